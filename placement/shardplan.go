package placement

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/hashicorp/raft"
)

// shardPlan finds the next step of one group.
type shardPlan struct {
	view            *ClusterView
	shard           Shard
	group           GroupView
	target          []TargetReplica
	data, witnesses int         // slots
	replicas        []*standing // all in the map or the configuration, by id
	waits           []string
}

func newShardPlan(v *ClusterView, s Shard) *shardPlan {
	total := staying(v.Map.Members)
	p := &shardPlan{view: v, shard: s, group: v.Groups[s.Group()], target: Target(*v.Map.Config, s.Number, v.Ring, total)}
	p.data, p.witnesses = Slots(*v.Map.Config, total)
	known := make(map[raft.ServerID]*standing)
	stand := func(id raft.ServerID) *standing {
		if known[id] == nil {
			known[id] = &standing{id: id, node: Replica{ID: id}.Node(), role: RoleOf(id)}
			p.replicas = append(p.replicas, known[id])
		}
		return known[id]
	}
	for _, r := range s.Replicas {
		stand(r.ID).mapped = true
		p.judge(known[r.ID], r.Incarnation)
	}
	if p.led() {
		for _, m := range p.group.Leader.Leading.Members {
			r := stand(m.ID)
			if !r.mapped {
				p.judge(r, 0)
			}
			r.member, r.voter = true, m.Voter
		}
	}
	slices.SortFunc(p.replicas, func(a, b *standing) int { return cmp.Compare(a.id, b.id) })
	for _, r := range p.replicas {
		p.measure(r)
	}
	for _, r := range p.replicas {
		r.caughtUp = r.filled && (r.role == Data || r.voter || !slices.ContainsFunc(p.replicas, func(d *standing) bool { return p.tooLateFor(r, d) }))
	}
	for _, slot := range p.target {
		if r := p.best(slot); r != nil {
			r.wanted = true
		}
	}
	return p
}

func (p *shardPlan) led() bool { return p.group.Leader != nil && p.group.Leader.Leading != nil }

func (p *shardPlan) leaderID() raft.ServerID {
	if !p.led() {
		return ""
	}
	return p.group.Leader.Replica
}

func (p *shardPlan) leaderNode() string { return Replica{ID: p.leaderID()}.Node() }

// count counts the replicas of which all of these are true.
func (p *shardPlan) count(are ...func(*standing) bool) int {
	n := 0
	for _, r := range p.replicas {
		if !slices.ContainsFunc(are, func(is func(*standing) bool) bool { return !is(r) }) {
			n++
		}
	}
	return n
}

// spare is how many live copies of the data there are beyond those wanted.
func (p *shardPlan) spare() int { return p.count(isVoter, isData, isCaughtUp) - p.data }

// next is the group's next step; nil if there is none.
func (p *shardPlan) next(t *traffic) *ShardStep {
	switch {
	case !p.led():
		p.wait("no leader is known that serves: no replica can be added or removed")
		return nil
	case !p.group.Leader.Leading.Committed || p.group.Leader.ConfigurationIndex == 0:
		p.wait("a change of the group's members is not committed yet")
		return nil
	case !p.leads():
		p.wait("the leader %s is about to leave the group", p.leaderID())
		return nil
	case 2*p.count(isVoter, isAlive) <= p.count(isVoter) && !p.view.faults.ignoreQuorum:
		p.wait("%d of %d voters live, too few for any change: bring nodes back", p.count(isVoter, isAlive), p.count(isVoter))
		return nil
	}
	if step := p.removeSecond(); step != nil {
		return step
	}
	for _, find := range []func(*traffic) *ShardStep{p.dropLearner, p.replaceLost, p.promote, p.remove, p.addLearner, p.create, p.forget, p.transfer} {
		if step := find(t); step != nil {
			return step
		}
	}
	return nil
}

// leads reports whether the leader is a data voter of its own configuration.
func (p *shardPlan) leads() bool {
	return p.count(isVoter, isData, func(r *standing) bool { return r.id == p.leaderID() }) == 1
}

func (p *shardPlan) wait(format string, args ...any) {
	p.waits = append(p.waits, fmt.Sprintf(format, args...))
}

func (p *shardPlan) step(action Action, r *standing, why string, args ...any) *ShardStep {
	return &ShardStep{
		Action: action, Group: p.shard.Group(), Replica: r.id, Node: r.node, Role: r.role,
		Prev: p.group.Leader.ConfigurationIndex, Copies: p.data, Voters: p.data + p.witnesses,
		Why: fmt.Sprintf(why, args...),
	}
}

