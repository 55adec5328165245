// Package raftlog keeps a replica's raft log, term and vote in one bbolt file, behind guards for what
// hashicorp/raft leaves open.
package raftlog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	boltErrors "go.etcd.io/bbolt/errors"

	"kvd/shard/entrycache"
	"kvd/snapshot/boltcheck"
)

// Refusals. Nothing has been written when one of these is returned.
var (
	// ErrGap: an entry does not follow the last one. The log has no holes, so raft must not acknowledge
	// what follows one.
	ErrGap = errors.New("raft log entries are not contiguous")

	// ErrGuarded: removing the end of the log would remove entries that the guard calls durable in the
	// state. They are committed; a raft that takes them back has gone wrong.
	ErrGuarded = errors.New("raft log entries at or below the guard cannot be taken back")

	// ErrVoteTerm: a vote's candidate was stored with no term before it.
	ErrVoteTerm = errors.New("vote without a term")

	// ErrClosed: the Store has been closed.
	ErrClosed = errors.New("raft log is closed")
)

// ErrFailed: a write has failed, so nobody knows what of it is on the disk, and raft may believe in a log end
// that is not there. Every later write fails with this; only opening the file again helps. The disk's error
// is wrapped too.
var ErrFailed = errors.New("raft log failed")

// ErrCorrupt: the file is not a raft log, or is damaged.
var ErrCorrupt = errors.New("raft log is corrupt")

const (
	// DefaultCacheBytes is Options.CacheBytes where that is 0.
	DefaultCacheBytes = 16 << 20

	// A prefix is removed in steps: bbolt has one writer at a time, and appends pass between them.
	prefixStep = 512
	// Nobody appends while the end of the log, or all of it, is removed.
	suffixStep = 8192

	lockTimeout = time.Second
)

// Options of a Store.
type Options struct {
	Path string // of the bbolt file, made if it does not exist. Required

	// NoSync leaves out fsync: a crash of the machine loses acknowledged entries and votes. Only for tests.
	NoSync bool

	// CacheBytes bounds the recent entries that are kept in memory. 0 is DefaultCacheBytes, a negative value
	// is none.
	CacheBytes int

	// Guard returns the highest index up to which the beginning of the log may be removed, and above which
	// its end. It is asked at each removal, must not call the Store, and may be called concurrently. nil
	// allows everything to be removed.
	Guard func() uint64

	Logger     *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil registers nothing
}

// Validate says what is wrong with o.
func (o Options) Validate() error {
	if o.Path == "" {
		return errors.New("raft log: no path")
	}
	return nil
}

// Store is a raft.LogStore and raft.StableStore over one bbolt file. All methods may be called concurrently.
// A write is durable when its method returns nil.
//
// The log has no holes: entries are appended at its end or, to an empty log, anywhere. Entries that were
// given to StoreLogs, and those that GetLog returns, share their Data and Extensions with the cache: nobody
// may write to them.
type Store struct {
	bolt  *raftboltdb.BoltStore
	log   *slog.Logger
	guard func() uint64
	path  string

	metrics metrics

	born    time.Time
	writing atomic.Int64 // 1 + nanoseconds from born to when the running write began; 0 = none runs

	write   sync.Mutex // held by whoever writes to bolt: one transaction at a time
	term    stagedTerm // under write
	replace uint64     // under write: see DeleteRange. 0 = none

	mu          sync.RWMutex // never held during I/O
	first, last uint64       // 0 = empty
	cache       *entrycache.Cache
	failed      error // why no more is written
	closed      bool

	hooks hooks
}

// hooks let a test act in the middle of an operation or break a guard. The zero value does nothing.
type hooks struct {
	beforeWrite    func() error // before each bbolt transaction; an error stands for the disk's
	unguardedVotes bool         // store term and candidate one after the other, as raft does
}

var (
	_ raft.LogStore          = (*Store)(nil)
	_ raft.MonotonicLogStore = (*Store)(nil)
	_ raft.StableStore       = (*Store)(nil)
)

