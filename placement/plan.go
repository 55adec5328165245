package placement

import (
	"time"

	"github.com/hashicorp/raft"

	"kvd/ring"
)

// The further actions of a shard's step.
const (
	Create   Action = "create"   // in the map: a new replica on Node with Role, its number from the counter
	Forget   Action = "forget"   // in the map: take Replica out, so that its node deletes it
	Transfer Action = "transfer" // leadership to Replica, which is on Node
)

// ShardStep is the next step of one group.
type ShardStep struct {
	Action  Action        `json:"action"`
	Group   uint64        `json:"group"`
	Replica raft.ServerID `json:"replica,omitempty"` // empty for Create, which draws a new one
	Node    string        `json:"node"`
	Role    Role          `json:"role"`
	// Prev is the index of the committed configuration that the step was planned
	// on; never 0. A change of members applies to that one only. Create and
	// Forget apply only if the shard's record is still the one in the view.
	Prev uint64 `json:"prev"`
	// Copies and Voters are what a Remove must leave: data replicas and voters
	// that the shard is to have (Check).
	Copies int `json:"copies,omitempty"`
	Voters int `json:"voters,omitempty"`
	// Why is a sentence for people.
	Why string `json:"why"`
}

// ClusterView is what PlanShards plans from.
type ClusterView struct {
	Map Map
	// Ring is of the members that are neither down nor leaving.
	Ring   *ring.Ring
	Nodes  map[string]NodeView  // by name; a missing one is neither alive nor down
	Groups map[uint64]GroupView // by group
	Limits Limits

	faults faults
}

// NodeView is how group 0's leader sees a node.
type NodeView struct {
	Alive bool // has reported lately, as the incarnation that the map has
	Down  bool // silent for as long as makes it down, all in this leader's term
}

// GroupView is what is known of a group.
type GroupView struct {
	// Leader is the report of the replica that leads and serves, with Leading;
	// of several that say so, the one of the latest term. nil = none is known.
	Leader *GroupReport
	// Reports are the replicas' latest ones, as far as they are fresh and come
	// from the incarnation of the node that the map has.
	Reports map[raft.ServerID]GroupReport
}

// Limits bound what goes on at the same time. Zero values are the defaults.
type Limits struct {
	Incoming    int           // data replicas being filled on one node; 2
	Outgoing    int           // data replicas being filled by the leaders on one node; 4
	LeaderMoves int           // moves of leadership in one plan; 4
	Acked       time.Duration // a replica that has not answered its leader for this long is not alive; 3 s
}

func (l Limits) withDefaults() Limits {
	if l.Incoming == 0 {
		l.Incoming = 2
	}
	if l.Outgoing == 0 {
		l.Outgoing = 4
	}
	if l.LeaderMoves == 0 {
		l.LeaderMoves = 4
	}
	if l.Acked == 0 {
		l.Acked = ackedWithin
	}
	return l
}

// ackedWithin is the default of Limits.Acked, and what Check goes by.
const ackedWithin = 3 * time.Second

// faults break the plan on purpose, for the tests of what checks it.
type faults struct{}

// PlanShards returns the next step of each group that has one, the neediest
// groups first. It is pure and level-triggered: a step may be carried out late,
// never, or twice, and the next call plans from what is then.
func PlanShards(v ClusterView) []ShardStep {
	return nil
}

// Check says why the group's leader must not carry out the step now; nil if it
// may. own is the leader's own report, made just before. It goes by nothing that
// the planner said of other replicas.
func Check(step ShardStep, own GroupReport) error {
	return nil
}
