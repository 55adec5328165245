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
	if l == nil {
		return nil, ErrBusy // raft is just being opened
	}
	if req.Term < l.raft.CurrentTerm() {
		return l.installed(false), nil
	}
	if covered, err := r.covers(l.state.store, req.LastLogIndex, req.LastLogTerm); err != nil {
		return nil, err
	} else if covered {
		return l.installed(true), nil
	}
	if r.Witness() {
		return r.jump(l, req)
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
	replaced := false
	answer, err := r.swap(l, staged.Meta, func() (*state, error) {
		replaced = true
		return newState(next), r.replace(l.state.store, next, staged)
	})
	switch {
	case !replaced || err != nil:
		err = errors.Join(err, next.Close())
	default:
		_ = l.state.retire()
	}
	if err != nil {
		return nil, err
	}
	return answer, nil
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
//
// While raft runs the answer may be out of date as soon as it is given, but
// "yes" stays true: what is committed is neither taken back nor overwritten.
func (r *Replica) covers(store *fsm.Store, index, term uint64) (bool, error) {
	if index <= store.AppliedIndex() {
		return true, nil
	}
	var entry raft.Log
	switch err := r.log.GetLog(index, &entry); {
	case err == nil:
		return entry.Term == term, nil
	case errors.Is(err, raft.ErrLogNotFound):
		// If it has been truncated in between, the state has it.
		return index <= store.AppliedIndex(), nil
	default:
		return false, fmt.Errorf("shard: read log entry %d: %w", index, err)
	}
}

// swap ends the life l and begins one with the state that replace returns, or
// with the old one if raft has appended or applied what the snapshot brings
// meanwhile. If neither can begin, the process must end, unless the node is
// closing.
func (r *Replica) swap(l *life, meta snapshot.Meta, replace func() (*state, error)) (*raft.InstallSnapshotResponse, error) {
	r.turn <- struct{}{}
	defer func() { <-r.turn }()
	if r.closed.Load() {
		return nil, ErrClosed
	}
	l.stop()
	answer := l.installed(true)
	next := l.state
	covered, err := r.covers(l.state.store, meta.Index, meta.Term)
	if err == nil && !covered {
		next, err = replace()
	}
	if err == nil {
		err = r.startLife(next, nil)
	}
	if err != nil {
		if !errors.Is(err, ErrClosed) {
			r.fail(fmt.Errorf("install a snapshot: %w", err))
		}
		return nil, err
	}
	if !covered {
		r.metrics.installs.Inc()
		r.slog.Info("installed a snapshot", "index", meta.Index, "term", meta.Term)
	}
	return answer, nil
}

// replace makes the received state the replica's on disk, and empties the log.
func (r *Replica) replace(old, next *fsm.Store, staged *snapshot.Staged) error {
	old.Moved("") // a defragmentation under way must not bring it back
	if err := r.log.SetUint64(keyInstalling, staged.Meta.Index); err != nil {
		return err
	}
	if err := staged.Commit(r.statePath()); err != nil {
		return err
	}
	next.Moved(r.statePath())
	return r.log.Reset()
}

// keyInstalling is where in the log's stable keys the index of the last snapshot
// stands whose installation was begun. Nothing else makes a state that is ahead
// of its log.
var keyInstalling = []byte("kvd.installing")

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
	installing, err := r.stored(keyInstalling)
	if err != nil {
		return fmt.Errorf("shard: look for an installation that was interrupted: %w", err)
	}
	if installing != meta.Index {
		return fmt.Errorf("%w: the state ends at %d, the log at %d: it has forgotten what it acknowledged, perhaps as an old copy: remove this node's data and let it join again, or restore a backup if it was alone", ErrLogBehind, meta.Index, last)
	}
	// All of this log is older than the state, or was never committed.
	r.slog.Info("emptying a log that an installed snapshot replaces", "first", first, "last", last, "state", meta.Index)
	return r.log.Reset()
}
