package server

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm"
)

// groupFollower follows one group for all watches of a stream that have keys in it.
// watches.mu guards what is below wake.
type groupFollower struct {
	w     *watches
	group uint64
	wake  chan struct{} // capacity 1: something below has changed

	parts   map[int64]*part // by number of their watch
	fresh   []*part         // the source does not have them yet
	gone    []int64         // the source need not have them any more
	goals   []goal          // ascending; the first may have been reached
	done    int64           // everything up to it has been taken of all parts
	waiting bool            // somebody waits for the state to reach a target
	lagged  bool            // it has not, in time

	leaderless bool // there is no leader, as far as those know who are polled

	// passed: everything up to it has been taken of all parts that the source had
	// when it was seen the last time. sights counts how often.
	passed int64
	sights int
}

// goal is an index up to which a group is complete at a revision.
type goal struct {
	at    int64
	index uint64
	node  string // that led the group; "" = this one, or unknown
}

// maxGoals: of more, the last one is replaced.
const maxGoals = 8

// batch is what has been taken from a group at once.
type batch struct {
	deliveries []fsm.Delivery // by number of the watch
	applied    uint64         // everything of the entries up to it has been taken, if live
	revision   int64          // and everything up to this revision
	live       bool
	leads      bool            // the replica that it is of does
	orphan     bool            // it knows no leader
	least      int64           // applied has no later revision; if not live
	next       map[int64]int64 // what merged watches go on from; if not live
}

// add gives the group one more part to follow. w.mu is held.
func (f *groupFollower) add(p *part) {
	f.parts[p.of.number] = p
	f.missing(p)
}

// remove ends one. w.mu is held.
func (f *groupFollower) remove(p *part) {
	if f.parts[p.of.number] != p {
		return
	}
	delete(f.parts, p.of.number)
	f.withdraw(p)
}

// withdraw takes a part from the source. w.mu is held.
func (f *groupFollower) withdraw(p *part) {
	p.next = p.taken()
	if p.given {
		p.given = false
		f.gone = append(f.gone, p.of.number)
		signalOnce(f.wake)
	}
}

// give notes that the source has a part from now on, and from where. w.mu is
// held.
func (f *groupFollower) give(p *part) (from int64) {
	p.next = p.taken()
	p.given, p.sight = true, f.sights
	return p.next
}

// taken is the first revision that has not been taken. w.mu is held.
func (p *part) taken() int64 {
	if p.given && p.follower.sights > p.sight {
		return max(p.next, p.follower.passed+1)
	}
	return p.next
}

// reset notes that there is another source, which has nothing yet, and may be
// behind the one before. w.mu is held.
func (f *groupFollower) reset() {
	f.fresh, f.gone = f.fresh[:0], nil
	for _, p := range f.parts {
		p.next = p.taken()
		p.given = false
		if !p.paused {
			f.fresh = append(f.fresh, p)
		}
	}
	f.passed, f.sights = 0, 0
}

// saw notes that everything of a live source has been taken. The last target
// that it has reached stays, for parts that are given to the next source.
// w.mu is held.
func (f *groupFollower) saw(b *batch) {
	f.sights++
	f.passed = max(f.passed, b.revision)
	for len(f.goals) > 0 && f.goals[0].index <= b.applied {
		f.passed = max(f.passed, f.goals[0].at)
		if len(f.goals) == 1 {
			break
		}
		if f.goals[1].index > b.applied {
			break
		}
		f.goals = f.goals[1:]
	}
	if len(f.fresh) == 0 {
		f.done = max(f.done, f.passed)
	}
	f.w.advanced()
}

// missing notes that a part needs something that the others may have. w.mu is
// held.
func (f *groupFollower) missing(p *part) {
	f.fresh = append(f.fresh, p)
	f.done = min(f.done, p.next-1)
	signalOnce(f.wake)
}

// aim has the group followed up to a target. w.mu is held.
func (f *groupFollower) aim(t goal) {
	defer signalOnce(f.wake)
	n := len(f.goals)
	switch {
	case !f.w.router.sharded: // it has only to look
	case n > 0 && f.goals[n-1].at >= t.at:
	case n == maxGoals:
		f.goals[n-1] = t
	default:
		f.goals = append(f.goals, t)
	}
}

