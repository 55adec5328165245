package shard

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// Leader is who leads the group as far as this replica knows: a hint, never a
// proof. A witness is not named: it serves nothing and hands over.
type Leader struct {
	Node string        // empty: unknown
	ID   raft.ServerID // empty: unknown
	Term uint64
	Self bool // this replica leads, though perhaps it does not serve yet
}

// Member is one replica in the group's latest configuration.
type Member struct {
	ID    raft.ServerID
	Node  string
	Voter bool
}

// Status is what this replica knows of itself and its group.
type Status struct {
	Group        uint64
	Replica      raft.ServerID
	State        string // leader, follower, candidate, shutdown
	Leader       Leader
	Term         uint64
	CommitIndex  uint64
	AppliedIndex uint64 // applied to the readable state
	DurableIndex uint64 // in the state file
	LastLogIndex uint64
	// FirstLogIndex is that of the first entry in the log; if the log is empty,
	// the one with which it will begin.
	FirstLogIndex uint64
	// ConfigurationIndex is the log index of the latest applied configuration.
	ConfigurationIndex uint64
	// ConfigurationCommitted is false while Members are of a later one.
	ConfigurationCommitted bool
	Members                []Member // the latest configuration, committed or not
}

// Following is how far another member follows this leader, by its own answers
// in the leader's term.
type Following struct {
	Match uint64    // highest log index known to be on its disk; 0: unknown
	Acked time.Time // when the latest message that it took was sent; zero: none
}

// NodeOf is the node part of a replica id, empty if the id is malformed.
func NodeOf(id raft.ServerID) string {
	node, number, ok := strings.Cut(string(id), "/")
	if !ok || number == "" {
		return ""
	}
	return node
}

// IsWitness reports whether the id is a witness's, <node>/<number>w.
func IsWitness(id raft.ServerID) bool { return strings.HasSuffix(string(id), "w") && NodeOf(id) != "" }

// Leader returns the leader that this replica knows of.
func (r *Replica) Leader() Leader {
	l := r.life.Load()
	_, id := l.raft.LeaderWithID()
	if IsWitness(id) && !r.cfg.Faults.WitnessServes {
		id = ""
	}
	return Leader{Node: NodeOf(id), ID: id, Term: l.raft.CurrentTerm(), Self: id == r.cfg.Replica && l.role.Load() != nil}
}

// LeaderChanged is closed when what Leader returns, or whether this replica
// serves, may have changed. Take it before looking.
func (r *Replica) LeaderChanged() <-chan struct{} { return r.changed.wait() }

// Serving reports whether this replica leads and may serve writes and read
// indexes.
func (r *Replica) Serving() bool {
	e := r.life.Load().role.Load()
	return e != nil && e.isServing()
}

// Status describes the replica now.
func (r *Replica) Status() Status {
	l := r.life.Load()
	s := Status{
		Group: r.cfg.Group, Replica: r.cfg.Replica,
		State:  strings.ToLower(l.raft.State().String()),
		Leader: r.Leader(), Term: l.raft.CurrentTerm(),
		CommitIndex: l.raft.CommitIndex(), LastLogIndex: l.raft.LastIndex(),
		AppliedIndex: l.state.store.AppliedIndex(), DurableIndex: l.state.store.DurableIndex(),
	}
	if s.FirstLogIndex, _ = r.log.FirstIndex(); s.FirstLogIndex == 0 {
		s.FirstLogIndex = s.DurableIndex + 1
	}
	latest := l.raft.GetConfiguration().Configuration()
	for _, server := range latest.Servers {
		s.Members = append(s.Members, Member{ID: server.ID, Node: NodeOf(server.ID), Voter: server.Suffrage == raft.Voter})
	}
	// Raft does not tell the index of its latest configuration. One that is not
	// applied yet differs, unless it takes back the one before; then a change
	// planned on the index is refused.
	applied, index := l.state.store.Configuration()
	s.ConfigurationIndex, s.ConfigurationCommitted = index, slices.Equal(applied.Servers, latest.Servers)
	return s
}

