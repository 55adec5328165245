package shard

import "github.com/hashicorp/raft"

// sendEarly sends entries to the followers that raft is about to write to this
// replica's own log, if it leads: so they write at the same time. Raft counts
// this replica when its write is done, and the others when it has asked them
// after that, so nothing is committed sooner than it may be
// (transport.Group.AppendEarly).
//
// Raft's main loop calls this, so the term cannot change meanwhile. Changes of
// the configuration are left to raft, which counts by the new one only when it
// has written it.
func (l *life) sendEarly(entries []*raft.Log) {
	if len(entries) == 0 || l.r.life.Load() != l || l.r.cfg.Faults.sendLate {
		return // raft is just being opened
	}
	term := entries[0].Term
	if l.raft.State() != raft.Leader || l.raft.CurrentTerm() != term || l.r.log.Err() != nil {
		return // what it follows
	}
	for _, e := range entries {
		if e.Type == raft.LogConfiguration || e.Term != term {
			return
		}
	}
	l.transport.AppendEarly(term, l.raft.CommitIndex(), entries)
}
