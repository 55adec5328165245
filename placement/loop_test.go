package placement

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func consistent(shards, replicas int, witnesses string) *ClusterConfig {
	return &ClusterConfig{Strategy: "consistent", Shards: shards, ReplicationFactor: replicas, Witnesses: witnesses}
}

// without is home with nothing on a node.
func without(node string) func(*Map, Overview) bool {
	return func(m *Map, o Overview) bool { return home(m, o) && on(o, node) == 0 }
}

// with is home with something on a node.
func with(node string) func(*Map, Overview) bool {
	return func(m *Map, o Overview) bool { return home(m, o) && on(o, node) > 0 }
}

// fill writes a key to each shard.
func (c *testCluster) fill() {
	c.t.Helper()
	for n := range c.cfg.Shards {
		c.put(GroupOf(n), "k", fmt.Sprint("v", n))
	}
}

// check reads them.
func (c *testCluster) check() {
	c.t.Helper()
	for n := range c.cfg.Shards {
		if v := c.get(GroupOf(n), "k"); v != fmt.Sprint("v", n) {
			c.t.Errorf("shard %d has %q", n, v)
		}
	}
}

func TestAStoppedNodesShardsAreRebuiltAndGoHome(t *testing.T) {
	rebuildAndGoHome(t, 4, 3, WitnessesNone)
}

// rebuildAndGoHome stops one of the nodes for as long as it takes to rebuild its
// replicas, where there are nodes for them.
func rebuildAndGoHome(t *testing.T, nodes, replicas int, witnesses string) {
	bubble(t, nodes, consistent(6, replicas, witnesses), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		c.fill()
		n := c.nodes["n3"]
		c.stop("n3")
		stopped := time.Now()
		rebuilt := without("n3")
		if data, w := Slots(*c.cfg, nodes); data+w > nodes-1 {
			// There are fewer nodes than voters: the dead one stays a member.
			rebuilt = func(_ *Map, o Overview) bool {
				return time.Since(stopped) > 31*time.Second && !slices.ContainsFunc(o.Shards, func(s ShardOverview) bool { return len(s.Target) != nodes-1 || !filled(s) })
			}
		}
		c.await(60*time.Second, "rebuilding", rebuilt)
		t.Log("rebuilt", time.Since(stopped)-30*time.Second, "after it was down")
		c.check()
		c.start(n.member())
		t.Log("home after", c.await(20*time.Second, "going home", with("n3")))
		c.check()
	})
}

// filled reports whether every slot of the shard has a voter that lives.
func filled(s ShardOverview) bool {
	for _, slot := range s.Target {
		if !slices.ContainsFunc(s.Replicas, func(r ReplicaOverview) bool {
			return r.Node == slot.Node && r.Role == slot.Role && r.Alive && r.State == replicaVoter
		}) {
			return false
		}
	}
	return true
}

// Whoever leads group 0 dies after each of its steps, and its replicas with it:
// the next one goes on, and nothing that was begun is thrown away.
func TestAnotherLeaderGoesOnAfterEachStep(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for i := range uint64(2) {
		t.Run(fmt.Sprint("seed ", seed+i), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed+i, 0))
			bubble(t, 5, consistent(3, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
				steps := make(chan ShardStep)
				c.restart(func(cfg *Config) { cfg.DownAfter = 5 * time.Second })
				c.await(30*time.Second, "founding", home)
				c.fill()
				c.restart(func(cfg *Config) {
					cfg.DownAfter = 5 * time.Second
					cfg.stepped = func(s ShardStep) {
						select {
						case steps <- s:
						case <-time.After(time.Millisecond):
						}
					}
				})
				c.await(30*time.Second, "starting again", home)
				n := c.nodes["n2"]
				c.stop("n2")
				took := make(map[Action]int)
				for still := false; !still; {
					select {
					case step := <-steps:
						took[step.Action]++
						if took[Create] > 20 {
							t.Fatalf("what was begun is thrown away: %v", took)
						}
						if leader := c.leader(); leader != nil {
							c.stop(leader.name)
							time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond)
							c.start(leader.member())
						}
					case <-time.After(30 * time.Second):
						still = true
					}
				}
				t.Log("killed after", took)
				c.await(time.Second, "rebuilding", without("n2"))
				c.check()
				c.start(n.member())
				c.await(time.Minute, "going home", with("n2"))
				c.check()
			})
		})
	}
}