// Followers tells how far the other members follow, voters and learners; nil
// if this replica does not lead and serve.
func (r *Replica) Followers() map[raft.ServerID]Following {
	l := r.life.Load()
	e := l.role.Load()
	if e == nil || !e.isServing() {
		return nil
	}
	all := make(map[raft.ServerID]Following)
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		if s.ID != r.cfg.Replica {
			all[s.ID] = Following{Match: l.transport.MatchIndex(s.ID, e.term), Acked: l.transport.Acked(s.ID, e.term)}
		}
	}
	return all
}

// Match is the highest log index that the member is known, by its own answers
// in this term, to have on disk; 0 if this replica does not lead.
func (r *Replica) Match(id raft.ServerID) uint64 {
	l := r.life.Load()
	e := l.role.Load()
	if e == nil || !e.isServing() {
		return 0
	}
	return l.transport.MatchIndex(id, e.term)
}

// AddLearner adds a replica without a vote. Like the other changes of members
// it must be called on the leader, applies only to the configuration whose log
// index is prevIndex (Status.ConfigurationIndex; 0 is refused), and returns the
// index of the new one once it is committed.
func (r *Replica) AddLearner(ctx context.Context, id raft.ServerID, prevIndex uint64) (uint64, error) {
	return r.change(ctx, prevIndex, func(l *life, wait time.Duration) raft.IndexFuture {
		return l.raft.AddNonvoter(id, raft.ServerAddress(id), prevIndex, wait)
	})
}

// Promote gives a learner its vote. The caller has measured that it has caught
// up (Match).
func (r *Replica) Promote(ctx context.Context, id raft.ServerID, prevIndex uint64) (uint64, error) {
	return r.change(ctx, prevIndex, func(l *life, wait time.Duration) raft.IndexFuture {
		return l.raft.AddVoter(id, raft.ServerAddress(id), prevIndex, wait)
	})
}

// Remove takes a replica out of the group.
func (r *Replica) Remove(ctx context.Context, id raft.ServerID, prevIndex uint64) (uint64, error) {
	return r.change(ctx, prevIndex, func(l *life, wait time.Duration) raft.IndexFuture {
		return l.raft.RemoveServer(id, prevIndex, wait)
	})
}

func (r *Replica) change(ctx context.Context, prevIndex uint64, start func(*life, time.Duration) raft.IndexFuture) (uint64, error) {
	if prevIndex == 0 {
		return 0, fmt.Errorf("shard: change members: no configuration index given")
	}
	l := r.life.Load()
	if _, err := l.serving(ctx); err != nil {
		return 0, err
	}
	wait := changeWait
	if t, ok := ctx.Deadline(); ok {
		wait = max(1, min(wait, time.Until(t))) // 0 would be for ever
	}
	var f raft.IndexFuture
	err := l.await(ctx, func() error {
		f = start(l, wait)
		return l.pushed(f.Error, func() { l.raft.Apply(emptyEntry(), 0) })
	})
	if err != nil {
		return 0, fmt.Errorf("shard: change members: %w", err)
	}
	return f.Index(), nil
}

// pushed waits for a change of members and has further entries appended while it
// does not commit. Raft sends the entry that gives a learner its vote before it
// counts the learner's answers, and never counts one again: if the learner is
// faster than the leader's next few lines and its vote is needed, then only the
// next entry commits the change, and an idle group has none.
func (l *life) pushed(wait func() error, push func()) error {
	done := make(chan error, 1)
	l.tasks.Go(func() { done <- wait() })
	pause := firstPush
	for range maxPushes {
		select {
		case err := <-done:
			return err
		case <-time.After(pause):
			push()
			pause *= 2
		}
	}
	return <-done
}

// A change that has not committed after firstPush is pushed maxPushes times at
// most, each after twice the pause: more would only fill the log of a group that
// has lost its quorum.
const (
	firstPush = 100 * time.Millisecond
	maxPushes = 6
)

