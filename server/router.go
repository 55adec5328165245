package server

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/server/h2"
	"kvd/shard"
)

// router takes requests to the leader of their group. It waits through
// elections and tries again whatever is certainly not in the log, until the
// request's deadline; it never tries again what might be.
type router struct {
	cfg       *Config
	metrics   *metrics
	sharded   bool
	pending   atomic.Int64 // bytes of writes under way
	answers   answers
	leaders   leaders
	quiet     silences[string] // nodes that do not answer
	behind    silences[uint64] // groups whose replica here lags, or knows no leader
	sizes     pageSizes
	cuts      cuts
	leases    leases
	gating    atomic.Int64 // groups whose gates other nodes wait for
	polls     atomic.Int64 // questions for watches that other nodes wait for
	following atomic.Int64 // streams of watches on this node
	least     int          // leastShare
	resolver  resolver
	asides    asides
	fetches   chan struct{} // one per request that reads several groups at a time
	hashing   chan struct{} // one per digest computed for another node

	started time.Time
	leaving chan struct{}   // closed when streams that would go on for ever have to end
	ctx     context.Context // ends when the router closes
	cancel  context.CancelFunc
	rounds  sync.WaitGroup

	mu     sync.Mutex
	reads  map[uint64]*rounds // by group
	closed bool
}

// Between two attempts of a request whose leader is unknown or unreachable.
const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 250 * time.Millisecond
)

var (
	errNoReplica   = errors.New("server: this node has no replica of the group")
	errNoLeader    = errors.New("server: no leader is known")
	errNoSpace     = errors.New("server: the leader's disk is nearly full")
	errNotReached  = errors.New("server: the leader was not reached")
	errLeaderMoved = errors.New("server: the leadership moved on")
	errBadAnswer   = errors.New("server: malformed answer from a peer")
)

func newRouter(cfg *Config, m *metrics) *router {
	r := &router{cfg: cfg, metrics: m, sizes: defaultPageSizes, sharded: cfg.Groups.Sharded(), reads: make(map[uint64]*rounds), answers: answers{max: cfg.MaxAnswerBytes}}
	r.cuts.router, r.leases.router, r.started = r, r, time.Now()
	r.resolver.router = r
	r.least = leastShare
	r.asides.init(cfg)
	r.fetches = make(chan struct{}, maxMerges)
	r.hashing = make(chan struct{}, max(cfg.MaxHashes, 1))
	r.leaving = make(chan struct{})
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// close ends what waits here, and the read rounds.
func (r *router) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.rounds.Wait()
}

// now is a monotonic clock.
func (r *router) now() time.Duration { return time.Since(r.started) }

// write is a request on its way into the log.
type write struct {
	group   uint64
	request fsm.Request
	grows   bool                 // refused when the leader's disk is nearly full
	answer  func() proto.Message // an empty response of the right type
}

// propose replicates a write and returns the state machine's response. Errors
// are gRPC statuses.
func (r *router) propose(ctx context.Context, w *write) (proto.Message, error) {
	size := int64(len(w.request.Data))
	if size > int64(r.cfg.MaxRequestBytes) {
		return nil, rpctypes.ErrGRPCRequestTooLarge
	}
	if r.pending.Add(size) > r.cfg.MaxPendingBytes {
		r.pending.Add(-size)
		r.metrics.shed.Inc()
		return nil, rpctypes.ErrGRPCRequestTooManyRequests
	}
	defer r.pending.Add(-size)

	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	for a := (attempts{router: r}); ; {
		to := r.target(w.group, &a)
		if to.replica == nil && !r.sharded {
			return nil, notJoined()
		}
		result, err := r.proposeOnce(ctx, to, w)
		if err == nil && result.Err == nil {
			return result.Response, nil
		}
		if err == nil {
			return nil, refusal(result.Err)
		}
		if !r.mayRetry(err) || !a.again(ctx, to.changed, err) {
			return nil, r.writeStatus(ctx, err)
		}
	}
}

// proposeOnce makes one attempt on whoever is thought to lead. Its errors are
// those of shard.Replica.Propose, wherever it was called.
func (r *router) proposeOnce(ctx context.Context, to target, w *write) (fsm.Result, error) {
	switch {
	case to.here:
		return r.proposeHere(ctx, to.replica, w.request, w.grows)
	case to.node == "":
		return fsm.Result{}, errNoLeader
	}
	r.metrics.forwardedWrites.Inc()
	return r.proposeThere(ctx, to.node, w)
}

func (r *router) proposeHere(ctx context.Context, replica Replica, request fsm.Request, grows bool) (fsm.Result, error) {
	if grows && r.cfg.NoSpace() {
		return fsm.Result{}, errNoSpace
	}
	return replica.Propose(ctx, request)
}

