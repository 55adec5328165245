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

// The actions, in the order in which a replacement takes them.
const (
	AddLearner Action = "add learner"
	Remove     Action = "remove"
	Promote    Action = "promote"
)

// Step is one change of one group's configuration.
type Step struct {
	Action  Action
	Replica raft.ServerID
}

// View is what a plan is made from: the map, and what the group's leader has
// measured.
type View struct {
	Members []Member
	Group   []shard.Member
	// Match is each replica's log index, measured by the leader in its term.
	Match  map[raft.ServerID]uint64
	Commit uint64
}

const (
	// maxVoters bounds a group's quorum; further nodes stay learners.
	maxVoters = 7
	// maxLag is how many entries behind the commit index a learner may be and
	// still count as caught up.
	maxLag = 64
)

// Plan returns the next step that brings the group towards the map, and false
// if there is none. It is pure and level-triggered: carried out or not, the
// next call plans from what is then. It promotes only what has been measured.
//
// A replica whose node has lost it can never answer again. It keeps its vote
// until the node's next replica has caught up, and loses it before that one
// gets its own: at no time do the votes of a node that may lose its disk once
// more count twice, and no step needs more living voters than the one before.
func Plan(v View) (Step, bool) {
	current := make(map[string]raft.ServerID, len(v.Members))
	for _, m := range v.Members {
		current[m.Name] = m.Replica
	}
	group := make(map[raft.ServerID]shard.Member, len(v.Group))
	voters := 0
	lost := make(map[string]bool) // nodes whose former replica votes
	for _, g := range v.Group {
		group[g.ID] = g
		if g.Voter {
			voters++
			lost[g.Node] = lost[g.Node] || current[g.Node] != g.ID
		}
	}
	// Finish a replacement before beginning another.
	for _, g := range sorted(v.Group) {
		if !g.Voter && current[g.Node] == g.ID && !lost[g.Node] && voters < maxVoters && caughtUp(v, g.ID) {
			return Step{Promote, g.ID}, true
		}
	}
	for _, g := range sorted(v.Group) {
		id, known := current[g.Node]
		if !known || id == g.ID {
			continue // nodes leave by an explicit removal only
		}
		if next, in := group[id]; !g.Voter || in && (next.Voter || caughtUp(v, id)) {
			return Step{Remove, g.ID}, true
		}
	}
	for _, m := range v.Members {
		if _, in := group[m.Replica]; !in {
			return Step{AddLearner, m.Replica}, true
		}
	}
	return Step{}, false
}

func caughtUp(v View, id raft.ServerID) bool {
	match := v.Match[id]
	return match > 0 && match+maxLag >= v.Commit
}

func sorted(group []shard.Member) []shard.Member {
	return slices.SortedFunc(slices.Values(group), func(a, b shard.Member) int { return cmp.Compare(a.ID, b.ID) })
}
