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
