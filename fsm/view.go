package fsm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// scanBudget is how many keys are looked at or changed in one hold of the lock: some ten microseconds.
const scanBudget = 128

// view reads one key space at a fixed revision. While it is open, no physical compaction that was not logically
// done before it was opened touches the index or the file, so what it may read stays.
type view struct {
	store     *Store
	space     *keyspace
	revision  int64 // newest it sees
	newest    int64 // as requests count: what may be asked for, and what responses carry; revision or above
	compacted int64
	epoch     *readEpoch
	meter     Meter // nil = what is read is not bounded
}

// openView opens a view of the newest revision, which counts as current at least. Changes that are applied while the
// view is open stay out of it even if they are not above current.
func (s *Store) openView(ctx context.Context, space Space, current int64) (*view, error) {
	if space >= spaces {
		return nil, fmt.Errorf("%w: %d", ErrUnknownSpace, space)
	}
	if s.config.Witness {
		return nil, ErrWitness
	}
	sp := s.spaces[space]
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.epoch.readers.Add(1)
	return &view{store: s, space: sp, revision: sp.revision, newest: max(sp.revision, current), compacted: sp.compacted,
		epoch: s.epoch, meter: meterOf(ctx)}, nil
}

func (v *view) close() { v.epoch.leave() }

// readEpoch counts the views opened between two physical compactions.
type readEpoch struct {
	readers atomic.Int64
	retired atomic.Bool
	once    sync.Once
	empty   chan struct{}
}

func newReadEpoch() *readEpoch { return &readEpoch{empty: make(chan struct{})} }

func (e *readEpoch) leave() {
	if e.readers.Add(-1) == 0 && e.retired.Load() {
		e.once.Do(func() { close(e.empty) })
	}
}

// retire is called when nobody can join any more; empty is closed when the last reader has left.
func (e *readEpoch) retire() {
	e.retired.Store(true)
	if e.readers.Load() == 0 {
		e.once.Do(func() { close(e.empty) })
	}
}

// check says whether rev, 0 or less for the newest, can be read, and returns the revision at which to look.
func (v *view) check(rev int64) (int64, error) {
	if rev > v.newest {
		return 0, ErrFutureRevision
	}
	if rev <= 0 {
		return v.revision, nil
	}
	if rev < v.compacted {
		return 0, ErrCompacted
	}
	return min(rev, v.revision), nil
}

// hit is a key that a read found, and its change.
type hit struct {
	key   string
	stamp mvcc.Stamp
}

// collect returns the first limit keys of the span at rev, all of them if limit is 0 or less, none if it is
// countOnly; and how many there are. If count is false, counting may stop at the limit.
func (v *view) collect(ctx context.Context, span mvcc.Span, rev, limit int64, count bool) (hits []hit, total int64, err error) {
	s, sp := v.store, v.space
	if span.Single {
		s.mu.RLock()
		stamp, ok := sp.index.Get(span.Start, rev)
		s.mu.RUnlock()
		switch {
		case !ok:
			return nil, 0, nil
		case limit == countOnly:
			return nil, 1, nil
		}
		return []hit{{span.Start, stamp}}, 1, nil
	}
	visit := func(key string, stamp mvcc.Stamp) bool {
		full := limit == countOnly || limit > 0 && total >= limit
		if full && !count {
			return false
		}
		if !full {
			hits = append(hits, hit{key, stamp})
		}
		total++
		return true
	}
	for from, done := span.Start, false; !done; {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		before := total
		s.mu.RLock()
		from, done = sp.index.Scan(span, from, rev, scanBudget, visit)
		s.mu.RUnlock()
		if err := v.take(int(total-before) * visitBytes); err != nil {
			return nil, 0, err
		}
	}
	return hits, total, nil
}

// countOnly is the limit that collects nothing.
const countOnly = -1 << 63

// fetch reads the values of hits. What it returns may share memory with other reads and must not be changed.
func (v *view) fetch(ctx context.Context, hits []hit) ([]*mvccpb.KeyValue, error) {
	s, sp := v.store, v.space
	if err := v.take(len(hits) * kvBytes); err != nil {
		return nil, err
	}
	kvs, all := make([]*mvccpb.KeyValue, len(hits)), make([]mvccpb.KeyValue, len(hits))
	s.mu.RLock()
	active, flushing := sp.active, sp.flushing
	s.mu.RUnlock()
	missing := 0
	for i, h := range hits {
		data, ok := active.Find(h.stamp.Revision())
		if !ok {
			data, ok = flushing.Find(h.stamp.Revision())
		}
		if !ok {
			missing++
			continue
		}
		kvs[i] = &all[i]
		if err := mvcc.DecodeRow(data, kvs[i]); err != nil {
			return nil, fmt.Errorf("%w: key %q: %w", ErrCorruptState, h.key, err)
		}
		if err := v.take(len(kvs[i].Key) + len(kvs[i].Value)); err != nil {
			return nil, err
		}
	}
	if missing == 0 {
		return kvs, nil
	}
	// A row that was in neither set had been written before, so a transaction that begins now sees it.
	tx, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer rollback(tx)
	return kvs, v.fetchStored(ctx, tx.Bucket(sp.bucket), hits, kvs, all)
}

// fetchStored fills the gaps of kvs from the file.
func (v *view) fetchStored(ctx context.Context, bucket *bbolt.Bucket, hits []hit, kvs []*mvccpb.KeyValue, all []mvccpb.KeyValue) error {
	var arena mvcc.Arena
	var keyBuffer [mvcc.KeyBytes]byte
	for i, h := range hits {
		if kvs[i] != nil {
			continue
		}
		if i%256 == 255 && ctx.Err() != nil {
			return ctx.Err()
		}
		stored := bucket.Get(h.stamp.Revision().AppendKey(keyBuffer[:0], false))
		if stored == nil {
			return fmt.Errorf("%w: key %q has no row at revision %d.%d", ErrCorruptState, h.key, h.stamp.Main, h.stamp.Sub)
		}
		kvs[i] = &all[i]
		if err := mvcc.DecodeRow(append(arena.Take(len(stored)), stored...), kvs[i]); err != nil {
			return fmt.Errorf("%w: key %q: %w", ErrCorruptState, h.key, err)
		}
		if err := v.take(len(kvs[i].Key) + len(kvs[i].Value)); err != nil {
			return err
		}
	}
	return nil
}

// begin starts a read transaction over what is durable.
func (s *Store) begin() (*bbolt.Tx, error) {
	for {
		f := s.file.Load()
		tx, err := f.db.Begin(false)
		switch {
		case err == nil:
			return tx, nil
		case errors.Is(err, berrors.ErrDatabaseNotOpen) && s.file.Load() != f: // defragmented meanwhile
		case errors.Is(err, berrors.ErrDatabaseNotOpen):
			return nil, ErrClosed
		default:
			return nil, err
		}
	}
}

// rollback ends a read transaction; that cannot fail.
func rollback(tx *bbolt.Tx) { _ = tx.Rollback() }
