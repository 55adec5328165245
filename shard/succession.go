package shard

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// When the process of the group's leader is proven dead, nobody has to wait for
// the heartbeats that do not come: its followers elect another at once.
//
// A verdict may be wrong all the same, since a network can refuse connections to
// a node that lives. So a follower that has come to it first asks the other
// voters for a pre-vote, and those grant it who have come to the same verdict
// about the same leader in the same term. Only with a majority of them, itself
// included, does it stand, as if the leader had handed over to it: raft's voters
// take that from a candidate although they know a leader. Where the others do not
// agree, nothing has happened. Who may win, and that a vote is given once, is left
// to raft: all this only decides when somebody stands.
//
// Of several with equal logs each refuses those behind it in the configuration,
// and stands no more once it has agreed to another, so that they do not share the
// votes. Nor does a voter agree to a second one soon after the first: who stands
// and loses would not hear of the winner before its own timeout (raft steps down
// for a leader of the same term only if nobody handed over), and a leadership
// that is then given to it would be nobody's until that fails, too.

const (
	// The others may come to the verdict a little later, so a follower asks again.
	successionPause = 10 * time.Millisecond
	// successionTries bounds that. After it raft's own timeouts are near.
	successionTries = 40
	// witnessTries is how often the data replicas may ask before a witness does:
	// it is needed only if it has entries that none of them has.
	witnessTries = 15
	// agreementLasts is for how long a voter agrees to nobody else. By then the one
	// that it has agreed to has its majority and stands, or will not soon.
	agreementLasts = 10 * successionPause
)

// succession is what this replica has promised in a term whose leader is dead.
type succession struct {
	mu     sync.Mutex
	term   uint64
	stands bool          // it stands itself
	to     raft.ServerID // it has agreed to this one instead
	at     time.Time     // when it decided so
}

// stand reports whether this replica may stand, and remembers that it does.
func (s *succession) stand(term uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.agreed(term) {
		return false
	}
	s.term, s.stands, s.to, s.at = term, true, "", time.Now()
	return true
}

// yield reports whether this replica may agree to another, and remembers that
// it does.
func (s *succession) yield(term uint64, to raft.ServerID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.term == term && s.stands:
		return false
	case s.agreed(term):
		return s.to == to // which makes it last no longer: others wait for its end
	}
	s.term, s.stands, s.to, s.at = term, false, to, time.Now()
	return true
}

// agreed reports whether there is an agreement that lasts. mu is held.
func (s *succession) agreed(term uint64) bool {
	return s.term == term && s.to != "" && time.Since(s.at) < agreementLasts
}

// yielded reports whether this replica has agreed to another of late, and so
// has nothing to ask for: it would only keep others from agreeing to that one.
func (s *succession) yielded(term uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.agreed(term)
}

// standing reports whether this replica stands in the term that follows. Raft
// may not have let it: what it promised must not keep others from it for long.
func (s *succession) standing(term uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stands && s.term == term && time.Since(s.at) < successionTries*successionPause
}

// watchDeaths looks for a successor when a node is found dead.
func (l *life) watchDeaths() {
	for {
		select {
		case <-l.transport.DeathNotify():
			l.succeed()
		case <-l.done:
			return
		}
	}
}

// orphaned is the leader that this replica follows, and the term, if the
// leader's process is dead.
func (l *life) orphaned() (leader raft.ServerID, term uint64, ok bool) {
	term = l.raft.CurrentTerm()
	_, leader = l.raft.LeaderWithID()
	ok = leader != "" && leader != l.r.cfg.Replica && l.raft.State() == raft.Follower && l.transport.Dead(leader)
	return leader, term, ok
}

