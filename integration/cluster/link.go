package cluster

import (
	"net"
	"sync"
	"time"
)

// linkState is what a link does with connections.
type linkState uint8

const (
	linkUp     linkState = iota
	linkCut              // connections are reset, new ones refused
	linkFrozen           // nothing is delivered; what is under way arrives when the link is up again
)

// Link is the way from one node to the connections that another accepts: a TCP proxy. All methods may be
// called concurrently.
type Link struct {
	listener net.Listener
	target   func() string // the present address of the far end

	mu      sync.Mutex
	state   linkState
	rate    int           // bytes per second of each connection and direction; 0 = no bound
	changed chan struct{} // closed at the next change of state
	conns   map[net.Conn]struct{}
	closed  bool
	group   sync.WaitGroup
}

func newLink(target func() string) (*Link, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &Link{listener: listener, target: target, changed: make(chan struct{}), conns: make(map[net.Conn]struct{})}
	l.group.Go(l.accept)
	return l, nil
}

// Addr is where the near end connects to.
func (l *Link) Addr() string { return l.listener.Addr().String() }

// Cut resets the link's connections and refuses new ones.
func (l *Link) Cut() { l.set(linkCut) }

// Freeze stops delivery in both directions without closing anything, as a lossy network does.
func (l *Link) Freeze() { l.set(linkFrozen) }

// Slow bounds what each connection carries, in bytes per second and direction.
func (l *Link) Slow(bytesPerSecond int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rate = bytesPerSecond
}

// Heal undoes Cut, Freeze and Slow.
func (l *Link) Heal() {
	l.Slow(0)
	l.set(linkUp)
}

func (l *Link) set(state linkState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = state
	close(l.changed)
	l.changed = make(chan struct{})
	if state == linkCut {
		l.resetLocked()
	}
}

func (l *Link) resetLocked() {
	for conn := range l.conns {
		if tcp, ok := conn.(*net.TCPConn); ok {
			tcp.SetLinger(0) // a reset: what is buffered is lost
		}
		conn.Close()
	}
	clear(l.conns)
}

// Close ends the link and waits for its goroutines.
func (l *Link) Close() {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.changed)
		l.changed = make(chan struct{})
		l.listener.Close()
		l.resetLocked()
	}
	l.mu.Unlock()
	l.group.Wait()
}

func (l *Link) accept() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		if !l.track(near) {
			continue
		}
		l.group.Go(func() { l.serve(near) })
	}
}

// track adopts a connection, or resets it if the link does not carry any.
func (l *Link) track(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[conn] = struct{}{}
	if l.closed || l.state == linkCut {
		l.resetLocked()
		return false
	}
	return true
}

func (l *Link) drop(conns ...net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, conn := range conns {
		conn.Close()
		delete(l.conns, conn)
	}
}

func (l *Link) serve(near net.Conn) {
	defer l.drop(near)
	if !l.pass() {
		return
	}
	far, err := net.Dial("tcp", l.target())
	if err != nil || !l.track(far) {
		return
	}
	defer l.drop(far)
	var group sync.WaitGroup
	group.Go(func() { l.pump(near, far); l.drop(near, far) })
	group.Go(func() { l.pump(far, near); l.drop(near, far) })
	group.Wait()
}

func (l *Link) pump(from, to net.Conn) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer[:l.delay(0)])
		if n > 0 {
			if !l.pass() {
				return
			}
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
			l.delay(n)
		}
		if err != nil {
			return
		}
	}
}

// delay waits as long as n bytes take on a slow link, and returns how many to carry at once.
func (l *Link) delay(n int) int {
	l.mu.Lock()
	rate := l.rate
	l.mu.Unlock()
	if rate == 0 {
		return 64 << 10
	}
	time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
	return min(64<<10, rate/50+1)
}

// pass waits while the link is frozen, and reports whether it is up.
func (l *Link) pass() bool {
	for {
		l.mu.Lock()
		state, changed, closed := l.state, l.changed, l.closed
		l.mu.Unlock()
		if closed || state == linkCut {
			return false
		}
		if state == linkUp {
			return true
		}
		<-changed
	}
}
