package sequencer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// ServerConfig says what a Server works with. Group0 is required.
type ServerConfig struct {
	Group0 Group0
	// Window is how many revisions are made ready at a time. A change of the
	// leader skips what is left of them; 0 means 2^18.
	Window     int64
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Faults are planted by tests.
	Faults Faults
}

// Faults are bugs that tests plant, to prove that they are seen.
type Faults struct {
	// WithoutConfirmation hands out revisions without asking a quorum whether
	// this node still leads group 0.
	WithoutConfirmation bool
}

const defaultWindow = 1 << 18

// extendTimeout bounds one attempt to make a window ready, handleTimeout an
// answer to another node, which has given up by then.
const (
	extendTimeout = 5 * time.Second
	handleTimeout = 5 * time.Second
)

// Server hands out revisions while its node leads group 0. All methods are safe
// for concurrent use.
//
// Every revision is handed out once: the bound in group 0 moves from a to b in
// one transaction that compares it with a, and whoever did that owns what is in
// between. What is handed out is above everything that was handed out before
// the request came, on any node: the leadership is confirmed after that, and a
// leader uses what it has made ready in its own term.
type Server struct {
	cfg    ServerConfig
	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	term      uint64 // in which the window was made ready; 0: none
	last      int64  // handed out
	bound     int64  // the last of the window
	extending *extension

	handedOut prometheus.Counter
	windows   prometheus.Counter
}

// extension is an attempt to make a window ready.
type extension struct {
	done chan struct{} // closed when err is set
	err  error
}

// NewServer returns a server, which must be closed before group 0's replica.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Window == 0 {
		cfg.Window = defaultWindow
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.handedOut = counter(cfg.Registerer, "revisions_total", "Revisions that this node has handed out as the leader of group 0.")
	s.windows = counter(cfg.Registerer, "windows_total", "Times this node has committed how far revisions may be handed out.")
	return s
}

func counter(r prometheus.Registerer, name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kvd_sequencer_" + name, Help: help})
	if r != nil {
		r.MustRegister(c)
	}
	return c
}

// Close ends what goes on in the background and fails later calls. Idempotent.
func (s *Server) Close() {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.tasks.Wait()
	if !closed && s.cfg.Registerer != nil {
		s.cfg.Registerer.Unregister(s.handedOut)
		s.cfg.Registerer.Unregister(s.windows)
	}
}

// Handle answers the clients of other nodes.
func (s *Server) Handle(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	n, err := parseRequest(payload)
	if err != nil {
		return appendResponse(0, err), nil
	}
	ctx, cancel := context.WithTimeout(ctx, handleTimeout)
	defer cancel()
	first, err := s.Take(ctx, n)
	return appendResponse(first, err), nil
}

