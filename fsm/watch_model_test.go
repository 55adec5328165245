package fsm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm/mvcc"
)

// modelEvent is a change as a watch must see it.
type modelEvent struct {
	revision   int64
	key, value string
	deleted    bool
	lease      int64
}

// eventLog is all changes of a state, as a simple model makes them.
type eventLog struct {
	*generator
	values    map[string]string
	attached  map[string]int64 // to leases
	granted   map[int64]bool
	events    []modelEvent
	revision  int64
	compacted int64
	floors    bool
	whole     int // bytes that watches take of a transaction
}

func newEventLog(seed uint64) *eventLog {
	l := &eventLog{generator: newGenerator(seed), values: map[string]string{}, attached: map[string]int64{}, granted: map[int64]bool{}, revision: 1, compacted: -1, floors: seed%2 == 0}
	l.whole = 300 + l.IntN(2000)
	return l
}

// limits are small, so that all ways to read history are taken.
func (l *eventLog) limits() historyLimits {
	return historyLimits{rows: 2 + l.IntN(40), near: l.Int64N(40), keys: 1 + l.Int64N(20), batch: 1 + l.IntN(6), changes: 1 + l.IntN(100), perKey: 1 + l.IntN(100)}
}

func (l *eventLog) put(rev int64, key, value string) {
	l.values[key] = value
	delete(l.attached, key)
	l.events = append(l.events, modelEvent{revision: rev, key: key, value: value})
}

// remove deletes what is in a range, and says whether that was anything.
func (l *eventLog) remove(rev int64, span mvcc.Span) bool {
	var keys []string
	for key := range l.values {
		if span.Contains([]byte(key)) {
			keys = append(keys, key)
		}
	}
	return l.removeAll(rev, keys)
}

func (l *eventLog) removeAll(rev int64, keys []string) bool {
	slices.Sort(keys)
	for _, key := range keys {
		delete(l.values, key)
		delete(l.attached, key)
		l.events = append(l.events, modelEvent{revision: rev, key: key, deleted: true})
	}
	return len(keys) > 0
}

// change makes a command and applies it to the model as revision rev.
func (l *eventLog) change(rev int64) proto.Message {
	switch n := l.IntN(22); {
	case n < 9:
		p := put(string(l.key()), fmt.Sprint("v", l.IntN(1000), string(bytes.Repeat([]byte("x"), l.IntN(100)))))
		p.PrevKv = l.oneIn(4)
		l.put(rev, string(p.Key), string(p.Value))
		if lease := 1 + l.Int64N(3); l.granted[lease] {
			p.Lease, l.attached[string(p.Key)], l.events[len(l.events)-1].lease = lease, lease, lease
		}
		l.advance(rev)
		return p
	case n < 13:
		d := &pb.DeleteRangeRequest{Key: l.key(), RangeEnd: l.rangeEnd()}
		if l.remove(rev, mvcc.NewSpan(d.Key, d.RangeEnd)) {
			l.advance(rev)
		}
		return d
	case n < 18:
		return l.transaction(rev)
	case n == 18:
		at := max(1, l.compacted) + l.Int64N(l.revision-max(1, l.compacted)+1)
		if at > l.compacted {
			l.compacted = at
			if l.floors {
				l.advance(rev)
			}
		}
		return &pb.CompactionRequest{Revision: at}
	case n < 21:
		return l.lease(rev)
	}
	return nil
}

// lease grants or revokes one.
func (l *eventLog) lease(rev int64) proto.Message {
	id := 1 + l.Int64N(3)
	if l.granted[id] = !l.granted[id]; l.granted[id] {
		return grant(id, 10)
	}
	var keys []string
	for key, lease := range l.attached {
		if lease == id {
			keys = append(keys, key)
		}
	}
	if l.removeAll(rev, keys) {
		l.advance(rev)
	}
	return revoke(id)
}

func (l *eventLog) advance(rev int64) { l.revision = rev }

// transaction changes several keys, each once, as servers see to.
func (l *eventLog) transaction(rev int64) *pb.TxnRequest {
	r := &pb.TxnRequest{}
	used := map[string]bool{}
	for range 1 + l.IntN(8) {
		key := string(l.key())
		if used[key] {
			continue
		}
		used[key] = true
		if l.oneIn(3) {
			r.Success = append(r.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)}}})
			if l.remove(rev, mvcc.NewSpan([]byte(key), nil)) {
				l.advance(rev)
			}
			continue
		}
		value := fmt.Sprint("t", l.IntN(1000))
		r.Success = append(r.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put(key, value)}})
		l.put(rev, key, value)
		l.advance(rev)
	}
	return r
}

