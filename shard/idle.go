package shard

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// A group that nobody uses still has its heartbeats and timers, and a node can
// have hundreds of groups. What keeps that cheap: the heartbeats of all groups
// leave at the same moments, so that they share wake-ups and writes; and raft's
// CommitTimeout is long, since this replica itself tells its followers of a
// commit.

// untilBeat is how long it is to the next multiple of an interval: the same
// moment for everybody. The wall clock sets nothing but that phase.
func untilBeat(interval time.Duration) time.Duration {
	return interval - time.Duration(time.Now().UnixNano())%interval
}

// pacedTransport holds raft's heartbeats back until the next beat. Raft makes
// them more often than that, so there is one in each beat.
type pacedTransport struct {
	Transport
	interval time.Duration
	now      broadcast    // whoever waits sends now
	until    atomic.Int64 // monotonic: nobody waits before this
	start    time.Time
	closing  chan struct{}
	close    sync.Once
}

func newPacedTransport(t Transport, interval time.Duration) *pacedTransport {
	p := &pacedTransport{Transport: t, interval: interval, start: time.Now(), closing: make(chan struct{})}
	p.now.init()
	return p
}

// hurry sends the heartbeats that wait, and for a moment those that come, at
// once: reads wait for their answers.
func (p *pacedTransport) hurry() {
	p.until.Store(int64(time.Since(p.start) + kickAgain))
	p.now.fire()
}

// AppendEntries implements raft.Transport.
func (p *pacedTransport) AppendEntries(id raft.ServerID, target raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if isHeartbeat(req) {
		p.await()
	}
	return p.Transport.AppendEntries(id, target, req, resp)
}

// isHeartbeat tells raft's heartbeats from its other AppendEntries.
func isHeartbeat(r *raft.AppendEntriesRequest) bool {
	return r.PrevLogEntry == 0 && len(r.Entries) == 0 && r.LeaderCommitIndex == 0
}

func (p *pacedTransport) await() {
	now := p.now.wait() // before the look at until
	if int64(time.Since(p.start)) < p.until.Load() {
		return
	}
	beat := time.NewTimer(untilBeat(p.interval))
	defer beat.Stop()
	select {
	case <-beat.C:
	case <-now:
	case <-p.closing:
	}
}

// Close implements raft.WithClose.
func (p *pacedTransport) Close() error {
	p.close.Do(func() { close(p.closing) })
	return p.Transport.Close()
}

// tellFollowers tells the others of a commit, as soon as there are no more
// entries that would.
func (l *life) tellFollowers() {
	pause := time.NewTimer(time.Hour)
	defer pause.Stop()
	for {
		select {
		case <-l.committed:
		case <-l.done:
			return
		}
		if l.role.Load() == nil {
			continue
		}
		pause.Reset(l.r.cfg.HeartbeatTimeout / 50)
		select {
		case <-pause.C:
		case <-l.done:
			return
		}
		if e := l.role.Load(); e != nil && e.isServing() && l.proposer.begin() {
			l.tell(e)
			l.proposer.open.Done()
		}
	}
}

// tell sends one message to each follower that answers. Those that do not are
// left to raft.
func (l *life) tell(e *epoch) {
	index := l.raft.CommitIndex()
	var last raft.Log
	if l.raft.LastIndex() != index || l.r.log.GetLog(index, &last) != nil {
		return // entries are under way, which tell of this one
	}
	recently := time.Now().Add(-l.r.cfg.HeartbeatTimeout)
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		if s.ID != l.r.cfg.Replica && l.transport.MatchIndex(s.ID, e.term) >= index && l.transport.Acked(s.ID, e.term).After(recently) {
			l.sendCommit(e, s.ID, index, last.Term)
		}
	}
}

// sendCommit tells a follower that has the entry that it is committed.
func (l *life) sendCommit(e *epoch, id raft.ServerID, index, term uint64) {
	self := []byte(l.r.cfg.Replica)
	req := &raft.AppendEntriesRequest{
		RPCHeader:    raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
		Term:         e.term,
		PrevLogEntry: index, PrevLogTerm: term,
		LeaderCommitIndex: index,
	}
	_ = l.transport.AppendEntries(id, raft.ServerAddress(id), req, new(raft.AppendEntriesResponse))
}
