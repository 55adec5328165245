// Package metricset registers the metrics of parts of a process that come and go: for as long as there is a user, and
// once if several follow, or overlap, each other.
package metricset

import (
	"errors"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Set is metrics that are registered together. Embed it in the struct that holds them. The zero Set is empty.
type Set struct {
	members []prometheus.Collector

	mu         sync.Mutex
	registerer prometheus.Registerer // nil if it is not registered
	users      int
	gone       bool // unregistered by its last user: a registerer may keep it instead
}

// Add adds metrics, before Join.
func (s *Set) Add(c ...prometheus.Collector) { s.members = append(s.members, c...) }

// Describe implements prometheus.Collector.
func (s *Set) Describe(out chan<- *prometheus.Desc) {
	for _, c := range s.members {
		c.Describe(out)
	}
}

// Collect implements prometheus.Collector.
func (s *Set) Collect(out chan<- prometheus.Metric) {
	for _, c := range s.members {
		c.Collect(out)
	}
}

func (s *Set) set() *Set { return s }

// Member is a struct that embeds a Set.
type Member interface {
	prometheus.Collector
	set() *Set
}

// Join registers m for its first user and returns it; or the one of the same type and metrics that has users already,
// with one more. Each Join needs one Leave of what it returned. If r is nil, or has other metrics under these names, m
// is returned unregistered. It is safe for concurrent use.
func Join[M Member](r prometheus.Registerer, m M) M {
	if r == nil {
		return m
	}
	for {
		s := m.set()
		s.mu.Lock()
		err := r.Register(m)
		if err == nil {
			s.registerer, s.users = r, 1
		}
		s.mu.Unlock()
		var exists prometheus.AlreadyRegisteredError
		if !errors.As(err, &exists) {
			return m
		}
		old, ok := exists.ExistingCollector.(M)
		if !ok {
			return m
		}
		if old.set().join() {
			return old
		}
		// Its last user has just left and has unregistered it.
	}
}

func (s *Set) join() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return false
	}
	s.users++
	return true
}

// Leave ends one use. The last one unregisters the set, unless the registerer keeps it for a next user.
func (s *Set) Leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users == 0 {
		return
	}
	if s.users--; s.users == 0 {
		s.gone = s.registerer.Unregister(s)
	}
}
