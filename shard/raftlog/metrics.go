package raftlog

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// The kinds of write transactions.
const (
	opAppend   = "append"
	opTruncate = "truncate"
	opStable   = "stable"
)

type metrics struct {
	write                    map[string]prometheus.Observer
	batchEntries, batchBytes prometheus.Observer
}

// newMetrics registers the metrics, or finds them registered by an earlier Store over the same registerer.
func newMetrics(r prometheus.Registerer) metrics {
	seconds := register(r, prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "kvd_raftlog_write_seconds",
		Help:    "Duration of write transactions of the raft log's file, with their fsyncs, by kind.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 2, 18), // 0.1 ms to 13 s
	}, []string{"op"}))
	m := metrics{
		write: map[string]prometheus.Observer{},
		batchEntries: register(r, prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "kvd_raftlog_batch_entries",
			Help:    "Entries appended to the raft log in one transaction.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 11),
		})),
		batchBytes: register(r, prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "kvd_raftlog_batch_bytes",
			Help:    "Bytes of entries appended to the raft log in one transaction.",
			Buckets: prometheus.ExponentialBuckets(256, 4, 10), // up to 64 MiB
		})),
	}
	for _, op := range []string{opAppend, opTruncate, opStable} {
		m.write[op] = seconds.WithLabelValues(op)
	}
	return m
}

func register[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		return c
	}
	err := r.Register(c)
	if again := (prometheus.AlreadyRegisteredError{}); errors.As(err, &again) {
		return again.ExistingCollector.(C)
	}
	if err != nil {
		panic(err) // two metrics of one name that differ: a bug
	}
	return c
}
