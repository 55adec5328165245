package placement

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"kvd/ring"
	"kvd/shard"
)

// The states of nodes, shards and replicas in an Overview.
const (
	nodeAlive   = "alive"
	nodeSuspect = "suspect"
	nodeDown    = "down"
	nodeLeaving = "leaving"

	shardOK       = "ok"
	shardMoving   = "moving"
	shardDegraded = "degraded"
	shardNoLeader = "no leader"
	shardNoQuorum = "no quorum"

	replicaCreating = "creating" // in the map, not in the group yet
	replicaLearner  = "learner"
	replicaVoter    = "voter"
	replicaRemoving = "removing" // not wanted here any more
	replicaLost     = "lost"     // its node has lost it
	replicaUnknown  = "unknown"  // no leader says
)

// explainer makes an Overview of one view.
type explainer struct {
	view   ClusterView
	home   *ring.Ring // with the nodes that are down
	now    time.Time
	seen   *observations
	failed map[uint64]error // the last step of the group
}

func (r *Reconciler) overview(m *Map, now time.Time) (Overview, error) {
	e := &explainer{now: now, seen: &r.seen, failed: make(map[uint64]error), view: ClusterView{Map: *m}}
	if m.Config != nil {
		var err error
		if e.view, err = r.view(m, now); err != nil {
			return Overview{}, err
		}
		if e.home, err = newRing(*m.Config, slices.DeleteFunc(slices.Clone(m.Members), func(m Member) bool { return m.Leaving })); err != nil {
			return Overview{}, err
		}
	}
	r.mu.Lock()
	for group, p := range r.groups {
		e.failed[group] = p.failed
	}
	r.mu.Unlock()
	o := Overview{Config: m.Config}
	explained := make(map[uint64]Explained)
	for _, x := range ExplainShards(e.view) {
		explained[x.Group] = x
	}
	for _, s := range m.Shards {
		o.Shards = append(o.Shards, e.shard(s, explained[s.Group()]))
	}
	for _, member := range m.Members {
		o.Nodes = append(o.Nodes, e.node(member, o.Shards))
	}
	return o, nil
}

func (e *explainer) node(m Member, shards []ShardOverview) NodeOverview {
	n := NodeOverview{Name: m.Name, State: e.seen.state(m, e.now), Weight: weightOf(m.Weight)}
	if report, ok := e.seen.latest(m); ok {
		n.DiskFree = report.DiskFree
	}
	var left []string
	for _, s := range shards {
		if s.Leader == m.Name {
			n.Leaders++
		}
		has, data := false, false
		for _, r := range s.Replicas {
			has = has || r.Node == m.Name
			data = data || r.Node == m.Name && r.Role == Data
		}
		if data {
			n.Shards++
		}
		if has {
			left = append(left, fmt.Sprint(s.Number))
		}
	}
	switch {
	case !m.Leaving:
	case len(left) > 0:
		n.Waits = fmt.Sprintf("%s still has replicas of %s: %s", m.Name, counted(len(left), "shard"), some(left))
	default:
		n.Waits = fmt.Sprintf("%s has no shards any more: its place in group 0 is being taken away", m.Name)
	}
	return n
}

func counted(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprint(n, " ", noun)
}