// entry makes a random entry.
func (l *eventLog) entry(t testing.TB) []byte {
	var b EntryBuilder
	floor := l.revision + 1 + l.Int64N(3)
	if l.floors {
		b.SetFloor(floor, 1)
	}
	for i := range l.IntN(6) {
		if !l.floors && l.oneIn(8) {
			b.Add(Request{Space: System, Data: request(t, put("system", "x")).Data})
			continue
		}
		rev := l.revision + 1
		if l.floors {
			rev = floor + int64(i)
		}
		b.Add(request(t, l.change(rev)))
		if l.floors {
			l.revision = max(l.revision, rev-1)
		}
	}
	return b.Bytes()
}

// expected is what a watch of span must see next from revision next on.
func (l *eventLog) expected(span mvcc.Span, next int64) []modelEvent {
	from, _ := slices.BinarySearchFunc(l.events, next, func(e modelEvent, rev int64) int { return int(e.revision - rev) })
	var all []modelEvent
	for _, e := range l.events[from:] {
		if span.Contains([]byte(e.key)) {
			all = append(all, e)
		}
	}
	return all
}

// follower is what a client knows of its watch.
type follower struct {
	span  mvcc.Span
	next  int64 // everything before has come
	ended bool

	canceled bool
}

func newFollower(key, end []byte, from int64) *follower {
	return &follower{span: mvcc.NewSpan(key, end), next: from}
}

// check compares a delivery with what the follower must get next.
func (w *follower) check(l *eventLog, d Delivery) error {
	if w.ended {
		return errors.New("a delivery after the end")
	}
	if d.Compacted > 0 {
		w.ended = true
		if d.Compacted <= w.next || d.Compacted > l.compacted || len(d.Events) > 0 {
			return fmt.Errorf("compacted %d (of %d) at %d", d.Compacted, l.compacted, w.next)
		}
		return nil
	}
	want := l.expected(w.span, w.next)
	if len(d.Events) == 0 && !d.Huge || len(d.Events) > len(want) {
		return fmt.Errorf("at %d: %d events, at most %d expected: %v", w.next, len(d.Events), len(want), d.Events)
	}
	for i, e := range d.Events {
		if err := want[i].check(e); err != nil {
			return fmt.Errorf("from %d, event %d: %w", w.next, i, err)
		}
	}
	last := w.next - 1
	if n := len(d.Events); n > 0 {
		last = d.Events[n-1].Kv.ModRevision
	}
	rest := want[len(d.Events):]
	switch {
	case len(rest) > 0 && rest[0].revision == last:
		return fmt.Errorf("transaction %d was split: %d events", last, len(d.Events))
	case d.Next <= last, len(rest) > 0 && d.Next > rest[0].revision, d.Huge && (len(rest) == 0 || d.Next != rest[0].revision):
		return fmt.Errorf("next is %d after %d, before %v; huge: %t", d.Next, last, rest[:min(1, len(rest))], d.Huge)
	}
	w.next = d.Next
	return nil
}

// checkHuge compares the parts of the transaction that a follower must get next, and then has its watch go on.
func (f *followed) checkHuge(ctx context.Context, l *eventLog, id int64, w *follower) error {
	at := w.next
	want := slices.DeleteFunc(l.expected(w.span, at), func(e modelEvent) bool { return e.revision != at })
	part := TransactionPart{Key: []byte(w.span.Start), RangeEnd: rangeEndOf(w.span), Revision: at, MaxBytes: 1 + l.IntN(1000)}
	for more := true; more; more = part.From > 0 {
		var events []*mvccpb.Event
		var err error
		events, part.From, err = f.store.ReadTransaction(ctx, part)
		if errors.Is(err, ErrCompacted) && at < l.compacted {
			w.ended = true
			return nil
		}
		if err != nil || len(events) == 0 || len(events) > len(want) {
			return fmt.Errorf("part of %d: %d events of %d, %w", at, len(events), len(want), err)
		}
		for i, e := range events {
			if err := want[i].check(e); err != nil {
				return fmt.Errorf("part of %d: %w", at, err)
			}
		}
		want = want[len(events):]
	}
	w.next = at + 1
	err := f.Watch(id, part.Key, part.RangeEnd, w.next)
	if errors.Is(err, ErrCompacted) && w.next < l.compacted {
		w.ended, err = true, nil
	}
	if len(want) > 0 {
		err = fmt.Errorf("transaction %d ends before %v", at, want[0])
	}
	return err
}

func (e modelEvent) check(got *mvccpb.Event) error {
	kv := got.Kv
	ok := string(kv.Key) == e.key && string(kv.Value) == e.value && kv.ModRevision == e.revision && (got.Type == mvccpb.Event_DELETE) == e.deleted &&
		got.PrevKv == nil && kv.Lease == e.lease && (kv.Version > 0) != e.deleted && (kv.CreateRevision > 0) != e.deleted
	if !ok {
		return fmt.Errorf("got %v, want %+v", got, e)
	}
	return nil
}

