// Package transport carries everything that kvd nodes say to each other: the raft messages of all groups,
// snapshots, and forwarded requests.
//
// There is one connection per direction and node pair: it carries the requests of the node that dialed
// and the answers to them. Everything queued for a peer leaves in one write. Snapshots and Asks use
// connections of their own.
package transport

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config says how a Transport reaches its peers, and its bounds. Zero bounds take their defaults.
type Config struct {
	// Identity says who this node is. It is called at each handshake and must not block.
	Identity func() Peer
	// Listener accepts connections from peers. The Transport owns it from New on, also if New fails.
	Listener net.Listener
	// Dial connects to an address. It must respect ctx.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Resolve returns the current address of a node. It must not block.
	Resolve func(node string) (addr string, ok bool)
	// OnPeer is told every identity learned in a handshake that succeeded, in either direction. A peer
	// that came with an Ask may belong to another cluster or to none. May be nil; must not block.
	OnPeer     func(Peer)
	Logger     *slog.Logger          // nil = discard
	Registerer prometheus.Registerer // nil = metrics are not registered

	MaxMessageBytes    int           // longest message in either direction (128 MiB)
	MaxPartialBytes    int           // of long messages that peers have not sent to the end, in sum; a connection that exceeds it is closed (512 MiB)
	MaxAppendBytes     int           // of entries in one AppendEntries, which has at least one; more are left for the next (16 MiB)
	QueueBytes         int           // a peer's send queue takes no more messages beyond this (32 MiB)
	InboxBytes         int           // the same for a group's raft messages that wait for its main loop (32 MiB)
	MaxConcurrentCalls int           // handlers of calls running at a time; more are answered ErrBusy (4096)
	MaxCallBytes       int           // payload that these handlers have in sum; more is answered ErrBusy (256 MiB)
	MaxInbound         int           // connections accepted at a time; strangers make room for newcomers (512)
	PipelineWindow     int           // AppendEntries in flight in a pipeline (2)
	DialTimeout        time.Duration // to connect and shake hands (1 s)
	RetryMin, RetryMax time.Duration // pause after failed attempts, doubling (50 ms to 1 s)
	RPCTimeout         time.Duration // for raft messages (10 s)
	RepeatAfter        time.Duration // AppendEntries that tell a peer nothing are not sent more often (30 s)
	HeartbeatTimeout   time.Duration // for heartbeats (2 s)
	PingAfter          time.Duration // silence after which a ping is sent (1.5 s)
	SilenceTimeout     time.Duration // silence after which a connection is closed (5 s)
	AskTimeout         time.Duration // for an Ask whose context has no deadline (10 s)
	StreamTimeout      time.Duration // snapshot streams without progress fail after this (30 s)
	InstallTimeout     time.Duration // from the end of a snapshot's stream to its answer (10 min)
}