// mayRetry reports whether err proves that the request is not in the log and
// another attempt may fare better.
func (r *router) mayRetry(err error) bool {
	switch {
	case errors.Is(err, shard.ErrUnknownOutcome):
		return r.cfg.faults.retryUnknown
	case errors.Is(err, shard.ErrNotLeader), errors.Is(err, shard.ErrNotProposed),
		errors.Is(err, errNoLeader), errors.Is(err, errNotReached), errors.Is(err, errMalformed):
		return true
	}
	return false
}

// writeStatus is what a client is told when err ends its write.
func (r *router) writeStatus(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, shard.ErrOverloaded):
		r.metrics.shed.Inc()
		return rpctypes.ErrGRPCRequestTooManyRequests
	case errors.Is(err, shard.ErrTooLarge):
		return rpctypes.ErrGRPCRequestTooLarge
	case errors.Is(err, errNoSpace):
		return rpctypes.ErrGRPCNoSpace
	}
	definite := r.mayRetry(err)
	if !definite {
		r.metrics.unknown.Inc()
		r.cfg.Logger.Debug("outcome of a write is unknown", "error", err)
	}
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return rpctypes.ErrGRPCCanceled
	case definite && r.ctx.Err() != nil:
		return rpctypes.ErrGRPCStopped
	case definite:
		return rpctypes.ErrGRPCTimeout
	default:
		return rpctypes.ErrGRPCTimeoutDueToLeaderFail
	}
}

// acquire pins a state of the group on this node: one that is linearizable for
// a read that began before the call, or, if serializable, whatever is there.
// Errors are gRPC statuses.
func (r *router) acquire(ctx context.Context, group uint64, serializable bool) (*fsm.Store, func(), error) {
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	var index uint64
	if serializable {
		r.metrics.serializable.Inc()
	} else {
		var err error
		if index, err = r.readIndex(ctx, group); err != nil {
			return nil, nil, err
		}
	}
	replica := r.cfg.Replica(group)
	if replica == nil {
		return nil, nil, notJoined()
	}
	state, release, err := replica.AcquireState(ctx, index)
	if err != nil {
		return nil, nil, r.readStatus(ctx, err)
	}
	return state, release, nil
}

// pinHere is acquire for a read that another node can answer too, if this one
// cannot do so soon.
func (r *router) pinHere(ctx context.Context, group uint64, serializable bool) (*fsm.Store, func(), error) {
	to := r.target(group, &attempts{})
	if to.replica == nil || !serializable && !to.here && r.behind.isSilent(group) {
		return nil, nil, errNoReplica
	}
	soon, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	state, release, err := r.pinOf(soon, group, to, serializable)
	if ctx.Err() == nil && !serializable {
		r.behind.answered(group, err == nil)
	}
	return state, release, err
}

func (r *router) pinOf(ctx context.Context, group uint64, to target, serializable bool) (*fsm.Store, func(), error) {
	var index uint64
	var err error
	switch {
	case serializable:
		r.metrics.serializable.Inc()
	case to.here:
		index, err = to.replica.ReadIndex(ctx)
	default:
		index, err = r.roundsOf(group).join(ctx)
	}
	if err != nil {
		return nil, nil, err
	}
	return to.replica.AcquireState(ctx, index)
}

// readIndex returns an index that covers every write acknowledged before the
// call. Reads change nothing, so every failure is tried again.
func (r *router) readIndex(ctx context.Context, group uint64) (uint64, error) {
	for a := (attempts{router: r}); ; {
		to := r.target(group, &a)
		if to.replica == nil {
			return 0, notJoined()
		}
		var index uint64
		err := errNoLeader
		switch {
		case to.here:
			index, err = to.replica.ReadIndex(ctx) // gathers its own rounds
		case to.node != "":
			index, err = r.roundsOf(group).join(ctx)
		}
		if err == nil {
			return index, nil
		}
		if errors.Is(err, shard.ErrClosed) || !a.again(ctx, to.changed, err) {
			return 0, r.readStatus(ctx, err)
		}
	}
}

func (r *router) readStatus(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return rpctypes.ErrGRPCCanceled
	case errors.Is(err, shard.ErrClosed) || r.ctx.Err() != nil:
		return rpctypes.ErrGRPCStopped
	default:
		return rpctypes.ErrGRPCTimeout
	}
}

// withDeadline gives a request without a deadline the default one.
func (r *router) withDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if call, ok := ctx.(*h2.Call); ok && call.Limit(r.cfg.RequestTimeout) { // without a timer and a context of its own
		return ctx, call.Unlimit
	}
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, r.cfg.RequestTimeout)
}

// wait returns true when it is time for another attempt, false when ctx is
// done or the router closed.
func (r *router) wait(ctx context.Context, changed <-chan struct{}, attempt int) bool {
	timer := time.NewTimer(min(minBackoff<<min(attempt, 8), maxBackoff))
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
	case <-r.ctx.Done():
	}
	return ctx.Err() == nil && r.ctx.Err() == nil
}
