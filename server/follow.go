package server

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"

	"kvd/fsm"
)

// watches follows keys for one client's stream, wherever their groups are. All
// methods are safe for concurrent use.
//
// Each group that has keys of a watch is followed by one goroutine for all
// watches of the stream: from the feed of this node's state, or by polling a
// node that has one. What is of one group is delivered as it comes. A watch of
// several groups keeps what comes until no group can still have something
// earlier (docs/design.md section 6), and is delivered by one goroutine more.
type watches struct {
	router  *router
	ctx     context.Context
	cancelf context.CancelFunc
	forget  func() bool // that the router's end ends ctx
	deliver func(watchDelivery) error
	turn    chan struct{} // capacity 1: full while deliver runs
	merges  chan struct{} // capacity 1: a merged watch may have something to deliver
	asks    chan struct{} // capacity 1: a merged watch has events that are not resolved
	tasks   sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	byID     map[int64]*followed
	groups   map[uint64]*groupFollower
	merged   map[int64]*followed // by number
	holding  map[int64]*followed // merged, and something waits, or the end
	merging  bool
	number   int64         // of the last watch; ids may be used again
	newest   int64         // revision that was handed out
	asked    time.Time     // when it was the newest
	keyBytes int           // of all watches
	sending  *followed     // deliver runs for it
	sent     chan struct{} // closed when it has returned; nil = nobody waits for that
	moved    chan struct{} // closed when more has been delivered; nil = nobody waits for that
}

// watchSpec is what one watch asks for.
type watchSpec struct {
	key, end []byte // as in a range
	from     int64  // the first revision that is wanted; 0 = from now on
	prevKV   bool   // events come with the key as it was before
}

// watchDelivery is a part of what one watch is to see, in order.
type watchDelivery struct {
	id        int64
	events    []*mvccpb.Event // whole revisions, ascending; shared, read-only; PrevKv set if asked for
	compacted int64           // > 0: the watch has ended, because what it needed was compacted up to here
	aside     *aside          // instead of events: what deliver reads itself, before it returns
	err       error           // a gRPC status: the watch has ended
}

// followed is one watch. watches.mu guards what changes.
type followed struct {
	id     int64
	number int64
	spec   watchSpec
	parts  []*part
	merged bool
	ended  bool
	ends   *watchDelivery // after what is before

	interrupt context.CancelFunc // of deliver, while it reads; may be nil
}

// part is one group's part of a watch. watches.mu guards it.
type part struct {
	of       *followed
	follower *groupFollower
	next     int64 // everything before it has been taken; and, of a watch of one group, delivered
	sight    int   // the follower's when it was given to the source
	given    bool  // the source has it
	aside    bool  // the transaction at next is too large to be kept

	waiting []*mvccpb.Event // merged: taken, and not delivered
	bytes   int             // of waiting
	paused  bool            // too much waits, or is aside, or the watch ends: the source must not have it
}

const (
	maxWatchKeyBytes = 16 << 20 // names of keys in all watches of a stream: they travel in one message
	takeBytes        = 256 << 10
	wholeBytes       = 2 << 20 // of a transaction for one watch; a larger one is set aside
	feedBytes        = 1 << 20
	eventBytes       = 2 * kvBytes // what an event takes beside its keys and values
)

// newWatches follows until ctx ends or close. deliver is called by one goroutine
// at a time and may block: then nothing more is taken from the groups. It may be
// called before the add of its watch has returned. An error of it ends
// everything.
func (r *router) newWatches(ctx context.Context, deliver func(watchDelivery) error) *watches {
	w := &watches{
		router: r, deliver: deliver, turn: make(chan struct{}, 1), merges: make(chan struct{}, 1), asks: make(chan struct{}, 1),
		byID: make(map[int64]*followed), groups: make(map[uint64]*groupFollower), merged: make(map[int64]*followed), holding: make(map[int64]*followed),
	}
	r.following.Add(1)
	w.ctx, w.cancelf = context.WithCancel(ctx)
	w.forget = context.AfterFunc(r.ctx, w.cancelf)
	return w
}

var (
	errDuplicateWatch = errors.New("server: the stream has a watch with that id")
	errWatchesClosed  = errors.New("server: the watches of the stream have been closed")
)

// add begins a watch. revision is for the answer's header: a watch from now on
// gets the events after it. That what is asked for has been compacted is told by
// a delivery. Errors are gRPC statuses.
func (w *watches) add(id int64, s watchSpec) (revision int64, err error) {
	groups, err := w.groupsOf(&s)
	if err != nil {
		return 0, err
	}
	if revision, err = w.now(&s, groups); err != nil {
		return 0, err
	}
	if s.from == 0 {
		s.from = revision + 1
	}
	if err := w.begin(id, s, groups); err != nil {
		return 0, refusal(err)
	}
	return revision, nil
}

func (w *watches) groupsOf(s *watchSpec) ([]uint64, error) {
	group, one, err := w.router.groupOfRange(s.key, s.end)
	if err != nil || !one {
		return w.router.cfg.Groups.All(), err
	}
	return []uint64{group}, nil
}

