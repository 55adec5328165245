package shard

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/raft"
)

// Leader is who leads the group as far as this replica knows: a hint, never a
// proof.
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
	// ConfigurationIndex is the log index of the latest applied configuration.
	ConfigurationIndex uint64
	Members            []Member
}

// NodeOf is the node part of a replica id, empty if the id is malformed.
func NodeOf(id raft.ServerID) string {
	node, number, ok := strings.Cut(string(id), "/")
	if !ok || number == "" {
		return ""
	}
	return node
}

// Leader returns the leader that this replica knows of.
func (r *Replica) Leader() Leader {
	l := r.life.Load()
	_, id := l.raft.LeaderWithID()
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
	_, s.ConfigurationIndex = l.state.store.Configuration()
	for _, server := range l.raft.GetConfiguration().Configuration().Servers {
		s.Members = append(s.Members, Member{ID: server.ID, Node: NodeOf(server.ID), Voter: server.Suffrage == raft.Voter})
	}
	return s
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
	if !l.proposer.begin() {
		return 0, ErrNotLeader
	}
	defer l.proposer.open.Done()
	f := start(l, time.Until(deadline(ctx)))
	if err := f.Error(); err != nil {
		return 0, fmt.Errorf("shard: change members: %w", err)
	}
	return f.Index(), nil
}

// deadline is ctx's, or ten seconds from now.
func deadline(ctx context.Context) time.Time {
	if t, ok := ctx.Deadline(); ok {
		return t
	}
	return time.Now().Add(10 * time.Second)
}

// TransferLeadership hands the leadership to a voter on the given node, or to
// the most advanced one if node is empty, and returns when this replica no
// longer leads.
func (r *Replica) TransferLeadership(ctx context.Context, node string) error {
	l := r.life.Load()
	e, err := l.serving(ctx)
	if err != nil {
		return err
	}
	var f raft.Future
	if node == "" {
		f = l.raft.LeadershipTransfer()
	} else {
		id, ok := voterOn(l.raft.GetConfiguration().Configuration(), node)
		if !ok || id == r.cfg.Replica {
			return fmt.Errorf("%w: %s", ErrNoTarget, node)
		}
		f = l.raft.LeadershipTransferToServer(id, raft.ServerAddress(id))
	}
	// Raft bounds the transfer by the election timeout.
	if err := f.Error(); err != nil {
		return fmt.Errorf("shard: transfer leadership: %w", err)
	}
	select {
	case <-e.over:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func voterOn(c raft.Configuration, node string) (raft.ServerID, bool) {
	for _, s := range c.Servers {
		if s.Suffrage == raft.Voter && NodeOf(s.ID) == node {
			return s.ID, true
		}
	}
	return "", false
}

// AdvanceFollower tells the follower on a node at once that index is
// committed, if it has that entry. Raft itself tells with the next entries or
// heartbeat, which would make a lone linearizable read on a follower wait.
func (r *Replica) AdvanceFollower(node string, index uint64) {
	l := r.life.Load()
	e := l.role.Load()
	if e == nil || !e.isServing() {
		return
	}
	id, ok := voterOn(l.raft.GetConfiguration().Configuration(), node)
	if !ok || id == r.cfg.Replica || l.transport.MatchIndex(id, e.term) < index || !l.advancing.CompareAndSwap(false, true) {
		return
	}
	var entry raft.Log
	if err := r.log.GetLog(index, &entry); err != nil || index > l.raft.CommitIndex() {
		l.advancing.Store(false)
		return
	}
	l.tasks.Go(func() {
		defer l.advancing.Store(false)
		self := []byte(r.cfg.Replica)
		req := &raft.AppendEntriesRequest{
			RPCHeader:    raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
			Term:         e.term,
			PrevLogEntry: index, PrevLogTerm: entry.Term,
			LeaderCommitIndex: index,
		}
		_ = l.transport.AppendEntries(id, raft.ServerAddress(id), req, new(raft.AppendEntriesResponse))
	})
}
