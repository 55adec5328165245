package shard

import (
	"time"

	"github.com/hashicorp/raft"
)

// A group that nobody uses still has its heartbeats and timers, and a node can
// have hundreds of groups. A timer that goes off alone is what costs most: it
// wakes the process up. So the leaders of all groups send their heartbeats at the
// same moments, and share the wake-ups and the writes; and raft's CommitTimeout
// is long, since this replica itself tells its followers of a commit.

const (
	// heartbeats is how many a leader sends in a HeartbeatTimeout. A follower
	// that misses them asks the others before it stands, and they know better.
	heartbeats = 3
	// patience is how much longer than a follower a leader is: raft sends a
	// heartbeat by itself, at a random moment, when there was none for a tenth
	// of the timeout, which must be longer than the time between two beats.
	patience = 4
)

// untilBeat is how long it is to the next multiple of an interval: the same
// moment for everybody. The wall clock sets nothing but that phase.
func untilBeat(interval time.Duration) time.Duration {
	return interval - time.Duration(time.Now().UnixNano())%interval
}

// pace makes raft leave the heartbeats of a leader to beat, or takes that back.
func (l *life) pace(leads bool) {
	l.reload(func(c *raft.ReloadableConfig) {
		c.HeartbeatTimeout, c.ElectionTimeout = l.r.cfg.HeartbeatTimeout, l.r.cfg.ElectionTimeout
		if leads {
			c.HeartbeatTimeout *= patience
			c.ElectionTimeout = max(c.ElectionTimeout, c.HeartbeatTimeout)
		}
	})
}

// beat makes raft send its heartbeats for as long as this replica leads. Raft
// takes a timeout that gets shorter, by however little, as a reason to.
func (l *life) beat(e *epoch) {
	interval := l.r.cfg.HeartbeatTimeout / heartbeats
	timer := time.NewTimer(untilBeat(interval))
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-e.over:
			return
		case <-l.done:
			return
		}
		timer.Reset(untilBeat(interval))
		l.reload(func(c *raft.ReloadableConfig) {
			c.HeartbeatTimeout = max(c.HeartbeatTimeout-1, l.r.cfg.HeartbeatTimeout)
		})
	}
}

// reload changes raft's configuration.
func (l *life) reload(change func(*raft.ReloadableConfig)) {
	l.configuring.Lock()
	defer l.configuring.Unlock()
	conf := l.raft.ReloadableConfig()
	change(&conf)
	if err := l.raft.ReloadConfig(conf); err != nil {
		l.r.slog.Warn("raft does not take its new configuration", "error", err)
	}
}

// tellFollowers tells the others of a commit, as soon as there are no more
// entries that would. Those that do not have the entry yet are told a little
// later, and so on, until raft would tell them itself.
func (l *life) tellFollowers() {
	// Watches of followers wait for it. At more than some 1000 entries per
	// second the next one is there first.
	first := l.r.cfg.HeartbeatTimeout / 1000
	wait := time.Duration(0) // none
	pause := time.NewTimer(time.Hour)
	defer pause.Stop()
	told := make(map[raft.ServerID]uint64)
	for {
		select {
		case <-l.committed:
			if wait != first { // else it has begun already
				wait = first
				pause.Reset(wait)
			}
		case <-pause.C:
			if isMissed := l.tellServing(told); !isMissed || wait > l.r.cfg.HeartbeatTimeout {
				wait = 0
				continue
			}
			wait *= 2
			pause.Reset(wait)
		case <-l.done:
			return
		}
	}
}

func (l *life) tellServing(told map[raft.ServerID]uint64) (isMissed bool) {
	if e := l.role.Load(); e != nil && e.isServing() && l.proposer.begin() {
		defer l.proposer.open.Done()
		return l.tell(e, told)
	}
	return false
}

// tell sends one message to each follower that answers, has the entry and has
// not been told. isMissed: one of them does not have it yet. Those that do not
// answer are left to raft.
func (l *life) tell(e *epoch, told map[raft.ServerID]uint64) (isMissed bool) {
	index := l.raft.CommitIndex()
	var last raft.Log
	if l.raft.LastIndex() != index || l.r.log.GetLog(index, &last) != nil {
		return false // entries are under way, which tell of this one
	}
	recently := time.Now().Add(-l.r.cfg.HeartbeatTimeout)
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		switch {
		case s.ID == l.r.cfg.Replica || told[s.ID] >= index || !l.transport.Acked(s.ID, e.term).After(recently):
		case l.transport.MatchIndex(s.ID, e.term) < index:
			isMissed = true
		default:
			l.sendCommit(e, s.ID, index, last.Term)
			told[s.ID] = index
		}
	}
	return isMissed
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