// majorityWithout reports whether a majority of the voters lives and has caught
// up once x is none of them.
func (p *shardPlan) majorityWithout(x *standing) bool {
	return 2*p.count(isVoter, isCaughtUp, but(x)) > p.count(isVoter, but(x)) || p.view.faults.ignoreQuorum
}

// dataInEveryQuorum reports whether as many voters as a group can do without
// cannot be all that have the data.
func dataInEveryQuorum(data, voters int) bool { return data > voters-(voters/2+1) }

// majorityWith is the same once the learner x votes.
func (p *shardPlan) majorityWith(x *standing) bool {
	return 2*(p.count(isVoter, isCaughtUp)+1) > p.count(isVoter)+1 || p.view.faults.ignoreQuorum
}

// voterBeside is another replica on r's node that votes; nil if there is none.
func (p *shardPlan) voterBeside(r *standing) *standing {
	for _, other := range p.replicas {
		if other != r && other.node == r.node && other.voter {
			return other
		}
	}
	return nil
}

// secondVote is the voter that must leave before any other change, because its
// node has another one; nil if there is none.
func (p *shardPlan) secondVote() *standing {
	var second *standing
	for _, r := range p.replicas {
		if !r.voter || p.voterBeside(r) == nil || r.id == p.leaderID() {
			continue
		}
		switch {
		case second == nil, r.lost && !second.lost, r.lost == second.lost && r.role == Witness:
			second = r
		}
	}
	return second
}

// removeSecond takes a node's second vote before anything else. Where the group
// cannot do without it, because others have died meanwhile, those that will never
// be back leave first, and other steps go on.
func (p *shardPlan) removeSecond() *ShardStep {
	second := p.secondVote()
	switch {
	case second == nil || p.view.faults.keepSecondVote:
		return nil
	case p.majorityWithout(second):
		return p.step(Remove, second, "%s votes twice since its data replica got a vote: %s is not needed any more", second.node, second.id)
	}
	p.wait("%s cannot be removed yet: too few of the other voters live and have caught up", second.id)
	for _, r := range p.replicas {
		if r.voter && (r.lost || r.gone && !r.staying) && p.majorityWithout(r) {
			return p.step(Remove, r, "%s does not come back, because %s, and the others need its vote to go on", r.id, p.reason(r))
		}
	}
	return nil
}

func (p *shardPlan) dropLearner(*traffic) *ShardStep {
	for _, r := range p.replicas {
		if r.member && !r.voter && !r.wanted {
			return p.step(Remove, r, "%s has no vote and is not needed: %s", r.id, p.reason(r))
		}
	}
	return nil
}

// replaceLost takes the vote of a replica that can never answer again, just
// before the next one gets its own: should that be lost too, then right after
// its promotion, the others are still a quorum.
func (p *shardPlan) replaceLost(*traffic) *ShardStep {
	for _, next := range []func(*standing) bool{p.followed, p.replaced} {
		for _, r := range p.replicas {
			if r.voter && r.lost && next(r) && p.replaced(r) && p.majorityWithout(r) {
				return p.step(Remove, r, "%s can never answer again, because %s, and a replica that takes its place has caught up", r.id, p.reason(r))
			}
		}
	}
	return nil
}

func (p *shardPlan) promote(*traffic) *ShardStep {
	for _, role := range []Role{Data, Witness} {
		for _, r := range p.replicas {
			if r.role != role || !r.wanted || !r.member || r.voter {
				continue
			}
			beside := p.voterBeside(r)
			switch {
			case !r.caughtUp:
				p.waitToCatchUp(r)
			case beside != nil && !beside.lost && (beside.role == Data || r.role == Witness || p.secondVote() != nil):
				// That one leaves first (remove), or another node's second vote.
			case r.role == Witness && !p.view.faults.anyWitness && !dataInEveryQuorum(p.count(isVoter, isData, isCaughtUp), p.count(isVoter)+1):
				p.wait("%s has caught up, but gets its vote only when more data replicas live and have caught up", r.id)
			case !p.majorityWith(r):
				p.wait("%s has caught up, but too few of the voters live and have caught up for it to get a vote", r.id)
			default:
				return p.step(Promote, r, "%s has caught up with the leader (log %d of %d): it gets a vote", r.id, r.match, p.group.Leader.Commit)
			}
		}
	}
	return nil
}