// Open opens or makes the file. It fails if another process has it open (after one second), with ErrCorrupt
// if it is damaged, and otherwise with the file system's error.
func Open(o Options) (*Store, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = DefaultCacheBytes
	}
	if o.Guard == nil {
		o.Guard = func() uint64 { return math.MaxUint64 }
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	bolt, err := openBolt(o)
	if err != nil {
		return nil, err
	}
	s := &Store{
		bolt: bolt, log: o.Logger, guard: o.Guard, path: o.Path, metrics: newMetrics(o.Registerer),
		born: time.Now(), cache: entrycache.New(o.CacheBytes),
	}
	err = s.loadBounds()
	if err == nil && !o.NoSync {
		err = syncDir(filepath.Dir(o.Path)) // the name of a new file
	}
	if err != nil {
		s.metrics.unregister()
		bolt.Close()
		return nil, err
	}
	return s, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// openBolt lets bbolt leave its list of free pages out of each commit: it finds them at start instead, which
// reads only the keys. It does that where a damaged page would end the process, hence the check before.
func openBolt(o Options) (*raftboltdb.BoltStore, error) {
	if info, err := os.Stat(o.Path); err == nil && info.Size() > 0 {
		if err := check(o.Path); err != nil {
			return nil, err
		}
	}
	bolt, err := raftboltdb.New(raftboltdb.Options{
		Path:   o.Path,
		NoSync: o.NoSync,
		BoltOptions: &bbolt.Options{
			Timeout: lockTimeout, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType, NoStatistics: true,
		},
		MsgpackUseNewTimeFormat: true,
	})
	switch {
	case errors.Is(err, boltErrors.ErrTimeout):
		return nil, fmt.Errorf("open raft log %s: another process has it open", o.Path)
	case err != nil:
		return nil, fmt.Errorf("open raft log %s: %w", o.Path, err)
	}
	return bolt, nil
}

func check(path string) error {
	if err := boltcheck.File(context.Background(), path); err != nil {
		return fmt.Errorf("open raft log: %w: %s: %w", ErrCorrupt, path, err)
	}
	return nil
}

// loadBounds reads the first and last index, and that these two entries are what their keys say.
func (s *Store) loadBounds() error {
	first, err1 := s.bolt.FirstIndex()
	last, err2 := s.bolt.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("open raft log %s: %w", s.path, err)
	}
	for _, index := range []uint64{first, last} {
		var entry raft.Log
		if index == 0 {
			continue
		}
		if err := s.bolt.GetLog(index, &entry); err != nil || entry.Index != index {
			return fmt.Errorf("open raft log %s: %w: entry %d is not readable", s.path, ErrCorrupt, index)
		}
	}
	s.first, s.last = first, last
	return nil
}

// Close waits for the write that runs and closes the file. Calling it again does nothing. Everything else
// fails with ErrClosed afterwards.
func (s *Store) Close() error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.cache.Reset()
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.metrics.unregister()
	return s.bolt.Close()
}

// IsMonotonic tells raft that there are no holes, so that it never counts on one.
func (s *Store) IsMonotonic() bool { return true }

// Err returns nil, or an error that is ErrFailed once a write has failed. Raft does not stop then: a follower
// goes on answering heartbeats, so whoever owns the replica must look here and stop it. It never waits.
func (s *Store) Err() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.failed
}

// WriteStalled returns for how long the write that runs now has been running, 0 if none runs. It never waits.
func (s *Store) WriteStalled() time.Duration {
	began := s.writing.Load()
	if began == 0 {
		return 0
	}
	return max(time.Since(s.born)-time.Duration(began-1), 1)
}

// commit runs one write transaction. The caller holds s.write and has changed nothing yet in memory.
func (s *Store) commit(op string, tx func() error) error {
	if err := s.writable(); err != nil {
		return err
	}
	began := time.Since(s.born)
	s.writing.Store(int64(began) + 1)
	defer s.writing.Store(0)
	err := s.hooks.before()
	if err == nil {
		err = tx()
	}
	if err != nil {
		return s.fail(err)
	}
	s.metrics.write[op].Observe((time.Since(s.born) - began).Seconds())
	return nil
}

func (h *hooks) before() error {
	if h.beforeWrite == nil {
		return nil
	}
	return h.beforeWrite()
}

func (s *Store) fail(err error) error {
	err = fmt.Errorf("%w: %s: %w", ErrFailed, s.path, err)
	s.log.Error("a write to the raft log failed: the replica has to stop", "path", s.path, "error", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = err
	return err
}

// writable says why nothing can be written, if so.
func (s *Store) writable() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return ErrClosed
	}
	return s.failed
}

// readError explains an error of reading what from bbolt. A missing entry or key stays the plain sentinel.
func (s *Store) readError(what string, err error) error {
	switch {
	case err == nil, errors.Is(err, raft.ErrLogNotFound), errors.Is(err, ErrKeyNotFound):
		return err
	case errors.Is(err, boltErrors.ErrDatabaseNotOpen):
		return ErrClosed
	}
	return fmt.Errorf("read %s of %s: %w", what, s.path, err)
}
