// Package lessor decides when leases expire, for one group during one term of its leader. It is pure: whoever drives it
// has the clock, the lease table and the log, and calls it from one goroutine at a time.
//
// A lease is given out for revocation when its time is over and never renewed from then on. The time begins anew with
// each Lessor, because earlier leaders may have renewed leases without a trace in the log (docs/design.md section 7).
package lessor

import (
	"container/heap"
	"math"
	"time"
)

// Lease is a lease as the lease table has it.
type Lease struct {
	ID          int64
	Incarnation int64 // grows from grant to grant of the same id
	TTL         int64 // seconds
	Remaining   int64 // seconds at the last checkpoint; 0 = TTL
	Ending      bool  // it is being revoked
}

// Config of a Lessor. The zero value of CheckpointInterval means that there are no checkpoints.
type Config struct {
	Now func() time.Duration // monotonic, since any moment
	// Grace is how much later than it must a lease expires, for the answers that tell of its time to arrive in.
	Grace time.Duration
	// CheckpointInterval is how long a lease goes on before what remains of its time is to be kept in the log.
	CheckpointInterval time.Duration
	// RetryInterval is how long after Failed a lease is given out again.
	RetryInterval time.Duration
}

// Lessor knows the leases of a group. It must not be used by several goroutines at a time.
type Lessor struct {
	cfg    Config
	leases map[int64]*entry
	queue  queue    // by what is due first; a renewal does not move a lease in it
	points []*entry // due for a checkpoint
}

type entry struct {
	lease    Lease
	deadline time.Duration // when the lease's time is over
	since    time.Duration // the last checkpoint or renewal
	given    bool          // out for revocation
	listed   bool          // in points
	noted    uint64        // counts checkpoints
	cleared  uint64        // of noted, what is known to be gone from the table
	at       time.Duration // not before this there is anything to do
	index    int           // in the queue; -1 = none
}

// New makes a Lessor without leases.
func New(cfg Config) *Lessor {
	return &Lessor{cfg: cfg, leases: make(map[int64]*entry)}
}

// Len is how many leases there are.
func (l *Lessor) Len() int { return len(l.leases) }

// Set tells what the table has. A lease that is new here has all of its time, or what its checkpoint has left of it,
// from now on.
func (l *Lessor) Set(lease Lease) {
	e := l.leases[lease.ID]
	if e != nil && e.lease.Incarnation != lease.Incarnation {
		l.remove(e)
		e = nil
	}
	now := l.cfg.Now()
	if e == nil {
		e = &entry{lease: lease, index: -1, since: now}
		e.lease.Ending = false // it begins, below
		l.leases[lease.ID] = e
		e.deadline = later(now, lease.TTL)
		if lease.Remaining > 0 {
			e.deadline = later(now, min(lease.Remaining, max(lease.TTL, 1)))
		}
		l.push(e, l.due(e))
	}
	begins := lease.Ending && !e.lease.Ending
	e.lease = lease
	if begins && !e.given {
		l.push(e, now)
	}
}

// Remove tells that the table does not have the lease any more.
func (l *Lessor) Remove(id int64) {
	if e := l.leases[id]; e != nil {
		l.remove(e)
	}
}

// Keep removes all leases that are not known to.
func (l *Lessor) Keep(known func(id int64) bool) {
	for id, e := range l.leases {
		if !known(id) {
			l.remove(e)
		}
	}
}

// State is what a lease allows.
type State int

const (
	Unknown State = iota // there is no such lease, or it is being revoked
	Alive
	// Noted: the table has, or may get, a checkpoint from before the renewal. It must be cleared there and Cleared be
	// told before the renewal may be answered.
	Noted
	// Dying: the lease's time is over, and nobody knows whether it will be revoked.
	Dying
)

// Renew gives a lease all of its time from now on, unless it is not Alive or Noted. mark is for Cleared.
func (l *Lessor) Renew(id int64) (state State, mark uint64) {
	e := l.leases[id]
	switch {
	case e == nil || e.lease.Ending:
		return Unknown, 0
	case e.given:
		return Dying, 0
	}
	now := l.cfg.Now()
	e.deadline, e.since = later(now, e.lease.TTL), now
	if e.noted > e.cleared || e.lease.Remaining > 0 {
		return Noted, e.noted
	}
	return Alive, 0
}

// Cleared tells that the table has no checkpoint of the lease from before mark was returned. If it is of another
// incarnation, nothing happens.
func (l *Lessor) Cleared(id, incarnation int64, mark uint64) {
	if e := l.leases[id]; e != nil && e.lease.Incarnation == incarnation {
		e.cleared = max(e.cleared, mark)
	}
}