func (p *shardPlan) waitToCatchUp(r *standing) {
	switch {
	case !r.alive:
		p.wait("%s does not answer the leader and cannot catch up", r.id)
	case r.filled:
		p.wait("%s begins its log after what a data replica still needs: it gets a vote when those have caught up or been replaced", r.id)
	default:
		p.wait("%s is catching up: log %d of %d, %d applied", r.id, r.match, p.group.Leader.Commit, r.applied)
	}
}

// remove takes a voter out that is not wanted, those first that will not return.
func (p *shardPlan) remove(*traffic) *ShardStep {
	voters := slices.DeleteFunc(slices.Clone(p.replicas), func(r *standing) bool { return !r.voter || r.wanted })
	worth := func(r *standing) int {
		switch {
		case r.lost:
			return 0
		case r.gone:
			return 1
		case r.id != p.leaderID():
			return 2
		}
		return 3
	}
	slices.SortStableFunc(voters, func(a, b *standing) int { return cmp.Compare(worth(a), worth(b)) })
	for _, r := range voters {
		if reason := p.needed(r); reason != "" {
			p.wait("%s, not wanted because %s, stays for now: %s", r.id, p.reason(r), reason)
			continue
		}
		if r.id != p.leaderID() {
			return p.step(Remove, r, "%s is not wanted because %s, and %s", r.id, p.reason(r), p.without(r))
		}
		if next := p.heir(); next != nil && next.caughtUp {
			return p.step(Transfer, next, "the leader %s is to be removed, because %s: %s leads instead", r.id, p.reason(r), next.node)
		}
		p.wait("the leader %s is to be removed, but no data replica that stays can lead", r.id)
	}
	return nil
}

// needed says why the unwanted voter cannot be removed yet; empty if it can.
func (p *shardPlan) needed(r *standing) string {
	if !p.majorityWithout(r) {
		return "too few of the other voters live and have caught up"
	}
	f := p.view.faults
	copies := p.count(isVoter, isData, isWanted, isCaughtUp)
	slots := p.data + p.witnesses
	enough := p.count(isVoter, stays, but(r)) >= slots
	asSafe := p.count(isVoter)%2 == 0 && p.count(isVoter, keepsFiles, but(r)) >= slots // bears as many failures
	switch {
	// One that its leader hears is a live copy, whatever group 0 hears of its node.
	case r.role == Data && (!r.gone || r.answers && !r.lost) && copies < p.data && !f.lowerCopies:
		return fmt.Sprintf("only %d of the %d data replicas that are to be there live and have caught up", copies, p.data)
	case p.replaced(r), r.gone && copies >= p.data && p.keepsOut(r):
		return ""
	case r.role == Data && r.gone && p.count(isVoter, isData, stays, but(r)) < p.data && !f.removeEarly:
		return fmt.Sprintf("nothing replaces it yet, and the shard shall have %d data replicas", p.data)
	case r.alive && !p.complete() && !asSafe && !f.lowerCopies:
		return "not all replicas that are wanted have a vote, live and have caught up"
	case !r.alive && !enough && !f.removeEarly:
		return fmt.Sprintf("nothing replaces it yet, and the shard shall have %d voters", slots)
	}
	return ""
}

// followed reports whether a wanted learner on r's node has caught up. It is to
// get its vote right after r has lost its own, so that the node never has two.
// A data replica beside a witness that lives is the exception: it gets its vote
// first (secondVote).
func (p *shardPlan) followed(r *standing) bool {
	return p.count(isNext, func(next *standing) bool {
		upgrade := r.role == Witness && next.role == Data && !r.lost
		return next.node == r.node && !upgrade
	}) > 0
}

// replaced reports whether r is followed, or is lost and learners that have
// caught up make up for it; and of a lost one, whether data remains in every
// quorum without it.
func (p *shardPlan) replaced(r *standing) bool {
	if !r.lost {
		return p.followed(r)
	}
	copies, voters := p.count(isVoter, isData, isCaughtUp, but(r)), p.count(isVoter, but(r))
	if !dataInEveryQuorum(copies, voters) {
		return false
	}
	more := p.count(isNext, isData)
	anywhere := more > 0 || p.count(isNext) > 0 && (r.role == Witness || copies >= p.data)
	return p.followed(r) || anywhere && voters+p.count(isNext) >= p.data+p.witnesses && p.count(isVoter, isData, but(r))+more >= p.data
}

// keepsOut reports whether a witness could get its vote if r did not count on it:
// r is gone and its last index too low or unknown.
func (p *shardPlan) keepsOut(r *standing) bool {
	return slices.ContainsFunc(p.replicas, func(w *standing) bool {
		return w.role == Witness && w.wanted && w.member && !w.voter && w.filled && p.tooLateFor(w, r)
	})
}

