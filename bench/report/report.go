// Package report measures what kvd does in each of its strategies, with real processes that get killed, and writes it
// down as the project's founding report: a text, a page with plots, and the raw figures.
package report

import (
	"fmt"
	"slices"
	"time"

	"kvd/bench"
)

// Format is the version of report.json. Durations in it are nanoseconds, as the names say.
const Format = 1

// Strategies of `kvd start`.
const (
	Full       = "full"
	Consistent = "consistent"
)

// Report is all that was measured. A step that failed has its reason in Error, and whatever it had measured before.
type Report struct {
	Format   int           `json:"format"`
	Started  time.Time     `json:"started"`
	Took     time.Duration `json:"took_ns"`
	Quick    bool          `json:"quick"` // cut short, to see that it works: not for comparisons
	Program  Program       `json:"program"`
	Machine  Machine       `json:"machine"`
	Load     Load          `json:"load"`
	Clusters []*Cluster    `json:"clusters"`
	Tests    []*Test       `json:"tests"`
}

// Program names what was measured.
type Program struct {
	Version  string `json:"version"`
	Revision string `json:"revision"` // of the source; empty if unknown
	Go       string `json:"go"`
	Command  string `json:"command"` // that made this report
}

// Load says how much was asked of the clusters.
type Load struct {
	Pairs      int           `json:"pairs"`
	ValueBytes int           `json:"value_bytes"`
	Clients    int           `json:"clients"` // that write or read at the same time
	Sustained  time.Duration `json:"sustained_ns"`
	WriteRate  float64       `json:"write_rate"` // per second, while nodes die and return
	ReadRate   float64       `json:"read_rate"`
	DownAfter  time.Duration `json:"down_after_ns"` // --down-after, of consistent
}

// Layout is what a cluster is made of.
type Layout struct {
	Strategy string `json:"strategy"`
	Nodes    int    `json:"nodes"`
	Shards   int    `json:"shards"` // 0 in full
	Copies   int    `json:"copies"` // of each key: the replication factor; in full, all nodes
}

// Name of a layout, for people.
func (l Layout) Name() string {
	if l.Strategy == Full {
		return fmt.Sprintf("full, %d nodes", l.Nodes)
	}
	return fmt.Sprintf("consistent, RF %d on %d nodes", l.Copies, l.Nodes)
}

// Setup says the same in the founding report's words.
func (l Layout) Setup() string {
	if l.Strategy == Full {
		return fmt.Sprintf("%d nodes, every key on each of them", l.Nodes)
	}
	return fmt.Sprintf("%d nodes, replication factor of %d, %d shards", l.Nodes, l.Copies, l.Shards)
}

// Cluster is what was measured with one cluster.
type Cluster struct {
	Layout
	Flags    []string      `json:"flags"` // of kvd start, the same for all nodes
	Formed   time.Duration `json:"formed_ns"`
	Bulks    []*Bulk       `json:"bulks"`
	Failures []*Failure    `json:"failures"`
	Error    string        `json:"error,omitempty"` // it could not be formed
}

// Names of bulks.
const (
	WriteOne       = "write-sequential"
	WriteMany      = "write-concurrent"
	ReadOne        = "read-sequential"
	ReadMany       = "read-concurrent"
	WriteSustained = "write-sustained"
	ReadSustained  = "read-sustained"
)

// Bulk is a number of requests, one after the other by each client.
type Bulk struct {
	Name      string         `json:"name"`
	Write     bool           `json:"write"`
	Clients   int            `json:"clients"`
	Requests  int64          `json:"requests"` // that succeeded
	Errors    map[string]int `json:"errors"`   // by gRPC code
	Took      time.Duration  `json:"took_ns"`
	PerSecond float64        `json:"per_second"`
	Mean      time.Duration  `json:"mean_ns"`
	P50       time.Duration  `json:"p50_ns"`
	P99       time.Duration  `json:"p99_ns"`
	Max       time.Duration  `json:"max_ns"`
	ClientCPU time.Duration  `json:"client_cpu_ns"`
	Histogram []Bucket       `json:"histogram"`
	Error     string         `json:"error,omitempty"`
}

// Bucket counts latencies from From up to To.
type Bucket struct {
	From  time.Duration `json:"from_ns"`
	To    time.Duration `json:"to_ns"`
	Count int64         `json:"count"`
}

// Roles of nodes that are killed.
const (
	Leader   = "leader"
	Follower = "follower"
)