// Left is how much of its time a lease has; none if that is over. ok is false for what Renew calls Unknown.
func (l *Lessor) Left(id int64) (left time.Duration, ok bool) {
	e := l.leases[id]
	if e == nil || e.lease.Ending {
		return 0, false
	}
	return max(e.deadline-l.cfg.Now(), 0), true
}

// Due gives out the leases whose time is over, or whose revocation has begun: max of them at most, and each once until
// Failed.
func (l *Lessor) Due(max int) []Lease {
	var out []Lease
	for now := l.cfg.Now(); len(l.queue) > 0 && l.queue[0].at <= now && len(out) < max; {
		e := l.queue[0]
		switch {
		case e.given, e.lease.Ending, now >= l.expiry(e):
			e.given = true
			l.drop(e)
			out = append(out, e.lease)
		case l.due(e) <= now:
			l.push(e, l.expiry(e))
			if !e.listed {
				e.listed = true
				l.points = append(l.points, e)
			}
		default:
			l.push(e, l.due(e))
		}
	}
	return out
}

// Failed tells that the revocation of a lease has failed, or may have: it will be given out again.
func (l *Lessor) Failed(id, incarnation int64) {
	if e := l.leases[id]; e != nil && e.lease.Incarnation == incarnation && e.given {
		l.push(e, l.cfg.Now()+l.cfg.RetryInterval)
	}
}

// Checkpoint is what remains of a lease's time.
type Checkpoint struct {
	Lease     Lease
	Remaining int64 // seconds, rounded up
}

// Checkpoints are due, max of them at most. From now on renewals are Noted, whatever becomes of them. Due must be called
// before.
func (l *Lessor) Checkpoints(max int) []Checkpoint {
	var out []Checkpoint
	now := l.cfg.Now()
	for len(l.points) > 0 && len(out) < max {
		e := l.points[0]
		l.points[0] = nil
		l.points = l.points[1:]
		e.listed = false
		if e.index < 0 || e.given || e.lease.Ending { // gone, or about to be
			continue
		}
		if remaining := seconds(e.deadline - now); e.deadline > now && remaining < e.lease.TTL {
			e.noted++
			out = append(out, Checkpoint{e.lease, remaining})
			e.since = now
		}
		l.push(e, l.due(e))
	}
	if len(l.points) == 0 {
		l.points = nil
	}
	return out
}

// Next is when Due or Checkpoints may have something to do, in Now's time. ok is false if never.
func (l *Lessor) Next() (at time.Duration, ok bool) {
	switch {
	case len(l.points) > 0:
		return l.cfg.Now(), true
	case len(l.queue) == 0:
		return 0, false
	}
	return l.queue[0].at, true
}

// expiry is when a lease that nobody renews is given out.
func (l *Lessor) expiry(e *entry) time.Duration { return saturated(e.deadline, l.cfg.Grace) }

// due is when a lease that nobody renews is given out, or is to be kept in the log before that.
func (l *Lessor) due(e *entry) time.Duration {
	expiry, interval := l.expiry(e), l.cfg.CheckpointInterval
	if point := saturated(e.since, interval); interval > 0 && e.deadline > point {
		return point
	}
	return expiry
}

func (l *Lessor) remove(e *entry) {
	delete(l.leases, e.lease.ID)
	l.drop(e)
}

func (l *Lessor) push(e *entry, at time.Duration) {
	e.at = at
	if e.index >= 0 {
		heap.Fix(&l.queue, e.index)
		return
	}
	heap.Push(&l.queue, e)
}

func (l *Lessor) drop(e *entry) {
	if e.index >= 0 {
		heap.Remove(&l.queue, e.index)
	}
}

// later adds seconds, as many as there can be. A lease has at least one.
func later(now time.Duration, sec int64) time.Duration {
	return saturated(now, time.Duration(min(max(sec, 1), math.MaxInt64/int64(time.Second)))*time.Second)
}

func saturated(a, b time.Duration) time.Duration {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// seconds rounds up.
func seconds(d time.Duration) int64 {
	return int64((d-1)/time.Second) + 1
}

// queue is a heap of leases by when there is something to do with them.
type queue []*entry

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].at < q[j].at }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *queue) Push(x any) {
	e := x.(*entry)
	e.index = len(*q)
	*q = append(*q, e)
}

func (q *queue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	e.index = -1
	return e
}
