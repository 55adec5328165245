package transport

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are those of one Transport. Peers whose address is not known share the label "other", so that
// strangers cannot make series.
type metrics struct {
	t          *Transport
	registerer prometheus.Registerer
	bytes      *prometheus.CounterVec // direction, peer
	frames     *prometheus.CounterVec // direction, peer
	dropped    *prometheus.CounterVec // reason
	refused    prometheus.Counter
	inFlight   prometheus.Gauge
	latency    prometheus.Histogram
	connected  *prometheus.Desc
	queue      *prometheus.Desc
	handlers   *prometheus.Desc
}

// traffic are the counters of one connection.
type traffic struct {
	bytesIn, bytesOut, framesIn, framesOut prometheus.Counter
}

func newMetrics(t *Transport) (*metrics, error) {
	m := &metrics{
		t: t, registerer: t.cfg.Registerer,
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kvd_transport_peer_bytes_total",
			Help: "Bytes sent to and received from a peer."}, []string{"direction", "peer"}),
		frames: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kvd_transport_peer_frames_total",
			Help: "Frames received from a peer, messages queued for it."}, []string{"direction", "peer"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kvd_transport_dropped_frames_total",
			Help: "Messages that were not handled, by reason."}, []string{"reason"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "kvd_transport_refused_connections_total",
			Help: "Incoming connections that failed their handshake or were too many."}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "kvd_transport_calls_in_flight",
			Help: "Calls that wait for their answer."}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "kvd_transport_call_duration_seconds",
			Help: "Time from a call to its answer or failure.", Buckets: prometheus.ExponentialBuckets(0.0001, 2.5, 12)}),
		connected: prometheus.NewDesc("kvd_transport_connected_peers", "Peers that this node has a connection to.", nil, nil),
		queue:     prometheus.NewDesc("kvd_transport_queue_bytes", "Bytes waiting to be written to a peer.", []string{"peer"}, nil),
		handlers:  prometheus.NewDesc("kvd_transport_handlers_running", "Handlers of incoming calls that are running.", nil, nil),
	}
	if m.registerer == nil {
		return m, nil
	}
	for i, c := range m.all() {
		if err := m.registerer.Register(c); err != nil {
			for _, done := range m.all()[:i] {
				m.registerer.Unregister(done)
			}
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.bytes, m.frames, m.dropped, m.refused, m.inFlight, m.latency, m}
}

func (m *metrics) unregister() {
	if m.registerer != nil {
		for _, c := range m.all() {
			m.registerer.Unregister(c)
		}
	}
}

func (m *metrics) traffic(node string) *traffic {
	peer := m.label(node)
	return &traffic{m.bytes.WithLabelValues("in", peer), m.bytes.WithLabelValues("out", peer),
		m.frames.WithLabelValues("in", peer), m.frames.WithLabelValues("out", peer)}
}

func (m *metrics) label(node string) string {
	if _, ok := m.t.cfg.Resolve(node); ok {
		return node
	}
	return "other"
}

// Describe implements prometheus.Collector for what is read off the connections at each scrape.
func (m *metrics) Describe(out chan<- *prometheus.Desc) {
	out <- m.connected
	out <- m.queue
	out <- m.handlers
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	queues := map[string]int{}
	connected := 0
	m.t.mu.RLock()
	for c := range m.t.conns {
		c.mu.Lock()
		queues[c.peer.Node] += c.queued + len(c.control)
		c.mu.Unlock()
		if c.dialed && c.purpose == purposePeer {
			connected++
		}
	}
	m.t.mu.RUnlock()
	labelled := map[string]int{}
	for node, n := range queues {
		labelled[m.label(node)] += n
	}
	out <- prometheus.MustNewConstMetric(m.connected, prometheus.GaugeValue, float64(connected))
	out <- prometheus.MustNewConstMetric(m.handlers, prometheus.GaugeValue, float64(m.t.running.Load()))
	for peer, n := range labelled {
		out <- prometheus.MustNewConstMetric(m.queue, prometheus.GaugeValue, float64(n), peer)
	}
}

var errDuplicate = errors.New("replica is already open")
