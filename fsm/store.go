// Package fsm is the deterministic state machine of a group: a multi-version key-value store that applies raft
// entries and answers reads exactly as etcd does, over one bbolt file that is written behind.
package fsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"kvd/fsm/mvcc"
	"kvd/snapshot/boltcheck"
)

// Store is the state of one replica. Apply and ApplyConfiguration must not be called concurrently with each
// other; every other method may be called at any time, by any number of goroutines.
//
// What has been applied is visible to reads at once and durable later: a crash loses what is above DurableIndex,
// and the raft log must still have it.
//
// Four locks, taken in this order: applyMu is held while an entry is applied, so that a flush takes whole entries;
// the hub's guards the watches; mu guards what readers look at and is held only for short steps in memory; the
// watermarks' own. None is held
// while waiting for anything but bbolt reads.
type Store struct {
	config    Config
	metrics   *metrics
	clusterID uint64

	file atomic.Pointer[file] // replaced by Defragment

	pathMu sync.Mutex
	path   string // where the file is

	applyMu     sync.Mutex
	hasher      *xxhash.Digest
	arena       mvcc.Arena
	activeBytes int64 // of the rows that no flush has taken
	isDirty     bool  // something has been applied that no flush has taken
	isTorn      bool  // the last entry failed half-way: nothing is written any more

	mu            sync.RWMutex
	spaces        [spaces]*keyspace
	leases        leases
	state         state // of the last whole entry
	configuration raft.Configuration
	durableState  state
	durableConfig raft.Configuration
	epoch         *readEpoch

	hub          *hub
	applied      watermark // index
	durable      watermark // index
	pendingBytes atomic.Int64

	dirty        chan struct{}    // something has been applied
	flushNow     chan struct{}    // do not wait for FlushInterval
	drained      chan struct{}    // a flush has ended
	compactNow   chan struct{}    // a compaction has been applied
	deletions    chan deletion    // from the compactor to the flusher
	defragments  chan *defragment // to the flusher
	flushed      flushProgress    // of the flusher alone
	stop         context.Context
	stopNow      context.CancelFunc
	background   sync.WaitGroup
	closeOnce    sync.Once
	closeErr     error
	failOnce     sync.Once
	failed       chan struct{}
	failure      error // valid once failed is closed
	failedOnDisk atomic.Bool
}

// keyspace is one of the two key spaces. Its fields are under Store.mu.
type keyspace struct {
	id     Space
	bucket []byte

	index     mvcc.Index
	revision  int64 // newest that reads may see
	compacted int64 // reads below it fail; -1 before the first compaction
	trimmed   int64 // the index has been compacted up to here

	active   mvcc.Rows // applied since the last flush began
	flushing mvcc.Rows // being written

	finished watermark // physical compaction is durable up to here (revision + 1)
}

// Open opens or creates the state at config.Path, reads its index into memory, and resumes a compaction that was
// interrupted.
func Open(config Config) (*Store, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config = config.withDefaults()
	s := &Store{
		config:      config,
		hasher:      xxhash.New(),
		epoch:       newReadEpoch(),
		dirty:       make(chan struct{}, 1),
		flushNow:    make(chan struct{}, 1),
		drained:     make(chan struct{}, 1),
		compactNow:  make(chan struct{}, 1),
		deletions:   make(chan deletion),
		defragments: make(chan *defragment),
		failed:      make(chan struct{}),
	}
	s.stop, s.stopNow = context.WithCancel(context.Background())
	for i := range s.spaces {
		s.spaces[i] = &keyspace{id: Space(i), bucket: spaceBuckets[i]}
	}
	if err := checkPages(s.stop, config.Path); err != nil {
		return nil, fmt.Errorf("open %s: %w", config.Path, err)
	}
	f, err := openFile(config, config.Path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", config.Path, err)
	}
	err = os.Remove(config.Path + defragmentSuffix)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = s.load(f.db)
	}
	if err == nil {
		err = unload(f.db) // the rebuilt index has read all of it
	}
	if err == nil && !config.NoSync {
		err = syncDir(filepath.Dir(config.Path)) // the name of a new file
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("load %s: %w", config.Path, err), f.db.Close())
	}
	s.path, s.metrics = config.Path, newMetrics(config.Registerer)
	s.hub = newHub(s.metrics, &s.config.faults)
	s.file.Store(f)
	signal(s.compactNow)
	s.background.Go(s.flushLoop)
	if !config.Witness {
		s.background.Go(s.compactLoop)
	}
	return s, nil
}

