package server

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	registerer prometheus.Registerer
	collectors []prometheus.Collector

	calls                                     *callMetrics
	forwardedWrites, forwardedReads, cuts     prometheus.Counter
	polls, resolutions                        prometheus.Counter
	watchStreams, watches                     prometheus.Gauge
	watchEvents, watchesStalled               prometheus.Counter
	readRounds, retries                       prometheus.Counter
	serializable, shed, unknown, panics, slow prometheus.Counter
	leasesExpired, leasesRenewed              prometheus.Counter
	snapshotBytes, httpHealthy, httpFailed    prometheus.Counter
}

func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	m := &metrics{registerer: registerer}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kvd_server_" + name, Help: help})
		m.collectors = append(m.collectors, c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "kvd_server_" + name, Help: help})
		m.collectors = append(m.collectors, g)
		return g
	}
	m.watchStreams = gauge("watch_streams", "Streams of watches that clients have open.")
	m.watches = gauge("watches", "Watches of all streams.")
	m.watchEvents = counter("watch_events_sent_total", "Events sent to clients, once for each watch.")
	m.watchesStalled = counter("watch_streams_stalled_total", "Streams of watches that ended because their client did not read them.")
	m.forwardedWrites = counter("forwarded_writes_total", "Writes sent to the leader's node, retries included.")
	m.forwardedReads = counter("forwarded_reads_total", "Pages of ranges, and transactions that read, asked of other nodes.")
	m.cuts = counter("snapshot_rounds_total", "Revisions at which all shards were asked to be complete; each serves all reads that waited for it.")
	m.polls = counter("watch_polls_total", "Questions to other nodes what they have for watches.")
	m.resolutions = counter("watch_resolutions_total", "Revisions at which shards were asked to be complete, for watches of several shards.")
	m.readRounds = counter("read_rounds_total", "Read indexes asked of the leader's node; each serves all reads that waited for it.")
	m.retries = counter("retries_total", "Attempts repeated because the leader was unknown, not reached or had changed.")
	m.serializable = counter("serializable_reads_total", "Reads answered from the local state, however old.")
	m.shed = counter("writes_shed_total", "Writes refused because too many were under way.")
	m.unknown = counter("unknown_outcomes_total", "Writes whose outcome could not be told to the client.")
	m.slow = counter("slow_requests_total", "Requests given up because their message did not arrive.")
	m.panics = counter("panics_total", "Requests that ended in a panic.")
	m.leasesExpired = counter("leases_expired_total", "Leases that this node has ended because their time was over.")
	m.leasesRenewed = counter("lease_renewals_total", "Renewals that this node has answered as the leader, or was asked in vain for.")
	m.snapshotBytes = counter("snapshot_sent_bytes_total", "Bytes of backups sent to clients.")
	m.httpHealthy = counter("health_success_total", "Checks at /health that succeeded.")
	m.httpFailed = counter("health_failures_total", "Checks at /health that failed.")
	m.calls = newCallMetrics()
	m.collectors = append(m.collectors, m.calls.collectors()...)
	return m, m.register()
}

func (m *metrics) register() error {
	if m.registerer == nil {
		return nil
	}
	for i, c := range m.collectors {
		if err := m.registerer.Register(c); err != nil {
			m.collectors = m.collectors[:i]
			m.unregister()
			return fmt.Errorf("server: register metrics: %w", err)
		}
	}
	return nil
}

func (m *metrics) unregister() {
	if m.registerer == nil {
		return
	}
	for _, c := range m.collectors {
		m.registerer.Unregister(c)
	}
}
