package report

import (
	"cmp"
	"fmt"
	"strings"
	"time"
)

// What the founding report says about the system, said of this one. Its headings are in the templates.

// Introduction is that section.
func (r *Report) Introduction() string {
	return "This project implements a distributed key-value store with fault tolerance using two replication strategies: " +
		"“full”, in which every node holds every key, and “consistent”, in which keys are hashed to shards of a few copies each, " +
		"placed on the nodes by a consistent hash ring. It handles node failures by redistributing keys, and recovers nodes when they come back online. " +
		"Every time below was measured in one run, with real processes that were ended by SIGKILL."
}

// fact is a line about the run.
type fact struct{ Name, Value string }

// Facts name the machine, the program and the run.
func (r *Report) Facts() (list []fact) {
	list = []fact{
		{"Date", fmt.Sprintf("%s; the run took %s", r.Started.Format("2 January 2006, 15:04 MST"), r.Took.Round(time.Second))},
		{"Machine", r.Machine.Words()},
		{"Disk", fmt.Sprintf("4 KiB appended to a file and synced in %s (median of %d)", Short(r.Machine.Sync), syncs)},
		{"kvd", strings.TrimSuffix(fmt.Sprintf("%s, %s", r.Program.Version, cmp.Or(r.Program.Revision, "unknown revision")), ", ")},
		{"Go", r.Program.Go},
		{"Command", r.Program.Command},
	}
	for _, c := range r.Clusters {
		list = append(list, fact{"Flags, " + c.Name(), "kvd start " + strings.Join(c.Flags, " ")})
	}
	return list
}

// module of the founding report, and where it lives.
type module struct {
	Number     int
	Name, Text string
	Features   []feature
}

type feature struct{ Name, Text string }

// Modules are that section.
func (r *Report) Modules() []module {
	performance := func(strategy string) []feature {
		return []feature{
			{"Write Performance Test", fmt.Sprintf("Measures the time required to write keys to a majority of their replicas, and to the disks there, with the strategy %s.", strategy)},
			{"Read Performance Test", "Measures the time required to read keys, linearizably: a read sees every write that was acknowledged before it began."},
			{"Node Failure and Recovery Test", "Measures what SIGKILL of a leader and of a follower does to steady load, and the time until the node has recovered."},
		}
	}
	return []module{
		{1, "ConsistentHash", "The packages ring and placement do what the founding report's ConsistentHash does:", []feature{
			{"Adding and Removing Nodes", "Adds nodes to the hash ring and removes them; only the shards that must move do."},
			{"Key Distribution", "Hashes a key to its shard, and retrieves the nodes responsible for it; redistributes copies when nodes fail, join or leave."},
			{"Node Recovery", "Makes the copies of a failed node elsewhere, and brings these temporarily relocated keys home when the node is back."},
		}},
		{2, "TestPerformanceFull", "This report's measurements with the strategy full:", performance(Full)},
		{3, "TestPerformanceConsistent", "This report's measurements with the strategy consistent:", performance(Consistent)},
	}
}

// toleranceTest is one of the three, in each strategy that was measured.
type toleranceTest struct {
	Number int
	Title  string
	Runs   []*Test
}

// ToleranceTests are the three tests of fault tolerance.
func (r *Report) ToleranceTests() (list []toleranceTest) {
	for _, t := range r.Tests {
		if n := len(list); n == 0 || !addRun(list, t) {
			list = append(list, toleranceTest{Number: t.Number, Title: t.Title, Runs: []*Test{t}})
		}
	}
	return list
}

func addRun(list []toleranceTest, t *Test) bool {
	for i := range list {
		if list[i].Number == t.Number {
			list[i].Runs = append(list[i].Runs, t)
			return true
		}
	}
	return false
}

// ToleranceWords introduce them.
func (r *Report) ToleranceWords() string {
	return "Nodes were killed and started again while keys were written and read. In each test the node that leads was the first to die, " +
		"nodes that fail together were stopped before they were killed so that none outlives the other, and every pair that was acknowledged was read " +
		"through every node that lived. " + fmt.Sprintf("%d of %s passed.", r.passed(), plural(len(r.Tests), "test"))
}

// measurement is one of the founding report's two tests of performance.
type measurement struct {
	Number int
	Title  string
	Runs   []measured
}

type measured struct {
	Layout
	Operation, Result string
	Bad               bool
}

// MeasurementWords introduce them.
func (r *Report) MeasurementWords() string {
	return fmt.Sprintf("The founding report measured 1000 pairs with 3 nodes and a replication factor of 2, and named %s for a write and %s for a read, on average. "+
		"A client that waits for each answer before it goes on measured:", Short(foundingWrite), Short(foundingRead))
}

// Measurements are the two tests of performance.
func (r *Report) Measurements() []measurement {
	return []measurement{
		{1, "Write Performance", r.measured(WriteOne, "Write", "write", foundingWrite)},
		{2, "Read Performance", r.measured(ReadOne, "Read", "read", foundingRead)},
	}
}

func (r *Report) measured(name, operation, noun string, before time.Duration) (list []measured) {
	for _, c := range r.Clusters {
		m := measured{Layout: c.Layout, Operation: fmt.Sprintf("%s %s key-value pairs.", operation, number(r.Load.Pairs))}
		if b := c.Bulk(name); b == nil || b.Error != "" {
			m.Bad, m.Result = true, "FAILED."
			if b != nil {
				m.Result = failedBecause(b.Error)
			}
		} else {
			m.Result = fmt.Sprintf("Average %s time: %s, %s %s.", noun, Short(b.Mean), times(before, b.Mean), Short(before))
		}
		list = append(list, m)
	}
	return list
}

// Method says how it was measured.
func (r *Report) Method() []string {
	l := r.Load
	return []string{
		"Every node is a process of its own, on the loopback interface of one machine. All nodes and the load generator share its processors and its disk, so clusters of more nodes have less of both for each.",
		fmt.Sprintf("Keys have a value of %d random bytes. A write is acknowledged once it is on the disks of a majority of its replicas. Reads are linearizable. Many clients talk to all nodes in turn, a single one to one node, whether that leads or not.", l.ValueBytes),
		fmt.Sprintf("Load while nodes fail: %g writes and %g reads become due per second, whatever becomes of those before them. A request's time counts from when it was due, so that waiting is not hidden. Clients know all nodes; one whose node dies connects to another.", l.WriteRate, l.ReadRate),
		"The time until writes succeed again is that of a write which is asked for right after the kill through the nodes that live, of one key in every shard, and repeated until it is acknowledged.",
		fmt.Sprintf("Copies are restored when every shard has all its copies, with a vote each, on nodes that live. %s of that time is --down-after, for which a node must be silent before its copies are made elsewhere.", Short(l.DownAfter)),
		"A node has caught up when its own state has everything that the leader had applied when its process started (full), or when it has a copy with a vote, and nothing left to catch up on, of every shard that it had before (consistent). Keys are home when every shard is on exactly the nodes that it was on before the kill.",
		"Before each kill pairs are written whose values are known. They, and those written after the kill, are read back from the others, and through the node itself once it has recovered.",
	}
}