// restart stops all nodes and starts them with another configuration.
func (c *testCluster) restart(tune func(*Config)) {
	var members []Member
	for name, n := range c.nodes {
		members = append(members, n.member())
		c.stop(name)
	}
	c.tune = tune
	for _, m := range members {
		c.start(m)
	}
}

// A leader counts only the silence that it has heard itself.
func TestANewLeaderCallsNobodyDownTooSoon(t *testing.T) {
	bubble(t, 4, consistent(3, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		silent := "n4"
		if c.leader().name == silent {
			silent = "n1"
		}
		c.stop(silent)
		time.Sleep(25 * time.Second)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		old := c.leader()
		heir := ""
		for name := range c.nodes {
			if name != old.name {
				heir = name
			}
		}
		if err := old.group0.TransferLeadership(ctx, heir); err != nil {
			t.Fatal(err)
		}
		changed := time.Now()
		c.await(60*time.Second, "rebuilding", func(m *Map, o Overview) bool {
			for _, n := range o.Nodes {
				if n.Name == silent && n.State == nodeDown && time.Since(changed) < 30*time.Second {
					t.Errorf("%s is down after %v", silent, time.Since(changed))
				}
			}
			return without(silent)(m, o)
		})
		if leader := c.leader(); leader == old {
			t.Error("the leader is the old one")
		}
	})
}

func TestAMemberIsDrainedAndLeaves(t *testing.T) {
	bubble(t, 4, consistent(6, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		c.fill()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		leader := c.leader()
		if err := leader.reconciler.Leave(ctx, "n9", false); !errors.Is(err, ErrUnknownMember) {
			t.Errorf("a stranger leaves: %v", err)
		}
		// The leader of group 0 itself, which has to hand everything over.
		for range 2 {
			if err := leader.reconciler.Leave(ctx, leader.name, false); err != nil {
				t.Fatal(err)
			}
		}
		took := c.await(30*time.Second, "leaving", func(m *Map, o Overview) bool {
			_, in := m.Member(leader.name)
			return !in && home(m, o)
		})
		t.Log("left after", took)
		c.stop(leader.name)
		c.check()
		// Three are left, and each shard has three copies.
		leader = c.leader()
		victim := ""
		for name := range c.nodes {
			if name != leader.name {
				victim = name
			}
		}
		if err := leader.reconciler.Leave(ctx, victim, false); !errors.Is(err, ErrTooFew) {
			t.Errorf("the third last leaves: %v", err)
		}
		if err := leader.reconciler.Leave(ctx, victim, true); err != nil {
			t.Errorf("by force: %v", err)
		}
		c.await(30*time.Second, "leaving by force", func(m *Map, o Overview) bool {
			return len(m.Members) == 2 && home(m, o)
		})
		c.stop(victim)
		c.check()
	})
}

func TestAMemberThatIsNeededCannotLeave(t *testing.T) {
	bubble(t, 3, nil, func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", func(m *Map, o Overview) bool { return len(m.Members) == 3 })
		leader := c.leader()
		var others []string
		for name := range c.nodes {
			if name != leader.name {
				others = append(others, name)
			}
		}
		c.stop(others[0])
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		time.Sleep(5 * time.Second)
		if err := leader.reconciler.Leave(ctx, others[1], true); !errors.Is(err, ErrQuorum) {
			t.Errorf("of three, of which one is dead, a live one leaves: %v", err)
		}
		if err := leader.reconciler.Leave(ctx, others[0], false); err != nil {
			t.Errorf("the dead one leaves: %v", err)
		}
		c.await(30*time.Second, "leaving", func(m *Map, o Overview) bool { return len(m.Members) == 2 })
		if members := leader.group0.Status().Members; len(members) != 2 {
			t.Errorf("members %+v", members)
		}
	})
}

