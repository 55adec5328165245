// Package placement keeps a group's members what the cluster map says they
// should be: it plans one step at a time from what is, and carries it out on
// the group's leader.
//
// The cluster map lives in the system key space of group 0, so that it is
// replicated, and changed by compare-and-swap, like everything else.
package placement

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

// Member is one node in the cluster map.
type Member struct {
	Name string `json:"name"`
	// Incarnation is drawn when a node's data directory is made. A node that
	// lost its directory comes back with another one.
	Incarnation uint64 `json:"incarnation"`
	// Replica is the node's replica of group 0. Its number grows with every
	// incarnation, so that a node that has forgotten its votes and entries
	// never speaks under the id that gave them.
	Replica raft.ServerID `json:"replica"`
	// Weight is the node's share of the shards; 0 counts as 1.
	Weight float64 `json:"weight,omitempty"`
	// Leaving: the node's replicas go elsewhere, and then it leaves.
	Leaving bool `json:"leaving,omitempty"`
}

const memberPrefix = "member/"

func memberKey(name string) string { return memberPrefix + name }

func decodeMember(value []byte) (Member, error) {
	var m Member
	if err := json.Unmarshal(value, &m); err != nil {
		return Member{}, fmt.Errorf("placement: malformed member record: %w", err)
	}
	return m, nil
}

func (m Member) encode() []byte {
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // strings and a number
	}
	return b
}

// next is the member after it lost its data and came back.
func (m Member) next(incarnation uint64) (Member, error) {
	node, number, _ := strings.Cut(string(m.Replica), "/")
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return Member{}, fmt.Errorf("placement: malformed replica id %q", m.Replica)
	}
	m.Incarnation, m.Replica = incarnation, raft.ServerID(fmt.Sprintf("%s/%d", node, n+1))
	return m, nil
}

// Action is what a step does to a group's configuration.
type Action string

// The actions that change a configuration, in the order in which a replacement
// takes them in group 0.
const (
	AddLearner Action = "add learner"
	Remove     Action = "remove"
	Promote    Action = "promote"
)

// Step is one change of group 0.
type Step struct {
	Action  Action
	Replica raft.ServerID
	Why     string // a sentence for people
}

// View is what a plan for group 0 is made from: the map, and what the group's
// leader has measured.
type View struct {
	Members []Member
	Group   []shard.Member
	// Leader is the replica that plans. It is never removed, and leads as long
	// as it is wanted.
	Leader raft.ServerID
	// Match is each replica's log index, measured by the leader in its term.
	Match  map[raft.ServerID]uint64
	Commit uint64
	// MaxVoters bounds the quorum; further nodes stay learners. 0 = 7.
	MaxVoters int
	// Nodes says who lives. nil = nothing is known: nobody is down.
	Nodes map[string]NodeView
	// Holding are nodes that still have replicas of shards.
	Holding map[string]bool
}

// maxVoters is the default of View.MaxVoters.
const maxVoters = 7

// Plan returns the next step that brings group 0 towards the map, and false if
// there is none. It is pure and level-triggered: carried out or not, the next
// call plans from what is then. It promotes only what has been measured.
//
// A replica whose node has lost it can never answer again. It keeps its vote
// until the node's next replica has caught up, and loses it before that one
// gets its own: at no time do the votes of a node that may lose its disk once
// more count twice, and no step needs more living voters than the one before.
//
// The vote of a node that is down, or leaves, goes to one that has none, where
// there is one: it gets the vote before the other one loses it. A node that
// leaves stays in the group, and so has the map, until it holds nothing else.
func Plan(v View) (Step, bool) {
	p := newMapPlan(v)
	for _, find := range []func() (Step, bool){p.removeDown, p.promote, p.removeLost, p.removeLeaving, p.add} {
		if step, ok := find(); ok {
			return step, true
		}
	}
	return Step{}, false
}

// mapPlan finds the next step of group 0, which has the map.
type mapPlan struct {
	View
	group   []shard.Member // by id
	members map[string]Member
	voters  int
	stay    int             // voters that are not leaving
	keep    int             // and not down
	lost    map[string]bool // nodes whose former replica votes
}

func newMapPlan(v View) *mapPlan {
	if v.MaxVoters == 0 {
		v.MaxVoters = maxVoters
	}
	p := &mapPlan{View: v, group: sorted(v.Group), members: make(map[string]Member), lost: make(map[string]bool)}
	for _, m := range v.Members {
		p.members[m.Name] = m
	}
	for _, g := range p.group {
		if !g.Voter {
			continue
		}
		p.voters++
		p.lost[g.Node] = p.lost[g.Node] || !p.current(g)
		if !p.members[g.Node].Leaving {
			p.stay++
			if !v.Nodes[g.Node].Down {
				p.keep++
			}
		}
	}
	return p
}

