package raftlog

import (
	"fmt"

	"github.com/hashicorp/raft"

	"kvd/shard/entrycache"
)

// FirstIndex returns the index of the first entry, 0 if there is none. It reads memory only.
func (s *Store) FirstIndex() (uint64, error) {
	first, _, err := s.bounds()
	return first, err
}

// LastIndex returns the index of the last entry, 0 if there is none. It reads memory only.
func (s *Store) LastIndex() (uint64, error) {
	_, last, err := s.bounds()
	return last, err
}

func (s *Store) bounds() (first, last uint64, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return 0, 0, ErrClosed
	}
	return s.first, s.last, nil
}

// GetLog copies the entry at index into out, or returns exactly raft.ErrLogNotFound. Recent entries come from
// memory and share their Data with all other readers.
func (s *Store) GetLog(index uint64, out *raft.Log) error {
	s.mu.RLock()
	closed, missing := s.closed, s.first == 0 || index < s.first || index > s.last
	cached := !missing && s.cache.Get(index, out)
	s.mu.RUnlock()
	switch {
	case closed:
		return ErrClosed
	case missing:
		return raft.ErrLogNotFound
	case cached:
		return nil
	}
	*out = raft.Log{} // the decoder leaves absent fields alone
	if err := s.bolt.GetLog(index, out); err != nil {
		return s.readError(fmt.Sprintf("entry %d", index), err)
	}
	return nil
}

// StoreLog is StoreLogs of one entry.
func (s *Store) StoreLog(entry *raft.Log) error { return s.StoreLogs([]*raft.Log{entry}) }

// StoreLogs appends the entries in one transaction: after a crash all of them are there or none. They must
// follow each other and the last entry (ErrGap).
func (s *Store) StoreLogs(entries []*raft.Log) error {
	if len(entries) == 0 {
		return nil
	}
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.makeRoom(entries); err != nil {
		return err
	}
	if err := s.commit(opAppend, func() error { return s.bolt.StoreLogs(entries) }); err != nil {
		return err
	}
	sizeBytes := 0
	s.mu.Lock()
	if s.first == 0 {
		s.first = entries[0].Index
	}
	s.last = entries[len(entries)-1].Index
	for _, entry := range entries {
		sizeBytes += entrycache.EntryBytes(entry)
		s.cache.Push(entry)
	}
	s.mu.Unlock()
	s.metrics.batchEntries.Observe(float64(len(entries)))
	s.metrics.batchBytes.Observe(float64(sizeBytes))
	return nil
}

// makeRoom checks that the entries fit to the end of the log, and removes what DeleteRange left for them to
// replace. The caller holds s.write, so the bounds do not move.
func (s *Store) makeRoom(entries []*raft.Log) error {
	for i, entry := range entries {
		if entry.Index != entries[0].Index+uint64(i) || entry.Index == 0 {
			return fmt.Errorf("%w: entry %d at place %d after %d", ErrGap, entry.Index, i, entries[0].Index)
		}
	}
	first, last, err := s.bounds()
	if err != nil {
		return err
	}
	from, replace := entries[0].Index, s.replace
	s.replace = 0
	if first == 0 || from == last+1 {
		return nil
	}
	if from == replace && from == first {
		if guard := s.guard(); from <= guard {
			return fmt.Errorf("%w: replacing %d to %d, guard %d", ErrGuarded, first, last, guard)
		}
		return s.removeDown(first, last)
	}
	return fmt.Errorf("%w: entry %d after %d", ErrGap, from, last)
}

// DeleteRange removes the entries from lo to hi, both included, as far as they exist. Where it lies says what
// it is for:
//
//	first        last
//	  |------------|
//	lo-----hi           the beginning, which the state no longer needs: only up to the guard
//	     lo--------hi   the end, which conflicts with the leader's: all, ErrGuarded if not above the guard
//	lo-------------hi   all of it: either of the two, see below
//	    lo---hi         a hole: ErrGap
//
// If it covers everything, then what is at or below the guard goes. If all of the log is above the guard, raft
// may mean a beginning, which must stay, or an end that conflicts. So nothing goes yet: in the latter case raft
// stores the replacing entries next, from the same index on, and that removes the old ones first.
//
// It removes in steps, the beginning upwards and the end downwards, so that a crash leaves no hole.
func (s *Store) DeleteRange(lo, hi uint64) error {
	guard := s.guard()
	first, last, err := s.bounds()
	switch {
	case err != nil:
		return err
	case first == 0 || lo > hi || lo > last || hi < first:
		return nil
	case lo == first && hi >= last && guard < first:
		s.write.Lock()
		s.replace = first
		s.write.Unlock()
		return nil
	case lo <= first:
		return s.removeBeginning(min(hi, guard))
	case hi < last:
		return fmt.Errorf("%w: removing %d to %d of %d to %d", ErrGap, lo, hi, first, last)
	case lo <= guard:
		return fmt.Errorf("%w: removing %d to %d, guard %d", ErrGuarded, lo, hi, guard)
	}
	s.write.Lock()
	defer s.write.Unlock()
	_, last, err = s.bounds()
	if err != nil || last < lo {
		return err
	}
	return s.removeDown(lo, last)
}

// removeBeginning removes everything up to limit, and lets other writers pass after each step.
func (s *Store) removeBeginning(limit uint64) error {
	for {
		done, err := s.removeStep(limit)
		if done || err != nil {
			return err
		}
	}
}

func (s *Store) removeStep(limit uint64) (done bool, err error) {
	s.write.Lock()
	defer s.write.Unlock()
	first, last, err := s.bounds()
	if err != nil || first == 0 || first > limit {
		return true, err
	}
	to := min(first+prefixStep-1, limit, last)
	if err := s.commit(opTruncate, func() error { return s.bolt.DeleteRange(first, to) }); err != nil {
		return true, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.first = to + 1
	s.cache.DropBefore(s.first)
	if to == last {
		s.first, s.last = 0, 0
	}
	return false, nil
}

// removeDown removes lo to last, from the end. The caller holds s.write.
func (s *Store) removeDown(lo, last uint64) error {
	for last >= lo {
		from := lo
		if last-lo >= suffixStep {
			from = last - suffixStep + 1
		}
		if err := s.commit(opTruncate, func() error { return s.bolt.DeleteRange(from, last) }); err != nil {
			return err
		}
		last = from - 1
		s.mu.Lock()
		s.last = last
		s.cache.DropAfter(last)
		if last < s.first {
			s.first, s.last = 0, 0
		}
		s.mu.Unlock()
	}
	return nil
}

// Reset removes all entries, whatever the guard says, and keeps the stable keys. It is for a replica whose
// state has been replaced, while no raft runs on this store. After a crash in the middle the beginning of the
// old log is there: call it again.
func (s *Store) Reset() error {
	s.write.Lock()
	defer s.write.Unlock()
	s.replace = 0
	first, last, err := s.bounds()
	if err != nil || first == 0 {
		return err
	}
	return s.removeDown(first, last)
}