func TestTheOnlyMemberCannotLeave(t *testing.T) {
	bubble(t, 1, nil, func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", func(m *Map, o Overview) bool { return len(m.Members) == 1 })
		leader := c.leader()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := leader.reconciler.Leave(ctx, leader.name, true); !errors.Is(err, ErrLast) {
			t.Errorf("the only member leaves: %v", err)
		}
	})
}

// join starts a node that is no founder.
func (c *testCluster) join(name string, incarnation uint64, weight float64) *testNode {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	m, _, err := c.leader().reconciler.Join(ctx, name, incarnation, weight)
	if err != nil {
		c.t.Fatal(err)
	}
	m.Weight = weight
	return c.start(m)
}

func TestANodeJoinsAndReplacesAnother(t *testing.T) {
	bubble(t, 3, consistent(6, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		c.fill()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		leader := c.leader()
		if err := leader.reconciler.ReplaceMember(ctx, "n1", "n4"); !errors.Is(err, ErrUnknownMember) {
			t.Errorf("replaced by a stranger: %v", err)
		}
		n4 := c.join("n4", 1, 1)
		if again, _, err := leader.reconciler.Join(ctx, "n4", 1, 1); err != nil || again.Replica != n4.replica {
			t.Errorf("joins again: %+v, %v", again, err)
		}
		if _, _, err := leader.reconciler.Join(ctx, "n4", 2, 1); !errors.Is(err, ErrMemberExists) {
			t.Errorf("another one joins under its name: %v", err)
		}
		t.Log("joined after", c.await(30*time.Second, "joining", with("n4")))
		out := "n1"
		if leader.name == out {
			out = "n2"
		}
		if err := c.leader().reconciler.ReplaceMember(ctx, out, "n4"); err != nil {
			t.Fatal(err)
		}
		c.await(30*time.Second, "replacing", func(m *Map, o Overview) bool {
			_, in := m.Member(out)
			return !in && home(m, o)
		})
		c.check()
		// The same name later is another replica.
		former := c.nodes[out].replica
		c.stop(out)
		if n := c.join(out, 2, 1); n.replica == former {
			t.Errorf("%s is used again", former)
		}
		c.await(30*time.Second, "joining again", with(out))
	})
}

// A node that lost its directory gets new replicas where it had them.
func TestAWipedNodesReplicasAreRebuilt(t *testing.T) {
	bubble(t, 3, consistent(4, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		c.fill()
		wiped := c.nodes["n2"]
		c.stop("n2")
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for c.leader() == nil {
			time.Sleep(100 * time.Millisecond)
		}
		next, err := c.leader().reconciler.Replace(ctx, Member{Name: "n2", Incarnation: 1, Replica: wiped.replica}, 2)
		if err != nil {
			t.Fatal(err)
		}
		c.start(next)
		t.Log("rebuilt after", c.await(30*time.Second, "rebuilding", func(m *Map, o Overview) bool {
			for _, s := range m.Shards {
				for _, r := range s.Replicas {
					if r.Node() == "n2" && r.Incarnation != 2 {
						return false
					}
				}
			}
			return home(m, o)
		}))
		c.check()
	})
}

// A replica whose files are damaged is rebuilt though its node lives.
func TestALostReplicaIsRebuilt(t *testing.T) {
	bubble(t, 3, consistent(2, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		c.fill()
		n := c.nodes["n2"]
		var lost ReplicaRef
		for ref, replica := range n.Replicas() {
			if ref.Group == 1 {
				lost = ref
				n.mu.Lock()
				delete(n.open, ref)
				n.lost = append(n.lost, ref)
				n.mu.Unlock()
				if err := replica.Close(); err != nil {
					t.Fatal(err)
				}
			}
		}
		n.reconciler.Nudge()
		c.await(30*time.Second, "rebuilding", func(m *Map, o Overview) bool {
			s, _ := m.shardOf(1)
			return home(m, o) && !slices.ContainsFunc(s.Replicas, func(r Replica) bool { return r.ID == lost.ID })
		})
		c.check()
	})
}

