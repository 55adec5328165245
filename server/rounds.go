package server

import (
	"context"
	"sync"
	"time"

	"kvd/shard"
)

// rounds gathers the linearizable reads of one group that arrive on a node
// which does not lead it, and asks the leader for one index for all of them.
// One request is under way; the reads that arrive meanwhile gather for the
// next. A read never shares an index that was asked for before it arrived: the
// leader may have acknowledged writes in between.
type rounds struct {
	router *router
	group  uint64

	mu        sync.Mutex
	gathering *round // not asked for yet; nil = nobody waits
	running   bool
	asked     *round // the round under way
}

type round struct {
	done  chan struct{} // closed when index and err are set
	index uint64
	err   error
}

// roundTimeout bounds one request, so that a peer that neither answers nor
// disconnects does not hold up the reads when the leadership has not moved.
const roundTimeout = 2 * time.Second

func (r *router) roundsOf(group uint64) *rounds {
	r.mu.Lock()
	defer r.mu.Unlock()
	q := r.reads[group]
	if q == nil {
		q = &rounds{router: r, group: group}
		r.reads[group] = q
	}
	return q
}

// join waits for the next round and returns its index.
func (q *rounds) join(ctx context.Context) (uint64, error) {
	q.mu.Lock()
	mine := q.gathering
	if q.router.cfg.faults.joinSentRound && q.asked != nil {
		mine = q.asked
	}
	if mine == nil {
		mine = &round{done: make(chan struct{})}
		q.gathering = mine
	}
	if !q.running && !q.router.spawn(q.run) {
		q.gathering = nil
		q.mu.Unlock()
		return 0, shard.ErrClosed
	}
	q.running = true
	q.mu.Unlock()
	select {
	case <-mine.done:
		return mine.index, mine.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// spawn starts f unless the router is closed.
func (r *router) spawn(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.rounds.Go(f)
	return true
}

// run asks for rounds until nobody waits.
func (q *rounds) run() {
	for {
		q.mu.Lock()
		next := q.gathering
		q.gathering, q.asked = nil, next
		q.running = next != nil
		q.mu.Unlock()
		if next == nil {
			return
		}
		next.index, next.err = q.router.askIndex(q.group)
		close(next.done)
	}
}

// askIndex asks whoever is thought to lead for a read index, once.
func (r *router) askIndex(group uint64) (uint64, error) {
	replica := r.cfg.Replica(group)
	if replica == nil {
		return 0, errNoReplica
	}
	leader := replica.Leader()
	ctx, cancel := context.WithTimeout(r.ctx, roundTimeout)
	defer cancel()
	switch {
	case leader.Self || leader.Node == r.cfg.Node:
		return replica.ReadIndex(ctx)
	case leader.Node == "":
		return 0, errNoLeader
	}
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { cancelWhenMoved(ctx, cancel, replica, leader.Node) })
	r.metrics.readRounds.Inc()
	index, err := r.readIndexThere(ctx, leader.Node, group)
	if err != nil && replica.Leader().Node != leader.Node {
		err = errLeaderMoved
	}
	return index, err
}

// cancelWhenMoved gives up on a leader as soon as there is another one: a
// paused or unreachable node would hold the reads up for no reason.
func cancelWhenMoved(ctx context.Context, cancel context.CancelFunc, replica Replica, node string) {
	for {
		changed := replica.LeaderChanged()
		if replica.Leader().Node != node {
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
