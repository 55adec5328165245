package placement

import (
	"cmp"
	"fmt"
	"slices"
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

// ShardStep is the next step of one group. All but Create are to pass Check on
// the group's leader just before they are carried out, Forget too: it is the
// only one that no configuration index can stop.
type ShardStep struct {
	Action  Action        `json:"action"`
	Group   uint64        `json:"group"`
	Replica raft.ServerID `json:"replica,omitempty"` // empty for Create, which draws a new one
	Node    string        `json:"node"`
	Role    Role          `json:"role"`
	// Prev is the index of the committed configuration that the step was planned
	// on; never 0. The step applies to that one only, and a Create or Forget only
	// to the shard's record that was in the view.
	Prev uint64 `json:"prev"`
	// Copies and Voters are how many data replicas and voters the shard is to
	// have: Check lets no removal go below them.
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
	// Lost are replicas that their nodes have said they cannot open any more.
	Lost map[raft.ServerID]bool
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

// faults break the planner on purpose, for the tests of what must notice.
type faults struct {
	removeEarly       bool // a dead voter goes before its replacement has a vote
	promoteUnmeasured bool // a learner is caught up because it is there
	ignoreIncarnation bool // a replica outlives its node's directory
	ignoreQuorum      bool // members change whoever lives
	lowerCopies       bool // a live copy goes though too few are left
	keepSecondVote    bool // a node's witness stays beside its data replica
	anyWitness        bool // a witness gets its vote whatever it and the data replicas lack
	forgetEarly       bool // a replica is forgotten while it is in the group
}

// PlanShards returns the next step of each group that has one, the neediest
// groups first. It is pure and level-triggered: a step may be carried out late,
// never, or twice, and the next call plans from what is then.
func PlanShards(v ClusterView) []ShardStep {
	var steps []ShardStep
	for _, e := range ExplainShards(v) {
		if e.Step != nil {
			steps = append(steps, *e.Step)
		}
	}
	return steps
}

// Explained is what is planned for one group, and why nothing else is.
type Explained struct {
	Group  uint64
	Target []TargetReplica
	Step   *ShardStep // nil = none
	Waits  []string   // sentences: what cannot be done yet, and what would have to happen
}

// ExplainShards is PlanShards for people: it has every group of the map, in the
// order in which they were planned.
func ExplainShards(v ClusterView) []Explained {
	if v.Map.Config == nil || v.Ring == nil {
		return nil
	}
	v.Limits = v.Limits.withDefaults()
	plans := make([]*shardPlan, len(v.Map.Shards))
	for i, s := range v.Map.Shards {
		plans[i] = newShardPlan(&v, s)
	}
	slices.SortStableFunc(plans, func(a, b *shardPlan) int { return cmp.Compare(a.spare(), b.spare()) })
	under := newTraffic(v.Limits)
	for _, p := range plans {
		under.add(p)
	}
	explained := make([]Explained, len(plans))
	for i, p := range plans {
		step := p.next(under)
		explained[i] = Explained{Group: p.shard.Group(), Target: p.target, Step: step, Waits: p.waits}
	}
	return explained
}

// traffic counts what goes on at the same time.
type traffic struct {
	limits             Limits
	incoming, outgoing map[string]int
	leaderMoves        int
}

func newTraffic(limits Limits) *traffic {
	return &traffic{limits: limits, incoming: make(map[string]int), outgoing: make(map[string]int)}
}

// add counts the data replicas of the group that are being filled, or will be.
func (t *traffic) add(p *shardPlan) {
	for _, r := range p.replicas {
		if p.led() && r.wanted && r.role == Data && !r.voter && !r.caughtUp {
			t.incoming[r.node]++
			t.outgoing[p.leaderNode()]++
		}
	}
}

// fill takes the room for one more data replica; the reason if there is none.
func (t *traffic) fill(from, to string) (reason string) {
	switch {
	case t.incoming[to] >= t.limits.Incoming:
		return fmt.Sprintf("%s receives as many as it may at a time already (%d)", to, t.incoming[to])
	case t.outgoing[from] >= t.limits.Outgoing:
		return fmt.Sprintf("%s, which leads, fills as many as it may at a time already (%d)", from, t.outgoing[from])
	}
	t.incoming[to]++
	t.outgoing[from]++
	return ""
}
