package integration

import (
	"sync"
	"testing"
	"time"

	"kvd/integration/cluster"
)

// The same three tests in the strategy `consistent`: every key on as many nodes as its replication factor says.
// They log how long it took after a failure until every key was read through every survivor.

// killAtOnce kills nodes so that none outlives the other.
func killAtOnce(t *testing.T, c *cluster.Cluster, names ...string) {
	t.Helper()
	for _, name := range names {
		must(t, c.Node(name).Pause())
	}
	var group sync.WaitGroup
	for _, name := range names {
		group.Go(func() {
			if err := c.Node(name).Kill(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

// Test 1: three nodes, two copies, ten pairs; each node in turn fails, and all pairs are read from the others.
func TestSingleNodeFailureConsistent(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, sharded(3, 8, 2))
	data := pairs("single", 0, 10)
	write(t, c, "n1", data)
	for _, victim := range c.Names() {
		awaitHome(t, c, victim)
		killAtOnce(t, c, victim)
		survivors := others(c, victim)
		took := readWithin(t, c, survivors, data, failoverBusy)
		snapshotOf(t, c, survivors[0], "single/", data)
		t.Logf("3 nodes, 2 copies: killed %s, read all %d pairs from each of %v within %v", victim, len(data), survivors, took.Round(time.Millisecond))
		must(t, c.StartNodes(liveness(t), victim))
	}
}

// Test 2: five nodes, three copies, twenty pairs; two nodes fail at once, every two of them.
func TestMultipleNodeFailuresConsistent(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, sharded(5, 8, 3, quick...))
	data := pairs("multiple", 0, 20)
	write(t, c, "n1", data)
	names := c.Names()
	for i, first := range names {
		for _, second := range names[i+1:] {
			awaitHome(t, c, first)
			killAtOnce(t, c, first, second)
			survivors := others(c, first, second)
			took := readWithin(t, c, survivors, data, failoverBusy)
			snapshotOf(t, c, survivors[2], "multiple/", data)
			t.Logf("5 nodes, 3 copies: killed %s and %s at once, read all %d pairs from each of %v within %v",
				first, second, len(data), survivors, took.Round(time.Millisecond))
			must(t, c.StartNodes(liveness(t), first, second))
		}
	}
}

// Test 3: three nodes, two copies, ten pairs; one node fails, pairs are written on, it recovers, and another one
// fails: all pairs are read.
func TestNodeRecoveryConsistent(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, sharded(3, 8, 2))
	data := pairs("recovery", 0, 10)
	write(t, c, "n1", data)
	awaitHome(t, c, "n1")
	first, second := leader(t, c), ""
	killAtOnce(t, c, first)
	survivors := others(c, first)
	took := readWithin(t, c, survivors, data, failoverBusy)
	meanwhile := pairs("recovery", 10, 20)
	write(t, c, survivors[0], meanwhile)
	must(t, c.StartNodes(liveness(t), first))
	all := append(data, meanwhile...)
	readWithin(t, c, []string{first}, all, failoverBusy)
	awaitHome(t, c, first)
	second = survivors[1]
	killAtOnce(t, c, second)
	again := readWithin(t, c, others(c, second), all, failoverBusy)
	snapshotOf(t, c, first, "recovery/", all)
	t.Logf("3 nodes, 2 copies: wrote %d pairs, killed %s (all read within %v), wrote %d more, recovered it, killed %s, read all %d from each of %v within %v",
		len(data), first, took.Round(time.Millisecond), len(meanwhile), second, len(all), others(c, second), again.Round(time.Millisecond))
}
