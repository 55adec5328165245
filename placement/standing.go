package placement

import "github.com/hashicorp/raft"

// standing is one replica as it is.
type standing struct {
	id       raft.ServerID
	node     string
	role     Role
	mapped   bool // in the map's record
	member   bool // of the configuration
	voter    bool
	lost     bool // for ever: it never answers again
	gone     bool // lost, or its node is down or no member of the cluster
	staying  bool // its node is a member that is not leaving
	wanted   bool // fills a slot of the target
	reported bool
	used     bool // has had entries
	answers  bool // its leader, lately
	alive    bool // and its node has reported lately; of no member: has reported itself
	filled   bool // and has, by measurement, all but the very latest entries
	caughtUp bool // and may have a vote: its log begins early enough
	first    uint64
	last     uint64 // known to be in its log
	match    uint64
	applied  uint64
}

// judge says from the map whether the replica can ever answer again.
func (p *shardPlan) judge(r *standing, incarnation uint64) {
	m, ok := p.view.Map.Member(r.node)
	r.staying = ok && !m.Leaving
	r.lost = !ok || r.mapped && m.Incarnation != incarnation && !p.view.faults.ignoreIncarnation || p.group.Lost[r.id]
	r.gone = r.lost || p.view.Nodes[r.node].Down
}

// measure takes what the leader and the replica itself say of it.
func (p *shardPlan) measure(r *standing) {
	report, reported := p.group.Reports[r.id]
	r.reported = reported
	r.applied, r.last = report.Applied, max(report.Last, report.Applied)
	r.used = r.last > 0
	r.first = report.First
	if report.First == 0 && r.used {
		r.first = r.last + 1 // nothing is in the log: it goes on after a snapshot
	}
	nodeAlive := p.view.Nodes[r.node].Alive
	if !p.led() || !r.member {
		r.alive = nodeAlive && reported && !r.lost
		return
	}
	leader := p.group.Leader
	if r.id == leader.Replica {
		r.answers, r.alive, r.filled, r.match, r.last = true, true, true, leader.Last, leader.Last
		return
	}
	f, followed := leader.Leading.Followers[r.id]
	r.match, r.last = f.Match, max(r.last, f.Match)
	r.answers = followed && f.Acked >= 0 && f.Acked <= p.view.Limits.Acked
	r.alive = r.answers && nodeAlive && !r.lost
	r.filled = r.alive && reported && near(f.Match, leader.Commit) && hasApplied(report, leader.Commit) || p.view.faults.promoteUnmeasured
}

const (
	// maxLag is how many entries behind the commit index a replica may be and
	// still count as caught up.
	maxLag = 64
	// maxReportLag is how many entries may have been committed since a replica
	// made its report.
	maxReportLag = 4096
)

// near reports whether an index measured by the leader is close to the commit
// index; 0 is none.
func near(match, commit uint64) bool { return match > 0 && match+maxLag >= commit }

// hasApplied reports whether a replica applies what it has. Its report is older
// than the leader's measurement, so under load it is judged by its own log.
func hasApplied(report GroupReport, commit uint64) bool {
	last := max(report.Last, report.Applied)
	return last > 0 && report.Applied+maxLag >= min(last, commit) && last+maxReportLag >= commit
}

// tooLateFor reports whether the witness's log begins after what d lacks, a data
// replica that votes and may come back: the witness could not bring it up to date.
func (p *shardPlan) tooLateFor(w, d *standing) bool {
	return d.role == Data && d.voter && !d.lost && (w.first == 0 || w.first > d.last+1) && !p.view.faults.anyWitness
}

// best is the replica that fills the slot: the one that is furthest on its way.
// One that has been in the group and is no member is on its way out.
func (p *shardPlan) best(slot TargetReplica) *standing {
	var best *standing
	rank := func(r *standing) int {
		switch {
		case r.voter:
			return 2
		case r.member:
			return 1
		}
		return 0
	}
	for _, r := range p.replicas {
		if r.node != slot.Node || r.role != slot.Role || !r.mapped || r.lost || !r.member && r.used {
			continue
		}
		if best == nil || rank(r) > rank(best) {
			best = r
		}
	}
	return best
}

func isVoter(r *standing) bool    { return r.voter }
func isData(r *standing) bool     { return r.role == Data }
func isWanted(r *standing) bool   { return r.wanted }
func isAlive(r *standing) bool    { return r.alive }
func isCaughtUp(r *standing) bool { return r.caughtUp }
func isNext(r *standing) bool     { return r.wanted && r.member && !r.voter && r.caughtUp }
func keepsFiles(r *standing) bool { return !r.lost }
func stays(r *standing) bool      { return r.staying && !r.lost }

func but(x *standing) func(*standing) bool { return func(r *standing) bool { return r != x } }
