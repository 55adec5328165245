package report

import (
	"time"
)

const ms = time.Millisecond

// nasty is text that must not become markup.
const nasty = "<script>alert('1')</script> | [x](http://example.com) `b`\nnext line"

// sampleReport is a whole report of fixed figures: what a run may measure.
func sampleReport() *Report {
	r := &Report{
		Format: Format, Started: time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC), Took: 200 * time.Second,
		Program: Program{Version: "1.2.3", Revision: "abcdef", Go: "go1.26", Command: "kvd bench report"},
		Machine: Machine{System: "linux/amd64", CPU: "A CPU", Cores: 2, MemoryBytes: 24 << 30, Kernel: "Linux 6", FileSystem: "ext4", Sync: 2 * ms},
		Load:    Load{Pairs: 1000, ValueBytes: 256, Clients: 32, Sustained: 3 * time.Second, WriteRate: 100, ReadRate: 97, DownAfter: 3 * time.Second},
	}
	for _, strategy := range []string{Full, Consistent} {
		for _, l := range layouts(strategy) {
			r.Clusters = append(r.Clusters, sampleCluster(l, r.Load))
		}
	}
	for _, strategy := range []string{Full, Consistent} {
		for _, t := range tests(strategy) {
			t.Killed, t.Through, t.Written, t.Read, t.ReadAfter = []string{"n1"}, []string{"n2", "n3"}, 10, 10, 2*time.Second
			if t.Number == 3 {
				t.Killed, t.CaughtUp = []string{"n1", "n3"}, 200*ms
			}
			r.Tests = append(r.Tests, t)
		}
	}
	return r
}

func sampleCluster(l Layout, load Load) *Cluster {
	c := &Cluster{Layout: l, Flags: l.flags(), Formed: time.Second, Bulks: bulks(load)}
	for _, b := range c.Bulks {
		b.Requests, b.Took, b.PerSecond = 1000, 2*time.Second, 500
		b.Mean, b.P50, b.P99, b.Max = 2*ms, 1500*time.Microsecond, 9*ms, 40*ms
		b.Histogram = []Bucket{{From: ms, To: 1259 * time.Microsecond, Count: 900}, {From: 10 * ms, To: 12590 * time.Microsecond, Count: 100}}
	}
	for _, role := range []string{Leader, Follower} {
		f := &Failure{
			Role: role, Node: "n2", FirstWrite: 1500 * ms, AllWrites: 1500 * ms, Writes: []time.Duration{1500 * ms}, Restarted: 6 * time.Second,
			CaughtUp: 300 * ms, Acknowledged: 101, Keys: 5000,
		}
		if l.Strategy == Consistent {
			f.Led, f.Writes, f.AllWrites = 4, []time.Duration{1500 * ms, 2500 * ms}, 2500*ms
			f.Restored, f.Home = 5*time.Second, 900*ms
		}
		f.Load = Samples{From: -3 * time.Second, To: 9 * time.Second, List: []Sample{
			{Due: -2 * time.Second, Took: ms}, {Due: -time.Second, Took: 2 * ms, Read: true}, {Due: -5 * ms, Took: 8 * ms, Code: "Unavailable"},
			{Due: 0, Took: 1500 * ms}, {Due: time.Second, Took: 500 * ms, Read: true}, {Due: 8 * time.Second, Took: ms},
		}}
		c.Failures = append(c.Failures, f)
	}
	return c
}
