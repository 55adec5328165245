package shard

import (
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the replica's own; state machine, log and transport have theirs.
type metrics struct {
	registry *registry

	commitSeconds, confirmSeconds, applySeconds, batchRequests prometheus.Histogram
	shed, leaderChanges, truncations, installs, diskStalls     prometheus.Counter
	witnessLeads                                               prometheus.Counter // of witnesses
	floorsDropped, successions                                 prometheus.Counter
}

func newMetrics(r *Replica) *metrics {
	m := &metrics{registry: r.registry}
	seconds := prometheus.ExponentialBuckets(0.0001, 2, 17)
	m.commitSeconds = m.histogram("commit_seconds", "Time from proposing a log entry until it is applied here.", seconds)
	m.confirmSeconds = m.histogram("read_confirm_seconds", "Time for a quorum to confirm the leadership for a read.", seconds)
	m.applySeconds = m.histogram("apply_seconds", "Time to apply a batch of committed log entries.", seconds)
	m.batchRequests = m.histogram("entry_requests", "Requests in a proposed log entry.", prometheus.ExponentialBuckets(1, 2, 11))
	m.shed = m.counter("proposals_shed_total", "Requests refused because too many bytes were waiting.")
	m.floorsDropped = m.counter("floors_dropped_total", "Times revisions were asked for and could not be used for their entry, which asked again.")
	m.leaderChanges = m.counter("leadership_lost_total", "Times this replica stopped leading.")
	m.successions = m.counter("successions_total", "Times this replica stood for election because the leader's process was dead.")
	m.truncations = m.counter("log_truncations_total", "Times the state was made durable so that the log's beginning could go.")
	m.installs = m.counter("snapshot_installs_total", "Snapshots that a leader sent and that were installed here.")
	m.diskStalls = m.counter("disk_stalls_total", "Times the replica went silent because a log write was stalled.")
	if r.Witness() {
		m.witnessLeads = m.counter("witness_leads_total", "Times this witness was elected, to feed another replica and hand over.")
		m.register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kvd_shard_witness_log_bytes", Help: "About how large the log of this witness is."},
			func() float64 { return float64(r.held.sizeBytes()) }))
		m.register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kvd_shard_witness_log_limit_bytes", Help: "The size at which the log of this witness takes no more writes."},
			func() float64 { return float64(r.cfg.WitnessLogBytes) }))
		r.held.refused = m.counter("witness_log_refused_total", "Times this witness refused writes because its log is at its limit.")
	}
	gauge := func(name, help string, value func(*life) float64) {
		m.register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kvd_shard_" + name, Help: help}, func() float64 {
			if l := r.life.Load(); l != nil {
				return value(l)
			}
			return 0
		}))
	}
	gauge("is_leader", "1 while this replica leads the group and serves.", func(l *life) float64 {
		if e := l.role.Load(); e != nil && e.isServing() {
			return 1
		}
		return 0
	})
	gauge("has_leader", "1 while this replica knows a leader.", func(l *life) float64 {
		if _, id := l.raft.LeaderWithID(); id != "" {
			return 1
		}
		return 0
	})
	gauge("is_voter", "1 while the latest configuration lets this replica vote.", func(l *life) float64 {
		for _, s := range l.raft.GetConfiguration().Configuration().Servers {
			if s.ID == r.cfg.Replica && s.Suffrage == raft.Voter {
				return 1
			}
		}
		return 0
	})
	gauge("term", "Raft term.", func(l *life) float64 { return float64(l.raft.CurrentTerm()) })
	gauge("commit_index", "Highest log index known to be committed.", func(l *life) float64 { return float64(l.raft.CommitIndex()) })
	gauge("applied_index", "Highest log index in the readable state.", func(l *life) float64 { return float64(l.state.store.AppliedIndex()) })
	gauge("durable_index", "Highest log index in the state file.", func(l *life) float64 { return float64(l.state.store.DurableIndex()) })
	gauge("last_log_index", "Highest log index on disk.", func(l *life) float64 { return float64(l.raft.LastIndex()) })
	gauge("first_log_index", "Lowest log index on disk.", func(*life) float64 {
		first, _ := r.log.FirstIndex()
		return float64(first)
	})
	gauge("proposal_queue_bytes", "Bytes of requests that wait to be proposed.", func(l *life) float64 { return float64(l.proposer.queuedBytes()) })
	gauge("entries_in_flight", "Log entries proposed and not yet applied.", func(l *life) float64 { return float64(len(l.proposer.slots)) })
	gauge("reads_waiting", "Reads that wait for a confirmation of the leadership.", func(l *life) float64 {
		l.reads.mu.Lock()
		defer l.reads.mu.Unlock()
		return float64(len(l.reads.waiting))
	})
	return m
}

func (m *metrics) register(c prometheus.Collector) {
	if m.registry != nil {
		m.registry.MustRegister(c)
	}
}

func (m *metrics) histogram(name, help string, buckets []float64) prometheus.Histogram {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "kvd_shard_" + name, Help: help, Buckets: buckets})
	m.register(h)
	return h
}

func (m *metrics) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kvd_shard_" + name, Help: help})
	m.register(c)
	return c
}
