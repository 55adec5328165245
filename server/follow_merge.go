package server

import (
	"math"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

const (
	// leastShare is what each part of each stream may keep, however many there are.
	leastShare = 4 << 10
	// waitingBytes is what the merged watches of a stream keep, about, until it
	// is resolved; each part of each at least leastPartBytes.
	waitingBytes   = 16 << 20
	leastPartBytes = 16 << 10
	mostPartBytes  = 1 << 20
	// mergeBytes of events are delivered at once, and what is left of the last
	// one's transaction.
	mergeBytes = 1 << 20
	// resolveInterval is the least time between two questions whether groups are
	// complete; it is longer if the answer takes longer.
	resolveInterval = 10 * time.Millisecond
)

// partBytes may wait in each part of a merged watch before it is paused. w.mu is
// held.
func (w *watches) partBytes() int {
	parts := max(1, len(w.merged)*len(w.groups))
	return w.shareOf(min(max(waitingBytes/parts, leastPartBytes), mostPartBytes))
}

// shareOf is at most what a part of this stream may keep, less if there are so many streams that all of them would keep
// more than Config.MaxWatchBytes if their clients did not read: once for what waits, and once for what has just been
// taken. w.mu is held.
func (w *watches) shareOf(most int) int {
	parts := max(1, w.router.following.Load()*int64(len(w.groups)))
	return min(most, max(int(w.router.cfg.MaxWatchBytes/parts/2), w.router.least))
}

// startMerging begins what merged watches need. w.mu is held.
func (w *watches) startMerging() {
	if w.merging {
		return
	}
	w.merging = true
	w.tasks.Go(w.merge)
	w.tasks.Go(w.resolve)
}

// merge delivers what is resolved: a revision is when everything before it has
// been taken from every group. A group's parts come in the order of their
// revisions, and each revision is of one group.
func (w *watches) merge() {
	for {
		f, events, p, ends := w.resolved()
		switch {
		case f == nil:
			select {
			case <-w.merges:
				continue
			case <-w.ctx.Done():
				return
			}
		case len(events) > 0:
			if w.send(f, watchDelivery{events: events}) != nil {
				return
			}
			w.delivered(f, events)
		case p != nil:
			if w.sendAside(p) != nil {
				return
			}
		default:
			if w.send(f, *ends) != nil {
				return
			}
		}
	}
}

// resolved is something that can be delivered: events, or what is aside in a
// part, or the end of a watch; nothing if there is none.
func (w *watches) resolved() (*followed, []*mvccpb.Event, *part, *watchDelivery) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.holding {
		if events := f.resolved(w.router.cfg.faults.unresolvedEvents); len(events) > 0 {
			return f, events, nil, nil
		}
		if p := f.resolvedAside(); p != nil {
			return f, nil, p, nil
		}
		if f.ends != nil {
			return f, nil, nil, f.ends
		}
	}
	return nil, nil, nil, nil
}

// resolved are the next events of a watch that can be delivered, up to
// mergeBytes. watches.mu is held.
func (f *followed) resolved(anything bool) (events []*mvccpb.Event) {
	limit := int64(math.MaxInt64)
	heads := make([]int, len(f.parts)) // of what waits
	waits := false
	for _, p := range f.parts {
		limit = min(limit, p.taken()-1)
		waits = waits || len(p.waiting) > 0
	}
	if !waits {
		return nil
	}
	if anything {
		limit = math.MaxInt64
	}
	for bytes := 0; bytes < mergeBytes; {
		first, revision := -1, int64(math.MaxInt64)
		for i, p := range f.parts {
			if heads[i] < len(p.waiting) && p.waiting[heads[i]].Kv.ModRevision < revision {
				first, revision = i, p.waiting[heads[i]].Kv.ModRevision
			}
		}
		if first < 0 || revision > limit {
			break
		}
		p, from := f.parts[first], heads[first]
		to := from
		for to < len(p.waiting) && p.waiting[to].Kv.ModRevision == revision {
			to++
		}
		heads[first] = to
		events = append(events, p.waiting[from:to]...)
		bytes += sizeOfEvents(p.waiting[from:to])
	}
	return events
}

// delivered removes what has been delivered, and has more taken of what was
// paused.
func (w *watches) delivered(f *followed, events []*mvccpb.Event) {
	last := events[len(events)-1].Kv.ModRevision
	w.mu.Lock()
	defer w.mu.Unlock()
	if f.ended {
		return
	}
	for _, p := range f.parts {
		n := 0
		for n < len(p.waiting) && p.waiting[n].Kv.ModRevision <= last {
			n++
		}
		if n == 0 {
			continue
		}
		p.bytes -= sizeOfEvents(p.waiting[:n])
		clear(p.waiting[:n])
		if p.waiting = p.waiting[n:]; len(p.waiting) == 0 {
			p.waiting = nil
		}
		if p.paused && !p.aside && f.ends == nil && p.bytes <= w.partBytes()/2 {
			p.follower.resume(p)
		}
	}
	w.release(f)
	w.advanced()
}

// resolve has groups followed up to where they are complete, as long as events
// wait for that.
func (w *watches) resolve() {
	for a := (attempts{router: w.router}); w.ctx.Err() == nil; {
		at, groups := w.unresolved()
		if len(groups) == 0 {
			select {
			case <-w.asks:
			case <-w.ctx.Done():
			}
			continue
		}
		began := time.Now()
		gates, err := w.router.resolver.resolve(w.ctx, at, groups)
		if err != nil {
			if !a.again(w.ctx, nil, err) {
				return
			}
			continue
		}
		a = attempts{router: w.router}
		w.aim(at, gates)
		w.rest(max(resolveInterval, time.Since(began)))
	}
}

func (w *watches) rest(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.ctx.Done():
	}
}

// unresolved is the last revision that waits, and the groups that may still have
// something before it and are not known to be complete there.
func (w *watches) unresolved() (at int64, groups []uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.holding {
		for _, p := range f.parts {
			if n := len(p.waiting); n > 0 {
				at = max(at, p.waiting[n-1].Kv.ModRevision)
			}
			if p.aside {
				at = max(at, p.next)
			}
		}
	}
	if at == 0 {
		return 0, nil
	}
	for group, g := range w.groups {
		if n := len(g.goals); n > 0 && g.goals[n-1].at >= at {
			continue
		}
		for number := range w.holding {
			if p := g.parts[number]; p != nil && p.taken() <= at {
				groups = append(groups, group)
				break
			}
		}
	}
	return at, groups
}
