package shard

import (
	"slices"
	"strconv"
	"sync"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

// WithGroup labels what is registered with the group and the replica that it is
// of: a node has many, and for a while two of one group. Nil stays nil.
func WithGroup(r prometheus.Registerer, group uint64, replica raft.ServerID) prometheus.Registerer {
	if r == nil {
		return nil
	}
	return prometheus.WrapRegistererWith(prometheus.Labels{"group": strconv.FormatUint(group, 10), "replica": string(replica)}, r)
}

// registry is the registerer of everything that belongs to one replica. States
// and logs come and go within it and share their metrics, so these stay until
// the replica is closed.
type registry struct {
	prometheus.Registerer

	mu         sync.Mutex
	collectors []prometheus.Collector
}

// newRegistry returns a prometheus.Registerer, nil if r is.
func newRegistry(cfg Config) *registry {
	if cfg.Registerer == nil {
		return nil
	}
	return &registry{Registerer: WithGroup(cfg.Registerer, cfg.Group, cfg.Replica)}
}

// registerer avoids an interface that holds a nil pointer.
func (g *registry) registerer() prometheus.Registerer {
	if g == nil {
		return nil
	}
	return g
}

// Register implements prometheus.Registerer.
func (g *registry) Register(c prometheus.Collector) error {
	if err := g.Registerer.Register(c); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.collectors = append(g.collectors, c)
	return nil
}

// MustRegister implements prometheus.Registerer.
func (g *registry) MustRegister(all ...prometheus.Collector) {
	for _, c := range all {
		if err := g.Register(c); err != nil {
			panic(err)
		}
	}
}

// Unregister implements prometheus.Registerer. It does nothing: the store that
// takes the place of the one that unregisters has the same metrics.
func (g *registry) Unregister(prometheus.Collector) bool { return false }

// close takes everything out again.
func (g *registry) close() {
	if g == nil {
		return
	}
	g.mu.Lock()
	all := slices.Clone(g.collectors)
	g.collectors = nil
	g.mu.Unlock()
	for _, c := range all {
		g.Registerer.Unregister(c)
	}
}
