package fsm

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are shared by the stores of one Registerer: after a snapshot has been installed, a new store continues
// the old one's.
type metrics struct {
	appliedIndex, durableIndex   prometheus.Gauge
	pendingBytes                 prometheus.Gauge
	keys, revision, compacted    prometheus.Gauge
	allocatedBytes, inUseBytes   prometheus.Gauge
	applySeconds, flushSeconds   prometheus.Histogram
	requests, rows, deletedRows  prometheus.Counter
	stallSeconds, flushedRowData prometheus.Counter
	turnSeconds                  prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	gauge := func(name, help string) prometheus.Gauge {
		return register(r, prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "kvd", Subsystem: "fsm", Name: name, Help: help}))
	}
	counter := func(name, help string) prometheus.Counter {
		return register(r, prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvd", Subsystem: "fsm", Name: name, Help: help}))
	}
	histogram := func(name, help string, least float64) prometheus.Histogram {
		return register(r, prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "kvd", Subsystem: "fsm", Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(least, 4, 10),
		}))
	}
	return &metrics{
		appliedIndex:   gauge("applied_index", "Index of the last raft entry applied."),
		durableIndex:   gauge("durable_index", "Index of the last raft entry whose effects are on disk."),
		pendingBytes:   gauge("pending_bytes", "Bytes applied and not yet on disk, at the last flush."),
		keys:           gauge("keys_count", "Live keys of clients, at the last flush."),
		revision:       gauge("revision_number", "Newest revision of the clients' key space, at the last flush."),
		compacted:      gauge("compact_revision_number", "Oldest readable revision of the clients' key space, at the last flush."),
		allocatedBytes: gauge("db_size_bytes", "Size of the state file."),
		inUseBytes:     gauge("db_in_use_bytes", "Bytes of the state file in use."),
		applySeconds:   histogram("apply_duration_seconds", "Time to apply one raft entry.", 10e-6),
		flushSeconds:   histogram("flush_duration_seconds", "Time to write a batch to disk.", 100e-6),
		requests:       counter("applied_requests_total", "Requests applied."),
		rows:           counter("flushed_rows_total", "Rows written to disk."),
		flushedRowData: counter("flushed_bytes_total", "Bytes of rows written to disk."),
		deletedRows:    counter("compacted_rows_total", "Rows deleted by compaction."),
		turnSeconds:    counter("flush_wait_seconds_total", "Time that flushes have waited for those of other groups."),
		stallSeconds:   counter("apply_stall_seconds_total", "Time that apply has waited for the disk."),
	}
}

// register returns the collector, or the equal one that is registered already.
func register[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		return c
	}
	err := r.Register(c)
	var exists prometheus.AlreadyRegisteredError
	if errors.As(err, &exists) {
		if old, ok := exists.ExistingCollector.(C); ok {
			return old
		}
	}
	return c
}

func (m *metrics) flushed(b flushBatch, took time.Duration) {
	m.flushSeconds.Observe(took.Seconds())
	for _, rows := range b.rows {
		m.rows.Add(float64(len(rows)))
	}
	m.flushedRowData.Add(float64(b.bytes))
	m.deletedRows.Add(float64(b.deleted))
}

func (s *Store) updateGauges(b flushBatch) {
	m, user := s.metrics, b.state.spaces[User]
	allocated, inUse := s.SizeBytes()
	m.durableIndex.Set(float64(b.state.index))
	m.pendingBytes.Set(float64(s.pendingBytes.Load()))
	m.keys.Set(float64(user.keys))
	m.revision.Set(float64(user.revision))
	m.compacted.Set(float64(user.compacted))
	m.allocatedBytes.Set(float64(allocated))
	m.inUseBytes.Set(float64(inUse))
}