// Failure is a node that was killed with SIGKILL and started again, under steady load. Times are from the kill, those
// of the recovery from the start of the new process. What did not happen is 0.
type Failure struct {
	Role string `json:"role"` // with shards: in group 0, which keeps the cluster map
	Node string `json:"node"`
	Led  int    `json:"led"`  // shards that it led
	Keys int64  `json:"keys"` // in the cluster at the kill
	// FirstWrite is when the first write that began after the kill succeeded; AllWrites, when one had in every shard.
	FirstWrite time.Duration   `json:"first_write_ns"`
	AllWrites  time.Duration   `json:"all_writes_ns"`
	Writes     []time.Duration `json:"writes_ns"`   // of each shard, in order of numbers
	Restored   time.Duration   `json:"restored_ns"` // every key had all its copies on live nodes; consistent only
	Restarted  time.Duration   `json:"restarted_ns"`
	CaughtUp   time.Duration   `json:"caught_up_ns"` // the node had all data that there was when it started
	Home       time.Duration   `json:"home_ns"`      // every shard was where it had been; consistent only
	// Acknowledged pairs were written before and after the kill, and read back from the others and, once it had recovered,
	// through the node itself; Lost ones were missing or wrong.
	Acknowledged int     `json:"acknowledged"`
	Lost         int     `json:"lost"`
	Load         Samples `json:"load"`
	Error        string  `json:"error,omitempty"`
}

// Samples are all requests of a load, in order of when they were due.
type Samples struct {
	From time.Duration `json:"from_ns"` // of the load's begin and end, from the kill
	To   time.Duration `json:"to_ns"`
	List []Sample      `json:"list"`
	// Unsent requests were due, but all clients were waiting; MaxLag is the longest that one was sent after it was due.
	Unsent int64         `json:"unsent"`
	MaxLag time.Duration `json:"max_lag_ns"`
}

// Sample is one request.
type Sample struct {
	Due  time.Duration `json:"due_ns"` // from the kill
	Took time.Duration `json:"took_ns"`
	Read bool          `json:"read,omitempty"`
	Code string        `json:"code,omitempty"` // of the failure
}

// Failed counts the requests that failed, by code.
func (s Samples) Failed() map[string]int {
	failed := make(map[string]int)
	for _, r := range s.List {
		if r.Code != "" {
			failed[r.Code]++
		}
	}
	return failed
}

// Longest is the longest that a request that succeeded took.
func (s Samples) Longest() (longest time.Duration) {
	for _, r := range s.List {
		if r.Code == "" {
			longest = max(longest, r.Took)
		}
	}
	return longest
}

// Test is one of the founding report's tests of fault tolerance.
type Test struct {
	Number int `json:"number"`
	Layout
	Title     string        `json:"title"`
	Operation string        `json:"operation"`
	Killed    []string      `json:"killed"`
	Written   int           `json:"written"` // pairs that were acknowledged
	Read      int           `json:"read"`    // of these, read back as they were written through each node that lived
	Through   []string      `json:"through"`
	ReadAfter time.Duration `json:"read_after_ns"` // from the kill until all were read
	CaughtUp  time.Duration `json:"caught_up_ns"`  // from the start of the recovered process; test 3 only
	Error     string        `json:"error,omitempty"`
}

// Passed tells whether the test did.
func (t *Test) Passed() bool { return t.Error == "" && t.Written > 0 && t.Read == t.Written }

// Bulk returns the one with a name, or nil.
func (c *Cluster) Bulk(name string) *Bulk {
	for _, b := range c.Bulks {
		if b.Name == name {
			return b
		}
	}
	return nil
}

// Failure returns the one of a role, or nil.
func (c *Cluster) Failure(role string) *Failure {
	for _, f := range c.Failures {
		if f.Role == role {
			return f
		}
	}
	return nil
}

// Problem is a step that failed.
type Problem struct {
	Where, Why string
	Lost       bool // acknowledged data is missing or wrong
}

// Problems lists the steps that failed.
func (r *Report) Problems() (list []Problem) {
	add := func(lost bool, why string, where ...any) {
		if why != "" || lost {
			list = append(list, Problem{Where: fmt.Sprint(where...), Why: why, Lost: lost})
		}
	}
	for _, c := range r.Clusters {
		add(false, c.Error, c.Name())
		for _, b := range c.Bulks {
			add(false, b.Error, c.Name(), ": ", b.Name)
		}
		for _, f := range c.Failures {
			add(f.Lost > 0, f.Error, c.Name(), ": failure and recovery of a ", f.Role)
		}
	}
	for _, t := range r.Tests {
		add(t.Error == "" && t.Read < t.Written, t.Error, "test ", t.Number, ", ", t.Name())
	}
	return list
}

// Of are the clusters of a strategy.
func (r *Report) Of(strategy string) (list []*Cluster) {
	for _, c := range r.Clusters {
		if c.Strategy == strategy {
			list = append(list, c)
		}
	}
	return list
}

// errorsOf counts by code.
func errorsOf(o *bench.Operation) map[string]int {
	errors := make(map[string]int)
	for _, e := range o.Errors {
		errors[e.Code.String()] += int(e.Count)
	}
	return errors
}

// bucketsPerDecade of histograms: each is wider than the one before by a quarter.
const bucketsPerDecade = 10

// sortSamples puts them in order.
func sortSamples(list []Sample) {
	slices.SortFunc(list, func(a, b Sample) int { return int(a.Due - b.Due) })
}
