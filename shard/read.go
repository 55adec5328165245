package shard

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// reads confirms for the leader's read indexes that this replica was still the
// leader after each read arrived (docs/design.md section 5 rule 3).
//
// A read that arrived at t is confirmed when a quorum of the voters of raft's
// latest configuration has answered, with success and in the term in which the
// index was taken, an AppendEntries that was sent at t or later. All reads
// share these answers; regular replication confirms for free, and an idle
// leader is kicked into sending heartbeats.
type reads struct {
	l    *life
	wake chan struct{} // capacity 1

	kicks atomic.Int32 // calls of raft's VerifyLeader under way

	mu      sync.Mutex
	waiting []*read // in order of arrival
	kicked  time.Time
}

type read struct {
	since time.Time
	epoch *epoch
	done  chan error // capacity 1
}

// kickAgain bounds how long an unanswered kick holds the next one back.
const kickAgain = 50 * time.Millisecond

// maxKicks bounds the calls of VerifyLeader under way. Raft's replication
// routines answer them under a lock, and wait there for room in a channel of 64
// to the main loop, which may be stuck in a disk write.
const maxKicks = 8

func newReads(l *life) *reads { return &reads{l: l, wake: make(chan struct{}, 1)} }

// ReadIndex returns an index such that any state of the group that has applied
// it answers linearizably for reads that began before this call. It must be
// called on the leader; it waits for a new leader to become ready, and for a
// quorum. It reads no clock of other nodes and trusts no lease.
//
// In a group with a sequencer it also waits for the entries that had asked for
// their revisions, so that reads of this group, of others and snapshots are
// strictly serializable together (docs/design.md section 5 rule 6).
func (r *Replica) ReadIndex(ctx context.Context) (uint64, error) {
	index, _, err := r.Confirm(ctx)
	return index, err
}

// Confirm is ReadIndex and tells the term too: this replica was the leader in
// it, for all the others, at some moment after the call.
func (r *Replica) Confirm(ctx context.Context) (index, term uint64, err error) {
	l := r.life.Load()
	e, err := l.serving(ctx)
	if err != nil {
		return 0, 0, err
	}
	if r.cfg.Faults.ReadWithoutConfirmation {
		return l.raft.CommitIndex(), e.term, nil
	}
	item := l.reads.join(e)
	if !r.cfg.Faults.ReadBeforeReserved {
		if err := l.proposer.await(ctx, e, l.proposer.unsettled()); err != nil {
			return 0, 0, err
		}
	}
	// An own-term command is applied, so this covers every write that any
	// leader acknowledged before now. It may exceed what is applied here.
	index = l.raft.CommitIndex()
	return index, e.term, l.reads.wait(ctx, item)
}

// ReadIndexAt returns an index such that any state of the group that has applied
// it answers reads at revision at completely and for ever: no write of that
// revision or below is missing, or comes later. Like ReadIndex it must be called
// on the leader. The group must have a sequencer, and at must have been handed
// out by it: nothing is written before it hands out more.
func (r *Replica) ReadIndexAt(ctx context.Context, at int64) (uint64, error) {
	l := r.life.Load()
	e, err := l.serving(ctx) // what earlier leaders may have proposed is applied
	if err != nil {
		return 0, err
	}
	p := l.proposer
	if p.isGated() {
		if err := p.await(ctx, e, p.unsettled()); err != nil {
			return 0, err
		}
	}
	var below []*ask
	if !r.cfg.Faults.SnapshotWithoutGate {
		below = p.raiseGate(at)
	}
	// A later leader asks for revisions after this, so they are above at.
	item := l.reads.join(e)
	if !r.cfg.Faults.SnapshotBeforeInFlight {
		if err := p.await(ctx, e, below); err != nil {
			return 0, err
		}
	}
	index := l.raft.CommitIndex()
	return index, l.reads.wait(ctx, item)
}

// join begins the confirmation that this replica leads from now on.
func (q *reads) join(e *epoch) *read {
	item := &read{since: time.Now(), epoch: e, done: make(chan error, 1)}
	q.mu.Lock()
	q.waiting = append(q.waiting, item)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return item
}

