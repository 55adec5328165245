package shard

import (
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

func TestALeaderKnowsHowFarTheOthersFollow(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		_, follower := c.follower(name)
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if _, err := leader.AddLearner(ctx, "n9/1", leader.Status().ConfigurationIndex); err != nil {
			t.Fatal(err)
		}
		before := time.Now()
		time.Sleep(2 * time.Second)
		index := leader.Status().LastLogIndex
		all := leader.Followers()
		if len(all) != 3 {
			t.Errorf("followers: %v", all)
		}
		for id, f := range all {
			switch {
			case id == "n9/1" && f != (Following{}):
				t.Errorf("a member that was never there follows: %+v", f)
			case id != "n9/1" && (f.Match != index || !f.Acked.After(before)):
				t.Errorf("%s: %+v, the log ends at %d", id, f, index)
			}
		}
		if all := follower.Followers(); all != nil {
			t.Errorf("a follower has followers: %v", all)
		}
	})
}

func TestStatusTellsWhetherTheConfigurationIsCommitted(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		if s := leader.Status(); !s.ConfigurationCommitted || s.ConfigurationIndex != 1 || s.FirstLogIndex != 1 {
			t.Errorf("at first: %+v", s)
		}
		for _, other := range c.members {
			if other != name {
				c.network.Isolate(other)
			}
		}
		ctx, cancel := within(500 * time.Millisecond)
		defer cancel()
		if _, err := leader.AddLearner(ctx, "n9/1", 1); err == nil {
			t.Fatal("changed the members without a quorum")
		}
		if s := leader.Status(); s.ConfigurationCommitted || s.ConfigurationIndex != 1 || len(s.Members) != 4 {
			t.Errorf("while a change is not committed: %+v", s)
		}
		for _, other := range c.members {
			c.network.Rejoin(other)
		}
		time.Sleep(10 * time.Second)
		_, leader = c.leader()
		if s := leader.Status(); !s.ConfigurationCommitted {
			t.Errorf("in the end: %+v", s)
		}
	})
}

func TestTheFirstIndexOfAnEmptyLogIsItsNext(t *testing.T) {
	bubble(t, 0, nil, func(c *cluster) {
		makeState(t, c.statePath("n1/1"), 3, 7, 4, 3, "old")
		if s := c.lone(1, 0, 3).Status(); s.FirstLogIndex != 5 {
			t.Errorf("%+v", s)
		}
	})
}

// While one replica of a group takes another's place, a node can have both.
func TestTwoReplicasOfAGroupHaveMetricsOfTheirOwn(t *testing.T) {
	metrics := prometheus.NewRegistry()
	series := func(name string) (n int) {
		families, err := metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == name {
				n += len(f.GetMetric())
			}
		}
		return n
	}
	tune := func(c *Config) { c.Registerer = metrics }
	bubble(t, 3, tune, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "v")
		for _, family := range []string{"kvd_shard_is_leader", "kvd_fsm_applied_index", "kvd_snapshot_streams_running"} {
			if n := series(family); n != 3 {
				t.Errorf("%d series of %s", n, family)
			}
		}
		c.stop(name)
		if n := series("kvd_shard_is_leader"); n != 2 {
			t.Errorf("%d series after one replica was closed", n)
		}
		if n := series("kvd_fsm_applied_index"); n != 2 {
			t.Errorf("%d series of states after one replica was closed", n)
		}
	})
}

func TestTheTailGrowsWithTheLog(t *testing.T) {
	tail := newTail(Config{SnapshotEntries: 100, SnapshotBytes: 1 << 20, TrailingEntries: 1000, TrailingBytes: 1 << 20})
	if cap(tail.sizes) != 0 {
		t.Errorf("room for %d entries before there is one", cap(tail.sizes))
	}
	for i := range 2500 {
		tail.add(&raft.Log{Data: make([]byte, i)})
	}
	if len(tail.sizes) != 1000 {
		t.Errorf("sizes of %d entries are kept", len(tail.sizes))
	}
	// From 2,563 bytes downwards, 448 fit in a mebibyte.
	if keep := tail.restart(); keep != 448 {
		t.Errorf("keeps %d entries", keep)
	}
}
