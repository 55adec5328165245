package server

import (
	"cmp"
	"context"
	"sync"
	"time"

	"kvd/fsm"
	"kvd/server/lessor"
	"kvd/shard"
)

// reign is this node's leadership of a group in one term, as far as leases go: it has the time of all leases whose home
// the group is, and ends those whose time is over. What it proposes carries the term, so that nothing of it is done when
// another one leads, whenever it is proposed (docs/design.md section 7).
type reign struct {
	router  *router
	group   uint64
	replica Replica
	ctx     context.Context // of this reign
	end     context.CancelFunc
	begun   chan struct{} // closed when term is set and the leases' time runs
	over    chan struct{} // closed when nothing of it runs any more
	wake    chan struct{} // capacity 1
	slots   chan struct{} // one per revocation under way
	tasks   sync.WaitGroup

	term uint64
	err  error // why it has not begun; set before over is closed

	mu       sync.Mutex
	lessor   *lessor.Lessor
	since    uint64 // what has been seen of the table's changes
	endings  map[int64]*ending
	pointing chan struct{} // closed when the checkpoint under way is in the log, or never will be; nil = none
	closed   bool          // no more tasks
}

const (
	maxRevocations = 256                    // of one reign under way
	maxCheckpoints = 1000                   // leases in one checkpoint
	leaseGrace     = 200 * time.Millisecond // see lessor.Config
	leaseRetry     = time.Second            // after a revocation that has failed
	reignRest      = 5 * time.Millisecond   // between two looks at the table
)

func newReign(r *router, group uint64, replica Replica) *reign {
	g := &reign{
		router: r, group: group, replica: replica,
		begun: make(chan struct{}), over: make(chan struct{}), wake: make(chan struct{}, 1),
		slots:   make(chan struct{}, maxRevocations),
		endings: make(map[int64]*ending),
		lessor: lessor.New(lessor.Config{
			Now: r.now, Grace: leaseGrace, CheckpointInterval: r.cfg.LeaseCheckpointInterval, RetryInterval: leaseRetry,
		}),
	}
	g.ctx, g.end = context.WithCancel(r.ctx)
	return g
}

// run is the reign, from its beginning to its end.
func (g *reign) run() {
	defer close(g.over)
	defer g.end()
	if g.err = g.begin(); g.err != nil {
		return
	}
	close(g.begun)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		changed := g.replica.LeaderChanged() // before looking who leads
		if !g.lasts() {
			break
		}
		notify, err := g.look()
		if err != nil {
			notify = nil
		}
		g.expire()
		g.checkpoint()
		timer.Reset(g.pause(err))
		select {
		case <-notify:
		case <-changed:
		case <-g.wake:
		case <-timer.C:
		case <-g.ctx.Done():
		}
		timer.Reset(reignRest) // so that many changes are seen together
		select {
		case <-timer.C:
		case <-g.ctx.Done():
		}
	}
	g.end()
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.tasks.Wait()
}

// begin waits until everything is applied that leaders before have acknowledged.
func (g *reign) begin() error {
	index, term, err := g.replica.Confirm(g.ctx)
	if err != nil {
		return err
	}
	g.term = term
	state, release, err := g.replica.AcquireState(g.ctx, index)
	if err != nil {
		return err
	}
	defer release()
	g.lookAtAll(state)
	return nil
}

// lasts reports whether this node still leads the group in the term, as far as it knows.
func (g *reign) lasts() bool {
	leader := g.replica.Leader()
	return g.ctx.Err() == nil && (leader.Self && leader.Term == g.term || g.router.cfg.faults.KeepReigns)
}

// pause is how long there is nothing to do unless the table changes.
func (g *reign) pause(err error) time.Duration {
	const failed, idle = 100 * time.Millisecond, time.Hour
	if err != nil {
		return failed
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.slots) == cap(g.slots) || g.pointing != nil {
		return idle // whatever ends wakes
	}
	at, ok := g.lessor.Next()
	if !ok {
		return idle
	}
	return min(max(at-g.router.now(), 0), idle)
}

