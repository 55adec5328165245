package fsm

import (
	"context"
	"fmt"
	"hash"
	"hash/crc32"

	"go.etcd.io/bbolt"

	"kvd/fsm/mvcc"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// hashBatch is how many rows are looked up in the index in one hold of the lock.
const hashBatch = 256

// HashKV hashes the clients' key space at rev, or at the newest revision if rev is 0 or less: every change up to
// rev that a read can see, as etcd does, and with the same result. It depends on rev and compactRev alone, not on
// how far physical compaction has come. Errors: ErrCompacted, ErrFutureRevision, ctx's.
func (s *Store) HashKV(ctx context.Context, rev int64) (sum uint32, compactRev, hashRev int64, err error) {
	return s.HashKVAt(ctx, rev, 0)
}

// HashKVAt is HashKV where current has been handed out, as for RangeAt.
func (s *Store) HashKVAt(ctx context.Context, rev, current int64) (sum uint32, compactRev, hashRev int64, err error) {
	v, err := s.openView(ctx, User, current)
	if err != nil {
		return 0, 0, 0, err
	}
	defer v.close()
	at, err := v.check(rev)
	if err != nil {
		return 0, 0, 0, err
	}
	if hashRev = rev; rev <= 0 {
		hashRev = v.newest
	}
	h := rowHasher{view: v, revision: at, hash: crc32.New(castagnoli)}
	if h.keepAt, err = v.keepRevision(ctx, at); err != nil {
		return 0, 0, 0, err
	}
	_, _ = h.hash.Write(v.space.bucket)
	if err := h.rows(ctx); err != nil {
		return 0, 0, 0, err
	}
	return h.hash.Sum32(), v.compacted, hashRev, nil
}

// keepRevision is the revision at which a change up to the compaction must be visible to be hashed. That is rev
// unless no key exists then: etcd hashes what the compaction has left in that case.
func (v *view) keepRevision(ctx context.Context, rev int64) (int64, error) {
	all := mvcc.Span{Unbounded: true}
	hits, _, err := v.collect(ctx, all, rev, 1, false)
	if err != nil || len(hits) > 0 {
		return rev, err
	}
	return v.compacted, nil
}

// rowHasher hashes rows in the order of revisions.
type rowHasher struct {
	view     *view
	revision int64
	keepAt   int64
	hash     hash.Hash32
	old      []oldRow // rows up to the compaction, to be judged together
}

type oldRow struct {
	revision   mvcc.Revision
	tombstone  bool
	key        string
	storedKey  []byte
	storedData []byte
}

func (h *rowHasher) rows(ctx context.Context) error {
	s, sp := h.view.store, h.view.space
	s.mu.RLock()
	recent := [...]mvcc.Rows{sp.flushing, sp.active}
	s.mu.RUnlock()
	tx, err := s.begin()
	if err != nil {
		return err
	}
	defer rollback(tx)
	first := mvcc.Revision{Main: h.revision + 1} // of the rows that are taken from memory
	for _, rows := range recent {
		if len(rows) > 0 && rows[0].Revision.Compare(first) < 0 {
			first = rows[0].Revision
		}
	}
	if err := h.stored(ctx, tx.Bucket(sp.bucket), first); err != nil {
		return err
	}
	var key [mvcc.KeyBytes]byte
	for _, rows := range recent {
		for _, row := range rows {
			if row.Revision.Main > h.revision {
				break
			}
			if err := h.row(row.Revision, row.Tombstone, row.Revision.AppendKey(key[:0], row.Tombstone), row.Data); err != nil {
				return err
			}
		}
	}
	return h.judge()
}

// stored hashes the rows of the file below a revision.
func (h *rowHasher) stored(ctx context.Context, bucket *bbolt.Bucket, below mvcc.Revision) error {
	cursor, n := bucket.Cursor(), 0
	for k, data := cursor.First(); k != nil; k, data = cursor.Next() {
		r, tombstone, err := mvcc.ParseKey(k)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrCorruptState, err)
		}
		if r.Compare(below) >= 0 {
			break
		}
		if n++; n%hashBatch == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := h.row(r, tombstone, k, data); err != nil {
			return err
		}
	}
	return h.judge()
}

func (h *rowHasher) row(r mvcc.Revision, tombstone bool, key, data []byte) error {
	if r.Main > h.view.compacted {
		if err := h.judge(); err != nil {
			return err
		}
		_, _ = h.hash.Write(key)
		_, _ = h.hash.Write(data)
		return nil
	}
	if tombstone { // never visible, and etcd leaves out one of the compaction's own revision
		return nil
	}
	name, _, err := mvcc.DecodeStamp(data, r, tombstone)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCorruptState, err)
	}
	h.old = append(h.old, oldRow{r, tombstone, string(name), append([]byte(nil), key...), data})
	if len(h.old) == hashBatch {
		return h.judge()
	}
	return nil
}

// judge hashes the old rows that are still visible.
func (h *rowHasher) judge() error {
	if len(h.old) == 0 {
		return nil
	}
	s, sp := h.view.store, h.view.space
	s.mu.RLock()
	for i := range h.old {
		row := &h.old[i]
		if stamp, ok := sp.index.Get(row.key, h.keepAt); !ok || stamp.Revision() != row.revision {
			row.storedData = nil
		}
	}
	s.mu.RUnlock()
	for _, row := range h.old {
		if row.storedData != nil {
			_, _ = h.hash.Write(row.storedKey)
			_, _ = h.hash.Write(row.storedData)
		}
	}
	h.old = h.old[:0]
	return nil
}

// Hash hashes the rows of both key spaces as they are in the file after everything applied has been written. Unlike
// HashKV it differs while replicas are at different points of a physical compaction.
func (s *Store) Hash(ctx context.Context) (uint32, error) {
	if s.config.Witness {
		return 0, ErrWitness
	}
	if err := s.Flush(ctx, s.AppliedIndex()); err != nil {
		return 0, err
	}
	tx, err := s.begin()
	if err != nil {
		return 0, err
	}
	defer rollback(tx)
	h := crc32.New(castagnoli)
	for _, name := range spaceBuckets {
		_, _ = h.Write(name)
		cursor, n := tx.Bucket(name).Cursor(), 0
		for k, v := cursor.First(); k != nil; k, v = cursor.Next() {
			if n++; n%hashBatch == 0 && ctx.Err() != nil {
				return 0, ctx.Err()
			}
			_, _ = h.Write(k)
			_, _ = h.Write(v)
		}
	}
	return h.Sum32(), nil
}
