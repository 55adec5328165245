package fsm

import (
	"bytes"
	"cmp"
	"fmt"
	"sync"
	"sync/atomic"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/pkg/v3/adt"

	"kvd/fsm/mvcc"
)

// hub knows who watches which keys of clients, and hands out what is applied.
//
// Apply publishes each transaction right after readers can see it. A watch is attached, so that changes from its
// live revision on are queued for it, under the lock that publishing takes, and reads what is before that revision
// from the history. So there is no moment at which it could miss or repeat something. Publishing waits for nobody: a
// watch for whose changes its feed has no room is detached, and will read them from the history.
type hub struct {
	watching atomic.Int64  // how many watches there are; while there are none, apply looks at nothing else
	scans    chan struct{} // slots for reading the history of ranges
	done     chan struct{}
	limits   historyLimits
	most     int // publishMost
	metrics  *metrics
	faults   *faults

	// All below is under mu, which comes after Store.applyMu and before Store.mu.
	mu        sync.Mutex
	published int64 // attached watches have been given all changes up to here; valid while there are watches
	keys      map[string]*audience
	ranges    adt.IntervalTree // of *audience
	found     []*audience      // scratch of publish
	point     adt.Interval     // scratch of publish: the key itself
	ended     bool             // done is closed
	closed    bool
}

// audience is the attached watches of one key or range.
type audience struct {
	span    mvcc.Span
	watches []*watch
}

// watch is one watch of a feed. But for id, span and feed it is under hub.mu.
type watch struct {
	feed *Feed
	id   int64
	span mvcc.Span

	next int64 // everything before has been handed out
	live int64 // changes from here on are queued; 0 if it is not attached

	queue    []*mvccpb.Event // may share memory with other watches' until it is appended to
	bytes    int64           // of the queue
	audience *audience
	place    int // in the audience

	isPending, isLagging, isWide, ended bool
}

// isLive says whether there is no history to read.
func (w *watch) isLive() bool { return w.live > 0 && w.next >= w.live }

const (
	// rangeScans is how many of a store's watches on ranges may read history at a time.
	rangeScans = 2
	// publishStep is how many events are queued in one hold of the lock, except that a transaction is not split.
	publishStep = 4096
	// publishMost is how many events are queued of one transaction. Whoever wants more of it lags: apply would take
	// long to give many watches the deletion of many keys.
	publishMost = 1 << 18
	// closeStep is how many watches end in one hold of the lock.
	closeStep = 128
	// eventBytes is what an event takes beside its key and value.
	eventBytes = 232
)

func newHub(m *metrics, faults *faults) *hub {
	b := &[2]bound{}
	return &hub{
		metrics: m, faults: faults, limits: defaultHistoryLimits, most: publishMost, scans: make(chan struct{}, rangeScans), done: make(chan struct{}),
		keys: map[string]*audience{}, ranges: adt.NewIntervalTree(), point: adt.Interval{Begin: &b[0], End: &b[1]},
	}
}

func sizeOf(e *mvccpb.Event) int { return eventBytes + len(e.Kv.Key) + len(e.Kv.Value) }

// Retire says that nothing more will be applied: feeds are told. What has been applied can still be read and taken.
func (s *Store) Retire() { s.hub.end(false) }

func (h *hub) end(closed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = h.closed || closed
	if !h.ended {
		h.ended = true
		close(h.done)
	}
}

// enter counts a watch, before it looks at anything, and returns the oldest revision that it can begin from.
//
// Apply may be between showing a change and publishing it. If it has seen no watch, the change counts as published
// here, because the revision is looked at later. If it sees this one, it publishes what is counted already, which
// nobody has asked for.
func (h *hub) enter(s *Store) (compacted int64) {
	h.metrics.watches.Inc()
	first := h.watching.Add(1) == 1
	s.mu.RLock()
	defer s.mu.RUnlock()
	if first {
		h.published = s.spaces[User].revision
	}
	return s.spaces[User].compacted
}

func (h *hub) leave() {
	h.watching.Add(-1)
	h.metrics.watches.Dec()
}

