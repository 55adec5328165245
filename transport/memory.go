package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// memoryWindow is what a memory connection holds per direction before writes wait, like a socket's buffers.
const memoryWindow = 1 << 20

// MemoryNetwork connects nodes within one process, for tests and simulation. Addresses are arbitrary
// names. Faults are set per directed link. It needs no goroutines and works in testing/synctest bubbles;
// it must be made in the bubble that uses it.
type MemoryNetwork struct {
	mu        sync.Mutex
	listeners map[string]*memoryListener
	links     map[memoryLink]*memoryFaults
	isolated  map[string]bool
	pipes     map[*memoryPipe]struct{}
	changed   chan struct{} // closed and replaced when a fault or a listener changes
}

type memoryLink struct{ from, to string }

type memoryFaults struct {
	cut     bool
	refused bool
	delay   time.Duration
}

// NewMemoryNetwork returns a network without nodes and faults.
func NewMemoryNetwork() *MemoryNetwork {
	return &MemoryNetwork{listeners: map[string]*memoryListener{}, links: map[memoryLink]*memoryFaults{},
		isolated: map[string]bool{}, pipes: map[*memoryPipe]struct{}{}, changed: make(chan struct{})}
}

// update changes faults or listeners and wakes everything that waits. It returns after the change is in effect.
func (n *MemoryNetwork) update(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	n.touch()
	for p := range n.pipes {
		p.touch()
	}
}

func (n *MemoryNetwork) touch() {
	close(n.changed)
	n.changed = make(chan struct{})
}

func (n *MemoryNetwork) link(from, to string) *memoryFaults {
	l := n.links[memoryLink{from, to}]
	if l == nil {
		l = &memoryFaults{}
		n.links[memoryLink{from, to}] = l
	}
	return l
}

func (n *MemoryNetwork) blocked(from, to string) bool {
	return from != to && (n.isolated[from] || n.isolated[to] || n.link(from, to).cut)
}

// Partition holds back everything from one node to another, until Heal. Connections stay open and lose
// nothing, as in TCP.
func (n *MemoryNetwork) Partition(from, to string) {
	n.update(func() { n.link(from, to).cut = true })
}

// Heal ends Partition for one directed link.
func (n *MemoryNetwork) Heal(from, to string) {
	n.update(func() { n.link(from, to).cut = false })
}

// Isolate partitions a node from all others in both directions, until Rejoin.
func (n *MemoryNetwork) Isolate(node string) {
	n.update(func() { n.isolated[node] = true })
}

// Rejoin ends Isolate.
func (n *MemoryNetwork) Rejoin(node string) {
	n.update(func() { delete(n.isolated, node) })
}

// HealAll ends all partitions, isolations, refusals and delays.
func (n *MemoryNetwork) HealAll() {
	n.update(func() {
		clear(n.isolated)
		clear(n.links)
	})
}

// Delay makes everything written from now on take d from one node to the other. Bytes stay in order.
func (n *MemoryNetwork) Delay(from, to string, d time.Duration) {
	n.update(func() { n.link(from, to).delay = d })
}

// Refuse makes dialing from one node to another fail at once, or work again.
func (n *MemoryNetwork) Refuse(from, to string, refuse bool) {
	n.update(func() { n.link(from, to).refused = refuse })
}

// Drop breaks all connections between two nodes; both ends see a reset.
func (n *MemoryNetwork) Drop(a, b string) {
	n.dropIf(func(l memoryLink) bool { return l == memoryLink{a, b} || l == memoryLink{b, a} })
}

// DropAll breaks all connections of a node, as when its process dies.
func (n *MemoryNetwork) DropAll(node string) {
	n.dropIf(func(l memoryLink) bool { return l.from == node || l.to == node })
}

func (n *MemoryNetwork) dropIf(match func(memoryLink) bool) {
	n.update(func() {
		for p := range n.pipes {
			if match(p.memoryLink) {
				p.err = syscall.ECONNRESET
				delete(n.pipes, p)
				p.touch()
			}
		}
	})
}