func TestAHeavierNodeGetsMoreShards(t *testing.T) {
	bubble(t, 4, consistent(12, 2, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		before := 0
		c.await(time.Second, "counting", func(m *Map, o Overview) bool { before = on(o, "n1"); return true })
		m := c.nodes["n1"].member()
		c.stop("n1")
		m.Weight = 3
		c.start(m)
		c.await(30*time.Second, "moving", func(m *Map, o Overview) bool {
			n1, _ := m.Member("n1")
			return n1.Weight == 3 && home(m, o) && on(o, "n1") > before
		})
	})
}

// What a leader remembers that has been replaced deletes no replica.
func TestOnlyAConfirmedLeaderLetsAReplicaBeDeleted(t *testing.T) {
	bubble(t, 3, consistent(1, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		old := c.at(1)
		if err := confirmExcluded(context.Background(), old, "n9/9"); err != nil {
			t.Errorf("a stranger is no member: %v", err)
		}
		if err := confirmExcluded(context.Background(), old, old.Status().Replica); err == nil {
			t.Error("a member is none")
		}
		c.network.Isolate(Replica{ID: old.Status().Replica}.Node())
		time.Sleep(time.Millisecond) // what was answered before proves nothing
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		if err := confirmExcluded(ctx, old, "n9/9"); err == nil {
			t.Error("a leader that nobody follows any more knows who is a member")
		}
		c.network.HealAll()
		time.Sleep(5 * time.Second)
	})
}

// Of a leader of group 0 that has been replaced no step is taken.
func TestAStepOfAFormerLeaderIsRefused(t *testing.T) {
	bubble(t, 3, consistent(1, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		n := c.nodes[Replica{ID: c.at(1).Status().Replica}.Node()]
		status := c.at(1).Status()
		step := ShardStep{Action: AddLearner, Group: 1, Replica: "n9/9", Node: "n9", Role: Data, Prev: status.ConfigurationIndex}
		term := n.group0.Leader().Term
		if _, err := n.reconciler.obey(context.Background(), stepRequest{Term: term - 1, Step: step}); !errors.Is(err, errStaleStep) {
			t.Errorf("obeyed a former leader: %v", err)
		}
		if got := c.at(1).Status().ConfigurationIndex; got != status.ConfigurationIndex {
			t.Error("and changed the group")
		}
		if _, err := n.reconciler.obey(context.Background(), stepRequest{Term: term, Step: step}); err != nil {
			t.Errorf("refused the present one: %v", err)
		}
	})
}

// A node that others cannot hear is down, whatever it does; when it is heard
// again its shards go home.
func TestAnIsolatedNodesShardsAreRebuiltAndGoHome(t *testing.T) {
	bubble(t, 4, consistent(4, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		c.fill()
		silent := "n1"
		if c.leader().name == silent {
			silent = "n2"
		}
		c.network.Isolate(silent)
		c.await(90*time.Second, "rebuilding", without(silent))
		c.network.HealAll()
		c.await(30*time.Second, "going home", with(silent))
		c.check()
	})
}

// Votes in the map's group go to nodes that live.
func TestADownNodesVoteGoesToAnother(t *testing.T) {
	bubble(t, 6, consistent(1, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		voters := func() (names []string) {
			if leader := c.leader(); leader != nil {
				for _, m := range leader.group0.Status().Members {
					if m.Voter {
						names = append(names, m.Node)
					}
				}
			}
			return names
		}
		c.await(30*time.Second, "founding", home)
		n7 := c.join("n7", 1, 1)
		c.await(30*time.Second, "joining", func(m *Map, o Overview) bool { return len(m.Members) == 7 && home(m, o) })
		if slices.Contains(voters(), n7.name) {
			t.Fatalf("%s has a vote beside %d founders", n7.name, 6)
		}
		for _, name := range []string{"n1", "n2"} {
			c.stop(name)
			c.await(90*time.Second, "replacing "+name, func(m *Map, o Overview) bool {
				return len(voters()) == mapVoters && !slices.Contains(voters(), name)
			})
		}
	})
}

