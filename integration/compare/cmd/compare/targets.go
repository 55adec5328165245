package main

import "fmt"

// target is what a figure, or its ratio to another server's, is to be in the median of all rounds.
type target struct {
	title, row string
	of         []string
	base       string // ratio to this server; "": the figure itself
	atMost     bool
	bound      float64
}

var both = []string{full, consistent}

var targets = []target{
	{"put, 100 clients: rate", "put-100/rate", both, etcd, false, 1.6},
	{"put, 1000 clients: rate", "put-1000/rate", both, etcd, false, 2.0},
	{"linearizable get, 100 clients: rate", "get-100/rate", both, etcd, false, 1.4},
	{"linearizable get, 1000 clients: rate", "get-1000/rate", both, etcd, false, 1.4},
	{"linearizable get, 100 clients: rate", "get-100/rate", both, floor, false, 0.75},
	{"linearizable get, 1000 clients: rate", "get-1000/rate", both, floor, false, 0.75},
	{"serializable get, 100 clients: rate", "sget-100/rate", both, etcd, false, 1.4},
	{"put, 1 client: latency", "put-1/p50", both, etcd, true, 0.9},
	{"linearizable get, 1 client: latency", "get-1/p50", both, etcd, true, 0.9},
	{"put, 100 clients: server CPU each", "put-100/cpu", both, etcd, true, 0.5},
	{"put, 1000 clients: server CPU each", "put-1000/cpu", both, etcd, true, 0.5},
	{"linearizable get, 100 clients: server CPU each", "get-100/cpu", both, etcd, true, 0.5},
	{"linearizable get, 1000 clients: server CPU each", "get-1000/cpu", both, etcd, true, 0.5},
	{"failover after SIGKILL of the leader", "failover", both, etcd, true, 0.5},
	{"restart", "restart", both, etcd, true, 0.8},
	{"memory", "memory/resident", both, etcd, true, 0.8},
	{"p99 of puts during a compaction / without", "compaction/ratio", both, "", true, 2},
	{"the same, compared with etcd's", "compaction/ratio", both, etcd, true, 1},
	{"p99 of puts during a snapshot install / without", "install/ratio", both, "", true, 2},
	{"the same, compared with etcd's", "install/ratio", both, etcd, true, 1},
	{"put, 1000 clients: rate", "put-1000/rate", []string{consistent}, full, false, 1.0},
	{"idle with 256 shards: % of a core", "idle", []string{consistent256}, "", true, 10},
	{"put, 1000 clients: rate", "put-1000/rate", both, floor, false, 0.7},
}

// measure returns what is to be judged of a server.
func (t target) measure(f figures, server string) spread {
	if t.base == "" {
		return f.of(t.row, server)
	}
	return f.ratios(t.row, server, t.base)
}

func (t target) met(median float64) bool {
	if t.atMost {
		return median <= t.bound
	}
	return median >= t.bound
}

func (t target) String() string {
	sign := "≥"
	if t.atMost {
		sign = "≤"
	}
	return fmt.Sprintf("%s %g", sign, t.bound)
}