// followed is a feed and what its watches must see.
type followed struct {
	*Feed
	watches map[int64]*follower
	lastID  int64
}

func follow(s *Store, maxBytes int64) *followed {
	return &followed{Feed: s.NewFeed(maxBytes), watches: map[int64]*follower{}}
}

// watch adds a watch of a random range from a random revision.
func (f *followed) watch(l *eventLog) error {
	key, end := l.key(), l.rangeEnd()
	revision, compacted := f.store.Revision(User), f.store.CompactRevision(User) // perhaps in the midst of an entry
	from := revision + 1
	switch l.IntN(4) {
	case 0:
		from = max(1, compacted-1) + l.Int64N(revision-max(0, compacted-1)+1)
	case 1:
		from += l.Int64N(4)
	}
	f.lastID++
	err := f.Watch(f.lastID, key, end, from)
	if from < compacted {
		var of *CompactedError
		if !errors.Is(err, ErrCompacted) || !errors.As(err, &of) || of.Revision != compacted {
			return fmt.Errorf("watch from %d, compacted %d: %w", from, compacted, err)
		}
		return nil
	}
	f.watches[f.lastID] = newFollower(key, end, from)
	return err
}

// cancel cancels a random watch.
func (f *followed) cancel(l *eventLog) {
	id := 1 + l.Int64N(f.lastID+1)
	f.Cancel(id)
	if w := f.watches[id]; w != nil {
		w.canceled = true
		delete(f.watches, id)
	}
}

// take calls Take once, and says whether there was anything.
func (f *followed) take(ctx context.Context, l *eventLog, maxBytes int) (bool, error) {
	before := maps.Clone(f.watches)
	all, err := f.Take(ctx, maxBytes, l.whole)
	if err != nil {
		return false, err
	}
	for _, d := range all {
		w := cmp.Or(f.watches[d.ID], before[d.ID])
		if w != nil && w.canceled { // while Take was under way
			continue
		}
		if w == nil {
			return false, fmt.Errorf("a delivery for watch %d, which is not there", d.ID)
		}
		if err := w.check(l, d); err != nil {
			return false, fmt.Errorf("watch %d of %q..%q: %w", d.ID, w.span.Start, w.span.End, err)
		}
		if d.Huge {
			if err := f.checkHuge(ctx, l, d.ID, w); err != nil {
				return false, fmt.Errorf("watch %d of %q..%q: %w", d.ID, w.span.Start, w.span.End, err)
			}
		}
		if w.ended {
			delete(f.watches, d.ID)
		} else if got := f.Next(d.ID); got != 0 && got < d.Next { // 0: a later delivery ends it
			return false, fmt.Errorf("watch %d: next is %d after a delivery with %d", d.ID, got, d.Next)
		}
	}
	return len(all) > 0, f.checkProgress(l)
}

// checkProgress: what counts as taken has been delivered.
func (f *followed) checkProgress(l *eventLog) error {
	revision, ok := f.Progress()
	for id, w := range f.watches {
		next := f.Next(id)
		if want := l.expected(w.span, w.next); len(want) > 0 && (ok && want[0].revision <= revision || want[0].revision < next) {
			return fmt.Errorf("progress %d, %t, next %d, but watch %d has not seen %v", revision, ok, next, id, want[0])
		}
	}
	return nil
}

// takeAll takes until there is nothing: then everything applied has come.
func (f *followed) takeAll(ctx context.Context, l *eventLog, maxBytes int) error {
	for {
		more, err := f.take(ctx, l, maxBytes)
		if err != nil {
			return err
		}
		if !more {
			break
		}
	}
	if revision, ok := f.Progress(); !ok || revision != l.revision {
		return fmt.Errorf("progress %d, %t at revision %d with nothing to take", revision, ok, l.revision)
	}
	for id, w := range f.watches {
		if want := l.expected(w.span, w.next); len(want) > 0 {
			return fmt.Errorf("watch %d has not seen %v", id, want)
		}
	}
	return nil
}

// moveTo goes on in another store, as after the installation of a snapshot.
func (f *followed) moveTo(t *testing.T, l *eventLog, s *Store, maxBytes int64) *followed {
	t.Helper()
	next := follow(s, maxBytes)
	for id, w := range f.watches {
		next.lastID++
		from := f.Next(id)
		if from < w.next {
			t.Fatalf("watch %d goes back from %d to %d", id, w.next, from)
		}
		w.next = from
		err := next.Watch(next.lastID, []byte(w.span.Start), rangeEndOf(w.span), from)
		switch {
		case err == nil:
			next.watches[next.lastID] = w
		case !errors.Is(err, ErrCompacted) || from >= l.compacted:
			t.Fatal(err)
		}
	}
	f.Close()
	return next
}

func rangeEndOf(span mvcc.Span) []byte {
	if span.Single {
		return nil
	}
	return []byte(span.End)
}
