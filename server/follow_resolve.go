package server

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"kvd/shard"
)

// resolver learns from which index on groups are complete at a revision, for all
// merged watches of this node: once that is so, it is for ever.
type resolver struct {
	router *router

	mu      sync.Mutex
	known   map[uint64]resolution // by group: the highest
	wishes  map[*wish]struct{}
	running bool
}

type resolution struct {
	at   int64
	gate gate
}

// wish is one caller's.
type wish struct {
	at     int64
	groups []uint64 // that are not known yet
	done   chan struct{}
}

// resolve returns an index for each group from which on it is complete at a
// revision, which must have been handed out. It tries until ctx ends.
func (q *resolver) resolve(ctx context.Context, at int64, groups []uint64) (map[uint64]gate, error) {
	q.mu.Lock()
	mine := &wish{at: at, groups: slices.Clone(groups), done: make(chan struct{})}
	if !q.fulfilled(mine) {
		if !q.running && !q.router.spawn(q.run) {
			q.mu.Unlock()
			return nil, shard.ErrClosed
		}
		q.running = true
		if q.wishes == nil {
			q.wishes = make(map[*wish]struct{})
		}
		q.wishes[mine] = struct{}{}
		q.mu.Unlock()
		select {
		case <-mine.done:
		case <-ctx.Done():
		}
		q.mu.Lock()
		delete(q.wishes, mine)
	}
	defer q.mu.Unlock()
	gates := make(map[uint64]gate, len(groups))
	for _, group := range groups {
		known, ok := q.known[group]
		if !ok || known.at < at {
			return nil, cmp.Or(ctx.Err(), shard.ErrClosed)
		}
		gates[group] = known.gate
	}
	return gates, nil
}

// fulfilled reports whether all is known that is wished for. q.mu is held.
func (q *resolver) fulfilled(w *wish) bool {
	w.groups = slices.DeleteFunc(w.groups, func(group uint64) bool {
		known, ok := q.known[group]
		return ok && known.at >= w.at
	})
	return len(w.groups) == 0
}

// run asks until all wishes are fulfilled.
func (q *resolver) run() {
	r := q.router
	for a := (attempts{router: r}); ; {
		at, groups := q.next()
		if len(groups) == 0 {
			return
		}
		r.metrics.resolutions.Inc()
		passed, err := q.ask(at, groups, &a)
		q.learn(at, passed)
		if len(passed) == len(groups) {
			a = attempts{router: r}
			continue
		}
		if r.ctx.Err() != nil {
			q.stop()
			return
		}
		a.again(r.ctx, r.cfg.leaderChanged(without(groups, passed)[0]), err)
	}
}

func (q *resolver) ask(at int64, groups []uint64, a *attempts) ([]gate, error) {
	if q.router.cfg.faults.skipGates {
		passed := make([]gate, len(groups))
		for i, group := range groups {
			passed[i].group = group
		}
		return passed, nil
	}
	ctx, cancel := context.WithTimeout(q.router.ctx, cutTimeout)
	defer cancel()
	return q.router.tryGates(ctx, at, groups, a)
}

// next is what to ask for; nothing ends run.
func (q *resolver) next() (at int64, groups []uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for w := range q.wishes {
		at = max(at, w.at)
		groups = append(groups, w.groups...)
	}
	slices.Sort(groups)
	groups = slices.Compact(groups)
	q.running = len(groups) > 0
	return at, groups
}

func (q *resolver) learn(at int64, passed []gate) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.known == nil {
		q.known = make(map[uint64]resolution)
	}
	for _, g := range passed {
		if q.known[g.group].at < at {
			q.known[g.group] = resolution{at, g}
		}
	}
	for w := range q.wishes {
		if q.fulfilled(w) {
			delete(q.wishes, w)
			close(w.done)
		}
	}
}

// stop ends what waits.
func (q *resolver) stop() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running = false
	for w := range q.wishes {
		delete(q.wishes, w)
		close(w.done)
	}
}
