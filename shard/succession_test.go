package shard

import (
	"testing"
	"testing/synctest"
	"time"
)

// kill ends a process: its connections break, and its address refuses new ones.
func (c *cluster) kill(name string) {
	c.network.DropAll(name)
	if err := c.nodes[name].Close(); err != nil {
		c.t.Error(err)
	}
}

// elected is how long it takes until another one serves.
func (c *cluster) elected(except string) time.Duration {
	begun := time.Now()
	c.until(func() bool {
		for name, r := range c.replicas {
			if name != except && r.Serving() {
				return true
			}
		}
		return false
	})
	return time.Since(begun)
}

func TestTheFollowersOfADeadProcessElectAtOnce(t *testing.T) {
	for _, voters := range []int{3, 5} {
		bubble(t, voters, nil, func(c *cluster) {
			name, leader := c.leader()
			c.mustPut(leader, "k", "v")
			time.Sleep(5 * time.Second)
			c.kill(name)
			if d := c.elected(name); d > 200*time.Millisecond {
				t.Errorf("%d voters: another one led after %v", voters, d)
			}
			_, next := c.leader(name)
			c.mustPut(next, "k", "w")
			if got := next.Status().Term; got != leader.Status().Term+1 {
				t.Errorf("%d voters: the term went from %d to %d", voters, leader.Status().Term, got)
			}
		})
	}
}

// A witness agrees at once, and stands only where it is needed.
func TestADataReplicaSucceedsWithTheVoteOfAWitness(t *testing.T) {
	bubbleWith(t, 3, "n3", nil, func(c *cluster) {
		leader, _ := c.leaderOf("n1")
		c.mustPut(leader, "k", "v")
		time.Sleep(5 * time.Second)
		c.kill("n1")
		if d := c.elected("n1"); d > 200*time.Millisecond {
			t.Errorf("the other data replica led after %v", d)
		}
	})
}

func TestAWitnessThatHasMoreSucceeds(t *testing.T) {
	bubbleWith(t, 3, "n3", nil, func(c *cluster) {
		leader, _ := c.leaderOf("n1")
		time.Sleep(5 * time.Second)
		c.network.Partition("n1", "n2")
		c.mustPut(leader, "k", "on n1 and the witness alone")
		c.kill("n1")
		c.network.HealAll()
		if d := c.elected("n1"); d > 500*time.Millisecond {
			t.Errorf("the other data replica led after %v", d)
		}
		_, next := c.leader("n1")
		ctx, cancel := within(5 * time.Second)
		defer cancel()
		index, err := next.ReadIndex(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.get(next, "k", index); got == "" {
			t.Error("an acknowledged write is lost")
		}
	})
}

// One follower whose attempts are refused does not depose a leader that others hear.
func TestAWrongVerdictDisturbsNobody(t *testing.T) {
	disturbed := func(fault bool) (moved bool) {
		bubble(t, 3, func(cfg *Config) { cfg.Faults.succeedAlone = fault }, func(c *cluster) {
			name, leader := c.leader()
			other, _ := c.follower(name)
			time.Sleep(5 * time.Second)
			term := leader.Status().Term
			for _, link := range [][2]string{{name, other}, {other, name}} {
				c.network.Refuse(link[0], link[1], true)
			}
			c.network.Drop(name, other)
			time.Sleep(900 * time.Millisecond)
			for range 100 {
				for _, r := range c.replicas {
					moved = moved || r.Status().Term != term
				}
				time.Sleep(100 * time.Millisecond)
			}
			c.network.HealAll()
			time.Sleep(5 * time.Second)
			if !fault {
				c.mustPut(leader, "k", "v")
			}
		})
		return moved
	}
	if disturbed(false) {
		t.Error("a leader was deposed by one follower's verdict")
	}
	if !disturbed(true) {
		t.Error("a follower that trusts its own verdict was not noticed")
	}
}

// A leader that only falls silent is given its time.
func TestASilentLeaderIsGivenItsTime(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		term := leader.Status().Term
		time.Sleep(5 * time.Second)
		c.network.Isolate(name)
		time.Sleep(700 * time.Millisecond)
		for other, r := range c.replicas {
			if other != name && r.Status().Term != term {
				t.Errorf("%s gave the leader up before the heartbeat timeout", other)
			}
		}
		c.network.HealAll()
	})
}

// Two that stand share the votes, and the loser would not hear of the winner before its own timeout.
func TestAVoterAgreesToOneSuccessorAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s succession
		for _, step := range []struct {
			after time.Duration
			what  string
			got   func() bool
			want  bool
		}{
			{0, "the first", func() bool { return s.yield(7, "n1/1") }, true},
			{0, "the first again", func() bool { return s.yield(7, "n1/1") }, true},
			{agreementLasts - 1, "a second", func() bool { return s.yield(7, "n2/1") }, false},
			{agreementLasts, "a second when the first has not made it", func() bool { return s.yield(7, "n2/1") }, true},
			{0, "itself after that", func() bool { return s.stand(7) }, false},
			{0, "another term", func() bool { return s.stand(8) }, true},
			{0, "another one when it stands", func() bool { return s.yield(8, "n1/1") }, false},
		} {
			time.Sleep(step.after)
			if got := step.got(); got != step.want {
				t.Errorf("%s: %v", step.what, got)
			}
		}
	})
}