func (c *Config) setDefaults() {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.OnPeer == nil {
		c.OnPeer = func(Peer) {}
	}
	setDefault(&c.MaxMessageBytes, 128<<20)
	setDefault(&c.MaxPartialBytes, max(512<<20, c.MaxMessageBytes))
	setDefault(&c.MaxAppendBytes, min(16<<20, c.MaxMessageBytes))
	setDefault(&c.QueueBytes, 32<<20)
	setDefault(&c.InboxBytes, 32<<20)
	setDefault(&c.MaxConcurrentCalls, 4096)
	setDefault(&c.MaxCallBytes, max(256<<20, c.MaxMessageBytes))
	setDefault(&c.MaxInbound, 512)
	setDefault(&c.PipelineWindow, 2)
	setDefault(&c.DialTimeout, time.Second)
	setDefault(&c.RetryMin, 50*time.Millisecond)
	setDefault(&c.RetryMax, time.Second)
	setDefault(&c.RPCTimeout, 10*time.Second)
	setDefault(&c.RepeatAfter, 30*time.Second)
	setDefault(&c.HeartbeatTimeout, 2*time.Second)
	setDefault(&c.PingAfter, 1500*time.Millisecond)
	setDefault(&c.SilenceTimeout, 5*time.Second)
	setDefault(&c.AskTimeout, 10*time.Second)
	setDefault(&c.StreamTimeout, 30*time.Second)
	setDefault(&c.InstallTimeout, 10*time.Minute)
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Validate reports what is missing or contradictory. It does not change c.
func (c *Config) Validate() error {
	d := *c
	d.setDefaults()
	var errs []error
	need := func(ok bool, text string) {
		if !ok {
			errs = append(errs, errors.New("transport: "+text))
		}
	}
	need(d.Identity != nil && d.Listener != nil && d.Dial != nil && d.Resolve != nil,
		"Identity, Listener, Dial and Resolve are needed")
	for _, v := range []int{d.MaxMessageBytes, d.MaxAppendBytes, d.QueueBytes, d.InboxBytes, d.MaxConcurrentCalls, d.MaxCallBytes, d.MaxInbound, d.PipelineWindow} {
		need(v > 0, "bounds must be positive")
	}
	for _, v := range []time.Duration{d.DialTimeout, d.RetryMin, d.RPCTimeout, d.RepeatAfter, d.HeartbeatTimeout, d.PingAfter,
		d.SilenceTimeout, d.AskTimeout, d.StreamTimeout, d.InstallTimeout} {
		need(v > 0, "timeouts must be positive")
	}
	need(d.RetryMax >= d.RetryMin, "RetryMax must not be below RetryMin")
	need(d.SilenceTimeout > d.PingAfter, "SilenceTimeout must be above PingAfter")
	need(d.MaxAppendBytes <= d.MaxMessageBytes, "MaxAppendBytes must not be above MaxMessageBytes")
	need(d.MaxPartialBytes >= d.MaxMessageBytes, "MaxPartialBytes must not be below MaxMessageBytes")
	need(d.MaxMessageBytes >= 1<<12, "MaxMessageBytes must be at least 4 KiB")
	return errors.Join(errs...)
}

// Handler answers a request. The payload is its own to keep. ctx ends when the caller gives up, when its
// deadline passes, and when the connection breaks. A *RemoteError travels with its code.
type Handler = func(ctx context.Context, from Peer, payload []byte) ([]byte, error)

// Transport connects this node with its peers. All its methods may be called concurrently.
type Transport struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	faults  faults
	running atomic.Int64 // call handlers
	payload atomic.Int64 // bytes that they were given
	partial budget       // of all accepted connections
	door    door
	pending sync.Pool // of *pending; not shared between transports, as its channels belong to a bubble

	mu       sync.RWMutex
	closed   bool
	tasks    sync.WaitGroup // every goroutine of the Transport but those of its Groups
	links    map[string]*link
	conns    map[*conn]struct{}
	calls    map[string]Handler
	asks     map[string]Handler
	groups   map[replicaKey]*Group
	installs map[replicaKey]struct{} // snapshots being received
}

// faults are planted by tests, to show that the tests for what they break notice them.
type faults struct {
	lostIsUnreachable bool // every request on a broken connection counts as not delivered
	ackedAtAnswer     bool // Acked takes the time of the answer
	answersForOthers  bool // what was sent early answers for whatever is sent later
	silenceIsDeath    bool // a node counts as dead that does not answer
}

// New starts a Transport: it accepts connections at once, and dials when there is something to send.
func New(cfg Config) (*Transport, error) {
	t, err := newTransport(cfg)
	if err != nil {
		if cfg.Listener != nil {
			err = errors.Join(err, cfg.Listener.Close())
		}
		return nil, err
	}
	t.spawn(t.accept)
	return t, nil
}

func newTransport(cfg Config) (*Transport, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	self := cfg.Identity()
	if err := self.validate(); err != nil {
		return nil, fmt.Errorf("transport: identity: %w", err)
	}
	t := &Transport{cfg: cfg, log: cfg.Logger, links: map[string]*link{}, conns: map[*conn]struct{}{},
		calls: map[string]Handler{}, asks: map[string]Handler{},
		groups: map[replicaKey]*Group{}, installs: map[replicaKey]struct{}{}}
	t.pending.New = func() any { return &pending{answer: make(chan answer, 1)} }
	t.door.max = cfg.MaxInbound
	t.partial.max = int64(cfg.MaxPartialBytes)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	var err error
	if t.metrics, err = newMetrics(t); err != nil {
		return nil, fmt.Errorf("transport: metrics: %w", err)
	}
	return t, nil
}

