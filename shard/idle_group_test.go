package shard

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// framesSent is how many messages all nodes have sent.
func (c *cluster) framesSent() (n float64) {
	c.t.Helper()
	families, err := c.metrics.Gather()
	if err != nil {
		c.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "kvd_transport_peer_frames_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "direction" && l.GetValue() == "out" {
					n += m.GetCounter().GetValue()
				}
			}
		}
	}
	return n
}

func TestAnIdleGroupIsQuiet(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		_, leader := c.leader()
		c.mustPut(leader, "k", "v")
		time.Sleep(time.Second)
		before := c.framesSent()
		const seconds = 60
		time.Sleep(seconds * time.Second)
		// Two followers, a few heartbeats a second, with their answers; and now
		// and then an AppendEntries that tells nothing, or a ping.
		if perSecond := (c.framesSent() - before) / seconds; perSecond > 2*heartbeats*2+3 {
			t.Errorf("%.1f messages a second", perSecond)
		}
		if !leader.Serving() {
			t.Error("the leader was not heard often enough")
		}
	})
}

// A read makes a leader send heartbeats at once.
func TestAReadInAnIdleGroupDoesNotWaitForTheBeat(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		_, leader := c.leader()
		c.mustPut(leader, "k", "v")
		time.Sleep(time.Second)
		for i := range 20 {
			time.Sleep(time.Second + time.Duration(i)*37*time.Millisecond) // somewhere between two beats
			ctx, cancel := within(time.Second)
			start := time.Now()
			if _, err := leader.ReadIndex(ctx); err != nil {
				t.Error(err)
			}
			if took := time.Since(start); took > time.Millisecond { // of virtual time
				t.Errorf("a read took %v", took)
			}
			cancel()
		}
	})
}

// Raft would tell them after a CommitTimeout.
func TestFollowersLearnOfACommitSoon(t *testing.T) {
	slow := func(c *Config) { c.HeartbeatTimeout, c.ElectionTimeout = time.Second, time.Second }
	bubble(t, 3, slow, func(c *cluster) {
		name, leader := c.leader()
		time.Sleep(10 * time.Second)
		for range 10 {
			time.Sleep(1234 * time.Millisecond)
			c.mustPut(leader, "k", "v")
			index := leader.Status().CommitIndex
			time.Sleep(25 * time.Millisecond)
			for _, other := range c.members {
				if s := c.replicas[other].Status(); other != name && s.AppliedIndex < index {
					t.Errorf("%s has applied %d of %d", other, s.AppliedIndex, index)
				}
			}
		}
	})
}

// So does one that gets and confirms the entry long after it was committed.
func TestASlowFollowerLearnsOfACommitSoon(t *testing.T) {
	slow := func(c *Config) { c.HeartbeatTimeout, c.ElectionTimeout = time.Second, time.Second }
	bubble(t, 3, slow, func(c *cluster) {
		name, leader := c.leader()
		other, follower := c.follower(name)
		time.Sleep(10 * time.Second)
		c.network.Delay(name, other, 50*time.Millisecond)
		c.network.Delay(other, name, 50*time.Millisecond)
		for range 10 {
			time.Sleep(2345 * time.Millisecond)
			c.mustPut(leader, "k", "v")
			index := leader.Status().CommitIndex
			if s := follower.Status(); s.AppliedIndex >= index {
				t.Fatal("it is not slow")
			}
			time.Sleep(300 * time.Millisecond) // three ways between the two take half of that
			if s := follower.Status(); s.AppliedIndex < index {
				t.Errorf("%s has applied %d of %d", other, s.AppliedIndex, index)
			}
		}
	})
}

// A follower that forgets the commit index learns it again, though its leader
// has nothing new to tell and the connection between the two has stayed.
func TestAReopenedFollowerLearnsTheCommitIndex(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "v")
		time.Sleep(10 * time.Second)
		to, follower := c.follower(name)
		cfg := follower.cfg
		cfg.Registerer, cfg.Bootstrap = prometheus.NewRegistry(), nil
		if err := follower.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c.replicas[to] = again
		time.Sleep(time.Minute)
		if s := again.Status(); s.CommitIndex != leader.Status().CommitIndex {
			t.Errorf("%d is committed, it knows of %d", leader.Status().CommitIndex, s.CommitIndex)
		}
	})
}