// Take hands out n revisions and returns the first of them, which is above all
// that were handed out before the call. The one before it was the latest at
// some moment during the call: a Take of none is how to learn it. ErrNotLeader
// sends the caller elsewhere; an error means that nothing was handed out.
func (s *Server) Take(ctx context.Context, n int64) (first int64, err error) {
	if n < 0 || n > maxReserve {
		return 0, ErrTooMany
	}
	index, term, err := s.confirm(ctx)
	if err != nil {
		return 0, err
	}
	for {
		s.mu.Lock()
		switch {
		case s.closed:
			s.mu.Unlock()
			return 0, ErrClosed
		case term < s.term: // this node has been elected again meanwhile
			s.mu.Unlock()
			return 0, ErrNotLeader
		case term == s.term && n <= s.bound-s.last:
			first = s.last + 1
			s.last += n
			s.handedOut.Add(float64(n))
			if s.bound-s.last < s.cfg.Window/2 {
				s.extend(index, term, 0)
			}
			s.mu.Unlock()
			return first, nil
		}
		ready := s.extend(index, term, n)
		s.mu.Unlock()
		select {
		case <-ready.done:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		if ready.err != nil {
			return 0, ready.err
		}
	}
}

func (s *Server) confirm(ctx context.Context) (index, term uint64, err error) {
	if s.cfg.Faults.WithoutConfirmation {
		leader := s.cfg.Group0.Leader()
		if !leader.Self {
			return 0, 0, ErrNotLeader
		}
		return 0, leader.Term, nil
	}
	index, term, err = s.cfg.Group0.Confirm(ctx)
	if errors.Is(err, shard.ErrNotLeader) {
		err = fmt.Errorf("%w: %w", ErrNotLeader, err)
	}
	return index, term, err
}

// extend makes a window ready that has n revisions at least, unless that is
// already going on. s.mu is held.
func (s *Server) extend(index, term uint64, n int64) *extension {
	if s.extending != nil {
		return s.extending
	}
	e := &extension{done: make(chan struct{})}
	s.extending = e
	old := int64(0)
	if term == s.term {
		old = s.bound
	}
	s.tasks.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, extendTimeout)
		defer cancel()
		from, to, err := s.move(ctx, index, old, max(s.cfg.Window, n))
		s.mu.Lock()
		defer s.mu.Unlock()
		s.extending = nil
		e.err = err
		switch {
		case err != nil:
			s.cfg.Logger.Info("no more revisions could be made ready", "error", err)
			if term == s.term && old == s.bound {
				s.term = 0 // whether the bound has moved is not known
			}
		case term == s.term && from == s.bound:
			s.bound = to
		case term > s.term:
			s.term, s.last, s.bound = term, from, to
		}
		close(e.done)
	})
	return e
}

// errMoved: somebody else has moved the bound.
var errMoved = errors.New("sequencer: the bound has been moved by another leader")

// move moves the bound up, from old or, if that is 0, from what the state has
// at index.
func (s *Server) move(ctx context.Context, index uint64, old, by int64) (from, to int64, err error) {
	from, exists := old, true
	if old == 0 {
		if from, exists, err = s.load(ctx, index); err != nil {
			return 0, 0, err
		}
	}
	if from > math.MaxInt64-by {
		return 0, 0, fmt.Errorf("sequencer: no revisions are left after %d", from)
	}
	to = from + by
	data, err := proto.Marshal(&pb.InternalRaftRequest{Txn: change(from, to, exists)})
	if err != nil {
		return 0, 0, fmt.Errorf("sequencer: encode: %w", err)
	}
	result, err := s.cfg.Group0.Propose(ctx, fsm.Request{Space: fsm.System, Data: data})
	switch {
	case errors.Is(err, shard.ErrNotLeader):
		return 0, 0, fmt.Errorf("%w: %w", ErrNotLeader, err)
	case err != nil:
		return 0, 0, err
	case result.Err != nil:
		return 0, 0, result.Err
	}
	if response, ok := result.Response.(*pb.TxnResponse); !ok || !response.Succeeded {
		return 0, 0, errMoved
	}
	s.windows.Inc()
	return from, to, nil
}

// change moves the bound if it is where it was seen.
func change(from, to int64, exists bool) *pb.TxnRequest {
	seen := &pb.Compare{
		Key: []byte(Key), Result: pb.Compare_EQUAL,
		Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: Encode(from)},
	}
	if !exists {
		seen.Target, seen.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{}
	}
	put := &pb.PutRequest{Key: []byte(Key), Value: Encode(to)}
	return &pb.TxnRequest{
		Compare: []*pb.Compare{seen},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put}}},
	}
}

// load reads the bound. A malformed one stays in the way: rather than that
// revisions are used twice, nothing is written.
func (s *Server) load(ctx context.Context, index uint64) (last int64, exists bool, err error) {
	state, release, err := s.cfg.Group0.AcquireState(ctx, index)
	if err != nil {
		return 0, false, err
	}
	defer release()
	answer, err := state.Range(ctx, fsm.System, &pb.RangeRequest{Key: []byte(Key)})
	if err != nil {
		return 0, false, err
	}
	if len(answer.Kvs) == 0 {
		return firstRevision, false, nil
	}
	last, err = decode(answer.Kvs[0].Value)
	return last, true, err
}
