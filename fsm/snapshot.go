package fsm

import (
	"context"
	"errors"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"kvd/snapshot"
)

var _ snapshot.Source = (*Store)(nil)

// SnapshotMeta describes what is durable; ok is false if nothing is.
func (s *Store) SnapshotMeta() (meta snapshot.Meta, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.durableState.index == 0 {
		return snapshot.Meta{}, false
	}
	return snapshotMeta(s.config.Group, s.clusterID, s.durableState, s.durableConfig), true
}

// errNothingDurable is returned by ViewSnapshot before the first flush.
var errNothingDurable = errors.New("fsm: nothing is durable yet")

// ViewSnapshot calls fn with a read transaction over what is durable, and its metadata from that transaction. Close
// and Defragment's end wait for fn.
func (s *Store) ViewSnapshot(ctx context.Context, fn func(tx *bbolt.Tx, meta snapshot.Meta) error) error {
	if s.config.Witness {
		return ErrWitness
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	tx, err := s.begin()
	if err != nil {
		return err
	}
	defer rollback(tx)
	m, err := readStored(tx)
	if err != nil {
		return err
	}
	if m.state.index == 0 {
		return errNothingDurable
	}
	return fn(tx, snapshotMeta(m.group, m.clusterID, m.state, m.configuration))
}

func snapshotMeta(group, clusterID uint64, s state, c raft.Configuration) snapshot.Meta {
	return snapshot.Meta{
		ClusterID:          clusterID,
		Group:              group,
		Index:              s.index,
		Term:               s.term,
		Configuration:      c.Clone(),
		ConfigurationIndex: s.configurationIndex,
		Revision:           s.spaces[User].revision,
		CompactRevision:    s.spaces[User].compacted,
		Keys:               s.spaces[User].keys,
	}
}
