package watches

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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

// Read reads all keys of a store at every revision up to one, which must have been answered to somebody. Nothing may
// have been compacted. It tries again until ctx is done.
func Read(ctx context.Context, services []linearizability.Service, last int64) (*Ledger, error) {
	states := make([]map[string]*mvccpb.KeyValue, last+1) // by revision
	var next atomic.Int64
	var group sync.WaitGroup
	errs := make(chan error, readers)
	for i := range readers {
		group.Go(func() {
			for {
				revision := next.Add(1)
				if revision > last {
					return
				}
				state, err := readAt(ctx, services, i, revision)
				if err != nil {
					errs <- err
					return
				}
				states[revision] = state
			}
		})
	}
	group.Wait()
	select {
	case err := <-errs:
		return nil, err
	default:
		return compile(states)
	}
}

// readAt reads all keys at a revision, from any of the services.
func readAt(ctx context.Context, services []linearizability.Service, first int, revision int64) (map[string]*mvccpb.KeyValue, error) {
	for i := first; ; i++ {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		answer, err := services[i%len(services)].Range(attempt, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: revision})
		cancel()
		if err == nil {
			state := make(map[string]*mvccpb.KeyValue, len(answer.Kvs))
			for _, kv := range answer.Kvs {
				state[string(kv.Key)] = kv
			}
			return state, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("watches: reading revision %d: %w", revision, errors.Join(err, ctx.Err()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// compile finds the changes between states.
func compile(states []map[string]*mvccpb.KeyValue) (*Ledger, error) {
	l := &Ledger{Last: int64(len(states) - 1), order: make(map[int64][]string)}
	for i := 1; i < len(states); i++ {
		revision, before, now := int64(i), states[i-1], states[i]
		from := len(l.Changes)
		for key, kv := range now {
			prev := before[key]
			switch {
			case prev != nil && prev.ModRevision == kv.ModRevision:
			case kv.ModRevision == revision:
				l.Changes = append(l.Changes, Change{revision, key, kv, prev})
			default:
				return nil, fmt.Errorf("%w: at revision %d %q has %v, and at the one before %v", linearizability.ErrViolation, revision, key, kv, prev)
			}
		}
		for key, prev := range before {
			if now[key] == nil {
				l.Changes = append(l.Changes, Change{revision, key, nil, prev})
			}
		}
		slices.SortFunc(l.Changes[from:], func(a, b Change) int { return cmp.Compare(a.Key, b.Key) })
	}
	return l, nil
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
