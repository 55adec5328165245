package integration

import (
	"testing"

	"kvd/integration/cluster"
)

// The three tests of fault tolerance of the project's founding report, by SIGKILL of real processes.

// Test 1: three nodes, ten pairs, one node fails, all pairs are read.
func TestSingleNodeFailure(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Nodes: 3, Args: quick})
	data := pairs("single", 0, 10)
	write(t, c, "n1", data)
	victim := leader(t, c) // the worst choice
	must(t, c.Node(victim).Kill())
	for _, name := range others(c, victim) {
		read(t, c, name, data)
	}
	t.Logf("3 nodes: wrote %d pairs, killed the leader %s, read all of them from %v", len(data), victim, others(c, victim))
}

// Test 2: five nodes, twenty pairs, two nodes fail at once, all pairs are read.
func TestMultipleNodeFailures(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Nodes: 5, Args: quick})
	data := pairs("multiple", 0, 20)
	write(t, c, "n1", data)
	victims := []string{leader(t, c)}
	victims = append(victims, others(c, victims[0])[0])
	for _, name := range victims {
		must(t, c.Node(name).Pause()) // so that none outlives the other
	}
	for _, name := range victims {
		must(t, c.Node(name).Kill())
	}
	for _, name := range others(c, victims...) {
		read(t, c, name, data)
	}
	more := pairs("after", 0, 20)
	write(t, c, others(c, victims...)[0], more)
	read(t, c, others(c, victims...)[2], more)
	t.Logf("5 nodes: wrote %d pairs, killed %v at once, read all of them from %v, wrote and read %d more", len(data), victims, others(c, victims...), len(more))
}

// Test 3: three nodes, ten pairs, one node fails, is recovered and has everything; also what was written
// meanwhile, and also when it is needed because another node fails.
func TestNodeRecovery(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Nodes: 3, Args: quick})
	data := pairs("recovery", 0, 10)
	write(t, c, "n1", data)
	first := leader(t, c)
	must(t, c.Node(first).Kill())
	survivor := others(c, first)[0]
	meanwhile := pairs("meanwhile", 0, 10)
	write(t, c, survivor, meanwhile)
	must(t, c.StartNodes(liveness(t), first))
	read(t, c, first, append(data, meanwhile...))
	second := leader(t, c, first)
	must(t, c.Node(second).Kill())
	for _, name := range others(c, second) {
		read(t, c, name, append(data, meanwhile...))
	}
	t.Logf("3 nodes: wrote %d pairs, killed %s, wrote %d more, recovered it, killed %s, read all %d from %v",
		len(data), first, len(meanwhile), second, len(data)+len(meanwhile), others(c, second))
}
