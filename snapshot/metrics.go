package snapshot

import (
	"github.com/prometheus/client_golang/prometheus"

	"kvd/snapshot/metricset"
)

type metrics struct {
	metricset.Set
	running          prometheus.Gauge
	complete, broken prometheus.Counter
	bytes            prometheus.Counter
}

// newMetrics registers the metrics, or joins an earlier Store's over the same registerer: a replica's store is made
// anew after each install.
func newMetrics(r prometheus.Registerer) *metrics {
	streams := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kvd_snapshot_streams_total",
		Help: "Snapshot streams that were made for followers, by how they ended.",
	}, []string{"result"})
	m := &metrics{
		running: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "kvd_snapshot_streams_running",
			Help: "Snapshot streams that are open now.",
		}),
		complete: streams.WithLabelValues("complete"),
		broken:   streams.WithLabelValues("broken"),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kvd_snapshot_stream_bytes_total",
			Help: "Bytes written to snapshot streams.",
		}),
	}
	m.Add(streams, m.running, m.bytes)
	return metricset.Join(r, m)
}