// complete reports whether every slot of the target has a voter that lives and
// has caught up.
func (p *shardPlan) complete() bool {
	return p.count(isVoter, isWanted, isCaughtUp) == len(p.target)
}

func (p *shardPlan) addLearner(*traffic) *ShardStep {
	for _, r := range p.replicas {
		switch {
		case !r.wanted || r.member:
		case !r.alive:
			p.wait("%s has not been opened on %s yet", r.id, r.node)
		default:
			return p.step(AddLearner, r, "%s is open on %s: it joins without a vote and catches up", r.id, r.node)
		}
	}
	return nil
}

// create assigns one more replica to a node. One at a time is on its way into a
// group; but data replicas, which come first in the target, do not wait for a
// witness: it may be one that cannot catch up before they have.
func (p *shardPlan) create(t *traffic) *ShardStep {
	for _, slot := range p.target {
		switch r := p.best(slot); {
		case r != nil && r.voter:
		case r != nil:
			return nil
		case !p.view.Nodes[slot.Node].Alive:
			p.wait("%s is to have a %s replica, but does not answer", slot.Node, slot.Role)
		default:
			if slot.Role == Data {
				if reason := t.fill(p.leaderNode(), slot.Node); reason != "" {
					p.wait("%s is to have a data replica, but %s", slot.Node, reason)
					continue
				}
			}
			return p.step(Create, &standing{node: slot.Node, role: slot.Role}, "the ring wants a %s replica on %s%s", slot.Role, slot.Node, p.because(slot.Node))
		}
	}
	return nil
}

func (p *shardPlan) forget(*traffic) *ShardStep {
	for _, r := range p.replicas {
		if r.mapped && !r.wanted && (!r.member || p.view.faults.forgetEarly) {
			return p.step(Forget, r, "%s is not in the group any more, and %s may delete its files", r.id, r.node)
		}
	}
	return nil
}

// heir is the first live data replica in the ring's order; nil if none votes.
func (p *shardPlan) heir() *standing {
	for _, slot := range p.target {
		if r := p.best(slot); r != nil && slot.Role == Data && r.voter && r.alive {
			return r
		}
	}
	return nil
}

// transfer gives a group that is at rest the leader that the ring prefers.
func (p *shardPlan) transfer(t *traffic) *ShardStep {
	if p.count(isWanted) != p.count(isWanted, isVoter) {
		return nil
	}
	next := p.heir()
	if next == nil || next.id == p.leaderID() {
		return nil
	}
	if !next.caughtUp {
		p.wait("%s is to lead, once it has caught up", next.node)
		return nil
	}
	if t.leaderMoves >= t.limits.LeaderMoves {
		p.wait("%s is to lead, after other shards have got their leaders", next.node)
		return nil
	}
	t.leaderMoves++
	return p.step(Transfer, next, "%s is the first live node in the ring's order for this shard: it is to lead", next.node)
}

// reason says why a replica is not wanted.
func (p *shardPlan) reason(r *standing) string {
	m, known := p.view.Map.Member(r.node)
	switch {
	case !known:
		return r.node + " is no member of the cluster"
	case r.lost:
		return r.node + " has lost it"
	case !r.mapped:
		return "the map does not have it"
	case m.Leaving:
		return r.node + " is leaving"
	case r.gone:
		return r.node + " is down"
	}
	for _, slot := range p.target {
		if slot.Node == r.node && slot.Role != r.role {
			return fmt.Sprintf("the ring wants a %s replica on %s", slot.Role, r.node)
		}
	}
	return "the ring prefers other nodes"
}

// because says why a new replica is needed on the node, in a clause.
func (p *shardPlan) because(node string) string {
	for _, r := range p.replicas {
		if r.voter && !r.wanted && r.node != node {
			return fmt.Sprintf(", because %s (%s)", p.reason(r), r.id)
		}
	}
	return fmt.Sprintf(": the shard has %d of %d replicas", p.count(isVoter, isWanted), len(p.target))
}

// without says what a group is without a replica.
func (p *shardPlan) without(r *standing) string {
	if p.replaced(r) {
		return "the replica that follows it on " + r.node + " has caught up"
	}
	return fmt.Sprintf("the shard has %d data replicas that live and %d voters without it", p.count(isVoter, isData, isCaughtUp, but(r)), p.count(isVoter, but(r)))
}