// attach queues changes for a watch from now on. Those before its live revision, if it needs any, are published and
// can be read.
func (h *hub) attach(w *watch) {
	w.live = max(w.next, h.published+1)
	switch f := h.faults; {
	case f.watchTwice:
		w.live = h.published + 1
		w.next = min(w.next, w.live)
	case f.WatchGap:
		w.next = w.live
	}
	a := h.audienceOf(w.span)
	w.audience, w.place = a, len(a.watches)
	a.watches = append(a.watches, w)
}

// audienceOf returns the audience of a span, a new one if there is none.
func (h *hub) audienceOf(span mvcc.Span) *audience {
	if span.Single {
		a := h.keys[span.Start]
		if a == nil {
			a = &audience{span: span}
			h.keys[span.Start] = a
		}
		return a
	}
	if isEmpty(span) {
		return &audience{span: span}
	}
	at := interval(span)
	if found := h.ranges.Find(at); found != nil {
		return found.Val.(*audience)
	}
	a := &audience{span: span}
	h.ranges.Insert(at, a)
	return a
}

// detach drops what is queued for a watch, and queues no more.
func (h *hub) detach(w *watch) {
	w.feed.bytes -= w.bytes
	w.queue, w.bytes = nil, 0
	if w.live == 0 {
		return
	}
	a := w.audience
	last := len(a.watches) - 1
	a.watches[w.place], a.watches[last].place = a.watches[last], w.place
	a.watches[last] = nil
	a.watches = a.watches[:last]
	w.live, w.audience = 0, nil
	switch {
	case last > 0:
	case a.span.Single:
		delete(h.keys, a.span.Start)
	case !isEmpty(a.span):
		h.ranges.Delete(interval(a.span))
	}
}

// publish queues the clients' changes that apply has made since there were from of them in memory, and that readers
// can see.
func (s *Store) publish(from int) error {
	h := s.hub
	if h.watching.Load() == 0 {
		return nil
	}
	if f := h.faults.publishing; f != nil {
		f()
	}
	sp := s.spaces[User] // only apply changes what is looked at here
	h.mu.Lock()
	defer h.mu.Unlock()
	queued := 0
	defer func() { h.metrics.watchEvents.Add(float64(queued)) }()
	for rows := sp.active[from:]; len(rows) > 0; {
		if queued > publishStep {
			h.mu.Unlock()
			h.metrics.watchEvents.Add(float64(queued))
			queued = 0
			h.mu.Lock()
		}
		n, err := h.publishTransaction(rows)
		if err != nil {
			return fmt.Errorf("%w: revision %d: %w", ErrCorruptState, rows[0].Revision.Main, err)
		}
		queued += n
		h.published = rows[0].Revision.Main
		for len(rows) > 0 && rows[0].Revision.Main == h.published {
			rows = rows[1:]
		}
	}
	h.published = sp.revision
	return nil
}

// publishTransaction queues the changes of the first transaction in rows, and returns how often it has queued one.
func (h *hub) publishTransaction(rows mvcc.Rows) (queued int, err error) {
	for i, row := range rows {
		if row.Revision.Main != rows[0].Revision.Main {
			break
		}
		if f := h.faults.watchSplit; f != nil && i > 0 {
			h.mu.Unlock()
			f()
			h.mu.Lock()
		}
		key, err := mvcc.RowKey(row.Data)
		if err != nil {
			return queued, err
		}
		h.find(key)
		if len(h.found) == 0 {
			continue
		}
		event, err := newEvent(row.Revision, row.Tombstone, row.Data)
		if err != nil {
			return queued, err
		}
		alone := []*mvccpb.Event{event}
		for _, a := range h.found {
			for i := len(a.watches) - 1; i >= 0; i-- { // either may take the i-th out
				if queued++; queued > h.most {
					a.watches[i].giveUp(event.Kv.ModRevision)
				} else {
					a.watches[i].enqueue(alone)
				}
			}
		}
	}
	return queued, nil
}

