package shard

import (
	"io"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"kvd/snapshot"
)

// A witness is a voter with the whole log and no state (docs/design.md section
// 9). It serves nothing: role stays nil in its lives, so that everything that
// asks for the leader is refused.
//
// What it must keep is what a data replica may lack: entries that were committed
// with its help can live on it and on a dead node alone. So it leads if nobody
// else can, for as long as it takes to feed a data replica; and the beginning of
// its log goes only up to what every data voter has on disk, which it is told
// (SetTruncationFloor). The same holds when it has to go on behind a snapshot.
// Then the leader's log begins behind the end of this one: what is skipped was
// committed without this witness, and has a majority that it does not belong to.

// Witness reports whether this replica is a witness: it votes and keeps the
// log, but has no state and serves nothing.
func (r *Replica) Witness() bool {
	return IsWitness(r.cfg.Replica) && !r.cfg.Faults.WitnessServes
}

// SetTruncationFloor lets a witness remove the beginning of its log up to index:
// all data voters of the group, dead ones too, have that on disk. Until it is
// called, a witness removes nothing. It means nothing to other replicas.
func (r *Replica) SetTruncationFloor(index uint64) {
	if !r.Witness() {
		return
	}
	r.floor.Store(index)
	first, err := r.log.FirstIndex()
	due := index > first+r.cfg.SnapshotEntries || index > first && r.held.sizeBytes() > r.cfg.SnapshotBytes+r.cfg.TrailingBytes
	if err == nil && due {
		r.life.Load().tail.trigger()
	}
}

// roleTransport makes a difference between witnesses and others where raft
// makes none.
type roleTransport struct {
	Transport
	l *life
}

// InstallSnapshot implements raft.Transport. A witness needs the snapshot's
// place in the log, not its data.
func (t roleTransport) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, req *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if IsWitness(id) && !t.l.r.cfg.Faults.WitnessServes {
		place := *req
		place.Size = 0
		req, data = &place, strings.NewReader("")
	}
	return t.Transport.InstallSnapshot(id, target, req, resp, data)
}

// RequestPreVote implements raft.WithPreVote. A witness refuses itself for a
// while, so that others stand first.
func (t roleTransport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, req *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if t.l.declines() {
		*resp = raft.RequestPreVoteResponse{RPCHeader: req.RPCHeader, Term: req.Term}
		return nil
	}
	return t.Transport.RequestPreVote(id, target, req, resp)
}

// declines reports whether a witness leaves the election to others: for two
// election timeouts from when it would have stood first. Meanwhile it votes, and
// each candidate tries once at least.
func (l *life) declines() bool {
	if !l.r.Witness() || l.r.cfg.Faults.witnessStands {
		return false
	}
	if l.r.life.Load() != l {
		return true // raft is just being opened
	}
	l.standing.Lock()
	defer l.standing.Unlock()
	if !l.stands.After(l.raft.LastContact()) {
		l.stands = time.Now()
	}
	return time.Since(l.stands) < 2*l.r.cfg.ElectionTimeout
}

// handOver gives the leadership of a witness to a replica that can serve, as
// soon as one has the log. Raft feeds it. It tries until it has worked.
func (l *life) handOver(e *epoch) {
	l.r.metrics.witnessLeads.Inc()
	l.r.slog.Info("this witness leads the group, and hands over to the first that has the log")
	pause := max(l.r.cfg.HeartbeatTimeout/50, time.Millisecond)
	timer := time.NewTimer(0)
	defer timer.Stop()
	begun := time.Now()
	for {
		select {
		case <-timer.C:
		case <-e.over:
			return
		case <-l.done:
			return
		}
		id := l.heir(time.Since(begun) > 2*l.r.cfg.ElectionTimeout)
		if id == "" {
			timer.Reset(pause)
			continue
		}
		err := l.await(l.ctx, func() error { return l.raft.LeadershipTransferToServer(id, raft.ServerAddress(id)).Error() })
		l.r.slog.Info("handed the leadership over", "to", id, "error", err)
		timer.Reset(pause)
	}
}

// heir is the voter that leads next: one with a state that has the whole log
// and answers. A data replica for which this witness's log begins too late gets
// nothing from it, so after a while another witness may try.
func (l *life) heir(orWitness bool) (best raft.ServerID) {
	term, last := l.raft.CurrentTerm(), l.raft.LastIndex()
	recently := time.Now().Add(-l.r.cfg.HeartbeatTimeout)
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		has := l.transport.MatchIndex(s.ID, term) >= last && l.transport.Acked(s.ID, term).After(recently)
		switch {
		case s.Suffrage != raft.Voter || s.ID == l.r.cfg.Replica || !has:
		case !IsWitness(s.ID):
			return s.ID
		case orWitness:
			best = s.ID
		}
	}
	return best
}

// jump is how a witness receives a snapshot, of which it gets the place alone:
// it goes on behind it, unless a data replica lacks what it would drop. Then it
// stays behind until that one has it, or is not a voter any more.
func (r *Replica) jump(l *life, req *raft.InstallSnapshotRequest) (*raft.InstallSnapshotResponse, error) {
	last, err := r.log.LastIndex()
	if err != nil {
		return nil, err
	}
	// If there is an entry at the snapshot's index, it is not the committed one.
	if drops := min(last, req.LastLogIndex-1); drops > r.floor.Load() {
		r.slog.Warn("this witness is too far behind for the leader's log, and cannot leave out what it lacks because another replica may need what would go",
			"end", last, "snapshot", req.LastLogIndex, "floor", r.floor.Load())
		return nil, ErrNeeded
	}
	meta := snapshot.Meta{
		ClusterID: r.cfg.ClusterID, Group: r.cfg.Group,
		Index: req.LastLogIndex, Term: req.LastLogTerm,
		Configuration: raft.DecodeConfiguration(req.Configuration), ConfigurationIndex: req.ConfigurationIndex,
	}
	return r.swap(l, meta, func() (*state, error) {
		if err := r.log.SetUint64(keyInstalling, meta.Index); err != nil {
			return nil, err
		}
		if err := l.state.store.InstallMeta(meta); err != nil {
			return nil, err
		}
		if err := r.log.Reset(); err != nil {
			return nil, err
		}
		r.held.reset()
		return l.state, nil
	})
}
