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
	registerer prometheus.Registerer
	own        []prometheus.Collector // registered here

	write                    map[string]prometheus.Observer
	batchEntries, batchBytes prometheus.Observer
}

// newMetrics registers the metrics, or finds them registered by an earlier Store over the same registerer.
func newMetrics(r prometheus.Registerer) metrics {
	m := metrics{registerer: r, write: map[string]prometheus.Observer{}}
	seconds := register(&m, prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "kvd_raftlog_write_seconds",
		Help:    "Duration of write transactions of the raft log's file, with their fsyncs, by kind.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 2, 18), // 0.1 ms to 13 s
	}, []string{"op"}))
	m.batchEntries = register(&m, prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "kvd_raftlog_batch_entries",
		Help:    "Entries appended to the raft log in one transaction.",
		Buckets: prometheus.ExponentialBuckets(1, 2, 11),
	}))
	m.batchBytes = register(&m, prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "kvd_raftlog_batch_bytes",
		Help:    "Bytes of entries appended to the raft log in one transaction.",
		Buckets: prometheus.ExponentialBuckets(256, 4, 10), // up to 64 MiB
	}))
	for _, op := range []string{opAppend, opTruncate, opStable} {
		m.write[op] = seconds.WithLabelValues(op)
	}
	return m
}

func register[C prometheus.Collector](m *metrics, c C) C {
	if m.registerer == nil {
		return c
	}
	err := m.registerer.Register(c)
	if again := (prometheus.AlreadyRegisteredError{}); errors.As(err, &again) {
		return again.ExistingCollector.(C)
	}
	if err != nil {
		panic(err) // two metrics of one name that differ: a bug
	}
	m.own = append(m.own, c)
	return c
}

func (m *metrics) unregister() {
	for _, c := range m.own {
		m.registerer.Unregister(c)
	}
}
