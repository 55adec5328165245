package fsm

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// historyLimits bound a step of reading history.
type historyLimits struct {
	rows    int   // looked at, except that a transaction is finished
	near    int64 // a range that is not so many revisions behind looks at all rows
	keys    int64 // so does a range of more keys than this, and than there may be rows
	batch   int   // keys looked at in one hold of the lock
	changes int   // of a range, taken from the index, about
	perKey  int   // changes of one key; of each key of a range a 32nd, because the lock is held for many
}

var defaultHistoryLimits = historyLimits{rows: 1 << 14, near: 1 << 10, keys: 1 << 10, batch: scanBudget, changes: 1 << 13, perKey: 1 << 10}

// history is one step of reading a watch's changes back. Its view keeps compactions from what it reads.
type history struct {
	limits historyLimits
	view   *view
	span   mvcc.Span
	from   mvcc.Revision
	to     int64 // the last revision to read
	limit  int   // bytes of events after which no further transaction begins
	whole  int   // and that a transaction may have
	part   int   // or: after which a transaction does not go on
	isWide bool  // the span is known to have more changes than are worth looking up

	events    []*mvccpb.Event
	subs      []uint32 // of the events, if it reads a part
	bytes     int
	beginning int   // bytes before the transaction of the last event
	before    int   // events before it
	last      int64 // revision of the last event
	looked    int   // rows
	scanned   int64 // revision of the last of them

	next      int64  // where the next step goes on; above to if none is needed
	huge      bool   // with a transaction that is too large
	sub       uint32 // with a part of it, from this change on
	compacted int64  // instead of all: what is needed is gone, up to here
}

