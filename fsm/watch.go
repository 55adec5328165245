package fsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// ErrWatchExists: the feed has a watch of this id.
var ErrWatchExists = errors.New("fsm: watch id is in use")

// CompactedError is ErrCompacted for a watch: Revision is the oldest one that it could begin from.
type CompactedError struct{ Revision int64 }

func (e *CompactedError) Error() string {
	return fmt.Sprintf("%v: the oldest is %d", ErrCompacted, e.Revision)
}

// Is makes errors.Is(err, ErrCompacted) hold.
func (e *CompactedError) Is(target error) bool { return target == ErrCompacted }

// Feed hands the changes of one store's client keys to one consumer: for each of its watches every change of the
// watched keys once, in order, transactions whole. Watch, Cancel, Next, Ready and Done may be called by any goroutine
// at any time; the other methods by one at a time.
//
// Changes come from memory as they are applied. A watch that begins in the past, or whose consumer is so slow that
// the feed is full, lags: Take reads its changes back from the history, and then it is live again. Whoever has waited
// until the store has applied an index, and then calls Take until it returns nothing, has every change up to there.
type Feed struct {
	store    *Store
	hub      *hub
	maxBytes int64
	ready    chan struct{}

	// All below is under hub.mu.
	watches map[int64]*watch
	pending []*watch // may have queued changes to hand out; each once
	lagging []*watch // have history to read; each once
	bytes   int64    // queued
	closed  bool
}

// Delivery is what a feed has for one watch.
type Delivery struct {
	ID int64

	// Events are whole transactions, oldest first. They are shared with others and must not be changed. PrevKv is
	// not set; PrevKV has it.
	Events []*mvccpb.Event

	// Next is the revision that the watch goes on from: to watch from there, in this state or in another one of the
	// group, misses and repeats nothing.
	Next int64

	// Huge says that the transaction at Next is larger than Take was to return. The watch has ended before it;
	// ReadTransaction has it, and a watch from the revision after it goes on.
	Huge bool

	// Compacted, if it is not 0, is the compaction that took away what the watch needed next: the watch has ended.
	Compacted int64
}

// NewFeed returns a feed without watches. What it has queued for its consumer takes up to maxBytes; changes beyond
// are read back from the history. It must be closed.
func (s *Store) NewFeed(maxBytes int64) *Feed {
	return &Feed{store: s, hub: s.hub, maxBytes: maxBytes, ready: make(chan struct{}, 1), watches: map[int64]*watch{}}
}

// Watch begins to follow a key, or the range that rangeEnd makes of it as in a range request, from revision from on,
// which may be in the future. Errors: a CompactedError if from is below CompactRevision, ErrWatchExists, ErrWitness,
// and ErrClosed after Close or Done.
func (f *Feed) Watch(id int64, key, rangeEnd []byte, from int64) error {
	if f.store.config.Witness {
		return ErrWitness
	}
	h := f.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.ended || f.closed:
		return ErrClosed
	case f.watches[id] != nil:
		return ErrWatchExists
	}
	if compacted := h.enter(f.store); from < compacted {
		h.leave()
		return &CompactedError{compacted}
	}
	w := &watch{feed: f, id: id, next: from, span: mvcc.NewSpan(bytes.Clone(key), bytes.Clone(rangeEnd))}
	f.watches[id] = w
	if from > h.published {
		h.attach(w)
	} else {
		f.lag(w)
	}
	return nil
}

// Cancel ends a watch: no Take that begins later has anything of it, and for those the id may be used again. An
// unknown id is fine.
func (f *Feed) Cancel(id int64) {
	f.hub.mu.Lock()
	defer f.hub.mu.Unlock()
	if w := f.watches[id]; w != nil {
		f.remove(w)
	}
}

// Close ends all watches of the feed. It is idempotent.
func (f *Feed) Close() {
	f.hub.mu.Lock()
	defer f.hub.mu.Unlock()
	f.closed = true
	n := 0
	for _, w := range f.watches {
		f.remove(w)
		if n++; n%closeStep == 0 { // apply need not wait for all of them
			f.hub.mu.Unlock()
			f.hub.mu.Lock()
		}
	}
	f.pending, f.lagging = nil, nil
}

// Ready receives when there may be something to take. Whoever receives must call Take.
func (f *Feed) Ready() <-chan struct{} { return f.ready }

// Done is closed when nothing more will be applied to the store, because it closes or another one has replaced it.
// The watches can go on from their Next in the store that follows.
func (f *Feed) Done() <-chan struct{} { return f.hub.done }

// Next is the revision from which a watch goes on in another store, also after Done: nothing before it is still to
// be taken. It is at least that of the watch's last delivery. 0 is an unknown id.
func (f *Feed) Next(id int64) int64 {
	f.hub.mu.Lock()
	defer f.hub.mu.Unlock()
	w := f.watches[id]
	switch {
	case w == nil:
		return 0
	case !w.isLive():
		return w.next
	case len(w.queue) > 0:
		return w.queue[0].Kv.ModRevision
	}
	return max(w.next, f.hub.published+1)
}

