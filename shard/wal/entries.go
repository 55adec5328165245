package wal

import (
	"fmt"

	"github.com/hashicorp/raft"
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
	if err := s.check(); err != nil {
		return 0, 0, err
	}
	first, last = s.rep.bounds()
	return first, last, nil
}

// GetLog copies the entry at index into out, or returns exactly raft.ErrLogNotFound. Recent entries come from
// memory and share their Data with all other readers.
func (s *Store) GetLog(index uint64, out *raft.Log) error {
	if err := s.check(); err != nil {
		return err
	}
	return s.log.read(s.rep, index, out)
}

// StoreLog is StoreLogs of one entry.
func (s *Store) StoreLog(entry *raft.Log) error { return s.StoreLogs([]*raft.Log{entry}) }

// StoreLogs appends the entries in one batch: after a crash all of them are there or none. They must follow
// each other and the last entry (ErrGap).
func (s *Store) StoreLogs(entries []*raft.Log) error {
	if len(entries) == 0 {
		return nil
	}
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	if err := s.fits(entries); err != nil {
		return err
	}
	r := s.rep.ask(kindEntry)
	r.entries = entries
	err := s.log.submit(r)
	r.entries = nil
	return err
}

// fits checks that the entries fit to the end of the log, or replace what DeleteRange left for them to
// replace. The caller has the turn, so the bounds do not move.
func (s *Store) fits(entries []*raft.Log) error {
	for i, entry := range entries {
		if entry.Index != entries[0].Index+uint64(i) || entry.Index == 0 {
			return fmt.Errorf("%w: entry %d at place %d after %d", ErrGap, entry.Index, i, entries[0].Index)
		}
	}
	first, last := s.rep.bounds()
	from, replace := entries[0].Index, s.replace
	s.replace = 0
	if first == 0 || from == last+1 {
		return nil
	}
	if from == replace && from == first {
		if guard := s.guard(); from <= guard {
			return fmt.Errorf("%w: replacing %d to %d, guard %d", ErrGuarded, first, last, guard)
		}
		return nil // the record of an entry replaces all that is there from its index on
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
// stores the replacing entries next, from the same index on, and that removes the old ones at once.
//
// All of what it removes goes in one step.
func (s *Store) DeleteRange(lo, hi uint64) error {
	guard := s.guard()
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	first, last := s.rep.bounds()
	switch {
	case first == 0 || lo > hi || lo > last || hi < first:
		return nil
	case lo == first && hi >= last && guard < first:
		s.replace = first
		return nil
	case lo <= first:
		return s.removeBeginning(first, min(hi, guard, last))
	case hi < last:
		return fmt.Errorf("%w: removing %d to %d of %d to %d", ErrGap, lo, hi, first, last)
	case lo <= guard:
		return fmt.Errorf("%w: removing %d to %d, guard %d", ErrGuarded, lo, hi, guard)
	}
	r := s.rep.ask(kindLast)
	r.index = lo - 1
	return s.log.submit(r)
}

// removeBeginning removes everything up to limit.
func (s *Store) removeBeginning(first, limit uint64) error {
	if limit < first {
		return nil
	}
	r := s.rep.ask(kindFirst)
	r.index = limit + 1
	return s.log.submit(r)
}

// Reset removes all entries, whatever the guard says, and keeps the stable keys. It is for a replica whose
// state has been replaced, while no raft runs on this store.
func (s *Store) Reset() error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	s.replace = 0
	if first, _ := s.rep.bounds(); first == 0 {
		return nil
	}
	return s.log.submit(s.rep.ask(kindReset))
}
