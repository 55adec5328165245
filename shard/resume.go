package shard

import (
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// resuming is the transport that raft gets. After failures raft pauses before it
// sends entries to a follower again, soon for ten seconds, while its heartbeats
// may have got through long ago: a node that comes back would get nothing for as
// long. So here a message with entries that failed is answered only when a
// heartbeat has been answered since, and raft counts one failure.
type resuming struct {
	Transport
	l *life
}

// AppendEntries implements raft.Transport.
func (t resuming) AppendEntries(id raft.ServerID, target raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	failed := time.Now()
	err := t.Transport.AppendEntries(id, target, req, resp)
	if err != nil && !isHeartbeat(req) {
		t.awaitAnswer(id, req.Term, failed)
	}
	return err
}

// awaitAnswer waits until the follower has answered a message sent after that
// moment, or is not to get any more from this leader.
func (t resuming) awaitAnswer(id raft.ServerID, term uint64, since time.Time) {
	if t.l.r.life.Load() != t.l {
		return // raft is just being opened
	}
	tick := time.NewTicker(max(t.l.r.cfg.HeartbeatTimeout/heartbeats, time.Millisecond))
	defer tick.Stop()
	follows := func(s raft.Server) bool { return s.ID == id }
	for !t.Acked(id, term).After(since) {
		if t.l.raft.State() != raft.Leader || t.l.raft.CurrentTerm() != term ||
			!slices.ContainsFunc(t.l.raft.GetConfiguration().Configuration().Servers, follows) {
			return
		}
		select {
		case <-tick.C:
		case <-t.l.done:
			return
		}
	}
}
