package wal

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	registerer prometheus.Registerer
	own        []prometheus.Collector // registered here

	sync                                    prometheus.Histogram
	batchBytes, batchRecords, batchReplicas prometheus.Histogram
	copied, recycled                        prometheus.Counter
}

func newMetrics(r prometheus.Registerer, l *Log) metrics {
	m := metrics{registerer: r}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return register(&m, prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}))
	}
	m.sync = histogram("kvd_wal_fsync_seconds", "Duration of the fdatasync that makes a batch of the raft log durable.",
		prometheus.ExponentialBuckets(0.00005, 2, 19)) // 50 us to 13 s
	m.batchBytes = histogram("kvd_wal_batch_bytes", "Bytes written to the raft log at once, with their filling to whole blocks.",
		prometheus.ExponentialBuckets(blockBytes, 4, 9)) // up to 256 MiB
	m.batchRecords = histogram("kvd_wal_batch_records", "Records written to the raft log at once.", prometheus.ExponentialBuckets(1, 2, 13))
	m.batchReplicas = histogram("kvd_wal_batch_replicas", "Replicas that shared a write to the raft log.", prometheus.ExponentialBuckets(1, 2, 11))
	m.copied = register(&m, prometheus.NewCounter(prometheus.CounterOpts{
		Name: "kvd_wal_copied_bytes_total", Help: "Bytes of entries copied forward, so that the raft log's oldest file could go.",
	}))
	m.recycled = register(&m, prometheus.NewCounter(prometheus.CounterOpts{
		Name: "kvd_wal_segments_recycled_total", Help: "Files of the raft log that went because nothing in them was needed.",
	}))
	gauge := func(name, help string, value func() float64) {
		register(&m, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("kvd_wal_segments", "Files of the raft log that have been written to.", func() float64 { return float64(len(l.segments.all())) })
	gauge("kvd_wal_size_bytes", "Bytes of the files of the raft log that have been written to.", func() float64 {
		size, _ := l.segments.sizes()
		return float64(size)
	})
	gauge("kvd_wal_live_bytes", "Bytes of the raft log that are entries of a replica's log.", func() float64 {
		_, live := l.segments.sizes()
		return float64(live)
	})
	return m
}

func (m *metrics) batch(sizeBytes, records, replicas int) {
	m.batchBytes.Observe(float64(sizeBytes))
	m.batchRecords.Observe(float64(records))
	m.batchReplicas.Observe(float64(replicas))
}

func (m *metrics) synced(d time.Duration) { m.sync.Observe(d.Seconds()) }

// register finds what an earlier Log over the same registerer has registered.
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