// file is an open bbolt file.
type file struct {
	db       *bbolt.DB
	identity os.FileInfo // which file it is, wherever it has been moved
}

// checkPages refuses a file with a damaged page, if there is a file: bbolt would end the process over it.
func checkPages(ctx context.Context, path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil
	}
	if err == nil {
		err = boltcheck.File(ctx, path)
	}
	if errors.Is(err, boltcheck.ErrCorrupt) {
		err = fmt.Errorf("%w: %w", ErrCorruptState, err)
	}
	return err
}

func openFile(config Config, path string) (_ *file, err error) {
	defer catchCorruption(&err)()
	f := &file{}
	f.db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout:         1, // one try
		NoFreelistSync:  true,
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: config.InitialMmapBytes,
		NoSync:          config.NoSync,
		NoGrowSync:      config.NoSync,
		OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
			opened, err := os.OpenFile(name, flag, mode)
			if err != nil {
				return nil, err
			}
			if f.identity, err = opened.Stat(); err != nil {
				return nil, errors.Join(err, opened.Close())
			}
			return opened, nil
		},
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, ErrLocked
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return nil, fmt.Errorf("%w: %w", ErrCorruptState, err)
	}
	return f, err
}

// Moved tells the store that its file has been renamed, or, with an empty path, that it is about to lose its name to
// another one. When Moved returns, no defragmentation brings a file back under the old name.
func (s *Store) Moved(path string) {
	s.pathMu.Lock()
	defer s.pathMu.Unlock()
	s.path = path
}

// Close stops the background work, writes what has been applied and closes the file. It waits for reads in
// progress, so cancel theirs first. It returns the error of the last flush, or the one that left an entry half
// applied, so that nothing may be written; the entries above DurableIndex are then only in the log.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.hub.end(true)
		s.stopNow()
		s.background.Wait()
		s.fail(ErrClosed)
		if s.failedOnDisk.Load() {
			s.closeErr = s.failure
		}
		s.closeErr = errors.Join(s.closeErr, s.file.Load().db.Close())
		s.metrics.Leave()
	})
	return s.closeErr
}

// fail ends the store: it keeps answering reads, and refuses all else with err. It returns the first err given.
func (s *Store) fail(err error) error {
	s.failOnce.Do(func() {
		s.failure = err
		if !errors.Is(err, ErrClosed) {
			s.config.Logger.Error("state machine has failed", "path", s.config.Path, "error", err)
		}
		close(s.failed)
		s.applied.fail(err)
		s.durable.fail(err)
		for _, sp := range s.spaces {
			sp.finished.fail(err)
		}
	})
	<-s.failed
	return s.failure
}

// Failed is closed when the store can no longer apply: an entry was not understood, the disk failed, or it was
// closed.
func (s *Store) Failed() <-chan struct{} { return s.failed }

// Err is why Failed is closed, or nil.
func (s *Store) Err() error {
	select {
	case <-s.failed:
		return s.failure
	default:
		return nil
	}
}

// AppliedIndex is the index of the last entry that reads see. 0 is none.
func (s *Store) AppliedIndex() uint64 { return s.applied.load() }

// DurableIndex is the index of the last entry that a crash cannot lose.
func (s *Store) DurableIndex() uint64 { return s.durable.load() }

// WaitApplied returns nil once AppliedIndex is at least index. Other errors are ctx's and the store's.
func (s *Store) WaitApplied(ctx context.Context, index uint64) error {
	return s.applied.wait(ctx, index)
}

// Configuration is the latest raft configuration applied, and the index of its entry; 0 is none.
func (s *Store) Configuration() (c raft.Configuration, index uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.configuration.Clone(), s.state.configurationIndex
}

// Digest is a hash over everything that was applied up to index: two replicas of a group with the same index and
// different digests have diverged. Restarts and snapshots keep it. It is 0 for a witness.
func (s *Store) Digest() (index, digest uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.index, s.state.digest
}

// Revision is the newest revision of the space; 1 for one that was never written.
func (s *Store) Revision(space Space) int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.spaces[space].revision
}

// CompactRevision is the oldest revision that can be read; -1 if the space was never compacted.
func (s *Store) CompactRevision(space Space) int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.spaces[space].compacted
}

// signal wakes the receiver of a channel of capacity 1.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
