package placement

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"kvd/shard"
)

// Each of two could leave alone. Together they must not: too few would remain.
func TestOfTwoThatLeaveAtTheSameTimeOneStays(t *testing.T) {
	bubble(t, 3, consistent(2, 2, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		leader := c.leader()
		var all sync.WaitGroup
		var mu sync.Mutex
		left := 0
		for name := range c.nodes {
			if name == leader.name {
				continue
			}
			all.Go(func() {
				err := leader.reconciler.Leave(ctx, name, false)
				if err != nil && !errors.Is(err, ErrTooFew) && !errors.Is(err, ErrConflict) {
					t.Errorf("%s: %v", name, err)
				}
				if err == nil {
					mu.Lock()
					defer mu.Unlock()
					left++
				}
			})
		}
		all.Wait()
		if left != 1 {
			t.Errorf("%d of two may leave, of three nodes that hold two copies", left)
		}
	})
}

// A node that has heard of a later leader of group 0 obeys no former one, even
// if its own replica of group 0 knows nothing of the later one yet.
func TestAStepThatComesAfterOneOfALaterLeaderIsRefused(t *testing.T) {
	bubble(t, 3, consistent(1, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		n := c.nodes[Replica{ID: c.at(1).Status().Replica}.Node()]
		status := c.at(1).Status()
		step := ShardStep{Action: AddLearner, Group: 1, Replica: "n9/9", Node: "n9", Role: Data, Prev: status.ConfigurationIndex}
		forget := ShardStep{Action: Forget, Group: 1, Replica: "n9/9", Node: "n9", Role: Data, Prev: status.ConfigurationIndex}
		term := n.group0.Leader().Term
		if _, err := n.reconciler.obey(context.Background(), stepRequest{Term: term + 1, Step: forget}); err != nil {
			t.Fatal(err)
		}
		if _, err := n.reconciler.obey(context.Background(), stepRequest{Term: term, Step: step}); !errors.Is(err, errStaleStep) {
			t.Errorf("adds to the group what was forgotten: %v", err)
		}
	})
}

// A learner can be added while its node leaves the map. Nobody would ever remove
// it, and its node would go on to hear of a leader.
func TestALearnerThatIsNoMemberIsRemoved(t *testing.T) {
	m := newModel(3)
	m.group["old/1"] = shard.Member{ID: "old/1", Node: "old"}
	if step, ok := Plan(m.view()); !ok || step.Action != Remove || step.Replica != "old/1" {
		t.Errorf("planned %v, %v", step, ok)
	}
}

// The map that a leader remembers of an earlier term may lack a data replica
// that another leader has added since, and that needs what a witness has.
func TestNoFloorFollowsFromAMapOfAnEarlierTerm(t *testing.T) {
	replica := leader(t)
	r := &Reconciler{cfg: Config{Replica: replica}}
	term, leads := r.observing()
	if !leads {
		t.Fatal("does not lead")
	}
	m := &Map{Shards: []Shard{{Replicas: []Replica{{ID: "n1/2", Incarnation: 1}, {ID: "n1/3w", Incarnation: 1}}}}}
	report := Report{Node: "n1", Incarnation: 1, Groups: []GroupReport{{Group: 1, Replica: "n1/2", Durable: 40}, {Group: 1, Replica: "n1/3w"}}}
	for _, at := range []uint64{term - 1, term} {
		r.current.Store(&known{m, at})
		answer, err := r.accept(report)
		if want := map[uint64]uint64{term: 40}[at]; err != nil || answer.Floors[1] != want {
			t.Errorf("in term %d, with a map of term %d: floors %v, %v", term, at, answer.Floors, err)
		}
	}
}

func TestReplicasThatAreNoMoreAreForgotten(t *testing.T) {
	var o observations
	o.begin(1)
	shards := []Shard{{Replicas: []Replica{{ID: "n1/1"}}}}
	o.durable[ReplicaRef{1, "n1/1"}] = 7
	for i := range uint64(2 * leastPruned) {
		o.durable[ReplicaRef{i + 2, "n1/2"}] = i
	}
	o.prune(shards)
	if floor, ok := o.floor(shards[0]); len(o.durable) != 1 || floor != 7 || !ok {
		t.Errorf("remembers %d, of which one is there at %d", len(o.durable), floor)
	}
}

// What a node says under another incarnation, or of another node's replicas,
// makes nobody forget what a data replica needs, and takes no room.
func TestReportsAreOfMembersAndOfTheirOwnReplicas(t *testing.T) {
	r := &Reconciler{cfg: Config{Replica: leader(t)}}
	term, _ := r.observing()
	m := &Map{Members: []Member{{Name: "n1", Incarnation: 1}}, Shards: []Shard{{Replicas: []Replica{{ID: "n1/2", Incarnation: 1}, {ID: "n2/3", Incarnation: 1}}}}}
	r.current.Store(&known{m, term})
	own, others := GroupReport{Group: 1, Replica: "n1/2", Durable: 40}, GroupReport{Group: 1, Replica: "n2/3", Durable: 50}
	for _, report := range []Report{{Node: "n1", Incarnation: 2}, {Node: "n3", Incarnation: 1}} {
		if _, err := r.accept(report); !errors.Is(err, ErrUnknownMember) {
			t.Errorf("accepted %+v: %v", report, err)
		}
	}
	if _, err := r.accept(Report{Node: "n1", Incarnation: 1, Groups: []GroupReport{own, others}}); err != nil {
		t.Error(err)
	}
	if floor, ok := r.seen.floor(m.Shards[0]); ok || len(r.seen.nodes) != 1 {
		t.Errorf("floor %d, %d nodes", floor, len(r.seen.nodes))
	}
}
