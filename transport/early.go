package transport

import (
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// AppendEarly sends entries to the followers before raft does: raft writes them to this replica's own log first, and
// that takes as long as it takes the followers. It is for the leader in the given term, just before that write, and
// commit is what is committed. It does not wait, and sends to those only whose pipeline is exactly up to the entry
// before, so that this is what raft would send next. The entries must not change any more; what raft sends later is
// compared with them.
//
// To raft it makes no difference but time. When it asks for these entries to be sent, which is after they are in this
// replica's log, it gets the answer that they have got: no answer reaches it sooner, and none for other entries or of
// another term. If they got none, or a failure, the pipeline has failed, and raft sends them again in another way.
// If the write fails, or the process ends, the followers have entries of this term that this replica has not: as if a
// leader had died whose disk was lost after it had sent them, which costs nothing as it never counted itself.
func (g *Group) AppendEarly(term, commit uint64, entries []*raft.Log) {
	g.peersMu.Lock()
	pipelines := g.pipelines
	g.peersMu.Unlock()
	for _, p := range pipelines {
		p.sendEarly(term, commit, entries)
	}
}

// forget is for a pipeline that is closed.
func (g *Group) forget(p *pipeline) {
	g.peersMu.Lock()
	defer g.peersMu.Unlock()
	rest := slices.Clone(g.pipelines) // AppendEarly may be looking at the old ones
	g.pipelines = slices.DeleteFunc(rest, func(q *pipeline) bool { return q == p })
}

func (p *pipeline) sendEarly(term, commit uint64, entries []*raft.Log) {
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	default:
		return
	}
	if p.ctx.Err() != nil || p.tail.term != term || len(entries) == 0 || entries[0].Index != p.tail.index+1 {
		return
	}
	self := []byte(p.g.key.replica)
	args := &raft.AppendEntriesRequest{
		RPCHeader:    raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
		Term:         term,
		PrevLogEntry: p.tail.index, PrevLogTerm: p.tail.logTerm,
		Entries: entries, LeaderCommitIndex: commit,
	}
	if p.g.fit(args); len(args.Entries) < len(entries) {
		return
	}
	select {
	case p.slots <- struct{}{}:
	default:
		return
	}
	fl := &flight{start: time.Now(), args: args, resp: new(raft.AppendEntriesResponse)}
	var err error
	if fl.s, err = p.g.send(p.c, p.target, p.g.t.cfg.RPCTimeout, args, false); err != nil {
		<-p.slots // it has not left
		return
	}
	p.mu.Lock()
	p.known.sent = fl.start
	p.mu.Unlock()
	p.early = append(p.early, fl)
	p.took(fl)
}

// unsent is what of a request of raft's has not left already; if all of it has, covering is the message whose answer
// answers it, too: by the log matching property the peer has everything up to the last entry of what it took.
// The caller has p.turn.
func (p *pipeline) unsent(args *raft.AppendEntriesRequest) (rest *raft.AppendEntriesRequest, covering *flight) {
	n := len(args.Entries)
	if n == 0 || len(p.early) == 0 {
		return args, nil
	}
	if !p.begins(args) {
		p.early = nil
		return args, nil
	}
	last := args.Entries[n-1].Index
	for len(p.early) > 0 && p.early[0].last() < last {
		p.early = p.early[1:]
	}
	if len(p.early) > 0 {
		covering = p.early[0]
		if covering.last() == last {
			p.early = p.early[1:]
		}
		return nil, covering
	}
	tail := *args
	tail.PrevLogEntry, tail.PrevLogTerm = p.tail.index, p.tail.logTerm
	tail.Entries = args.Entries[p.tail.index-args.PrevLogEntry:]
	if len(tail.Entries) == 0 {
		return args, nil
	}
	return &tail, nil
}

// begins reports whether a request asks for entries that were sent early, from the first one on, or goes on within
// them. One leader makes one entry of an index in a term, so the term tells that they are the same.
func (p *pipeline) begins(args *raft.AppendEntriesRequest) bool {
	if p.g.t.faults.answersForOthers {
		return true
	}
	first, early := args.PrevLogEntry+1, p.early[0]
	if args.Term != p.tail.term || first < early.first() || first > early.last() {
		return false
	}
	for i, e := range args.Entries {
		if e.Index != first+uint64(i) {
			return false
		}
		if e.Index <= p.tail.index && e.Term != p.tail.term {
			return false
		}
	}
	return true
}