// pending is the first target that has not been reached. w.mu is held.
func (f *groupFollower) pending() (goal, bool) {
	for _, t := range f.goals {
		if t.at > f.done {
			return t, true
		}
	}
	return goal{}, false
}

var (
	errBehind   = errors.New("server: the state of the group is behind")
	errNoSource = errors.New("server: the state of the group has gone")
)

// aloneInterval is how often it is looked whether this node's replica can still
// be expected to hear of everything.
const aloneInterval = 2 * time.Second

func (f *groupFollower) run() {
	a := attempts{router: f.w.router}
	for r := (relay{groupFollower: f}); f.w.ctx.Err() == nil; {
		var err error
		if replica := f.replica(); replica != nil {
			err = f.followHere(replica)
		} else {
			err = r.poll(&a)
		}
		switch {
		case err == nil:
			a = attempts{router: f.w.router}
		case !a.again(f.w.ctx, nil, err):
			return
		}
	}
}

// replica is this node's, if it can be expected to hear of everything.
func (f *groupFollower) replica() Replica {
	r := f.w.router
	replica := r.cfg.Replica(f.group)
	if replica == nil || r.sharded && r.behind.isSilent(f.group) && r.dataNode(f.group, 0) != "" {
		return nil
	}
	return replica
}

// followHere follows the group by this node's replica, until it is behind or
// gone.
func (f *groupFollower) followHere(replica Replica) error {
	s := stateSource{groupFollower: f, replica: replica}
	defer s.leave()
	for {
		more, err := s.take()
		if err != nil {
			if f.w.router.sharded && f.w.ctx.Err() == nil {
				f.w.router.behind.answered(f.group, false)
			}
			return err
		}
		if !more {
			if err := s.wait(); err != nil {
				return err
			}
		}
	}
}

// stateSource takes from this node's states of a group.
type stateSource struct {
	*groupFollower
	replica Replica
	state   *fsm.Store
	feed    *fsm.Feed
}

// take takes what there is, and delivers it. more is false if there was nothing.
func (s *stateSource) take() (more bool, err error) {
	b, err := s.takePinned()
	if err != nil {
		return false, err
	}
	return len(b.deliveries) > 0, s.accept(b)
}

func (s *stateSource) takePinned() (*batch, error) {
	ctx := s.w.ctx
	state, release, err := s.replica.AcquireState(ctx, 0)
	if err != nil {
		return nil, err
	}
	defer release()
	if state != s.state {
		s.leave()
		s.state, s.feed = state, state.NewFeed(feedBytes)
	}
	b := &batch{}
	if b.deliveries, err = s.register(); err != nil || len(b.deliveries) > 0 {
		return b, err
	}
	b.applied = state.AppliedIndex() // before what is taken
	b.least = state.Revision(fsm.User)
	take, whole := s.shares()
	if b.deliveries, err = s.feed.Take(ctx, take, whole); err != nil {
		s.drop() // what it has taken is lost
		return nil, err
	}
	if err := s.addPrevious(ctx, b, whole); err != nil {
		s.drop()
		return nil, err
	}
	if b.revision, b.live = s.feed.Progress(); !b.live {
		s.addNext(b)
	}
	return b, nil
}

// shares are the most bytes to take at once, about, and of one transaction.
func (f *groupFollower) shares() (take, whole int) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	return f.w.shareOf(takeBytes), f.w.shareOf(wholeBytes)
}

// addNext says how far the merged watches are, of which others that lag must not
// keep back what they wait for.
func (s *stateSource) addNext(b *batch) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	for number := range s.w.merged {
		if p := s.parts[number]; p != nil && p.given {
			if b.next == nil {
				b.next = make(map[int64]int64)
			}
			b.next[number] = s.feed.Next(number)
		}
	}
}

// leave forgets the feed, if there is one, of which everything that was taken
// has been accepted.
func (s *stateSource) leave() {
	s.w.mu.Lock()
	for number, p := range s.parts {
		if s.feed != nil && p.given {
			p.next = max(p.next, s.feed.Next(number))
		}
	}
	s.w.mu.Unlock()
	s.drop()
}

// drop forgets the feed, and what has been taken of it last.
func (s *stateSource) drop() {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	if s.feed != nil {
		s.feed.Close()
	}
	s.state, s.feed = nil, nil
	s.reset()
}

