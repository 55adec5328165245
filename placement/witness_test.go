package placement

import (
	"fmt"
	"testing"
	"time"

	"kvd/shard"
)

func TestShardsWithWitnessesAreRebuiltAndGoHome(t *testing.T) {
	kinds := []struct{ nodes, replicas int }{{3, 2}, {4, 2}, {5, 2}, {5, 3}, {6, 3}}
	if testing.Short() {
		kinds = kinds[1:2]
	}
	for _, kind := range kinds {
		t.Run(fmt.Sprintf("%d copies on %d nodes", kind.replicas, kind.nodes), func(t *testing.T) {
			rebuildAndGoHome(t, kind.nodes, kind.replicas, WitnessesAuto)
		})
	}
}

// A witness drops the beginning of its log when all data replicas have it on
// disk, and keeps what one that is dead may need when it comes back.
func TestAWitnessDropsItsLogAsItIsTold(t *testing.T) {
	bubble(t, 3, consistent(1, 2, WitnessesAuto), func(t *testing.T, c *testCluster) {
		c.tuneLogs = func(cfg *shard.Config) { cfg.SnapshotEntries, cfg.TrailingEntries = 50, 10 }
		c.restart(nil)
		c.await(30*time.Second, "founding", home)
		write := func(n int) {
			for range n {
				c.put(1, "k", "v")
			}
		}
		var witness, behind *shard.Replica
		var nodeBehind *testNode
		for _, n := range c.nodes {
			for ref, replica := range n.Replicas() {
				switch {
				case RoleOf(ref.ID) == Witness:
					witness = replica
				case !replica.Serving():
					behind, nodeBehind = replica, n
				}
			}
		}
		first := func() uint64 { return witness.Status().FirstLogIndex }
		dropped := func(least uint64) {
			t.Helper()
			for start := time.Now(); first() <= least; time.Sleep(100 * time.Millisecond) {
				if time.Since(start) > 20*time.Second {
					t.Fatalf("the witness's log still begins at %d", first())
				}
				write(10)
			}
		}
		dropped(100)
		time.Sleep(time.Second)
		had := behind.Status().DurableIndex
		c.stop(nodeBehind.name)
		write(500)
		time.Sleep(20 * time.Second)
		write(100)
		if first() > had+1 {
			t.Errorf("the witness's log begins at %d, and a data replica that is dead has what comes before %d", first(), had+1)
		}
		c.start(nodeBehind.member())
		dropped(had + 100)
	})
}
