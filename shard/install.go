package shard

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/raft"

	"kvd/fsm"
	"kvd/snapshot"
)

// install receives a snapshot beside raft, whose own way has no check for
// stale ones and keeps a divergent log (docs/design.md section 8). The stream
// is staged and verified whole, its index built, and only then is raft stopped
// and the state swapped. A crash at any point leaves the old state or the new
// one; repairLog finishes what was interrupted between swap and log.
func (r *Replica) install(ctx context.Context, req *raft.InstallSnapshotRequest, body io.Reader) (*raft.InstallSnapshotResponse, error) {
	if !r.installing.TryLock() {
		return nil, ErrBusy
	}
	defer r.installing.Unlock()
	l := r.life.Load()
	if req.Term < l.raft.CurrentTerm() {
		return l.installed(false), nil
	}
	if r.covers(l.state.store, req.LastLogIndex, req.LastLogTerm) {
		return l.installed(true), nil
	}
	r.slog.Info("receiving a snapshot", "index", req.LastLogIndex, "term", req.LastLogTerm, "bytes", req.Size)
	staged, err := snapshot.Stage(ctx, body, r.cfg.Dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = staged.Discard() }()
	if m := staged.Meta; m.Group != r.cfg.Group || m.ClusterID != r.cfg.ClusterID || m.Index != req.LastLogIndex || m.Term != req.LastLogTerm {
		return nil, fmt.Errorf("shard: snapshot of cluster %x group %d at %d/%d is not the announced one", m.ClusterID, m.Group, m.Index, m.Term)
	}
	next, err := r.openState(staged.Path)
	if err != nil {
		return nil, fmt.Errorf("shard: open the received state: %w", err)
	}
	return r.swap(l, staged, next)
}

func (l *life) installed(success bool) *raft.InstallSnapshotResponse {
	return &raft.InstallSnapshotResponse{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax},
		Term:      l.raft.CurrentTerm(),
		Success:   success,
	}
}

// covers reports whether this replica already has everything up to a committed
// entry: its log holds that very entry, so by the log matching property all
// before it are the leader's, and what follows may be acknowledged and must
// stay; or its state has it.
func (r *Replica) covers(store *fsm.Store, index, term uint64) bool {
	if index <= store.AppliedIndex() {
		return true
	}
	var entry raft.Log
	return r.log.GetLog(index, &entry) == nil && entry.Term == term
}

// swap ends the life l and begins one with the received state.
func (r *Replica) swap(l *life, staged *snapshot.Staged, next *fsm.Store) (*raft.InstallSnapshotResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errors.Join(ErrClosed, next.Close())
	}
	l.stop()
	answer := l.installed(true)
	// Raft may have appended or applied while the stream was on its way.
	if r.covers(l.state.store, staged.Meta.Index, staged.Meta.Term) {
		if err := errors.Join(next.Close(), r.startLife(l.state, nil)); err != nil {
			return nil, r.broken(err)
		}
		return answer, nil
	}
	if err := staged.Commit(r.statePath()); err != nil {
		return nil, r.broken(errors.Join(err, next.Close()))
	}
	if err := r.log.Reset(); err != nil {
		return nil, r.broken(errors.Join(err, next.Close()))
	}
	if err := r.startLife(newState(next), nil); err != nil {
		return nil, r.broken(err)
	}
	_ = l.state.retire()
	r.metrics.installs.Inc()
	r.slog.Info("installed a snapshot", "index", staged.Meta.Index, "term", staged.Meta.Term)
	return answer, nil
}

// broken ends the process: raft is stopped and cannot be started again.
func (r *Replica) broken(err error) error {
	r.fail(fmt.Errorf("install a snapshot: %w", err))
	return err
}

// repairLog finishes an installation that a crash interrupted after the swap
// of the state, and refuses a log that cannot belong to the state. It runs
// before raft opens.
func (r *Replica) repairLog(store *fsm.Store) error {
	meta, ok := store.SnapshotMeta()
	first, err1 := r.log.FirstIndex()
	last, err2 := r.log.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("shard: read the bounds of the log: %w", err)
	}
	if first > meta.Index+1 {
		return fmt.Errorf("%w: the state ends at %d, the log begins at %d: remove this node's data and let it join again", ErrLogGap, meta.Index, first)
	}
	if !ok || last == 0 || first == meta.Index+1 {
		return nil
	}
	if last >= meta.Index {
		var entry raft.Log
		if err := r.log.GetLog(meta.Index, &entry); err != nil {
			return fmt.Errorf("shard: read log entry %d: %w", meta.Index, err)
		}
		if entry.Term == meta.Term {
			return nil
		}
	}
	// All of this log is older than the state, or was never committed.
	r.slog.Info("emptying a log that an installed snapshot replaces", "first", first, "last", last, "state", meta.Index)
	return r.log.Reset()
}
