package fsm

import (
	"context"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"kvd/fsm/mvcc"
)

// Flush returns once everything applied up to index is durable, or everything that has been applied if that is
// less. Other errors are ctx's and the store's.
func (s *Store) Flush(ctx context.Context, index uint64) error {
	target := min(index, s.applied.load())
	if s.durable.load() >= target {
		return nil
	}
	signal(s.flushNow)
	return s.durable.wait(ctx, target)
}

// flushProgress is what the flusher remembers between flushes.
type flushProgress struct {
	deletion *deletion // being done
	finished [spaces]int64
	deadline time.Time // of the timer; zero if it is off
}

// flushLoop is the only writer of the file.
func (s *Store) flushLoop() {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	p := &s.flushed
	arm := func(after time.Duration) {
		if deadline := time.Now().Add(after); p.deadline.IsZero() || deadline.Before(p.deadline) {
			p.deadline = deadline
			timer.Reset(after)
		}
	}
	for i := range p.finished {
		p.finished[i] = s.durableState.spaces[i].finished
	}
	for {
		deletions, turn := s.deletions, s.config.Pace.begin()
		if p.deletion != nil {
			deletions = nil
		} else {
			turn = nil
		}
		due, deletes := false, false
		select {
		case <-s.stop.Done():
			if err := s.flush(false); err != nil {
				s.failFlush(err)
			}
			return
		case d := <-deletions:
			p.deletion = &d
		case <-s.dirty:
			arm(s.config.FlushInterval)
		case <-s.flushNow:
			due = true
		case <-timer.C:
			due = true
		case turn <- struct{}{}:
			due, deletes = true, true
		case d := <-s.defragments:
			d.done <- s.defragment(d.ctx)
			if s.failedOnDisk.Load() {
				return
			}
		}
		if !due {
			continue
		}
		timer.Stop()
		p.deadline = time.Time{}
		if err := s.flush(deletes); err != nil {
			s.failFlush(err)
			return
		}
	}
}

// failFlush: a state that cannot be written must not look as if it were, and cannot be undone in memory.
func (s *Store) failFlush(err error) {
	s.failedOnDisk.Store(true)
	_ = s.fail(fmt.Errorf("write state: %w", err))
	signal(s.drained)
}

// flushBatch is what one flush writes: all of what whole entries have changed since the last one.
type flushBatch struct {
	state         state
	configuration *raft.Configuration // nil if unchanged
	rows          [spaces]mvcc.Rows
	leases        leaseBatch
	bytes         int64
	deletion      *deletion
	deleted       int // revisions of the deletion that this flush deletes
}

// takeBatch moves what is active into the batch. Readers find it as flushing until it is on disk. It returns the
// store's failure if the last entry was not applied whole: then what is active does not belong to any index.
func (s *Store) takeBatch() (flushBatch, error) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	if s.isTorn {
		return flushBatch{}, s.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := flushBatch{state: s.state, leases: s.leases.take(), bytes: s.activeBytes}
	s.activeBytes, s.isDirty = 0, false
	if s.state.configurationIndex != s.durableState.configurationIndex {
		c := s.configuration.Clone()
		b.configuration = &c
	}
	for i, sp := range s.spaces {
		b.rows[i] = sp.active
		sp.flushing, sp.active = sp.active, nil
		if n := len(b.rows[i]); n > 0 {
			sp.active = make(mvcc.Rows, 0, min(n, maxActiveCapacity))
		}
	}
	return b, nil
}

// maxActiveCapacity is how many rows are made room for in advance, whatever the last batch had.
const maxActiveCapacity = 1 << 16

// flush waits for its turn and writes what has been applied until then. If deletes, which takes a turn of the pace, it
// also does a step of the deletion.
func (s *Store) flush(deletes bool) error {
	if !s.config.faults.unlimited {
		asked := time.Now()
		s.config.Flushes.begin()
		defer s.config.Flushes.end()
		s.metrics.turnSeconds.Add(time.Since(asked).Seconds())
	}
	start := time.Now()
	if deletes {
		defer func() { s.config.Pace.end(time.Since(start)) }()
	}
	b, err := s.takeBatch()
	if err != nil {
		return err
	}
	p := &s.flushed
	if deletes {
		b.deletion, b.deleted = p.deletion, min(len(p.deletion.revisions), 2*s.config.CompactionBatch)
		if p.deletion.last && b.deleted == len(p.deletion.revisions) {
			p.finished[p.deletion.space] = p.deletion.revision
		}
	}
	for i := range b.state.spaces {
		b.state.spaces[i].finished = p.finished[i]
	}
	if b.deletion != nil || b.state.index != s.durable.load() {
		if err := s.write(b); err != nil {
			return err
		}
		s.metrics.flushed(b, time.Since(start))
	}
	if b.deletion != nil {
		if b.deletion.revisions = b.deletion.revisions[b.deleted:]; len(b.deletion.revisions) == 0 {
			p.deletion = nil
		}
	}
	s.written(b)
	return nil
}

// write is the one transaction of a flush.
func (s *Store) write(b flushBatch) (err error) {
	defer catchCorruption(&err)()
	if f := s.config.faults.flushFails; f != nil {
		if err := f(); err != nil {
			return err
		}
	}
	return s.file.Load().db.Update(func(tx *bbolt.Tx) error {
		for i, rows := range b.rows {
			if err := s.putRows(tx.Bucket(spaceBuckets[i]), rows); err != nil {
				return err
			}
		}
		if b.deletion != nil {
			if err := s.deleteRows(tx.Bucket(spaceBuckets[b.deletion.space]), b.deletion.revisions[:b.deleted]); err != nil {
				return err
			}
		}
		if err := b.leases.write(tx); err != nil {
			return err
		}
		meta := tx.Bucket(metaBucket)
		if b.configuration != nil {
			if err := meta.Put(configurationKey, appendConfiguration(nil, *b.configuration)); err != nil {
				return err
			}
		}
		if f := s.config.faults.stateNotWritten; f != nil && f() {
			return nil
		}
		return meta.Put(stateKey, appendState(make([]byte, 0, stateBytes), b.state))
	})
}

func (s *Store) putRows(bucket *bbolt.Bucket, rows mvcc.Rows) error {
	bucket.FillPercent = 0.9 // rows only append
	var key [mvcc.KeyBytes]byte
	for _, row := range rows {
		k := row.Revision.AppendKey(key[:0], row.Tombstone)
		if f := s.config.faults.rowNotWritten; f != nil && f(k) {
			continue
		}
		if err := bucket.Put(k, row.Data); err != nil {
			return err
		}
	}
	return nil
}

// written makes what a flush wrote count as durable.
func (s *Store) written(b flushBatch) {
	s.mu.Lock()
	s.durableState = b.state
	if b.configuration != nil {
		s.durableConfig = *b.configuration
	}
	for _, sp := range s.spaces {
		sp.flushing = nil
	}
	s.mu.Unlock()
	s.pendingBytes.Add(-b.bytes)
	s.durable.advance(b.state.index)
	for i, sp := range s.spaces {
		sp.finished.advance(finishedMark(b.state.spaces[i].finished))
	}
	signal(s.drained)
	s.updateGauges(b)
}

// SizeBytes is the size of the file, and how much of it is in use.
func (s *Store) SizeBytes() (allocated, inUse int64) {
	tx, err := s.begin()
	if err != nil {
		return 0, 0
	}
	defer rollback(tx)
	stats := tx.DB().Stats()
	free := int64(stats.FreePageN+stats.PendingPageN) * int64(tx.DB().Info().PageSize)
	return tx.Size(), max(0, tx.Size()-free)
}
