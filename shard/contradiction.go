package shard

import (
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
)

// settledLog is the log for raft. It bounds a witness's, and refuses to replace what the state has
// applied, and halts the replica: entries that were committed are only taken
// back by a leader that has lost them, together with a majority of the disks.
// Going on would answer reads from a state that the others do not have (I4).
type settledLog struct {
	LogStore
	l *life
}

var _ raft.MonotonicLogStore = settledLog{}

// IsMonotonic implements raft.MonotonicLogStore.
func (s settledLog) IsMonotonic() bool {
	m, ok := s.LogStore.(raft.MonotonicLogStore)
	return ok && m.IsMonotonic()
}

// StoreLog implements raft.LogStore.
func (s settledLog) StoreLog(entry *raft.Log) error { return s.StoreLogs([]*raft.Log{entry}) }

// StoreLogs implements raft.LogStore.
func (s settledLog) StoreLogs(entries []*raft.Log) error {
	if len(entries) > 0 {
		if err := s.check(entries[0].Index); err != nil {
			return err
		}
	}
	h := s.l.r.held
	if h == nil {
		s.l.sendEarly(entries)
		return s.LogStore.StoreLogs(entries)
	}
	if err := h.admit(entries); err != nil {
		return err
	}
	s.l.sendEarly(entries)
	if err := s.LogStore.StoreLogs(entries); err != nil {
		return err
	}
	h.add(entries)
	return nil
}

// DeleteRange implements raft.LogStore. Raft removes the log's end only when a
// leader has other entries. A removal of all of it may be that, too: then
// StoreLogs is next.
func (s settledLog) DeleteRange(lo, hi uint64) error {
	first, err := s.FirstIndex()
	if err != nil {
		return err
	}
	last, err := s.LastIndex()
	if err != nil {
		return err
	}
	if first < lo && lo <= last && last <= hi {
		if err := s.check(lo); err != nil {
			return err
		}
	}
	if err := s.LogStore.DeleteRange(lo, hi); err != nil {
		return err
	}
	return s.measure()
}

// measure notes what is left of a witness's log.
func (s settledLog) measure() error {
	if s.l.r.held == nil {
		return nil
	}
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	s.l.r.held.keep(first, last)
	return nil
}

// check fails if the entry at index is applied.
func (s settledLog) check(index uint64) error {
	applied := s.l.state.store.AppliedIndex()
	if index > applied {
		return nil
	}
	err := fmt.Errorf("%w: the leader has other entries from %d on, and this node has applied its own up to %d: "+
		"a majority has lost acknowledged writes, perhaps to an old copy of a data directory. This node still has them: "+
		"keep a copy of its data directory, then delete the contents so that it rejoins with what the others have",
		ErrContradicted, index, applied)
	s.l.r.fail(err)
	return err
}