// succeed makes this replica stand for election if its leader is dead, and
// enough others say so.
func (l *life) succeed() {
	leader, term, ok := l.orphaned()
	if !ok {
		return
	}
	same := func() bool {
		leader2, term2, ok := l.orphaned()
		return ok && leader2 == leader && term2 == term
	}
	timer := time.NewTimer(time.Duration(l.rank(leader)) * successionPause)
	defer timer.Stop()
	for try := range successionTries {
		select {
		case <-timer.C:
		case <-l.done:
			return
		}
		if !same() {
			return
		}
		if (!l.r.Witness() || try >= witnessTries) && !l.succession.yielded(term) && (l.r.cfg.Faults.succeedAlone || l.preElected(leader, term)) {
			if !l.succession.stand(term) {
				return
			}
			l.r.slog.Info("the leader's process is dead: standing for election", "leader", string(leader), "term", term)
			l.r.metrics.successions.Inc()
			l.transport.Stand(same)
			return
		}
		timer.Reset(successionPause)
	}
}

// rank is how many of the leader's followers come before this one. They may ask
// first, so that not all ask at once and each gets a part of the agreements.
func (l *life) rank(leader raft.ServerID) int {
	before := 0
	for _, id := range l.voters() {
		if id == l.r.cfg.Replica {
			break
		}
		if id != leader {
			before++
		}
	}
	return before
}

// preElected asks the other voters, and reports whether a majority agrees.
func (l *life) preElected(leader raft.ServerID, term uint64) bool {
	var last raft.Log
	if l.r.log.GetLog(l.raft.LastIndex(), &last) != nil {
		return false // the log is empty behind a snapshot: raft will do
	}
	self := []byte(l.r.cfg.Replica)
	req := &raft.RequestPreVoteRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self},
		Term:      term + 1, LastLogIndex: last.Index, LastLogTerm: last.Term,
	}
	voters := l.voters()
	if !slices.Contains(voters, l.r.cfg.Replica) {
		return false
	}
	ctx, cancel := context.WithTimeout(l.ctx, successionTries*successionPause)
	defer cancel()
	answers := make(chan bool, len(voters))
	asked := 0
	for _, id := range voters {
		if id == leader || id == l.r.cfg.Replica {
			continue
		}
		asked++
		l.tasks.Go(func() {
			resp := new(raft.RequestPreVoteResponse)
			// Not as a witness would, which refuses itself.
			err := l.transport.Transport.RequestPreVote(id, raft.ServerAddress(id), req, resp)
			answers <- err == nil && resp.Granted
		})
	}
	granted := 1
	for ; asked > 0 && granted <= len(voters)/2; asked-- {
		select {
		case yes := <-answers:
			if yes {
				granted++
			}
		case <-ctx.Done():
			return false
		}
	}
	return granted > len(voters)/2
}

// voters are those of the latest configuration, in its order.
func (l *life) voters() []raft.ServerID {
	var voters []raft.ServerID
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		if s.Suffrage == raft.Voter {
			voters = append(voters, s.ID)
		}
	}
	return voters
}

// judgePreVote answers for a replica whose leader's process is dead: raft would
// refuse, because it still has that leader. In any other case raft answers.
func (l *life) judgePreVote(req *raft.RequestPreVoteRequest) *raft.RequestPreVoteResponse {
	candidate := raft.ServerID(req.ID)
	resp := &raft.RequestPreVoteResponse{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax}, Term: req.Term - 1}
	if l.succession.standing(req.Term - 1) {
		return resp // raft may not know yet that its vote is given
	}
	leader, term, ok := l.orphaned()
	if !ok || candidate == leader || req.Term != term+1 {
		return nil
	}
	var last raft.Log
	if l.r.log.GetLog(l.raft.LastIndex(), &last) != nil {
		return nil
	}
	voters := l.voters()
	rank, own := slices.Index(voters, candidate), slices.Index(voters, l.r.cfg.Replica)
	if rank < 0 {
		return nil
	}
	order := cmp.Or(cmp.Compare(req.LastLogTerm, last.Term), cmp.Compare(req.LastLogIndex, last.Index))
	if order == 0 && own >= 0 && !l.r.Witness() && (own < rank || IsWitness(candidate)) {
		order = -1 // this one stands itself
	}
	if order >= 0 && l.succession.yield(term, candidate) {
		resp.Term, resp.Granted = req.Term, true
	}
	return resp
}
