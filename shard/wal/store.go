package wal

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard/entrycache"
)

// Store is the log and the votes of one replica. All methods may be called concurrently. A write is durable
// when its method returns nil.
//
// The log has no holes: entries are appended at its end or, to an empty log, anywhere. Entries that were
// given to StoreLogs share their Data and Extensions with the cache, and so do those that GetLog returns:
// nobody may write to them.
type Store struct {
	log    *Log
	rep    *replica
	guard  func() uint64
	closed atomic.Bool

	// Of whoever has the replica's turn.
	term    stagedTerm
	replace uint64 // see DeleteRange. 0 = none
}

var (
	_ raft.LogStore          = (*Store)(nil)
	_ raft.MonotonicLogStore = (*Store)(nil)
	_ raft.StableStore       = (*Store)(nil)
)

// Replica opens a replica's part of the log: ErrNoReplica if it does not exist, ErrInUse if it is open already.
func (l *Log) Replica(id ID, o ReplicaOptions) (*Store, error) {
	l.mu.Lock()
	rep, closing := l.population.replicas[id], l.closing
	l.mu.Unlock()
	switch {
	case closing:
		return nil, ErrClosed
	case rep == nil:
		return nil, fmt.Errorf("%w: %s", ErrNoReplica, id)
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = DefaultCacheBytes
	}
	if o.Guard == nil {
		o.Guard = func() uint64 { return math.MaxUint64 }
	}
	rep.mu.Lock()
	defer rep.mu.Unlock()
	switch {
	case rep.gone:
		return nil, fmt.Errorf("%w: %s", ErrNoReplica, id)
	case rep.cache != nil:
		return nil, fmt.Errorf("%w: %s", ErrInUse, id)
	}
	rep.cache = entrycache.New(o.CacheBytes)
	return &Store{log: l, rep: rep, guard: o.Guard}, nil
}

// Close waits for the write that runs. Calling it again does nothing. Everything else fails with ErrClosed
// afterwards. The Log stays open.
func (s *Store) Close() error {
	s.rep.turn <- struct{}{}
	defer func() { <-s.rep.turn }()
	if s.closed.Swap(true) {
		return nil
	}
	s.rep.mu.Lock()
	defer s.rep.mu.Unlock()
	s.rep.cache = nil
	return nil
}

// IsMonotonic tells raft that there are no holes, so that it never counts on one.
func (s *Store) IsMonotonic() bool { return true }

// Err is that of the Log: after a failed write no replica of the node can go on. Raft does not stop then: a
// follower goes on answering heartbeats, so whoever owns the replica must look here and stop it.
func (s *Store) Err() error { return s.log.Err() }

// WriteStalled returns for how long the write of the Log that runs now has been running, for whatever replica:
// this one's next would wait for it. 0 if none runs. It never waits.
func (s *Store) WriteStalled() time.Duration { return s.log.WriteStalled() }

// begin takes the turn, if something can be written.
func (s *Store) begin() error {
	s.rep.turn <- struct{}{}
	err := s.check()
	if err == nil {
		err = s.log.unusableNow()
	}
	if err != nil {
		s.end()
	}
	return err
}

func (s *Store) end() { <-s.rep.turn }

func (s *Store) check() error {
	if s.closed.Load() {
		return ErrClosed
	}
	select {
	case <-s.log.done:
		return ErrClosed
	default:
		return nil
	}
}
