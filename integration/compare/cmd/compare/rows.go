package main

import "strconv"

// row is a line of the tables.
type row struct {
	key, section, title, unit string
	decimals                  int
}

func (r row) format(value float64) string { return strconv.FormatFloat(value, 'f', r.decimals, 64) }

// Sections of the tables.
const (
	sectionRate     = "Operations per second"
	sectionMedian   = "Latency, median"
	sectionTail     = "Latency, 99th percentile"
	sectionCPU      = "Processor time of all servers per operation"
	sectionClient   = "Processor time of the client per operation (part of the same machine's)"
	sectionTool     = "Cross-check: operations per second, measured by etcd's own benchmark"
	sectionFailure  = "Failure and restart"
	sectionSize     = "Memory and disk, all three nodes"
	sectionDisrupts = "Puts at a fixed rate while something else goes on"
	sectionTime     = "How long that takes"
	sectionIdle     = "Idle"
	sectionWatch    = "Watch"
	sectionLease    = "Leases"
)

var sections = []string{
	sectionRate, sectionMedian, sectionTail, sectionCPU, sectionClient, sectionTool, sectionWatch, sectionLease,
	sectionFailure, sectionSize, sectionDisrupts, sectionTime, sectionIdle,
}

// rows lists all that can be measured, in the order of the tables.
var rows = listRows()

func listRows() []row {
	var all []row
	for _, l := range loads {
		all = append(all,
			row{l.key() + "/rate", sectionRate, l.title(), "1/s", 0},
			row{l.key() + "/p50", sectionMedian, l.title(), "ms", 3},
			row{l.key() + "/p99", sectionTail, l.title(), "ms", 2},
			row{l.key() + "/cpu", sectionCPU, l.title(), "µs", 1},
			row{l.key() + "/client", sectionClient, l.title(), "µs", 1})
	}
	all = append(all,
		row{"tool-put/rate", sectionTool, "put, 100 clients", "1/s", 0},
		row{"tool-range/rate", sectionTool, "linearizable range of one key, 100 clients", "1/s", 0})
	all = append(append(all, watchRows()...), leaseRows()...)
	return append(all,
		row{"failover", sectionFailure, "SIGKILL of the leader to the first successful put", "s", 2},
		row{"failover-all", sectionFailure, "the same, to a put of each of 32 keys, whatever their shards", "s", 2},
		row{"restart", sectionFailure, "restart of all nodes, to linearizable reads on each", "s", 2},
		row{"memory/resident", sectionSize, "resident memory", "MiB", 0},
		row{"memory/anonymous", sectionSize, "of that, not of mapped files", "MiB", 0},
		row{"memory/peak", sectionSize, "most that was resident while filling", "MiB", 0},
		row{"disk", sectionSize, "disk, as du counts it", "MiB", 0},
		row{"backup/without", sectionDisrupts, "p99 before a backup", "ms", 2},
		row{"backup/with", sectionDisrupts, "p99 during backups from the leader", "ms", 2},
		row{"backup/ratio", sectionDisrupts, "ratio", "×", 2},
		row{"compaction/without", sectionDisrupts, "p99 before a compaction", "ms", 2},
		row{"compaction/with", sectionDisrupts, "p99 during the compaction of as many revisions as keys", "ms", 2},
		row{"compaction/ratio", sectionDisrupts, "ratio", "×", 2},
		row{"install/without", sectionDisrupts, "p99 before an install", "ms", 2},
		row{"install/with", sectionDisrupts, "p99 while a node that lost its data gets it again", "ms", 2},
		row{"install/ratio", sectionDisrupts, "ratio", "×", 2},
		row{"probe/failed", sectionDisrupts, "puts that failed, of all these", "", 0},
		row{"backup/time", sectionTime, "one backup", "s", 2},
		row{"compaction/time", sectionTime, "compaction", "s", 2},
		row{"install/time", sectionTime, "a node that lost its data: started until it is whole", "s", 2},
		row{"install/count", sectionTime, "snapshots it was sent (0: it got the log)", "", 0},
		row{"idle", sectionIdle, "processor time of all three nodes", "% of a core", 1})
}

// rowOf returns the row with a key. One that is not listed is a mistake of the program.
func rowOf(key string) row {
	for _, r := range rows {
		if r.key == key {
			return r
		}
	}
	panic("compare: no row " + key)
}
