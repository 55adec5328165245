// Package snapshot turns the bbolt file of a state into a checked stream, and a checked stream back into a
// file: for followers that need a whole state, and for backups.
package snapshot

import (
	"context"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// Meta says which state a snapshot is. The zero value is an empty state that belongs to no cluster.
type Meta struct {
	// ClusterID and Group say whose state it is. ClusterID 0 is unknown.
	ClusterID uint64
	Group     uint64

	// Index and Term are those of the last raft entry that the state contains.
	Index uint64
	Term  uint64

	// Configuration is the latest one at or below Index; ConfigurationIndex is the index of its entry.
	Configuration      raft.Configuration
	ConfigurationIndex uint64

	// Revision and CompactRevision are those of the user key space; Keys is how many of its keys live.
	Revision        int64
	CompactRevision int64
	Keys            int64
}

// Source is the state that snapshots are made of. Its methods may be called concurrently with each other
// and with everything else that happens to the state.
type Source interface {
	// SnapshotMeta describes what is durable: a crash right after it returns loses nothing of it. It only
	// ever grows. ok is false while nothing is durable; then meta is zero.
	SnapshotMeta() (meta Meta, ok bool)

	// ViewSnapshot calls fn with a read transaction over the durable state, and with the metadata that is
	// stored in that same transaction. Both are valid only inside fn. fn may take long (it streams the
	// whole file); no lock may be held around it that a write needs. It returns fn's error, or its own
	// if there is no durable state, or the state is closed, or ctx is done before fn starts.
	ViewSnapshot(ctx context.Context, fn func(tx *bbolt.Tx, meta Meta) error) error
}