// wait ends when the confirmation is there.
func (q *reads) wait(ctx context.Context, item *read) error {
	// The epoch may have ended, and its reads been flushed, before the item came.
	if q.l.role.Load() != item.epoch {
		return ErrNotLeader
	}
	select {
	case err := <-item.done:
		if err == nil {
			q.l.r.metrics.confirmSeconds.Observe(time.Since(item.since).Seconds())
		}
		return err
	case <-item.epoch.over:
		return ErrNotLeader
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrNotProposed, ctx.Err())
	}
}

// run releases reads as answers come in.
func (q *reads) run() {
	retry := time.NewTimer(kickAgain)
	defer retry.Stop()
	for {
		var acked <-chan struct{} // nobody wakes up for the heartbeats of an idle group
		if q.pending() {
			acked = q.l.transport.AckNotify()
		}
		select {
		case <-q.wake:
		case <-acked:
		case <-retry.C:
		case <-q.l.done:
			return
		}
		if q.release() {
			q.kick()
		}
		if q.pending() {
			retry.Reset(kickAgain)
		}
	}
}

// kick makes the heartbeats go out; what VerifyLeader answers is of no use.
func (q *reads) kick() {
	if q.kicks.Load() >= maxKicks || !q.l.proposer.begin() {
		return
	}
	q.kicks.Add(1)
	q.l.tasks.Go(func() {
		defer q.l.proposer.open.Done()
		defer q.kicks.Add(-1)
		_ = q.l.raft.VerifyLeader().Error()
	})
}

func (q *reads) pending() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting) > 0
}

// release answers the reads that are confirmed and reports whether those that
// remain need heartbeats to be sent.
func (q *reads) release() (kick bool) {
	e := q.l.role.Load()
	if e == nil || !e.isServing() || !q.pending() {
		return false
	}
	confirmed := q.l.confirmedAt(e.term, q.l.transport.Acked)
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for n < len(q.waiting) && !q.waiting[n].since.After(confirmed) {
		if q.waiting[n].epoch == e {
			q.waiting[n].done <- nil
		} else {
			q.waiting[n].done <- ErrNotLeader
		}
		n++
	}
	q.waiting = slices.Delete(q.waiting, 0, n)
	if len(q.waiting) == 0 {
		return false
	}
	// One kick is under way at a time; its answers release every read that
	// came before it, and the reads that came later need another.
	now := time.Now()
	if confirmed.Before(q.kicked) && now.Sub(q.kicked) < kickAgain {
		return false
	}
	q.kicked = now
	return true
}

// confirmedAt is the latest moment at which a quorum of the voters is known to
// have followed this replica in the given term; acked is Transport.Acked.
func (l *life) confirmedAt(term uint64, acked func(raft.ServerID, uint64) time.Time) time.Time {
	servers := l.raft.GetConfiguration().Configuration().Servers
	var sent []time.Time // newest answered send of each voter
	self := false
	for _, s := range servers {
		switch {
		case s.Suffrage != raft.Voter:
		case s.ID == l.r.cfg.Replica:
			self = true
		default:
			sent = append(sent, acked(s.ID, term))
		}
	}
	if self {
		sent = append(sent, time.Now())
	}
	if len(sent) == 0 {
		return time.Time{}
	}
	slices.SortFunc(sent, func(a, b time.Time) int { return b.Compare(a) })
	// This replica's own vote counts only if it has not moved on meanwhile;
	// terms never go back, so one look after the others' answers is enough.
	if l.raft.State() != raft.Leader || l.raft.CurrentTerm() != term {
		return time.Time{}
	}
	return sent[len(sent)/2]
}

// flush answers every waiting read.
func (q *reads) flush(err error) {
	q.mu.Lock()
	waiting := q.waiting
	q.waiting = nil
	q.mu.Unlock()
	for _, item := range waiting {
		item.done <- err
	}
}
