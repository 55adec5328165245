package placement

import (
	"github.com/prometheus/client_golang/prometheus"

	"kvd/snapshot/metricset"
)

// metrics are of what this node does as group 0's leader. They are registered as
// long as the Reconciler runs.
type metrics struct {
	metricset.Set
	steps    *prometheus.CounterVec
	failures prometheus.Counter
	nodes    *prometheus.GaugeVec
}

func newMetrics(registerer prometheus.Registerer) *metrics {
	m := &metrics{
		steps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kvd_placement_steps_total", Help: "Steps of shards that this node has had carried out as leader of group 0.",
		}, []string{"step"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kvd_placement_step_failures_total", Help: "Steps of groups that could not be carried out, and were planned anew.",
		}),
		nodes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "kvd_placement_nodes", Help: "Members by state, as the leader of group 0 sees them; nothing on other nodes.",
		}, []string{"state"}),
	}
	m.Add(m.steps, m.failures, m.nodes)
	return metricset.Join(registerer, m)
}

// count sets the number of members in each state; nil where this node does not
// lead.
func (m *metrics) count(states map[string]int) {
	m.nodes.Reset()
	for state, n := range states {
		m.nodes.WithLabelValues(state).Set(float64(n))
	}
}