// chaos stops, isolates and wipes nodes at random, as far as every shard bears
// it, while clients write.
type chaos struct {
	*testCluster
	random  *rand.Rand
	away    []Member // by the order in which they left; without replica if only isolated
	written []int    // by shard, acknowledged
	events  []string
}

// leave makes one more node go, in one of three ways.
func (c *chaos) leave() {
	var names []string
	for name := range c.nodes {
		if !slices.ContainsFunc(c.away, func(m Member) bool { return m.Name == name }) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	m := c.nodes[names[c.random.IntN(len(names))]].member()
	switch c.random.IntN(3) {
	case 0:
		c.network.Isolate(m.Name)
		m.Replica = ""
	case 1:
		c.stop(m.Name)
	default:
		c.stop(m.Name)
		m.Incarnation++
	}
	c.away = append(c.away, m)
	c.events = append(c.events, fmt.Sprintf("%s leaves as %+v", m.Name, m))
}

// comeBack brings the node back that has been away for longest.
func (c *chaos) comeBack() {
	m := c.away[0]
	c.away = c.away[1:]
	c.events = append(c.events, m.Name+" comes back")
	if m.Replica == "" {
		c.network.Rejoin(m.Name)
		return
	}
	for range 600 {
		if next, err := c.readmit(m); err == nil {
			c.start(next)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	c.t.Fatalf("%s is not let in: %v", m.Name, c.events)
}

// readmit asks the leader what a node is now.
func (c *chaos) readmit(m Member) (Member, error) {
	for _, n := range c.nodes {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		known, err := n.reconciler.fresh(ctx)
		if err != nil {
			continue
		}
		old, _ := known.Member(m.Name)
		if old.Incarnation == m.Incarnation {
			return old, nil
		}
		return n.reconciler.Replace(ctx, old, m.Incarnation)
	}
	return Member{}, errors.New("no leader")
}

// write makes a few writes, and lets some time pass.
func (c *chaos) write() {
	for range c.random.IntN(8) {
		n := c.random.IntN(len(c.written))
		c.put(GroupOf(n), "k", fmt.Sprint(c.written[n]+1))
		c.written[n]++
		time.Sleep(time.Duration(c.random.IntN(4000)) * time.Millisecond)
	}
}

// With witnesses a shard outlives all of its copies but one, without them what
// their majority outlives.
func TestShardsOutliveNodes(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for i, kind := range []struct {
		cfg  *ClusterConfig
		away int
	}{
		{consistent(3, 3, WitnessesNone), 1},
		{consistent(3, 2, WitnessesAuto), 1},
		{consistent(3, 3, WitnessesAuto), 2},
	} {
		seed := seed + uint64(i)
		t.Run(fmt.Sprintf("%d copies, witnesses %s, seed %d", kind.cfg.ReplicationFactor, kind.cfg.Witnesses, seed), func(t *testing.T) {
			bubble(t, 5, kind.cfg, func(t *testing.T, cluster *testCluster) {
				cluster.restart(func(cfg *Config) { cfg.DownAfter = 10 * time.Second })
				c := &chaos{testCluster: cluster, random: rand.New(rand.NewPCG(seed, 1)), written: make([]int, kind.cfg.Shards)}
				defer func() {
					if t.Failed() {
						t.Log(c.events)
					}
				}()
				rounds := 8
				if testing.Short() {
					rounds = 2
				}
				for range rounds {
					c.await(3*time.Minute, "rest", home)
					for range kind.away {
						c.leave()
						c.write()
					}
					for len(c.away) > 0 {
						c.comeBack()
						c.write()
					}
				}
				c.await(3*time.Minute, "going home", home)
				for n, want := range c.written {
					if got := c.get(GroupOf(n), "k"); want > 0 && got != fmt.Sprint(want) {
						t.Errorf("shard %d has %q of %d writes", n, got, want)
					}
				}
			})
		})
	}
}