// current reports whether the map names the replica as its node's.
func (p *mapPlan) current(g shard.Member) bool { return p.members[g.Node].Replica == g.ID }

func (p *mapPlan) caughtUp(id raft.ServerID) bool {
	return id == p.Leader || near(p.Match[id], p.Commit)
}

// ready reports whether the replica counts for a quorum: it lives and has
// caught up.
func (p *mapPlan) ready(g shard.Member) bool {
	return p.caughtUp(g.ID) && (p.Nodes == nil || p.Nodes[g.Node].Alive || g.ID == p.Leader)
}

// safeWithout reports whether a majority of the other voters is ready.
func (p *mapPlan) safeWithout(x shard.Member) bool {
	ready := 0
	for _, g := range p.group {
		if g.Voter && g.ID != x.ID && p.ready(g) {
			ready++
		}
	}
	return x.ID != p.Leader && 2*ready > p.voters-1
}

// mayVote reports whether a learner is one that a vote could go to.
func (p *mapPlan) mayVote(g shard.Member) bool {
	return !g.Voter && p.current(g) && !p.lost[g.Node] && !p.members[g.Node].Leaving && !p.Nodes[g.Node].Down
}

// room reports whether one more may vote. Nodes that are down, one at a time, and
// those that leave keep their votes until others have them.
func (p *mapPlan) room() bool { return p.keep < p.MaxVoters && p.stay <= p.MaxVoters }

// promote finishes a replacement before another one begins.
func (p *mapPlan) promote() (Step, bool) {
	if !p.room() {
		return Step{}, false
	}
	for _, g := range p.group {
		if p.mayVote(g) && p.ready(g) {
			return Step{Promote, g.ID, fmt.Sprintf("%s has caught up with the leader: it gets a vote", g.ID)}, true
		}
	}
	return Step{}, false
}

func (p *mapPlan) removeLost() (Step, bool) {
	for _, g := range p.group {
		m, known := p.members[g.Node]
		switch {
		case p.current(g), g.ID == p.Leader, !known && g.Voter:
			continue // nodes leave by an explicit removal only
		case !known: // it was on its way in when its node was removed
			return Step{Remove, g.ID, fmt.Sprintf("%s is no member of the cluster", g.Node)}, true
		}
		i := slices.IndexFunc(p.group, func(next shard.Member) bool { return next.ID == m.Replica })
		if !g.Voter || i >= 0 && (p.group[i].Voter || p.caughtUp(m.Replica)) {
			return Step{Remove, g.ID, fmt.Sprintf("%s has lost it and has %s now", g.Node, m.Replica)}, true
		}
	}
	return Step{}, false
}

// removeDown takes the vote of a node that is down, once another one has one
// more. The node is added again without a vote.
func (p *mapPlan) removeDown() (Step, bool) {
	for _, g := range p.group {
		if g.Voter && p.stay > p.MaxVoters && p.Nodes[g.Node].Down && p.safeWithout(g) {
			return Step{Remove, g.ID, fmt.Sprintf("%s is down and another node has its vote", g.Node)}, true
		}
	}
	return Step{}, false
}

func (p *mapPlan) removeLeaving() (Step, bool) {
	for _, g := range p.group {
		if !p.members[g.Node].Leaving || p.Holding[g.Node] {
			continue
		}
		switch {
		case g.ID == p.Leader:
			if heir := slices.IndexFunc(p.group, p.mayLead); heir >= 0 {
				return Step{Transfer, p.group[heir].ID, fmt.Sprintf("%s leads and is leaving: %s leads instead", g.Node, p.group[heir].Node)}, true
			}
		case !g.Voter, p.safeWithout(g) && !p.successor():
			return Step{Remove, g.ID, fmt.Sprintf("%s is leaving and holds nothing else", g.Node)}, true
		}
	}
	return Step{}, false
}

func (p *mapPlan) mayLead(g shard.Member) bool {
	return g.Voter && g.ID != p.Leader && p.current(g) && p.ready(g) && !p.members[g.Node].Leaving
}

// successor reports whether a learner is on its way to a vote that is free or
// becomes free.
func (p *mapPlan) successor() bool {
	return p.room() && slices.ContainsFunc(p.group, p.mayVote)
}

func (p *mapPlan) add() (Step, bool) {
	for _, m := range p.Members {
		in := slices.ContainsFunc(p.group, func(g shard.Member) bool { return g.ID == m.Replica })
		if !in && !(m.Leaving && !p.Holding[m.Name]) {
			return Step{AddLearner, m.Replica, fmt.Sprintf("%s is a member: it gets the map and catches up", m.Name)}, true
		}
	}
	return Step{}, false
}

func sorted(group []shard.Member) []shard.Member {
	return slices.SortedFunc(slices.Values(group), func(a, b shard.Member) int { return cmp.Compare(a.ID, b.ID) })
}
