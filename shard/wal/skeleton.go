package wal

import (
	"errors"
	"time"

	"github.com/hashicorp/raft"
)

var errNotBuilt = errors.New("wal: not built yet")

// Log is the log of all replicas of a node.
type Log struct{}

// Status is what is in a Log.
type Status struct {
	Segments                             int
	SizeBytes, LiveBytes, AllocatedBytes int64
	Replicas                             []ReplicaStatus
}

// ReplicaStatus is what is in a Log of one replica.
type ReplicaStatus struct {
	ID          ID
	First, Last uint64 // 0: no entries
	LiveBytes   int64
	Keys        map[string][]byte // stable keys as raft reads them
}

func Open(Options) (*Log, error)                        { return nil, errNotBuilt }
func (*Log) Replicas() []ID                             { return nil }
func (*Log) Create(ID) error                            { return errNotBuilt }
func (*Log) Replica(ID, ReplicaOptions) (*Store, error) { return nil, errNotBuilt }
func (*Log) Remove(ID) error                            { return errNotBuilt }
func (*Log) Status() Status                             { return Status{} }
func (*Log) Close() error                               { return nil }
func (*Log) Err() error                                 { return nil }
func (*Log) WriteStalled() time.Duration                { return 0 }

// Store is the log and the votes of one replica.
type Store struct{}

func (*Store) IsMonotonic() bool                    { return true }
func (*Store) FirstIndex() (uint64, error)          { return 0, errNotBuilt }
func (*Store) LastIndex() (uint64, error)           { return 0, errNotBuilt }
func (*Store) GetLog(uint64, *raft.Log) error       { return errNotBuilt }
func (*Store) StoreLog(*raft.Log) error             { return errNotBuilt }
func (*Store) StoreLogs([]*raft.Log) error          { return errNotBuilt }
func (*Store) DeleteRange(lo, hi uint64) error      { return errNotBuilt }
func (*Store) Set(key, value []byte) error          { return errNotBuilt }
func (*Store) SetUint64(key []byte, v uint64) error { return errNotBuilt }
func (*Store) Get(key []byte) ([]byte, error)       { return nil, errNotBuilt }
func (*Store) GetUint64(key []byte) (uint64, error) { return 0, errNotBuilt }
func (*Store) Reset() error                         { return errNotBuilt }
func (*Store) Err() error                           { return nil }
func (*Store) WriteStalled() time.Duration          { return 0 }
func (*Store) Close() error                         { return nil }

var (
	_ raft.LogStore          = (*Store)(nil)
	_ raft.MonotonicLogStore = (*Store)(nil)
	_ raft.StableStore       = (*Store)(nil)
)