// look tells the lessor of what has changed in the table. notify is closed when more has.
func (g *reign) look() (notify <-chan struct{}, err error) {
	state, release, err := g.replica.AcquireState(g.ctx, 0)
	if err != nil {
		return nil, err
	}
	defer release()
	notify = state.LeaseNotify()
	ids, next, all := state.LeaseChanges(g.since)
	if all {
		g.lookAtAll(state)
		return notify, nil
	}
	for len(ids) > 0 {
		some := ids[:min(len(ids), 1000)]
		ids = ids[len(some):]
		g.mu.Lock()
		for _, id := range some {
			g.sync(state, id)
		}
		g.mu.Unlock()
	}
	g.since = next
	return notify, nil
}

func (g *reign) lookAtAll(state *fsm.Store) {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, g.since, _ = state.LeaseChanges(0)
	known := make(map[int64]bool)
	for _, info := range state.Leases() {
		if info.Home {
			known[info.ID] = true
			g.lessor.Set(leaseOf(info))
		}
	}
	g.lessor.Keep(func(id int64) bool { return known[id] })
}

// sync tells the lessor what the table has of a lease. g.mu is held, so that the lessor never goes back to what the table
// had before.
func (g *reign) sync(state *fsm.Store, id int64) fsm.LeaseInfo {
	info, ok := state.Lease(id)
	if !ok || !info.Home {
		g.lessor.Remove(id)
		return fsm.LeaseInfo{}
	}
	g.lessor.Set(leaseOf(info))
	return info
}

func leaseOf(info fsm.LeaseInfo) lessor.Lease {
	return lessor.Lease{ID: info.ID, Incarnation: info.Incarnation, TTL: info.TTL, Remaining: info.Remaining, Ending: info.Ending}
}

// kick makes the reign look again.
func (g *reign) kick() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// task runs f unless the reign is over. g.mu is held.
func (g *reign) task(f func()) bool {
	if !g.closed {
		g.tasks.Go(f)
	}
	return !g.closed
}

// guard is the term that what the reign proposes is for.
func (g *reign) guard() uint64 {
	if g.router.cfg.faults.KeepReigns {
		return 0
	}
	return g.term
}

// leases has the reigns of this node.
type leases struct {
	router *router

	mu     sync.Mutex
	reigns map[uint64]*reign // by group
}

// reignInterval is how often the node looks which groups it leads. Whoever asks for a lease need not wait for it.
const reignInterval = 500 * time.Millisecond

// run begins reigns until the router closes.
func (l *leases) run() {
	ticker := time.NewTicker(reignInterval)
	defer ticker.Stop()
	for {
		for _, group := range l.router.cfg.Groups.All() {
			if replica := l.router.ofKeys(group); replica != nil && replica.Leader().Self {
				l.reign(group, replica)
			}
		}
		l.endOld()
		select {
		case <-ticker.C:
		case <-l.router.ctx.Done():
			return
		}
	}
}

// endOld ends the reigns of replicas that have stopped without a word.
func (l *leases) endOld() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for group, g := range l.reigns {
		switch {
		case isClosed(g.over):
			delete(l.reigns, group)
		case isClosed(g.begun) && !g.lasts():
			g.end()
		}
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// reign is the latest one of a group; it may not have begun. nil if the router is closed.
func (l *leases) reign(group uint64, replica Replica) *reign {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g := l.reigns[group]; g != nil && !isClosed(g.over) {
		return g
	}
	g := newReign(l.router, group, replica)
	if !l.router.spawn(g.run) {
		g.end()
		return nil
	}
	if l.reigns == nil {
		l.reigns = make(map[uint64]*reign)
	}
	l.reigns[group] = g
	return g
}

// of waits for this node's reign over a group in a term, in which it was confirmed to lead.
func (l *leases) of(ctx context.Context, group uint64, replica Replica, term uint64) (*reign, error) {
	for {
		g := l.reign(group, replica)
		if g == nil {
			return nil, shard.ErrClosed
		}
		select {
		case <-g.begun:
		case <-g.over:
			return nil, cmp.Or(g.err, shard.ErrNotLeader)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		switch {
		case g.term == term || l.router.cfg.faults.KeepReigns:
			return g, nil
		case g.term > term:
			return nil, shard.ErrNotLeader
		}
		g.end()
		select {
		case <-g.over:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
