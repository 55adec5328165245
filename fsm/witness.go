package fsm

import (
	"context"
	"fmt"

	"kvd/snapshot"
)

// A witness's store keeps how far the log has come and with which configuration, so that its replica can vote and
// keep a log, and nothing of what the log's commands do.

// role is what a file is for; the file of data names none.
var witnessRole = []byte("witness")

// InstallMeta moves a witness's store forward to the index, term and configuration of meta, as if the entries up to
// there had been applied. It is durable when InstallMeta returns. What is at or below AppliedIndex changes nothing.
// The other fields of meta, but for its identity, are not used. It must not be called concurrently with Apply or
// ApplyConfiguration. Errors: ErrNotWitness, ErrForeignState, the store's.
func (s *Store) InstallMeta(meta snapshot.Meta) error {
	switch {
	case !s.config.Witness:
		return ErrNotWitness
	case meta.Group != s.config.Group || meta.ClusterID != 0 && s.clusterID != 0 && meta.ClusterID != s.clusterID:
		return fmt.Errorf("%w: group %d of cluster %x instead of group %d of cluster %x",
			ErrForeignState, meta.Group, meta.ClusterID, s.config.Group, s.clusterID)
	}
	if err := s.Err(); err != nil {
		return err
	}
	if meta.Index > s.applied.load() {
		s.install(meta)
	}
	return s.Flush(context.Background(), meta.Index) // Close ends it
}

func (s *Store) install(meta snapshot.Meta) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.mu.Lock()
	s.configuration, s.state.configurationIndex = meta.Configuration.Clone(), meta.ConfigurationIndex
	s.mu.Unlock()
	s.commit(meta.Index, meta.Term, nil)
}

// advance is what a witness does with an entry: nothing.
func (s *Store) advance(index, term uint64) {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.commit(index, term, nil)
}
