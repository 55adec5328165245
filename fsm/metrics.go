package fsm

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kvd/snapshot/metricset"
)

// metrics are shared by the stores of one Registerer: after a snapshot has been installed, a new store continues
// the old one's. They are gone when no store of it is open.
type metrics struct {
	metricset.Set
	appliedIndex, durableIndex   prometheus.Gauge
	pendingBytes                 prometheus.Gauge
	keys, revision, compacted    prometheus.Gauge
	leases                       prometheus.Gauge
	allocatedBytes, inUseBytes   prometheus.Gauge
	applySeconds, flushSeconds   prometheus.Histogram
	requests, rows, deletedRows  prometheus.Counter
	stallSeconds, flushedRowData prometheus.Counter
	turnSeconds                  prometheus.Counter
	watches                      prometheus.Gauge
	watchEvents, laggingWatches  prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "kvd", Subsystem: "fsm", Name: name, Help: help})
		m.Add(g)
		return g
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "kvd", Subsystem: "fsm", Name: name, Help: help})
		m.Add(c)
		return c
	}
	histogram := func(name, help string, least float64) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "kvd", Subsystem: "fsm", Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(least, 4, 10),
		})
		m.Add(h)
		return h
	}
	m.appliedIndex = gauge("applied_index", "Index of the last raft entry applied.")
	m.durableIndex = gauge("durable_index", "Index of the last raft entry whose effects are on disk.")
	m.pendingBytes = gauge("pending_bytes", "Bytes applied and not yet on disk, at the last flush.")
	m.keys = gauge("keys_count", "Live keys of clients, at the last flush.")
	m.leases = gauge("leases_count", "Leases of clients that this group has granted or has keys of, at the last flush.")
	m.revision = gauge("revision_number", "Newest revision of the clients' key space, at the last flush.")
	m.compacted = gauge("compact_revision_number", "Oldest readable revision of the clients' key space, at the last flush.")
	m.allocatedBytes = gauge("db_size_bytes", "Size of the state file.")
	m.inUseBytes = gauge("db_in_use_bytes", "Bytes of the state file in use.")
	m.applySeconds = histogram("apply_duration_seconds", "Time to apply one raft entry.", 10e-6)
	m.flushSeconds = histogram("flush_duration_seconds", "Time to write a batch to disk.", 100e-6)
	m.requests = counter("applied_requests_total", "Requests applied.")
	m.rows = counter("flushed_rows_total", "Rows written to disk.")
	m.flushedRowData = counter("flushed_bytes_total", "Bytes of rows written to disk.")
	m.deletedRows = counter("compacted_rows_total", "Rows deleted by compaction.")
	m.turnSeconds = counter("flush_wait_seconds_total", "Time that flushes have waited for those of other groups.")
	m.stallSeconds = counter("apply_stall_seconds_total", "Time that apply has waited for the disk.")
	m.watches = gauge("watches_count", "Watches of client keys.")
	m.watchEvents = counter("watch_events_total", "Events that were queued for watches as they happened.")
	m.laggingWatches = counter("watch_lagging_total", "Watches that were put back to reading the history, because their queue was full or a transaction made too many events.")
	return metricset.Join(r, m)
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
	m.leases.Set(float64(b.leases.count))
	m.revision.Set(float64(user.revision))
	m.compacted.Set(float64(user.compacted))
	m.allocatedBytes.Set(float64(allocated))
	m.inUseBytes.Set(float64(inUse))
}
