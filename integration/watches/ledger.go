package watches

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/integration/linearizability"
)

// Change is what one revision did to one key.
type Change struct {
	Revision int64
	Key      string
	KV       *mvccpb.KeyValue // nil: the key was deleted
	Prev     *mvccpb.KeyValue // what was there before; nil: nothing
}

// Ledger is all that a store ever held: its changes by revision and then by key.
type Ledger struct {
	Last    int64 // the newest revision it knows of
	Changes []Change
	order   map[int64][]string // the keys of a transaction in the order of its operations, where that is known
}

// readers is how many reads of the past are under way at a time.
const readers = 8

// Bounds are a range of keys, as in a request; the zero value is all keys.
type Bounds struct{ Key, End []byte }

func (b Bounds) orAll() Bounds {
	if len(b.Key) == 0 {
		return Bounds{[]byte{0}, []byte{0}}
	}
	return b
}

// state is what keys hold at a revision.
type state map[string]*mvccpb.KeyValue

// Reader reads what a store holds within bounds at one revision after the other, in pieces, so that what has been read
// may be compacted.
type Reader struct {
	services []linearizability.Service
	bounds   Bounds
	ledger   *Ledger
	state    state        // at the ledger's last revision
	turn     atomic.Int64 // of the services: the one that answers, most likely
}

// NewReader returns a reader that begins with an empty store. Any of the services is asked.
func NewReader(services []linearizability.Service, bounds Bounds) *Reader {
	return &Reader{services: services, bounds: bounds.orAll(), ledger: &Ledger{order: make(map[int64][]string)}, state: state{}}
}

// Ledger returns what has been read.
func (r *Reader) Ledger() *Ledger { return r.ledger }