// now is the newest revision: of this node's state if it has all keys, else of
// all that were handed out. A watch that knows where it begins does not wait for
// whoever hands them out, and of many that begin soon after each other one asks.
func (w *watches) now(s *watchSpec, groups []uint64) (int64, error) {
	if !w.router.sharded {
		return w.router.localRevision(w.ctx, groups)
	}
	if s.from == 0 {
		return w.latest(w.ctx)
	}
	if known := w.knownRevision(); known >= s.from-1 {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(w.ctx, minAttempt)
	defer cancel()
	revision, err := w.latest(ctx)
	if err != nil && w.ctx.Err() == nil {
		return w.router.localRevision(w.ctx, w.router.cfg.Groups.All())
	}
	return revision, err
}

func (w *watches) latest(ctx context.Context) (int64, error) {
	revision, err := w.router.latest(ctx)
	if err == nil {
		w.mu.Lock()
		w.newest, w.asked = max(w.newest, revision), time.Now()
		w.mu.Unlock()
	}
	return revision, err
}

// knownRevision was the newest one less than a second ago; 0 = unknown.
func (w *watches) knownRevision() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if time.Since(w.asked) > time.Second {
		return 0
	}
	return w.newest
}

// localRevision is the newest one of this node's states of the groups.
func (r *router) localRevision(ctx context.Context, groups []uint64) (newest int64, err error) {
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	err = notJoined()
	for _, group := range groups {
		replica := r.cfg.Replica(group)
		if replica == nil {
			continue
		}
		state, release, failed := replica.AcquireState(ctx, 0)
		if failed != nil {
			err = r.readStatus(ctx, failed)
			continue
		}
		newest = max(newest, state.Revision(fsm.User))
		release()
	}
	if newest > 0 || r.sharded {
		err = nil
	}
	return newest, err
}

// begin makes the parts of a watch and has their groups followed.
func (w *watches) begin(id int64, s watchSpec, groups []uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch size := len(s.key) + len(s.end); {
	case w.closed || w.ctx.Err() != nil:
		return errWatchesClosed
	case w.byID[id] != nil:
		return errDuplicateWatch
	case w.keyBytes+size > maxWatchKeyBytes:
		return kvdError(codes.ResourceExhausted, ReasonBusy, "the names of the keys that this stream watches are too long in sum")
	default:
		w.keyBytes += size
	}
	w.number++
	f := &followed{id: id, number: w.number, spec: s, merged: len(groups) > 1}
	w.byID[id] = f
	if f.merged {
		w.startMerging()
		w.merged[f.number] = f
	}
	for _, group := range groups {
		g := w.follower(group)
		p := &part{of: f, follower: g, next: s.from}
		f.parts = append(f.parts, p)
		g.add(p)
	}
	return nil
}

// follower of a group, which is begun with its first watch. w.mu is held.
func (w *watches) follower(group uint64) *groupFollower {
	g := w.groups[group]
	if g == nil {
		g = &groupFollower{w: w, group: group, wake: make(chan struct{}, 1), parts: make(map[int64]*part)}
		w.groups[group] = g
		w.tasks.Go(g.run)
	}
	return g
}

// cancel ends a watch: when it returns, nothing of it is delivered any more. It
// must not be called by deliver.
func (w *watches) cancel(id int64) {
	w.mu.Lock()
	if f := w.byID[id]; f != nil {
		w.end(f)
	}
	var sent chan struct{}
	if w.sending != nil && w.sending.id == id { // it may have ended by itself, and that is being told
		if w.sent == nil {
			w.sent = make(chan struct{})
		}
		sent = w.sent
	}
	w.mu.Unlock()
	if sent != nil {
		<-sent
	}
}

// end forgets a watch. w.mu is held.
func (w *watches) end(f *followed) {
	if f.ended {
		return
	}
	f.ended = true
	delete(w.byID, f.id)
	delete(w.merged, f.number)
	delete(w.holding, f.number)
	w.keyBytes -= len(f.spec.key) + len(f.spec.end)
	for _, p := range f.parts {
		p.waiting = nil
		p.follower.remove(p)
	}
	if f.interrupt != nil {
		f.interrupt()
	}
	w.advanced()
}

// close ends all watches, and waits for deliver to return.
func (w *watches) close() {
	w.mu.Lock()
	if !w.closed {
		w.router.following.Add(-1)
	}
	w.closed = true
	w.mu.Unlock()
	w.forget()
	w.cancelf()
	w.tasks.Wait()
}

// send delivers something of a watch that has not ended. Whoever has begun to
// follow it for that watch calls it, and nobody else.
func (w *watches) send(f *followed, d watchDelivery) error {
	select {
	case w.turn <- struct{}{}:
	case <-w.ctx.Done():
		return w.ctx.Err()
	}
	defer func() { <-w.turn }()
	w.mu.Lock()
	if f.ended || w.ctx.Err() != nil {
		w.mu.Unlock()
		return w.ctx.Err()
	}
	if d.compacted > 0 || d.err != nil {
		w.end(f)
	}
	w.sending = f
	w.mu.Unlock()
	d.id = f.id
	err := w.deliver(d)
	w.mu.Lock()
	w.sending = nil
	if f.ended {
		w.advanced()
	}
	if w.sent != nil {
		close(w.sent)
		w.sent = nil
	}
	w.mu.Unlock()
	if err != nil {
		w.cancelf()
	}
	return err
}

