package shard

import (
	"fmt"
	"testing"
	"time"
)

// While a snapshot is on its way to a follower, the log keeps what comes behind
// it: raft's own count of trailing entries cannot promise that.
func TestTheLogKeepsWhatAStreamNeeds(t *testing.T) {
	tune := func(c *Config) { c.SnapshotEntries, c.TrailingEntries = 20, 5 }
	bubble(t, 3, tune, func(c *cluster) {
		_, leader := c.leader()
		c.mustPut(leader, "k", "v")
		state := leader.life.Load().state.store
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if err := state.Flush(ctx, state.AppliedIndex()); err != nil {
			t.Fatal(err)
		}
		meta, stream, err := leader.life.Load().snapshots.Open("")
		if err != nil {
			t.Fatal(err)
		}
		write := func() (first uint64) {
			for i := range 200 {
				c.mustPut(leader, fmt.Sprint("k", i), "v")
			}
			time.Sleep(time.Second)
			first, err := leader.log.FirstIndex()
			if err != nil {
				t.Fatal(err)
			}
			return first
		}
		if first := write(); first > meta.Index {
			t.Errorf("the stream is of %d and the log begins at %d", meta.Index, first)
		}
		if err := stream.Close(); err != nil {
			t.Fatal(err)
		}
		if first := write(); first <= meta.Index {
			t.Errorf("nobody needs the log at %d any more, and it is kept", first)
		}
		// And never is anything removed that the state has not on disk (I9).
		if first := write(); first > state.DurableIndex()+1 {
			t.Errorf("the log begins at %d, the state ends at %d", first, state.DurableIndex())
		}
	})
}

// A follower learns of a commit when it is told, not with the next heartbeat.
func TestAFollowerIsToldOfACommit(t *testing.T) {
	slow := func(c *Config) { c.HeartbeatTimeout, c.ElectionTimeout = 10*time.Second, 10*time.Second }
	bubble(t, 3, slow, func(c *cluster) {
		name, leader := c.leader()
		to, follower := c.follower(name)
		c.mustPut(leader, "k", "v")
		index := leader.Status().CommitIndex
		for leader.Match(follower.cfg.Replica) < index {
			time.Sleep(time.Millisecond)
		}
		leader.AdvanceFollower(to, index+1) // not committed: must do nothing
		leader.AdvanceFollower("n9", index) // nor for a stranger
		leader.AdvanceFollower(name, index) // nor for itself
		follower.AdvanceFollower(name, index)
		leader.AdvanceFollower(to, index)
		start := time.Now()
		if got := c.get(follower, "k", index); got != "v" {
			t.Errorf("k = %q", got)
		}
		if took := time.Since(start); took > time.Millisecond { // of virtual time
			t.Errorf("it took %v", took)
		}
		if follower.Status().CommitIndex != index {
			t.Errorf("the follower takes %d as committed, the leader %d", follower.Status().CommitIndex, index)
		}
	})
}