// register tells the feed what to follow. It returns the watches that cannot be,
// because what they need is compacted.
func (s *stateSource) register() (refused []fsm.Delivery, _ error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	for _, number := range s.gone {
		s.feed.Cancel(number)
	}
	for _, p := range s.fresh {
		if p.of.ended || p.paused || p.given {
			continue
		}
		err := s.feed.Watch(p.of.number, p.of.spec.key, p.of.spec.end, s.give(p))
		var compacted *fsm.CompactedError
		switch {
		case errors.As(err, &compacted):
			refused = append(refused, fsm.Delivery{ID: p.of.number, Compacted: compacted.Revision})
		case err != nil:
			return nil, err
		}
	}
	s.gone, s.fresh = nil, nil
	return refused, nil
}

// addPrevious adds what keys were before, for the watches that ask for it.
func (s *stateSource) addPrevious(ctx context.Context, b *batch, most int) error {
	for i := range b.deliveries {
		d := &b.deliveries[i]
		s.w.mu.Lock()
		p := s.parts[d.ID]
		wanted := p != nil && p.of.spec.prevKV
		s.w.mu.Unlock()
		if !wanted {
			continue
		}
		if err := addPrevious(ctx, s.state, d, most); err != nil {
			return err
		}
	}
	return nil
}

// addPrevious copies events and adds what their keys were before. Where they
// take more than most bytes then, the delivery ends before a transaction, which
// is set aside.
func addPrevious(ctx context.Context, state *fsm.Store, d *fsm.Delivery, most int) error {
	events := make([]*mvccpb.Event, 0, len(d.Events))
	whole, bytes := 0, 0 // events of whole transactions
	for i, e := range d.Events {
		if i > 0 && e.Kv.ModRevision != d.Events[i-1].Kv.ModRevision {
			whole = i
		}
		previous, err := state.PrevKV(ctx, e.Kv.Key, e.Kv.ModRevision)
		if err != nil {
			return err
		}
		e = &mvccpb.Event{Type: e.Type, Kv: e.Kv, PrevKv: previous}
		if bytes += sizeOfEvent(e); bytes > most {
			d.Events, d.Next, d.Huge = events[:whole], d.Events[whole].Kv.ModRevision, true
			return nil
		}
		events = append(events, e)
	}
	d.Events = events
	return nil
}

// wait returns when there may be something to take. An error means that another
// source is needed.
func (s *stateSource) wait() error {
	if s.awaitGoal() {
		s.w.router.behind.answered(s.group, false)
		return errBehind
	}
	var alone <-chan time.Time
	if s.w.router.sharded && s.isUsed() {
		timer := time.NewTimer(aloneInterval)
		defer timer.Stop()
		alone = timer.C
	}
	select {
	case <-s.feed.Ready():
	case <-s.wake:
	case <-s.feed.Done():
		return s.replaced()
	case <-alone:
		if s.isAlone() {
			s.w.router.behind.answered(s.group, false)
			return errBehind
		}
	case <-s.w.ctx.Done():
		return s.w.ctx.Err()
	}
	return nil
}

// replaced waits for the state that comes in the place of the one that was
// followed. Meanwhile another node may have one.
func (s *stateSource) replaced() error {
	old := s.state
	ctx := s.w.ctx
	if s.w.router.sharded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	state, release, err := s.replica.AcquireState(ctx, 0)
	switch {
	case err == nil && state == old:
		release()
		err = errNoSource
	case err == nil:
		release()
		return nil
	}
	if s.w.router.sharded && s.w.ctx.Err() == nil {
		s.w.router.behind.answered(s.group, false)
	}
	return err
}

func (s *stateSource) isUsed() bool {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	return len(s.parts) > 0
}

// isAlone reports whether this node's replica is no member any more, as far as
// it is known, or hears of no leader.
func (s *stateSource) isAlone() bool {
	return s.w.router.cfg.Replica(s.group) != s.replica || s.replica.Leader().Node == ""
}

// awaitGoal has somebody wake the follower when the state has reached the
// first target. It reports whether that has taken too long already.
func (s *stateSource) awaitGoal() (late bool) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	t, ok := s.pending()
	late, s.lagged = s.lagged, false
	if !ok || late || s.groupFollower.waiting || len(s.parts) == 0 {
		return late && ok
	}
	s.groupFollower.waiting = true
	s.w.tasks.Go(func() { s.await(t.index) })
	return false
}

