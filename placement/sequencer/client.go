package sequencer

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// ClientConfig says what a Client works with. Node, Group0, Server and Peers
// are required.
type ClientConfig struct {
	Node   string // this one's name
	Group0 Group0 // tells who leads
	Server *Server
	Peers  Peers
	// CallTimeout bounds one request to a leader that neither answers nor
	// disconnects, and is not replaced either; 2 s.
	CallTimeout time.Duration
	Logger      *slog.Logger
	Registerer  prometheus.Registerer
}

// Client asks the leader of group 0 for revisions, for all replicas and reads
// of this node. One request is under way at a time; what is wanted meanwhile
// gathers for the next one. All methods are safe for concurrent use.
type Client struct {
	cfg    ClientConfig
	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu      sync.Mutex
	waiting []*want // in order of arrival; those asked for too, until they are answered
	running bool
	closed  bool

	seconds prometheus.Histogram
}

// want is one call that waits for an answer.
type want struct {
	count func() int // nil: the latest revision is wanted, and none of its own
	asked int64      // how many were asked for in the request under way; -1: none
	done  chan got   // capacity 1
}

type got struct {
	first int64
	err   error
}

// NewClient returns a client. Close the replicas that use it first.
func NewClient(cfg ClientConfig) *Client {
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = 2 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{cfg: cfg}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.seconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "kvd_sequencer_request_seconds", Help: "Time of a request for revisions to the leader of group 0.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 2, 17),
	})
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(c.seconds)
	}
	return c
}

// Close ends all calls with ErrClosed. Idempotent.
func (c *Client) Close() {
	c.mu.Lock()
	closed := c.closed
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.tasks.Wait()
	if !closed && c.cfg.Registerer != nil {
		c.cfg.Registerer.Unregister(c.seconds)
	}
}

// Latest returns the last revision that had been handed out at some moment
// during the call: no write that was acknowledged before the call is above it,
// and every write that begins after it is. It waits for a leader of group 0
// until ctx ends.
func (c *Client) Latest(ctx context.Context) (int64, error) {
	first, err := c.want(ctx, nil)
	if err != nil {
		return 0, err
	}
	return first - 1, nil
}

// Reserve implements shard.Sequencer.
func (c *Client) Reserve(ctx context.Context, count func() int) (first int64, err error) {
	return c.want(ctx, count)
}

func (c *Client) want(ctx context.Context, count func() int) (int64, error) {
	w := &want{count: count, asked: -1, done: make(chan got, 1)}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return 0, ErrClosed
	}
	c.waiting = append(c.waiting, w)
	if !c.running {
		c.running = true
		c.tasks.Go(c.run)
	}
	c.mu.Unlock()
	select {
	case g := <-w.done:
		return g.first, g.err
	case <-ctx.Done():
	}
	// From here on count is not called any more.
	c.mu.Lock()
	c.waiting = slices.DeleteFunc(c.waiting, func(x *want) bool { return x == w })
	c.mu.Unlock()
	return 0, ctx.Err()
}

// Between two requests after one that failed, unless the leader changes.
const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 250 * time.Millisecond
)

// run asks until nobody waits.
func (c *Client) run() {
	for attempt := 0; c.goOn(); {
		changed := c.cfg.Group0.LeaderChanged() // before looking who leads
		err := errNoLeader
		if leader := c.cfg.Group0.Leader(); leader.Node != "" {
			n, ok := c.gather()
			if !ok {
				continue
			}
			var first int64
			if first, err = c.request(leader.Node, n); err == nil {
				c.answer(first)
				attempt = 0
				continue
			}
		}
		c.cfg.Logger.Debug("no revisions yet", "error", err)
		c.pause(changed, attempt)
		attempt++
	}
}

var errNoLeader = errors.New("sequencer: no leader of group 0 is known")

// goOn reports whether anybody waits. When the client closes, nobody does.
func (c *Client) goOn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		for _, w := range c.waiting {
			w.done <- got{err: ErrClosed}
		}
		c.waiting = nil
	}
	c.running = len(c.waiting) > 0
	return c.running
}

// gather closes the next request: it says how many revisions to ask for, and
// whether to ask at all.
func (c *Client) gather() (n int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = slices.DeleteFunc(c.waiting, func(w *want) bool {
		if w.asked = 0; w.count != nil {
			w.asked = int64(w.count())
		}
		switch {
		case w.asked > maxReserve:
			w.done <- got{err: ErrTooMany}
			return true
		case w.count != nil && w.asked <= 0:
			w.done <- got{}
			return true
		case n+w.asked > maxReserve:
			w.asked = -1 // the next time
		default:
			n += w.asked
		}
		return false
	})
	return n, len(c.waiting) > 0
}

// answer shares out the revisions from first on among those for whom they were
// asked.
func (c *Client) answer(first int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := first
	c.waiting = slices.DeleteFunc(c.waiting, func(w *want) bool {
		switch {
		case w.asked < 0: // came later
			return false
		case w.count == nil:
			w.done <- got{first: first}
		default:
			w.done <- got{first: next}
			next += w.asked
		}
		return true
	})
}

// request asks the node that is thought to lead, once.
func (c *Client) request(node string, n int64) (first int64, err error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.cfg.CallTimeout)
	defer cancel()
	start := time.Now()
	if node == c.cfg.Node {
		first, err = c.cfg.Server.Take(ctx, n)
	} else {
		first, err = c.call(ctx, node, n)
	}
	if err == nil {
		c.seconds.Observe(time.Since(start).Seconds())
	}
	return first, err
}

func (c *Client) call(ctx context.Context, node string, n int64) (int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { c.cancelWhenMoved(ctx, cancel, node) })
	answer, err := c.cfg.Peers.Call(ctx, node, Method, appendRequest(n))
	if err != nil {
		return 0, err
	}
	return parseResponse(answer)
}

// cancelWhenMoved gives up on a leader as soon as it is known to be none.
func (c *Client) cancelWhenMoved(ctx context.Context, cancel context.CancelFunc, node string) {
	for {
		changed := c.cfg.Group0.LeaderChanged()
		if c.cfg.Group0.Leader().Node != node {
			cancel()
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (c *Client) pause(changed <-chan struct{}, attempt int) {
	timer := time.NewTimer(min(minBackoff<<min(attempt, 8), maxBackoff))
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-c.ctx.Done():
	}
}