// some names the first few of a list.
func some(names []string) string {
	const most = 8
	if len(names) > most {
		return strings.Join(names[:most], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}

func (e *explainer) shard(s Shard, x Explained) ShardOverview {
	o := ShardOverview{Number: s.Number, Target: x.Target}
	g := e.view.Groups[s.Group()]
	if g.Leader != nil {
		o.Leader = shard.NodeOf(g.Leader.Replica)
	}
	for _, r := range s.Replicas {
		o.Replicas = append(o.Replicas, e.replica(r, g, x.Target))
	}
	if g.Leader != nil {
		for _, m := range g.Leader.Leading.Members {
			if !slices.ContainsFunc(s.Replicas, func(r Replica) bool { return r.ID == m.ID }) {
				o.Replicas = append(o.Replicas, e.replica(Replica{ID: m.ID}, g, nil))
			}
		}
	}
	votes, alive, copies := 0, 0, 0
	for _, r := range o.Replicas {
		if r.votes(g.Leader) {
			votes++
			if r.Alive {
				alive++
				if r.Role == Data {
					copies++
				}
			}
		}
	}
	o.Tolerates = max(0, min(alive-(votes/2+1), copies-1))
	data, witnesses := Slots(*e.view.Map.Config, staying(e.view.Map.Members))
	switch {
	case g.Leader == nil && alive <= votes/2:
		o.State = shardNoQuorum
	case g.Leader == nil:
		o.State = shardNoLeader
	case copies < data || alive < data+witnesses:
		o.State = shardDegraded
	case x.Step != nil || slices.ContainsFunc(o.Replicas, func(r ReplicaOverview) bool { return r.State != replicaVoter }):
		o.State = shardMoving
	default:
		o.State = shardOK
	}
	o.Why = e.why(s, x, o, votes, alive)
	return o
}

// votes reports whether the replica has a vote; without a leader that says so,
// whether it may have one.
func (r ReplicaOverview) votes(leader *GroupReport) bool {
	if leader == nil {
		return r.State == replicaUnknown || r.State == replicaLost
	}
	return slices.ContainsFunc(leader.Leading.Members, func(m shard.Member) bool { return m.ID == r.ID && m.Voter })
}

func (e *explainer) replica(r Replica, g GroupView, target []TargetReplica) ReplicaOverview {
	o := ReplicaOverview{ID: r.ID, Node: r.Node(), Role: r.Role()}
	report, reported := g.Reports[r.ID]
	o.Alive, o.Match = reported, report.Last
	wanted := slices.Contains(target, TargetReplica{Node: o.Node, Role: o.Role})
	member, known := e.view.Map.Member(o.Node)
	if g.Leader == nil {
		o.State, o.Commit = replicaUnknown, report.Commit
	} else {
		o.Commit = g.Leader.Commit
		if follows, ok := g.Leader.Leading.Followers[r.ID]; ok {
			o.Match = follows.Match
			o.Alive = e.view.Nodes[o.Node].Alive && follows.Acked >= 0 && follows.Acked <= ackedWithin
		}
		// Where nothing can replace a dead replica, it stays a voter.
		o.State = memberState(r.ID, g.Leader.Leading.Members, wanted || !o.Alive)
	}
	if r.Incarnation != 0 && (!known || member.Incarnation != r.Incarnation) || r.Incarnation == 0 && target != nil {
		o.State, o.Alive = replicaLost, false
	}
	return o
}

func memberState(id raft.ServerID, members []shard.Member, stays bool) string {
	i := slices.IndexFunc(members, func(m shard.Member) bool { return m.ID == id })
	switch {
	case i < 0 && stays:
		return replicaCreating
	case !stays:
		return replicaRemoving
	case members[i].Voter:
		return replicaVoter
	}
	return replicaLearner
}

// why explains a shard in sentences: where it is and why, what is done about it,
// what that waits for.
func (e *explainer) why(s Shard, x Explained, o ShardOverview, votes, alive int) []string {
	var why []string
	say := func(format string, args ...any) { why = append(why, fmt.Sprintf(format, args...)) }
	switch o.State {
	case shardNoQuorum:
		say("%d of %d replicas answer, too few for a majority: the shard neither reads nor writes until more of their nodes run and reach each other: %s", alive, votes, names(o.Replicas, false))
	case shardNoLeader:
		say("%d of %d replicas answer, and none of them is known to lead: they are electing one, or just have", alive, votes)
	}
	say("the ring's order for shard %d among the nodes that live is %s", s.Number, targets(x.Target))
	for _, t := range Target(*e.view.Map.Config, s.Number, e.home, staying(e.view.Map.Members)) {
		if m, ok := e.view.Map.Member(t.Node); ok && e.view.Nodes[t.Node].Down {
			say("%s is to have a %s replica, but is down, silent for %v: another node stands in for it, where there is one, until it is back", t.Node, t.Role, e.seen.silence(m, e.now).Round(time.Second))
		}
	}
	if x.Step != nil {
		say("next step: %s: %s", x.Step.Action, x.Step.Why)
	}
	why = append(why, x.Waits...)
	if err := e.failed[s.Group()]; err != nil {
		say("the last step did not succeed, and is planned anew: %v", err)
	}
	return why
}

// names lists the nodes of the replicas that are alive, or of those that are not.
func names(replicas []ReplicaOverview, alive bool) string {
	var nodes []string
	for _, r := range replicas {
		if r.Alive == alive {
			nodes = append(nodes, r.Node)
		}
	}
	return some(nodes)
}

func targets(target []TargetReplica) string {
	var list []string
	for _, t := range target {
		name := t.Node
		if t.Role == Witness {
			name += " (witness)"
		}
		list = append(list, name)
	}
	if len(list) == 0 {
		return "empty"
	}
	return strings.Join(list, ", ")
}