// readHistory reads some of what a lagging watch needs next.
func (f *Feed) readHistory(ctx context.Context, w *watch, limit, whole int) (*history, error) {
	s := f.store
	if !w.span.Single {
		select {
		case s.hub.scans <- struct{}{}:
			defer func() { <-s.hub.scans }()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	v, err := s.openView(ctx, User, 0)
	if err != nil {
		return nil, err
	}
	defer v.close()
	h := &history{limits: s.hub.limits, view: v, span: w.span, to: v.revision, limit: limit, whole: max(1, whole), part: math.MaxInt}
	s.hub.mu.Lock()
	h.from, h.isWide = mvcc.Revision{Main: w.next}, w.isWide
	if w.live > 0 {
		h.to = min(h.to, w.live-1)
	}
	s.hub.mu.Unlock()
	if f := s.config.faults.catchingUp; f != nil {
		f()
	}
	time.Sleep(s.config.faults.SlowHistory)
	h.next = h.to + 1
	switch {
	case h.from.Main < v.compacted:
		h.compacted = v.compacted
		return h, nil
	case h.from.Main > h.to:
		h.next = h.from.Main
		return h, nil
	}
	return h, h.read(ctx)
}

func (h *history) read(ctx context.Context) error {
	if h.span.Single || !h.isWide && h.to-h.from.Main >= h.limits.near {
		changes, ok, err := h.collect(ctx)
		if err != nil {
			return err
		}
		if ok {
			return h.fetch(ctx, changes)
		}
		h.next, h.isWide = h.to+1, true
	}
	return h.scan(ctx)
}

// collect finds the changes of the span in the index, if they are few; not all of them, perhaps, but those before
// next.
func (h *history) collect(ctx context.Context) (changes []mvcc.Change, ok bool, err error) {
	s, index := h.view.store, &h.view.space.index
	perKey, most := h.limits.perKey, max(h.limits.keys, h.to-h.from.Main)
	if !h.span.Single {
		perKey = perKey/32 + 1
	}
	for from, done, keys := h.span.Start, false, int64(0); !done; keys += int64(h.limits.batch) {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		if keys >= most || len(changes) >= h.limits.changes && !h.span.Single {
			return nil, false, nil
		}
		var next int64
		s.mu.RLock()
		changes, next, from, done = index.Changes(h.span, from, h.from.Main, h.to, h.limits.batch, perKey, changes)
		s.mu.RUnlock()
		h.next = min(h.next, next)
	}
	if h.next <= h.from.Main {
		return nil, false, nil
	}
	if !h.span.Single {
		slices.SortFunc(changes, func(a, b mvcc.Change) int { return a.Stamp.Revision().Compare(b.Stamp.Revision()) })
	}
	place := func(r mvcc.Revision) int {
		i, _ := slices.BinarySearchFunc(changes, r, func(c mvcc.Change, r mvcc.Revision) int { return c.Stamp.Revision().Compare(r) })
		return i
	}
	return changes[place(h.from):place(mvcc.Revision{Main: h.next})], true, nil
}

// fetch makes events of changes found in the index.
func (h *history) fetch(ctx context.Context, changes []mvcc.Change) error {
	rows := findRows(h.view)
	defer rows.close()
	for i, c := range changes {
		if i%256 == 255 && ctx.Err() != nil {
			return ctx.Err()
		}
		r := c.Stamp.Revision()
		if h.isFull(r) {
			return nil
		}
		data, err := rows.row(c)
		if err != nil {
			return err
		}
		if done, err := h.add(r, c.Stamp.Tombstone(), data); err != nil || done {
			return err
		}
	}
	return nil
}

// isFull says whether the step ends before a change's transaction, and if so, sets where the next one goes on.
func (h *history) isFull(r mvcc.Revision) bool {
	if r.Main == h.last || h.bytes < h.limit {
		return false
	}
	h.next = r.Main
	return true
}

// add takes a change; done says that the step ends before it, or before its transaction, which is too large.
func (h *history) add(r mvcc.Revision, tombstone bool, row []byte) (done bool, err error) {
	if len(h.events) > 0 && h.bytes >= h.part {
		h.sub = r.Sub
		return true, nil
	}
	if r.Main != h.last {
		h.last, h.beginning, h.before = r.Main, h.bytes, len(h.events)
	}
	if h.bytes-h.beginning+eventBytes+len(row) > h.whole {
		clear(h.events[h.before:])
		h.events, h.bytes = h.events[:h.before], h.beginning
		h.next, h.huge = r.Main, true
		return true, nil
	}
	event, err := newEvent(r, tombstone, row)
	if err != nil {
		return false, fmt.Errorf("%w: revision %d.%d: %w", ErrCorruptState, r.Main, r.Sub, err)
	}
	h.events = append(h.events, event)
	if h.part < math.MaxInt {
		h.subs = append(h.subs, r.Sub)
	}
	h.bytes += sizeOf(event)
	return false, nil
}

// scan looks at all rows in the order of their revisions.
func (h *history) scan(ctx context.Context) error {
	rows := findRows(h.view)
	defer rows.close()
	end := mvcc.Revision{Main: h.to + 1}
	at := h.from
	if first, ok := rows.first(); !ok || at.Compare(first) < 0 {
		until := end
		if ok && first.Compare(end) < 0 {
			until = first
		}
		if done, err := h.scanStored(ctx, rows, until); err != nil || done {
			return err
		}
	}
	for _, set := range []mvcc.Rows{rows.flushing, rows.active} {
		begin, _ := slices.BinarySearchFunc(set, at, func(row mvcc.Row, r mvcc.Revision) int { return row.Revision.Compare(r) })
		for _, row := range set[begin:] {
			if row.Revision.Compare(end) >= 0 {
				return nil
			}
			if done, err := h.look(row.Revision, row.Tombstone, row.Data); err != nil || done {
				return err
			}
		}
	}
	return nil
}

func (h *history) scanStored(ctx context.Context, rows *rowFinder, until mvcc.Revision) (done bool, err error) {
	bucket, err := rows.file()
	if err != nil {
		return false, err
	}
	cursor := bucket.Cursor()
	for k, data := cursor.Seek(h.from.AppendKey(nil, false)); k != nil; k, data = cursor.Next() {
		r, tombstone, err := mvcc.ParseKey(k)
		if err != nil {
			return false, fmt.Errorf("%w: %w", ErrCorruptState, err)
		}
		if r.Compare(until) >= 0 {
			return false, nil
		}
		if h.looked%256 == 255 && ctx.Err() != nil {
			return false, ctx.Err()
		}
		if done, err := h.look(r, tombstone, data); err != nil || done {
			return done, err
		}
	}
	return false, nil
}

// look takes a row, if it is of the span; done says that the step ends before it.
func (h *history) look(r mvcc.Revision, tombstone bool, data []byte) (done bool, err error) {
	if h.looked >= h.limits.rows && r.Main != h.scanned {
		h.limit = 0
	}
	if h.isFull(r) {
		return true, nil
	}
	h.looked, h.scanned = h.looked+1, r.Main
	key, err := mvcc.RowKey(data)
	if err != nil {
		return false, fmt.Errorf("%w: revision %d.%d: %w", ErrCorruptState, r.Main, r.Sub, err)
	}
	if !h.span.Contains(key) {
		return false, nil
	}
	return h.add(r, tombstone, data)
}

// rowFinder finds the rows that were applied before it was made: those in memory, and those that had been written.
type rowFinder struct {
	view             *view
	active, flushing mvcc.Rows
	tx               *bbolt.Tx
}

func findRows(v *view) *rowFinder {
	v.store.mu.RLock()
	defer v.store.mu.RUnlock()
	return &rowFinder{view: v, active: v.space.active, flushing: v.space.flushing}
}

func (s *rowFinder) close() {
	if s.tx != nil {
		rollback(s.tx)
	}
}

// first is the oldest row in memory.
func (s *rowFinder) first() (r mvcc.Revision, ok bool) {
	for _, set := range []mvcc.Rows{s.flushing, s.active} {
		if len(set) > 0 {
			return set[0].Revision, true
		}
	}
	return mvcc.Revision{}, false
}

// file is the bucket of what was not in memory.
func (s *rowFinder) file() (_ *bbolt.Bucket, err error) {
	if s.tx == nil {
		if s.tx, err = s.view.store.begin(); err != nil {
			return nil, err
		}
	}
	return s.tx.Bucket(s.view.space.bucket), nil
}

// row is the stored form of a change.
func (s *rowFinder) row(c mvcc.Change) ([]byte, error) {
	r := c.Stamp.Revision()
	if c.Stamp.Tombstone() {
		return mvcc.AppendTombstone(nil, c.Key), nil
	}
	for _, set := range []mvcc.Rows{s.active, s.flushing} {
		if data, ok := set.Find(r); ok {
			return data, nil
		}
	}
	bucket, err := s.file()
	if err != nil {
		return nil, err
	}
	var key [mvcc.KeyBytes]byte
	data := bucket.Get(r.AppendKey(key[:0], false))
	if data == nil {
		return nil, fmt.Errorf("%w: key %q has no row at revision %d.%d", ErrCorruptState, c.Key, r.Main, r.Sub)
	}
	return data, nil
}