// changeWait is how long raft waits at most for an earlier change to commit
// before it refuses the next one.
const changeWait = 10 * time.Second

// await runs a call of raft, which knows no contexts, until it ends or ctx
// does; in the latter case the call goes on behind.
func (l *life) await(ctx context.Context, call func() error) error {
	if !l.proposer.begin() {
		return ErrNotLeader
	}
	done := make(chan error, 1)
	l.tasks.Go(func() {
		defer l.proposer.open.Done()
		done <- call()
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TransferLeadership hands the leadership to a voter on the given node, or to
// the most advanced one if node is empty, never to a witness, and returns when
// this replica no longer leads.
func (r *Replica) TransferLeadership(ctx context.Context, node string) error {
	l := r.life.Load()
	e, err := l.serving(ctx)
	if err != nil {
		return err
	}
	id, err := l.successor(e, node)
	if err != nil {
		return err
	}
	err = l.await(ctx, func() error { return l.raft.LeadershipTransferToServer(id, raft.ServerAddress(id)).Error() })
	if err != nil {
		return fmt.Errorf("shard: transfer leadership: %w", err)
	}
	select {
	case <-e.over:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// maxTransferLag is how many entries a voter may be behind and still be handed
// the leadership. Raft refuses writes while it catches up, and, if that is by a
// snapshot, would go on to refuse them until the snapshot is installed.
const maxTransferLag = 1000

// successor is the voter to hand the leadership to: the most advanced one by
// its own answers of those that still answer, on the given node unless that is
// empty.
func (l *life) successor(e *epoch, node string) (raft.ServerID, error) {
	var best raft.ServerID
	var match uint64
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		if s.Suffrage != raft.Voter || IsWitness(s.ID) || s.ID == l.r.cfg.Replica || node != "" && NodeOf(s.ID) != node {
			continue
		}
		if acked := l.transport.Acked(s.ID, e.term); !acked.IsZero() && time.Since(acked) > l.r.cfg.HeartbeatTimeout {
			continue // raft would refuse writes while it waits in vain
		}
		if m := l.transport.MatchIndex(s.ID, e.term); best == "" || m > match {
			best, match = s.ID, m
		}
	}
	switch {
	case best == "":
		return "", fmt.Errorf("%w: %s", ErrNoTarget, node)
	case match+maxTransferLag < l.raft.CommitIndex():
		return "", fmt.Errorf("%w: %s has not caught up", ErrNoTarget, best)
	}
	return best, nil
}

// voterOn is the voter with a state on a node.
func voterOn(c raft.Configuration, node string) (raft.ServerID, bool) {
	for _, s := range c.Servers {
		if s.Suffrage == raft.Voter && NodeOf(s.ID) == node && !IsWitness(s.ID) {
			return s.ID, true
		}
	}
	return "", false
}

// AdvanceFollower tells the follower on a node at once that index is
// committed, if it has that entry. Otherwise it is told with the next entries,
// or a little later, and a lone linearizable read on a follower would wait.
func (r *Replica) AdvanceFollower(node string, index uint64) {
	l := r.life.Load()
	e := l.role.Load()
	if e == nil || !e.isServing() {
		return
	}
	id, ok := voterOn(l.raft.GetConfiguration().Configuration(), node)
	if !ok || id == r.cfg.Replica || l.transport.MatchIndex(id, e.term) < index {
		return
	}
	// In this order: what is read after it was committed stays in the log.
	var entry raft.Log
	if index > l.raft.CommitIndex() || r.log.GetLog(index, &entry) != nil {
		return
	}
	if !l.advancing.CompareAndSwap(false, true) {
		return
	}
	if !l.proposer.begin() {
		l.advancing.Store(false)
		return
	}
	l.tasks.Go(func() {
		defer l.proposer.open.Done()
		defer l.advancing.Store(false)
		l.sendCommit(e, id, index, entry.Term)
	})
}
