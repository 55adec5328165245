package snapshot

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	running          prometheus.Gauge
	complete, broken prometheus.Counter
	bytes            prometheus.Counter
}

// newMetrics registers the metrics, or finds them registered by an earlier Store over the same registerer: a
// replica's store is made anew after each install.
func newMetrics(r prometheus.Registerer) metrics {
	streams := register(r, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kvd_snapshot_streams_total",
		Help: "Snapshot streams that were made for followers, by how they ended.",
	}, []string{"result"}))
	return metrics{
		running: register(r, prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "kvd_snapshot_streams_running",
			Help: "Snapshot streams that are open now.",
		})),
		complete: streams.WithLabelValues("complete"),
		broken:   streams.WithLabelValues("broken"),
		bytes: register(r, prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kvd_snapshot_stream_bytes_total",
			Help: "Bytes written to snapshot streams.",
		})),
	}
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