// Progress says up to which revision everything that the feed's watches follow has been taken; ok is false if
// something is still to be taken or to be read from the history.
func (f *Feed) Progress() (revision int64, ok bool) {
	f.hub.mu.Lock()
	defer f.hub.mu.Unlock()
	if f.hub.watching.Load() == 0 {
		return f.store.Revision(User), true
	}
	for _, list := range [][]*watch{f.pending, f.lagging} {
		for _, w := range list {
			if !w.ended && (len(w.queue) > 0 || !w.isLive()) {
				return 0, false
			}
		}
	}
	return f.hub.published, true
}

// Take returns what there is, up to about maxBytes, but one transaction at least; nil, nil if there is nothing now.
// Of the history, a transaction with more than wholeBytes of events for a watch is Huge. A watch may have several
// deliveries, in their order. Take may read the file, so the store must not be closed meanwhile. If it could not return
// all, Ready receives again. With an error, ctx's or the store's, nothing is lost.
func (f *Feed) Take(ctx context.Context, maxBytes, wholeBytes int) ([]Delivery, error) {
	left := max(1, maxBytes)
	var out []Delivery
	for begin := true; ; begin = false {
		w, err := f.takeQueued(&out, &left, begin)
		if w != nil {
			err = f.catchUp(ctx, w, &out, &left, wholeBytes)
		}
		switch {
		case err != nil && len(out) == 0:
			return nil, err
		case err != nil || w == nil:
			return out, nil // the next call meets the error again
		}
	}
}

// takeQueued takes what is in memory, and then returns a watch to read the history for, if any lags and there is room
// left. At the beginning of a Take, half of the room is kept for those that lag.
func (f *Feed) takeQueued(out *[]Delivery, left *int, begin bool) (*watch, error) {
	h := f.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || f.closed {
		return nil, ErrClosed
	}
	kept := 0
	if begin && len(f.lagging) > 0 {
		kept = *left / 2
	}
	n := 0
	for end := len(f.pending); n < end && *left > kept; n++ {
		w := f.pending[n]
		w.isPending = false
		if len(w.queue) == 0 || !w.isLive() { // it was detached meanwhile, and may have to read what is before the queue
			continue
		}
		*out = append(*out, w.take(left, kept))
		if len(w.queue) > 0 {
			f.pend(w) // after the others
		}
	}
	f.pending = slices.Delete(f.pending, 0, n)
	for *left > 0 && len(f.lagging) > 0 {
		w := f.lagging[0]
		f.lagging[0] = nil
		f.lagging = f.lagging[1:]
		w.isLagging = false
		if !w.ended {
			return w, nil
		}
	}
	if len(f.pending)+len(f.lagging) > 0 {
		signal(f.ready)
	}
	return nil, nil
}

// catchUp reads a part of a watch's history, and makes the watch live if that was the last of it.
func (f *Feed) catchUp(ctx context.Context, w *watch, out *[]Delivery, left *int, whole int) error {
	r, err := f.readHistory(ctx, w, *left, whole)
	h := f.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case w.ended:
		return nil
	case err != nil:
		f.lag(w)
		return err
	case r.compacted > 0:
		f.remove(w)
		*out = append(*out, Delivery{ID: w.id, Next: w.next, Compacted: r.compacted})
		return nil
	}
	w.next, w.isWide = r.next, r.isWide && r.next <= r.to
	if len(r.events) > 0 || r.huge {
		*out = append(*out, Delivery{ID: w.id, Events: r.events, Next: r.next, Huge: r.huge})
		*left -= r.bytes
	}
	if r.huge {
		f.remove(w)
		return nil
	}
	if r.next <= r.to {
		f.lag(w)
		return nil
	}
	if w.live == 0 {
		h.attach(w)
	}
	switch {
	case !w.isLive(): // changes have been published since the view was opened
		f.lag(w)
	case len(w.queue) > 0:
		f.pend(w)
	}
	return nil
}

// The methods below need hub.mu.

func (f *Feed) pend(w *watch) {
	if !w.isPending {
		w.isPending = true
		f.pending = append(f.pending, w)
	}
	signal(f.ready)
}

func (f *Feed) lag(w *watch) {
	if !w.isLagging {
		w.isLagging = true
		f.lagging = append(f.lagging, w)
	}
	signal(f.ready)
}

func (f *Feed) remove(w *watch) {
	f.hub.detach(w)
	w.ended = true
	delete(f.watches, w.id)
	f.hub.leave()
}

// PrevKV is the key just before revision rev, which is what an event's PrevKv shows; nil if the key did not exist
// then, or if that has been compacted. Errors: ErrFutureRevision if rev-1 is not there yet, ErrWitness, ctx's.
func (s *Store) PrevKV(ctx context.Context, key []byte, rev int64) (*mvccpb.KeyValue, error) {
	v, err := s.openView(ctx, User, 0)
	if err != nil {
		return nil, err
	}
	defer v.close()
	if rev <= 1 {
		return nil, nil
	}
	at, err := v.check(rev - 1)
	if err != nil {
		if errors.Is(err, ErrCompacted) {
			err = nil
		}
		return nil, err
	}
	hits, _, err := v.collect(ctx, mvcc.NewSpan(key, nil), at, 0, false)
	if err != nil || len(hits) == 0 {
		return nil, err
	}
	kvs, err := v.fetch(ctx, hits)
	if err != nil {
		return nil, err
	}
	return kvs[0], nil
}
