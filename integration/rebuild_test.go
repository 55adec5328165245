package integration

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"kvd/integration/cluster"
	"kvd/placement"
)

// isDown says whether a node is taken to be down.
func isDown(node string) func(placement.Overview) error {
	return func(view placement.Overview) error {
		for _, n := range view.Nodes {
			if n.Name == node && n.State == "down" {
				return nil
			}
		}
		return fmt.Errorf("%s is not down: %+v", node, view.Nodes)
	}
}

// A node stays down: its copies are made anew on other nodes and its vote goes, so that one more may fail. When it is back, everything
// goes home, and what the others held for it is gone from their disks.
func TestADownNodesCopiesAreRebuiltAndComeHome(t *testing.T) {
	t.Parallel()
	const copies = 2
	c := cluster.Run(t, sharded(4, 8, copies, with("--down-after=2s")...))
	data := pairs("rebuilt", 0, 300)
	write(t, c, "n1", data)
	before := awaitHome(t, c, "n1")
	first := before.Shards[0].Target[0].Node
	held := dataOn(before, first)
	if held == 0 {
		t.Fatalf("%s holds nothing: %+v", first, before)
	}

	killAtOnce(t, c, first)
	began := time.Now()
	survivor := others(c, first)[0]
	awaitShards(t, c, survivor, isDown(first))
	down := time.Since(began)
	awaitShards(t, c, survivor, eachShard(copied(copies)))
	restored := time.Since(began)
	after := awaitHome(t, c, survivor) // of those that live: the dead one has no vote any more
	for _, s := range after.Shards {
		for _, target := range s.Target {
			if target.Node == first {
				t.Fatalf("%s is down, and shard %d is wanted on it", first, s.Number)
			}
		}
		if s.Tolerates < 1 {
			t.Fatalf("shard %d bears no further failure: %+v", s.Number, s)
		}
	}
	awaitNoVote(t, c, first)
	more := pairs("rebuilt", 300, 400)
	write(t, c, survivor, more)
	data = append(data, more...)

	second := others(c, first)[1]
	killAtOnce(t, c, second)
	again := readWithin(t, c, others(c, first, second), data, failoverBusy)
	snapshotOf(t, c, others(c, first, second)[1], "rebuilt/", data)

	began = time.Now()
	must(t, c.StartNodes(liveness(t), second, first))
	view := awaitHome(t, c, first)
	home := time.Since(began)
	if now := dataOn(view, first); now != held {
		t.Fatalf("%s held %d data replicas, and now %d", first, held, now)
	}
	onDisk(t, c, view)
	for _, name := range c.Names() {
		snapshotOf(t, c, name, "rebuilt/", data)
	}
	t.Logf("4 nodes, 2 copies: killed %s (%d shards' data), down after %v, all copies back after %v; killed %s, read all %d pairs within %v; both back, at home after %v and nothing else on disk",
		first, held, down.Round(time.Millisecond), restored.Round(time.Millisecond), second, len(data), again.Round(time.Millisecond), home.Round(time.Millisecond))
}

// awaitNoVote waits until a node that is down has lost its vote in group 0, where the map is: it is added again without.
func awaitNoVote(t *testing.T, c *cluster.Cluster, name string) {
	t.Helper()
	eventually(t, name+" has no vote in group 0", func(context.Context) (bool, error) {
		return slices.ContainsFunc(others(c, name), func(other string) bool {
			return c.Node(other).Log.Contains(`changing the group's members" step="add learner" replica=` + name + "/")
		}), nil
	})
}

// dataOn counts the data replicas of a node.
func dataOn(view placement.Overview, node string) (count int) {
	for _, s := range view.Shards {
		for _, r := range s.Replicas {
			if r.Node == node && r.Role == placement.Data {
				count++
			}
		}
	}
	return count
}