// Close ends all connections and groups and waits for every goroutine and handler, which must therefore
// not call it. Requests under way fail with ErrUnreachable or ErrConnectionLost.
func (t *Transport) Close() error {
	t.mu.Lock()
	first := !t.closed
	t.closed = true
	var conns []*conn
	for c := range t.conns {
		conns = append(conns, c)
	}
	var groups []*Group
	for _, g := range t.groups {
		groups = append(groups, g)
	}
	t.mu.Unlock()
	if first {
		t.cancel()
		_ = t.cfg.Listener.Close()
		for _, g := range groups {
			_ = g.Close()
		}
		for _, c := range conns {
			c.fail(ErrClosed)
		}
	}
	t.tasks.Wait()
	if first {
		t.metrics.unregister()
	}
	return nil
}

// spawn runs f in a goroutine that Close waits for. After Close it does nothing and returns false.
func (t *Transport) spawn(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.tasks.Go(f)
	return true
}

// accept takes in connections until Close.
func (t *Transport) accept() {
	pause := time.Duration(0)
	for {
		nc, err := t.cfg.Listener.Accept()
		if err == nil {
			pause = 0
			t.admit(nc)
			continue
		}
		if t.ctx.Err() != nil {
			return
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		t.log.Error("accept a peer's connection", "error", err, "retry_in", pause)
		select {
		case <-time.After(pause):
		case <-t.ctx.Done():
			return
		}
	}
}

// serve shakes hands on an accepted connection and serves it until it ends.
func (t *Transport) serve(v *visitor) {
	nc := v.conn
	w := newWire(nc, t.cfg.MaxMessageBytes)
	w.frames.budget = &t.partial
	defer w.frames.drop()
	ctx, cancel := context.WithTimeout(t.ctx, 2*t.cfg.DialTimeout)
	stop := interruptible(ctx, nc)
	h, err := t.welcome(w)
	err = errors.Join(err, stop())
	cancel()
	if err != nil {
		if t.ctx.Err() == nil {
			t.metrics.refused.Inc()
			t.log.Warn("handshake of an incoming peer connection failed", "remote", nc.RemoteAddr(), "node", h.from.Node, "error", err)
		}
		return
	}
	if _, ok := t.cfg.Resolve(h.from.Node); ok && h.purpose != purposeAsk {
		t.sendAway(t.door.known(v, h.from.Node, h.purpose))
	}
	w.traffic = t.metrics.traffic(h.from.Node)
	t.cfg.OnPeer(h.from)
	switch h.purpose {
	case purposeStream:
		w.frames.limit = 2 * fragmentBytes
		t.receiveSnapshot(w, h.from)
	case purposeAsk:
		w.frames.limit = min(t.cfg.MaxMessageBytes, maxAskBytes)
		t.run(newConn(t, w, h, false))
	default:
		t.run(newConn(t, w, h, false))
		t.suspect(h.from.Node)
	}
}

// run serves a connection until it ends.
func (t *Transport) run(c *conn) {
	if !t.attach(c) {
		return
	}
	if c.purpose == purposePeer {
		t.revive(c.peer.Node) // it is heard from here on
	}
	c.readLoop()
	t.detach(c)
}

// attach makes c known and starts its writer. It fails after Close.
func (t *Transport) attach(c *conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		c.fail(ErrClosed)
		return false
	}
	t.conns[c] = struct{}{}
	t.tasks.Go(c.writeLoop)
	return true
}

func (t *Transport) detach(c *conn) {
	t.mu.Lock()
	delete(t.conns, c)
	t.mu.Unlock()
}

// Handle sets the handler of a Call method.
func (t *Transport) Handle(method string, h Handler) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls[method] = h
}

// HandleAsk sets the handler of an Ask method.
func (t *Transport) HandleAsk(method string, h Handler) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.asks[method] = h
}

// handler looks up without allocating.
func (t *Transport) handler(why purpose, method []byte) Handler {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if why == purposeAsk {
		return t.asks[string(method)]
	}
	return t.calls[string(method)]
}