// advanced wakes those that wait for something to be delivered. w.mu is held.
func (w *watches) advanced() {
	if w.moved != nil {
		close(w.moved)
		w.moved = nil
	}
}

// progress returns a revision up to which everything of ALL watches has been
// delivered: deliver has returned before this does. Errors are gRPC statuses.
func (w *watches) progress(ctx context.Context) (revision int64, err error) {
	ctx, cancel := w.router.withDeadline(ctx)
	defer cancel()
	defer context.AfterFunc(w.ctx, cancel)()
	revision, gates, err := w.complete(ctx)
	if err != nil {
		return 0, w.router.readStatus(ctx, err)
	}
	if w.router.cfg.faults.earlyProgress {
		return revision, nil
	}
	w.aim(revision, gates)
	for behind := (*followed)(nil); ; {
		w.mu.Lock()
		if behind = w.behind(behind, revision); behind == nil {
			w.mu.Unlock()
			return revision, nil
		}
		if w.moved == nil {
			w.moved = make(chan struct{})
		}
		moved := w.moved
		w.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return 0, w.router.readStatus(ctx, ctx.Err())
		}
	}
}

// leaderPatience is how long progress waits for a leader to say what has been
// written.
const leaderPatience = time.Second

// completeAlone is the newest revision of the one group. What a client was told
// of before it asked counts, as in etcd, where a node answers a write when it has
// it itself. Without a leader it is what this node has.
func (w *watches) completeAlone(ctx context.Context) (int64, map[uint64]gate, error) {
	soon, cancel := context.WithTimeout(ctx, leaderPatience)
	defer cancel()
	state, release, err := w.router.acquire(soon, userGroup, false)
	if err != nil {
		state, release, err = w.router.acquire(ctx, userGroup, true)
	}
	if err != nil {
		return 0, nil, err
	}
	defer release()
	return state.Revision(fsm.User), map[uint64]gate{userGroup: {group: userGroup}}, nil
}

// complete is the newest revision, and where the groups that are followed are
// complete at it.
func (w *watches) complete(ctx context.Context) (int64, map[uint64]gate, error) {
	if !w.router.sharded {
		return w.completeAlone(ctx)
	}
	revision, err := w.router.cfg.Revisions.Latest(ctx)
	if err != nil {
		return 0, nil, err
	}
	var groups []uint64
	w.mu.Lock()
	for group, g := range w.groups {
		if len(g.parts) > 0 {
			groups = append(groups, group)
		}
	}
	w.mu.Unlock()
	gates, err := w.router.resolver.resolve(ctx, revision, groups)
	return revision, gates, err
}

// aim has the groups followed up to where they are complete at a revision.
func (w *watches) aim(at int64, gates map[uint64]gate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for group, g := range gates {
		if f := w.groups[group]; f != nil {
			f.aim(goal{at: at, index: g.index, node: g.node})
		}
	}
}

// behind is a watch that has not got everything up to a revision; nil if there is none. It begins to look at the one
// that it found last, because there may be many. w.mu is held.
func (w *watches) behind(last *followed, revision int64) *followed {
	if w.sending != nil && w.sending.ended {
		return w.sending // that it has ended, and where, has not been told yet
	}
	if last != nil && !last.ended && last.delivered() < revision {
		return last
	}
	for _, f := range w.byID {
		if f.delivered() < revision {
			return f
		}
	}
	return nil
}

// delivered is up to where a watch has got everything: all that there is before
// what it begins with, which may be in the future. w.mu is held.
func (f *followed) delivered() int64 {
	all := int64(math.MaxInt64)
	for _, p := range f.parts {
		all = min(all, p.taken()-1)
		if len(p.waiting) > 0 {
			all = min(all, p.waiting[0].Kv.ModRevision-1)
		}
	}
	return all
}

// hasLeaders reports whether the groups of all watches have leaders, as far as it
// is known here. Without watches it is the one that new ones depend on.
func (w *watches) hasLeaders() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	r, idle := w.router, true
	for group, g := range w.groups {
		if len(g.parts) == 0 {
			continue
		}
		idle = false
		replica := r.cfg.Replica(group)
		if g.leaderless && replica == nil || replica != nil && replica.Leader().Node == "" {
			return false
		}
	}
	return !idle || r.hasLeader()
}

// progressOf is a revision up to which everything of one watch has been
// delivered, as far as it is known without asking.
func (w *watches) progressOf(id int64) (revision int64, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.byID[id]
	if f == nil {
		return 0, false
	}
	revision = f.delivered()
	if revision < f.spec.from { // nothing has happened yet that it could see
		for _, p := range f.parts {
			revision = min(revision, p.follower.passed)
		}
	}
	return revision, revision > 0
}
