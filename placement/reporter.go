package placement

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

// Host is what a node tells of itself, besides its replica of group 0.
type Host interface {
	// Replicas are the open replicas of shards. Two may be of one group, while a
	// data replica takes the place of a witness.
	Replicas() map[ReplicaRef]*shard.Replica
	// Lost are the replicas that the map gives to this incarnation of the node
	// and that it will never be able to open.
	Lost() []ReplicaRef
	// DiskFree is what the node's disk has left, in bytes.
	DiskFree() uint64
}

// Peers reaches the other nodes. from is the name of the node that calls.
type Peers interface {
	Call(ctx context.Context, node, method string, payload []byte) ([]byte, error)
}

const (
	// reportTimeout bounds a report to a leader that does not answer.
	reportTimeout = time.Second
	// reportAgain is how soon a report that did not arrive is made again.
	reportAgain = 100 * time.Millisecond
)

// reporting tells group 0's leader once in a while, and whenever it is another
// one or Nudge was called, how this node's replicas are.
func (r *Reconciler) reporting(ctx context.Context) {
	for ctx.Err() == nil {
		changed := r.cfg.Replica.LeaderChanged()
		wait := r.cfg.ReportEvery
		if err := r.report(ctx); err != nil {
			wait = min(wait, reportAgain)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-changed:
		case <-r.nudged:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// Nudge makes this node report now: call it when a replica was opened or closed.
func (r *Reconciler) Nudge() {
	select {
	case r.nudged <- struct{}{}:
	default:
	}
}

// report makes one report and heeds the answer.
func (r *Reconciler) report(ctx context.Context) error {
	leader := r.cfg.Replica.Leader()
	if leader.Node == "" {
		return shard.ErrNotLeader
	}
	report := r.build(nil)
	var answer ReportAnswer
	var err error
	if leader.Node == r.cfg.Node {
		answer, err = r.accept(report)
	} else {
		ctx, cancel := context.WithTimeout(ctx, reportTimeout)
		defer cancel()
		err = r.call(ctx, leader.Node, MethodReport, report, &answer)
	}
	if err != nil {
		return err
	}
	for ref, replica := range r.replicas() {
		if floor := answer.Floors[ref.Group]; floor > 0 && shard.IsWitness(ref.ID) {
			replica.SetTruncationFloor(floor)
		}
	}
	return nil
}

// replicas are this node's, of shards.
func (r *Reconciler) replicas() map[ReplicaRef]*shard.Replica {
	if r.cfg.Host == nil {
		return nil
	}
	return r.cfg.Host.Replicas()
}

// build reports all of this node's replicas, or those of the named groups.
func (r *Reconciler) build(groups []uint64) Report {
	report := Report{Node: r.cfg.Node, Incarnation: r.cfg.Incarnation, Weight: r.cfg.Weight}
	if groups == nil || slices.Contains(groups, 0) {
		report.Groups = append(report.Groups, describe(r.cfg.Replica))
	}
	for ref, replica := range r.replicas() {
		if groups == nil || slices.Contains(groups, ref.Group) {
			report.Groups = append(report.Groups, describe(replica))
		}
	}
	if r.cfg.Host != nil {
		report.Lost, report.DiskFree = r.cfg.Host.Lost(), r.cfg.Host.DiskFree()
	}
	return report
}

// describe is a replica's own view. Whoever reads it may be late: what it says
// of others was so a moment ago.
func describe(replica *shard.Replica) GroupReport {
	s := replica.Status()
	g := GroupReport{
		Group: s.Group, Replica: s.Replica, Term: s.Term,
		Commit: s.CommitIndex, Applied: s.AppliedIndex, Durable: s.DurableIndex,
		First: s.FirstLogIndex, Last: s.LastLogIndex,
		ConfigurationIndex: s.ConfigurationIndex, Leader: s.Leader.ID,
	}
	if followers := replica.Followers(); followers != nil && s.Leader.Self {
		now := time.Now()
		g.Leading = &Leading{Members: s.Members, Committed: s.ConfigurationCommitted, Followers: make(map[raft.ServerID]Following)}
		for id, f := range followers {
			acked := time.Duration(-1)
			if !f.Acked.IsZero() {
				acked = now.Sub(f.Acked)
			}
			g.Leading.Followers[id] = Following{Match: f.Match, Acked: acked}
		}
	}
	return g
}

// accept takes a report in, on group 0's leader.
func (r *Reconciler) accept(report Report) (ReportAnswer, error) {
	term, leads := r.observing()
	if !leads {
		return ReportAnswer{}, shard.ErrNotLeader
	}
	var answer ReportAnswer
	m := r.current.Load()
	if m != nil && m.term != term { // another leader may have added replicas since
		m = nil
	}
	if m != nil && len(m.Members) > 0 {
		if member, ok := m.Member(report.Node); !ok || member.Incarnation != report.Incarnation {
			return answer, fmt.Errorf("%w: %s, as %016x", ErrUnknownMember, report.Node, report.Incarnation)
		}
	}
	if r.seen.accept(report, true, time.Now()) {
		r.wakeUp()
	}
	if m == nil {
		return answer, nil
	}
	for _, g := range report.Groups {
		if !shard.IsWitness(g.Replica) {
			continue
		}
		if s, ok := m.shardOf(g.Group); ok {
			if floor, ok := r.seen.floor(s); ok {
				if answer.Floors == nil {
					answer.Floors = make(map[uint64]uint64)
				}
				answer.Floors[g.Group] = floor
			}
		}
	}
	return answer, nil
}

// observing begins the observations of this term, if this node leads group 0.
func (r *Reconciler) observing() (term uint64, leads bool) {
	term = r.cfg.Replica.Leader().Term
	if !r.cfg.Replica.Serving() {
		return 0, false
	}
	r.seen.begin(term)
	return term, true
}

// call is a Call whose payload and answer are JSON.
func (r *Reconciler) call(ctx context.Context, node, method string, request, answer any) error {
	if r.cfg.Peers == nil {
		return errNoPeers
	}
	payload, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("placement: encode %s: %w", method, err)
	}
	b, err := r.cfg.Peers.Call(ctx, node, method, payload)
	if err != nil {
		return fmt.Errorf("placement: %s: %w", node, err)
	}
	if err := json.Unmarshal(b, answer); err != nil {
		return fmt.Errorf("placement: malformed answer of %s to %s: %w", node, method, err)
	}
	return nil
}

var errNoPeers = errors.New("placement: this node is alone")
