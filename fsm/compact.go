package fsm

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"kvd/fsm/mvcc"
)

// deletion is a part of a physical compaction: rows that nobody can read any more.
type deletion struct {
	space     Space
	revision  int64 // of the compaction
	revisions []mvcc.Revision
	last      bool // the compaction ends with it
}

// deletionRevisions bounds the memory of one deletion (16 bytes each), except that one step adds to it whole.
const deletionRevisions = 1 << 20

// finishedMark maps revisions, which may be -1, to the numbers of a watermark.
func finishedMark(rev int64) uint64 { return uint64(rev + 1) }

// WaitCompacted returns once the rows that a compaction at rev made unreadable are durably gone. The compaction
// must have been applied. Other errors are ctx's and the store's.
func (s *Store) WaitCompacted(ctx context.Context, space Space, rev int64) error {
	if space >= spaces {
		return fmt.Errorf("%w: %d", ErrUnknownSpace, space)
	}
	if s.config.Witness {
		return ErrWitness
	}
	return s.spaces[space].finished.wait(ctx, finishedMark(rev))
}

// compactLoop does in the background what applied compactions allow: it takes unreadable changes out of the index,
// and hands their rows to the flusher, which deletes them.
func (s *Store) compactLoop() {
	for {
		select {
		case <-s.compactNow:
		case <-s.stop.Done():
			return
		case <-s.failed:
			return
		}
		for _, sp := range s.spaces {
			if !s.compact(sp) {
				return
			}
		}
	}
}

// compact brings one space's index to its compaction revision; false if the store stops first. Interrupted, it
// begins again at the next start, with the rows that are left.
func (s *Store) compact(sp *keyspace) bool {
	s.mu.Lock()
	d := deletion{space: sp.id, revision: sp.compacted}
	if d.revision <= sp.trimmed {
		s.mu.Unlock()
		return true
	}
	// Whoever reads below the revision joined this epoch or one before; later readers are refused.
	epoch := s.epoch
	s.epoch = newReadEpoch()
	s.mu.Unlock()
	epoch.retire()
	select {
	case <-epoch.empty:
	case <-s.stop.Done():
		return false
	case <-s.failed:
		return false
	}
	for next, done := "", false; !done; {
		if !s.awaitTurn() {
			return false
		}
		start := time.Now()
		s.mu.Lock()
		next, done, d.revisions = sp.index.Compact(next, d.revision, s.config.CompactionBatch, d.revisions)
		s.mu.Unlock()
		s.config.Pace.end(time.Since(start))
		if done || len(d.revisions) >= deletionRevisions {
			d.last = done
			if !s.handOver(d) {
				return false
			}
			d.revisions = nil
		}
	}
	s.mu.Lock()
	sp.trimmed = d.revision
	s.mu.Unlock()
	return true
}

// awaitTurn returns when this store may do a step; false if it stops first.
func (s *Store) awaitTurn() bool {
	select {
	case s.config.Pace.begin() <- struct{}{}:
		return true
	case <-s.stop.Done():
	case <-s.failed:
	}
	return false
}

// handOver gives the flusher rows to delete, in the order of the file, which is fastest. A key's oldest row then
// goes first: what a crash leaves of a key ends with its tombstone, if it had one.
func (s *Store) handOver(d deletion) bool {
	mvcc.SortRevisions(d.revisions)
	if s.config.faults.outOfOrder {
		slices.Reverse(d.revisions)
	}
	select {
	case s.deletions <- d:
		return true
	case <-s.stop.Done():
	case <-s.failed:
	}
	return false
}

// deleteRows deletes the rows of revisions. A flush writes all that was applied before it deletes, so none of them
// can still be waiting to be written.
func (s *Store) deleteRows(bucket *bbolt.Bucket, revisions []mvcc.Revision) error {
	var key [mvcc.KeyBytes]byte
	cursor := bucket.Cursor()
	for _, r := range revisions {
		prefix := r.AppendKey(key[:0], false) // a tombstone's key is longer
		found, _ := cursor.Seek(prefix)
		if !bytes.HasPrefix(found, prefix) {
			return fmt.Errorf("%w: no row at revision %d.%d to delete", ErrCorruptState, r.Main, r.Sub)
		}
		if f := s.config.faults.rowNotDeleted; f != nil && f(found) {
			continue
		}
		if err := cursor.Delete(); err != nil {
			return err
		}
	}
	return nil
}
