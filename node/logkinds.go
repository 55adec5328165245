package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/shard"
	"kvd/shard/raftlog"
	"kvd/shard/wal"
	"kvd/shard/wal/vfs"
)

// boltLogs are files in the replicas' directories, which come and go with them.
type boltLogs struct{ logConfig }

func (b boltLogs) path(r placement.ReplicaRef) string {
	return filepath.Join(replicaDir(b.dataDir, r), boltFile)
}

func (b boltLogs) create(placement.ReplicaRef) error { return nil } // shard.Create opens it

func (b boltLogs) open(r placement.ReplicaRef, guard func() uint64, cacheBytes int) (shard.LogStore, error) {
	return raftlog.Open(raftlog.Options{
		Path: b.path(r), Guard: guard, NoSync: b.noSync, CacheBytes: cacheBytes,
		Logger: b.logger, Registerer: shard.WithGroup(b.registerer, r.Group, r.ID),
	})
}

func (b boltLogs) missing(r placement.ReplicaRef) (string, error) { return missingFile(b.path(r)) }
func (b boltLogs) remove(placement.ReplicaRef) error              { return nil }
func (b boltLogs) replicas() []wal.ID                             { return nil }
func (b boltLogs) freeBytes() (uint64, error)                     { return math.MaxUint64, nil }
func (b boltLogs) close() error                                   { return nil }

func (b boltLogs) keys(of []placement.ReplicaRef) (map[placement.ReplicaRef]stableKeys, error) {
	all := make(map[placement.ReplicaRef]stableKeys, len(of))
	for _, r := range of {
		keys, err := raftlog.Keys(b.path(r))
		if err != nil {
			return nil, err
		}
		all[r] = keys
	}
	return all, nil
}

// sharedLogs are all in one.
type sharedLogs struct {
	log   *wal.Log
	fs    vfs.FS
	dir   string
	fatal func(error)
}

// logID is a replica's name in the shared log.
func logID(r placement.ReplicaRef) (wal.ID, error) {
	_, number, err := bootstrap.ParseReplicaID(string(r.ID))
	return wal.ID{Group: r.Group, Replica: number}, err
}

func (s *sharedLogs) create(r placement.ReplicaRef) error {
	id, err := logID(r)
	if err != nil {
		return err
	}
	if err := s.log.Create(id); !errors.Is(err, wal.ErrExists) {
		return err
	}
	store, err := s.log.Replica(id, wal.ReplicaOptions{CacheBytes: -1})
	if err != nil {
		return fmt.Errorf("%w: %w", errReplicaLost, err)
	}
	return errors.Join(neverUsed(store, id), store.Close())
}

// neverUsed refuses a log that was used although nothing says so: it is of
// another time than the rest of the directory.
func neverUsed(log shard.LogStore, id wal.ID) error {
	last, err := log.LastIndex()
	if err != nil {
		return err
	}
	_, err = log.GetUint64([]byte(keyTerm))
	if last == 0 && err != nil && err.Error() == wal.ErrKeyNotFound.Error() {
		return nil
	}
	return fmt.Errorf("%w: the log of %v was used, which the data directory does not know of", errReplicaLost, id)
}

func (s *sharedLogs) open(r placement.ReplicaRef, guard func() uint64, cacheBytes int) (shard.LogStore, error) {
	id, err := logID(r)
	if err != nil {
		return nil, err
	}
	store, err := s.log.Replica(id, wal.ReplicaOptions{Guard: guard, CacheBytes: cacheBytes})
	if err != nil {
		return nil, err // not a LogStore that holds a nil pointer
	}
	return &watchedLog{store, s.fatal}, nil
}

// watchedLog tells at once when nobody can go on with the shared log. Raft
// panics where a term cannot be stored or an entry cannot be read: the node has
// time to end with what is wrong instead.
type watchedLog struct {
	*wal.Store
	fatal func(error) // nil: nobody wants to know
}

const timeToEnd = 5 * time.Second

func (w *watchedLog) watch(err error) error {
	if errors.Is(err, wal.ErrFailed) || errors.Is(err, wal.ErrCorrupt) {
		w.end(err)
	}
	return err
}

func (w *watchedLog) end(err error) {
	if w.fatal != nil {
		w.fatal(err)
		time.Sleep(timeToEnd)
	}
}

// GetLog ends the node for whatever the disk says, too: raft would panic, or for
// ever try to send that entry, as a leader whom the others follow.
func (w *watchedLog) GetLog(index uint64, entry *raft.Log) error {
	err := w.Store.GetLog(index, entry)
	if err != nil && err != raft.ErrLogNotFound && !errors.Is(err, wal.ErrClosed) && !errors.Is(err, fs.ErrClosed) {
		w.end(err)
	}
	return err
}

func (w *watchedLog) StoreLog(entry *raft.Log) error      { return w.watch(w.Store.StoreLog(entry)) }
func (w *watchedLog) StoreLogs(entries []*raft.Log) error { return w.watch(w.Store.StoreLogs(entries)) }
func (w *watchedLog) DeleteRange(first, last uint64) error {
	return w.watch(w.Store.DeleteRange(first, last))
}
func (w *watchedLog) Set(key, value []byte) error          { return w.watch(w.Store.Set(key, value)) }
func (w *watchedLog) SetUint64(key []byte, v uint64) error { return w.watch(w.Store.SetUint64(key, v)) }

func (s *sharedLogs) missing(r placement.ReplicaRef) (string, error) {
	id, err := logID(r)
	if err != nil {
		return "", err
	}
	if slices.Contains(s.log.Replicas(), id) {
		return "", nil
	}
	return fmt.Sprintf("the log of %v in %s", id, s.dir), nil
}

func (s *sharedLogs) keys(of []placement.ReplicaRef) (map[placement.ReplicaRef]stableKeys, error) {
	have := make(map[wal.ID]stableKeys)
	for _, there := range s.log.Status().Replicas {
		keys := stableKeys(there.Keys)
		if there.VoteTerm > 0 {
			keys[keyVoteTerm] = binary.BigEndian.AppendUint64(nil, there.VoteTerm)
			keys[keyVoteCandidate] = []byte(there.VotedFor)
		}
		have[there.ID] = keys
	}
	all := make(map[placement.ReplicaRef]stableKeys, len(of))
	for _, r := range of {
		id, err := logID(r)
		if err != nil {
			return nil, err
		}
		if all[r] = have[id]; all[r] == nil {
			return nil, fmt.Errorf("%w: %v", wal.ErrNoReplica, id)
		}
	}
	return all, nil
}

func (s *sharedLogs) remove(r placement.ReplicaRef) error {
	id, err := logID(r)
	if err != nil {
		return nil // it has none
	}
	if err := s.log.Remove(id); !errors.Is(err, wal.ErrNoReplica) {
		return err
	}
	return nil
}

func (s *sharedLogs) replicas() []wal.ID         { return s.log.Replicas() }
func (s *sharedLogs) freeBytes() (uint64, error) { return s.fs.Free(s.dir) }
func (s *sharedLogs) close() error               { return s.log.Close() }