// find sets found to the audiences of a key.
func (h *hub) find(key []byte) {
	h.found = h.found[:0]
	if a := h.keys[string(key)]; a != nil {
		h.found = append(h.found, a)
	}
	if h.ranges.Len() == 0 {
		return
	}
	begin, end := h.point.Begin.(*bound), h.point.End.(*bound)
	begin.key = mvcc.NewSpan(key, nil).Start
	end.key, end.after = begin.key, true
	h.ranges.Visit(h.point, func(found *adt.IntervalValue) bool {
		h.found = append(h.found, found.Val.(*audience))
		return true
	})
	begin.key, end.key = "", ""
}

// enqueue gives an attached watch a change, if there is room in its feed.
func (w *watch) enqueue(alone []*mvccpb.Event) {
	f, revision, n := w.feed, alone[0].Kv.ModRevision, int64(sizeOf(alone[0]))
	switch {
	case revision < w.live:
		return
	case f.bytes+n > f.maxBytes:
		w.giveUp(revision)
		return
	case len(w.queue) == 0:
		w.queue = alone
	default:
		w.queue = append(w.queue, alone[0])
	}
	w.bytes += n
	f.bytes += n
	if w.isLive() {
		f.pend(w)
	}
}

// giveUp detaches an attached watch because of a change at revision, so that it lags.
func (w *watch) giveUp(revision int64) {
	if revision < w.live {
		return
	}
	if w.isLive() {
		// All before this transaction, or before what is queued, has been handed out.
		w.next = max(w.next, revision)
		if len(w.queue) > 0 {
			w.next = w.queue[0].Kv.ModRevision
		}
	}
	h := w.feed.hub
	h.metrics.laggingWatches.Inc()
	h.detach(w)
	w.feed.lag(w)
}

// take hands out what is queued, or the first transactions of it, one at least, that bring left down to kept.
func (w *watch) take(left *int, kept int) Delivery {
	d := Delivery{ID: w.id, Events: w.queue, Next: w.feed.hub.published + 1}
	bytes := w.bytes
	w.queue = nil
	if room := int64(*left - kept); bytes > room {
		var n int
		n, bytes = split(d.Events, room)
		if n < len(d.Events) {
			d.Events, w.queue = d.Events[:n:n], d.Events[n:]
			d.Next = w.queue[0].Kv.ModRevision
		}
	}
	w.bytes -= bytes
	w.feed.bytes -= bytes
	w.next = d.Next
	*left -= int(bytes)
	return d
}

// split returns how many events make up the first transactions that fill left, and their size.
func split(events []*mvccpb.Event, left int64) (n int, bytes int64) {
	for n < len(events) {
		if n > 0 && bytes >= left && events[n].Kv.ModRevision != events[n-1].Kv.ModRevision {
			break
		}
		bytes += int64(sizeOf(events[n]))
		n++
	}
	return n, bytes
}

// newEvent makes an event of a row, which it copies: the row's memory is part of a much larger block.
func newEvent(r mvcc.Revision, tombstone bool, row []byte) (*mvccpb.Event, error) {
	m := &struct {
		event mvccpb.Event
		kv    mvccpb.KeyValue
	}{}
	m.event.Kv = &m.kv
	err := mvcc.DecodeRow(bytes.Clone(row), &m.kv)
	if tombstone {
		m.event.Type, m.kv.ModRevision = mvccpb.Event_DELETE, r.Main
	}
	return &m.event, err
}

// bound is an end of an interval of keys: a key, what is right after it, or, if last, what is after all keys.
type bound struct {
	key         string
	after, last bool
}

// Compare implements adt.Comparable.
func (b *bound) Compare(other adt.Comparable) int {
	o := other.(*bound)
	if b.last || o.last {
		return compareBool(b.last, o.last)
	}
	if c := cmp.Compare(b.key, o.key); c != 0 {
		return c
	}
	return compareBool(b.after, o.after)
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func interval(span mvcc.Span) adt.Interval {
	return adt.Interval{Begin: &bound{key: span.Start}, End: &bound{key: span.End, last: span.Unbounded}}
}

// isEmpty says whether no key is in a span; the tree of intervals cannot have such.
func isEmpty(span mvcc.Span) bool { return !span.Single && !span.Unbounded && span.End <= span.Start }