func (s *stateSource) await(index uint64) {
	ctx := s.w.ctx
	if s.w.router.sharded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	_, release, err := s.replica.AcquireState(ctx, index)
	if err == nil {
		release()
		s.w.router.behind.answered(s.group, true)
	}
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.groupFollower.waiting, s.lagged = false, err != nil
	signalOnce(s.wake)
}

// accept delivers what has been taken, or keeps it until it is resolved.
func (f *groupFollower) accept(b *batch) error {
	for i := range b.deliveries {
		d := &b.deliveries[i]
		p := f.wanted(d)
		switch {
		case p == nil:
		case p.of.merged:
			f.keep(p, d)
		default:
			if err := f.pass(p, d); err != nil {
				return err
			}
		}
	}
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if b.live {
		f.saw(b)
	}
	for number, next := range b.next {
		f.sawOne(f.parts[number], next, b)
	}
	if len(f.w.holding) > 0 {
		signalOnce(f.w.merges)
	}
	return nil
}

// sawOne notes how far one part is, while others lag. w.mu is held.
func (f *groupFollower) sawOne(p *part, next int64, b *batch) {
	if p == nil || !p.given {
		return
	}
	p.next = max(p.next, next)
	for _, t := range f.goals {
		if t.index <= b.applied && p.next > b.least {
			p.next = max(p.next, t.at+1)
		}
	}
}

// wanted is the part that a delivery is of; nil if nobody wants it any more.
func (f *groupFollower) wanted(d *fsm.Delivery) *part {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	p := f.parts[d.ID]
	if p == nil || !p.given { // cancelled, or paused
		return nil
	}
	if d.Compacted > 0 && d.Compacted <= p.taken() { // nothing is gone that it does not have: it goes on from there
		p.next, p.given = p.taken(), false
		f.missing(p)
		return nil
	}
	return p
}

// pass delivers what has been taken for a watch of one group.
func (f *groupFollower) pass(p *part, d *fsm.Delivery) error {
	if len(d.Events) > 0 {
		if err := f.w.send(p.of, watchDelivery{events: d.Events}); err != nil {
			return err
		}
	}
	f.w.mu.Lock()
	if d.Compacted > 0 {
		p.of.ends = &watchDelivery{compacted: d.Compacted}
	}
	p.next = max(p.next, d.Next)
	if d.Huge {
		f.setAside(p)
	}
	f.w.advanced()
	f.w.mu.Unlock()
	if d.Huge {
		if err := f.w.sendAside(p); err != nil {
			return err
		}
	}
	f.w.mu.Lock()
	ends := p.of.ends
	f.w.mu.Unlock()
	if ends != nil {
		return f.w.send(p.of, *ends)
	}
	return nil
}

// keep keeps what has been taken for a watch of many groups. One that waits for
// much already is taken no more of.
func (f *groupFollower) keep(p *part, d *fsm.Delivery) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if p.of.ended {
		return
	}
	if d.Compacted > 0 || d.Huge || len(d.Events) > 0 {
		f.w.holding[p.of.number] = p.of
	}
	if d.Compacted > 0 { // nothing that comes after it is resolved
		p.of.ends = &watchDelivery{compacted: d.Compacted}
		f.stop(p)
		return
	}
	p.waiting = append(p.waiting, d.Events...)
	p.bytes += sizeOfEvents(d.Events)
	p.next = max(p.next, d.Next)
	switch {
	case d.Huge:
		f.setAside(p)
	case p.bytes > f.w.partBytes():
		f.stop(p)
	}
	signalOnce(f.w.asks)
}

// stop takes no more of a part. w.mu is held.
func (f *groupFollower) stop(p *part) {
	p.paused = true
	f.withdraw(p)
}

// resume follows a part again that was stopped. w.mu is held.
func (f *groupFollower) resume(p *part) {
	p.paused = false
	f.missing(p)
}

func sizeOfEvents(events []*mvccpb.Event) (n int) {
	for _, e := range events {
		n += sizeOfEvent(e)
	}
	return n
}

func sizeOfEvent(e *mvccpb.Event) int {
	return eventBytes + len(e.Kv.Key) + len(e.Kv.Value) + len(e.PrevKv.GetKey()) + len(e.PrevKv.GetValue())
}

// signalOnce wakes the receiver of a channel of capacity 1.
func signalOnce(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