// To reads on, up to a revision, which must have been answered to somebody. Nothing may be compacted meanwhile but what
// it has read before. It looks at every revision at which something is known to have happened, and between two of them
// as far as they differ: so the only changes that it overlooks are those that nobody was told of, and that others undid
// before the next one that somebody was told of. It tries again until ctx is done. With an error nothing has been read.
func (r *Reader) To(ctx context.Context, last int64, known []int64) error {
	from := r.ledger.Last
	if last <= from {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := &piece{Reader: r, fail: cancel, slots: make(chan struct{}, readers), states: map[int64]state{from: r.state}, known: make(map[int64]bool)}
	points := []int64{from, last}
	for _, k := range known {
		if k > from && k <= last {
			points = append(points, k)
			p.known[k] = true
		}
	}
	slices.Sort(points)
	points = slices.Compact(points)
	for _, point := range points[1:] {
		p.group.Go(func() { p.at(ctx, point) })
	}
	p.group.Wait()
	for i := range points[1:] {
		p.group.Go(func() { p.between(ctx, points[i], points[i+1]) })
	}
	p.group.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	changes, err := compile(p.states)
	if err != nil {
		return err
	}
	r.ledger.Last, r.ledger.Changes, r.state = last, append(r.ledger.Changes, changes...), p.states[last]
	return nil
}

// piece is what is read at a time.
type piece struct {
	*Reader
	fail  context.CancelCauseFunc
	slots chan struct{}
	known map[int64]bool
	group sync.WaitGroup

	mu     sync.Mutex
	states map[int64]state // by revision
}

// at returns the state at a revision; nil if ctx is done.
func (r *piece) at(ctx context.Context, revision int64) state {
	r.mu.Lock()
	known := r.states[revision]
	r.mu.Unlock()
	if known != nil {
		return known
	}
	select {
	case r.slots <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	read, err := r.read(ctx, revision)
	<-r.slots
	if err != nil {
		r.fail(err)
		return nil
	}
	r.mu.Lock()
	r.states[revision] = read
	r.mu.Unlock()
	return read
}

// between reads what it takes to know every change after one revision and up to another.
func (r *piece) between(ctx context.Context, from, to int64) {
	before, after := r.at(ctx, from), r.at(ctx, to)
	if to-from < 2 || before == nil || after == nil {
		return
	}
	middle, deleted := int64(0), false
	for _, kv := range after {
		if m := kv.ModRevision; m > from && m < to {
			middle = m
			break
		}
	}
	for key := range before {
		deleted = deleted || after[key] == nil
	}
	switch {
	case middle > 0:
	case deleted && r.known[to]:
		middle = to - 1 // most likely it was then
	case deleted:
		middle = (from + to) / 2
	default:
		return // all that differs was put at the later revision
	}
	r.between(ctx, from, middle)
	r.between(ctx, middle, to)
}

// read reads a state, from any of the services: any copy has it. Some may be down, or stopped.
func (r *piece) read(ctx context.Context, revision int64) (state, error) {
	request := &pb.RangeRequest{Key: r.bounds.Key, RangeEnd: r.bounds.End, Revision: revision, Serializable: true}
	for {
		turn := r.turn.Load()
		attempt, cancel := context.WithTimeout(ctx, 3*time.Second)
		answer, err := r.services[turn%int64(len(r.services))].Range(attempt, request)
		cancel()
		if err == nil {
			found := make(state, len(answer.Kvs))
			for _, kv := range answer.Kvs {
				found[string(kv.Key)] = kv
			}
			return found, nil
		}
		r.turn.CompareAndSwap(turn, turn+1)
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("watches: reading revision %d: %w", revision, errors.Join(err, ctx.Err()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// compile finds the changes between states. Where two differ, there is none between them.
func compile(states map[int64]state) (changes []Change, err error) {
	revisions := slices.Sorted(maps.Keys(states))
	for i := 1; i < len(revisions); i++ {
		revision, before, now := revisions[i], states[revisions[i-1]], states[revisions[i]]
		from := len(changes)
		for key, kv := range now {
			prev := before[key]
			switch {
			case prev != nil && prev.ModRevision == kv.ModRevision:
			case kv.ModRevision == revision:
				changes = append(changes, Change{revision, key, kv, prev})
			default:
				return nil, fmt.Errorf("%w: at revision %d %q has %v, and at %d %v", linearizability.ErrViolation, revision, key, kv, revisions[i-1], prev)
			}
		}
		for key, prev := range before {
			if now[key] == nil {
				changes = append(changes, Change{revision, key, nil, prev})
			}
		}
		slices.SortFunc(changes[from:], func(a, b Change) int { return cmp.Compare(a.Key, b.Key) })
	}
	return changes, nil
}

// Known are the revisions at which something happened, as clients and watches were told.
func Known(ops []linearizability.Op, watches []*Watch) (known []int64) {
	for _, op := range ops {
		if op.Changes() {
			known = append(known, op.Output.Revision)
		}
	}
	for _, w := range watches {
		for _, a := range w.Answers {
			for _, e := range a.Events {
				known = append(known, e.Kv.ModRevision)
			}
		}
	}
	slices.Sort(known)
	return slices.Compact(known)
}

// at returns the changes of a revision.
func (l *Ledger) at(revision int64) []Change {
	compare := func(c Change, revision int64) int { return cmp.Compare(c.Revision, revision) }
	from, _ := slices.BinarySearchFunc(l.Changes, revision, compare)
	to, _ := slices.BinarySearchFunc(l.Changes, revision+1, compare)
	return l.Changes[from:to]
}

// Agree checks that every change that a client was told of is among those of the ledger, and learns from the requests
// in which order transactions wrote their keys.
func (l *Ledger) Agree(ops []linearizability.Op) error {
	for _, op := range ops {
		if !op.Changes() || op.Output.Revision > l.Last {
			continue
		}
		revision := op.Output.Revision
		i := slices.IndexFunc(l.at(revision), func(c Change) bool { return c.Key == op.Input.Key })
		if i < 0 {
			return fmt.Errorf("%w: the store shows no change of the key at revision %d: %v", linearizability.ErrViolation, revision, op)
		}
		c := l.at(revision)[i]
		if deleted := op.Input.Kind == linearizability.Delete; deleted != (c.KV == nil) || !deleted && string(c.KV.Value) != op.Input.Value {
			return fmt.Errorf("%w: the store shows %v at revision %d: %v", linearizability.ErrViolation, c.KV, revision, op)
		}
		l.order[revision] = append(l.order[revision], op.Input.Key)
	}
	return nil
}