// Listen makes a node reachable under its name.
func (n *MemoryNetwork) Listen(name string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[name] != nil {
		return nil, &net.OpError{Op: "listen", Net: "memory", Addr: memoryAddr(name), Err: syscall.EADDRINUSE}
	}
	l := &memoryListener{n: n, name: name, queue: make(chan *memoryConn, 128), closed: make(chan struct{})}
	n.listeners[name] = l
	n.touch()
	return l, nil
}

// Dialer returns the dial function of a node.
func (n *MemoryNetwork) Dialer(from string) func(ctx context.Context, to string) (net.Conn, error) {
	return func(ctx context.Context, to string) (net.Conn, error) { return n.Dial(ctx, from, to) }
}

// Dial connects one node to another. Over a partition, in either direction, it waits; without a listener
// it is refused.
func (n *MemoryNetwork) Dial(ctx context.Context, from, to string) (net.Conn, error) {
	conn, err := n.dial(ctx, from, to)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "memory", Addr: memoryAddr(to), Err: err}
	}
	return conn, nil
}

func (n *MemoryNetwork) dial(ctx context.Context, from, to string) (net.Conn, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n.mu.Lock()
		changed := n.changed
		if !n.blocked(from, to) && !n.blocked(to, from) {
			delay := n.link(from, to).delay + n.link(to, from).delay
			conn, err := n.connect(from, to)
			n.mu.Unlock()
			if err == nil {
				err = sleep(ctx, delay)
			}
			if err != nil {
				return nil, errors.Join(err, closeConn(conn))
			}
			return conn, nil
		}
		n.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

func closeConn(c *memoryConn) error {
	if c == nil {
		return nil
	}
	return c.Close()
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// connect is called with n.mu held.
func (n *MemoryNetwork) connect(from, to string) (*memoryConn, error) {
	l := n.listeners[to]
	if l == nil || n.link(from, to).refused {
		return nil, syscall.ECONNREFUSED
	}
	there := newMemoryPipe(n, from, to)
	back := newMemoryPipe(n, to, from)
	select {
	case l.queue <- &memoryConn{in: there, out: back}:
	default:
		return nil, syscall.ECONNREFUSED
	}
	n.pipes[there], n.pipes[back] = struct{}{}, struct{}{}
	return &memoryConn{in: back, out: there}, nil
}

type memoryAddr string

func (memoryAddr) Network() string  { return "memory" }
func (a memoryAddr) String() string { return string(a) }

type memoryListener struct {
	n      *MemoryNetwork
	name   string
	queue  chan *memoryConn
	closed chan struct{}
	once   sync.Once
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memoryListener) Close() error {
	l.once.Do(func() {
		l.n.mu.Lock()
		delete(l.n.listeners, l.name)
		l.n.mu.Unlock()
		close(l.closed)
		for {
			select {
			case c := <-l.queue:
				_ = c.Close()
			default:
				return
			}
		}
	})
	return nil
}

func (l *memoryListener) Addr() net.Addr { return memoryAddr(l.name) }

// memoryPipe is one direction of a connection. The network's mutex guards it.
type memoryPipe struct {
	memoryLink
	n             *MemoryNetwork
	segments      []segment
	queued        int
	ended         bool // the writer has closed; what is queued can still be read
	endTime       time.Time
	closed        bool // the reader has closed
	err           error
	readDeadline  time.Time
	writeDeadline time.Time
	changed       chan struct{} // closed and replaced at every change
}

type segment struct {
	data []byte
	due  time.Time
}

func newMemoryPipe(n *MemoryNetwork, from, to string) *memoryPipe {
	return &memoryPipe{memoryLink: memoryLink{from, to}, n: n, changed: make(chan struct{})}
}

func (p *memoryPipe) touch() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// due returns when something written now arrives: never before what was written earlier.
func (p *memoryPipe) due() time.Time {
	t := time.Now().Add(p.n.link(p.from, p.to).delay)
	if k := len(p.segments); k > 0 && p.segments[k-1].due.After(t) {
		return p.segments[k-1].due
	}
	return t
}

// attempt is what a read or write comes to: done, or to be tried again at a change or at a time.
type attempt struct {
	n     int
	err   error
	done  bool
	again time.Time // zero = only at a change
}

func expired(deadline time.Time) bool { return !deadline.IsZero() && !time.Now().Before(deadline) }

// try repeats f, which is called with the mutex held, until it is done.
func (p *memoryPipe) try(f func() attempt) (int, error) {
	for {
		p.n.mu.Lock()
		a := f()
		changed := p.changed
		p.n.mu.Unlock()
		if a.done {
			return a.n, a.err
		}
		if a.again.IsZero() {
			<-changed
			continue
		}
		timer := time.NewTimer(time.Until(a.again))
		select {
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// earlier returns the earlier of two times, the zero time meaning never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func (p *memoryPipe) read(b []byte) attempt {
	switch {
	case p.err != nil:
		return attempt{err: p.err, done: true}
	case p.closed:
		return attempt{err: net.ErrClosed, done: true}
	case expired(p.readDeadline):
		return attempt{err: os.ErrDeadlineExceeded, done: true}
	case len(b) == 0:
		return attempt{done: true}
	case p.n.blocked(p.from, p.to):
		return attempt{again: p.readDeadline}
	}
	n := 0
	now := time.Now()
	for len(p.segments) > 0 && n < len(b) && !p.segments[0].due.After(now) {
		s := &p.segments[0]
		k := copy(b[n:], s.data)
		n, s.data = n+k, s.data[k:]
		if len(s.data) == 0 {
			p.segments = p.segments[1:]
		}
	}
	switch {
	case n > 0:
		p.queued -= n
		p.touch()
		return attempt{n: n, done: true}
	case len(p.segments) > 0:
		return attempt{again: earlier(p.readDeadline, p.segments[0].due)}
	case p.ended && !p.endTime.After(now):
		return attempt{err: io.EOF, done: true}
	case p.ended:
		return attempt{again: earlier(p.readDeadline, p.endTime)}
	}
	return attempt{again: p.readDeadline}
}

func (p *memoryPipe) write(b []byte) attempt {
	switch {
	case p.err != nil:
		return attempt{err: p.err, done: true}
	case p.ended:
		return attempt{err: net.ErrClosed, done: true}
	case expired(p.writeDeadline):
		return attempt{err: os.ErrDeadlineExceeded, done: true}
	case p.closed && !p.n.blocked(p.to, p.from):
		return attempt{err: syscall.EPIPE, done: true}
	case len(b) == 0:
		return attempt{done: true}
	case p.queued >= memoryWindow:
		return attempt{again: p.writeDeadline}
	}
	n := min(len(b), memoryWindow-p.queued)
	p.segments = append(p.segments, segment{append([]byte(nil), b[:n]...), p.due()})
	p.queued += n
	p.touch()
	return attempt{n: n, done: true}
}

// memoryConn is one end of a connection.
type memoryConn struct{ in, out *memoryPipe }

func (c *memoryConn) Read(b []byte) (int, error) {
	return c.in.try(func() attempt { return c.in.read(b) })
}

func (c *memoryConn) Write(b []byte) (int, error) {
	total := 0
	for {
		n, err := c.out.try(func() attempt { return c.out.write(b[total:]) })
		if total += n; err != nil || total == len(b) {
			return total, err
		}
	}
}

func (c *memoryConn) Close() error {
	n := c.in.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if !c.out.ended {
		c.out.ended, c.out.endTime = true, c.out.due()
	}
	c.in.closed = true
	for _, p := range []*memoryPipe{c.in, c.out} {
		p.touch()
		if p.ended && p.closed {
			delete(n.pipes, p)
		}
	}
	return nil
}

func (c *memoryConn) LocalAddr() net.Addr  { return memoryAddr(c.out.from) }
func (c *memoryConn) RemoteAddr() net.Addr { return memoryAddr(c.out.to) }

func (c *memoryConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *memoryConn) SetReadDeadline(t time.Time) error {
	c.in.n.mu.Lock()
	defer c.in.n.mu.Unlock()
	c.in.readDeadline = t
	c.in.touch()
	return nil
}

func (c *memoryConn) SetWriteDeadline(t time.Time) error {
	c.in.n.mu.Lock()
	defer c.in.n.mu.Unlock()
	c.out.writeDeadline = t
	c.out.touch()
	return nil
}

func (c *memoryConn) String() string { return fmt.Sprintf("%s->%s", c.out.from, c.out.to) }
