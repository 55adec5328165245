package placement

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

// observations are what this node has seen of the others as group 0's leader in
// one term. A new leader begins with none: silence counts from when it began to
// listen. All methods are safe for concurrent use; now never goes back.
type observations struct {
	suspectAfter, downAfter time.Duration

	mu     sync.Mutex
	term   uint64
	looked time.Time // when the loop last looked; zero = not in this term
	nodes  map[life]*observed
	// durable is the highest index that each data replica was ever said to have
	// in its state file, also if its node is gone.
	durable map[ReplicaRef]uint64
}

// life is one incarnation of a node. Two may speak at the same time: one that
// was replaced and does not know it, and its successor.
type life struct {
	node        string
	incarnation uint64
}

type observed struct {
	since  time.Time // when this node began to listen
	heard  time.Time // the latest report; zero = none
	report Report    // the latest whole one, without its groups
	groups map[ReplicaRef]observedGroup
}

type observedGroup struct {
	GroupReport
	heard   time.Time
	changed time.Time // when it last differed from the one before
}

// begin forgets what was seen in another term.
func (o *observations) begin(term uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.term != term {
		o.term, o.looked = term, time.Time{}
		o.nodes, o.durable = make(map[life]*observed), make(map[ReplicaRef]uint64)
	}
}

// accept keeps a report, or the part of one that a probe has brought, and tells
// whether another plan may follow from it: a group that is at rest only comes
// further.
func (o *observations) accept(report Report, whole bool, now time.Time) (news bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.listen(life{report.Node, report.Incarnation}, now)
	news = n.heard.IsZero() || now.Sub(n.heard) >= o.suspectAfter
	n.heard = now
	before := n.groups
	if whole {
		news = news || len(report.Groups) != len(before) || len(report.Lost) > 0 || report.Weight != n.report.Weight
		n.groups = make(map[ReplicaRef]observedGroup, len(report.Groups))
		n.report = report
		n.report.Groups = nil
	}
	for _, g := range report.Groups {
		if shard.NodeOf(g.Replica) != report.Node {
			continue // nobody speaks for others
		}
		ref := ReplicaRef{g.Group, g.Replica}
		changed := now
		old, ok := before[ref]
		if ok && old.progress() == g.progress() {
			changed = old.changed
		}
		news = news || !ok || old.shape() != g.shape()
		n.groups[ref] = observedGroup{g, now, changed}
		o.durable[ref] = max(o.durable[ref], g.Durable)
	}
	return news
}

// shape is what differs when the group has changed.
func (g GroupReport) shape() [4]uint64 {
	s := [4]uint64{g.Term, g.ConfigurationIndex}
	if g.Leading != nil {
		s[2] = 1 + uint64(len(g.Leading.Members))
		if g.Leading.Committed {
			s[3] = 1
		}
	}
	return s
}

// progress is what differs when a replica has come further.
func (g GroupReport) progress() [6]uint64 {
	p := [6]uint64{g.Term, g.Applied, g.Last, g.ConfigurationIndex}
	if g.Leading != nil {
		for _, f := range g.Leading.Followers {
			p[4] += f.Match
		}
		p[5] = 1 + uint64(len(g.Leading.Members))
	}
	return p
}

func (o *observations) listen(l life, now time.Time) *observed {
	n := o.nodes[l]
	if n == nil {
		n = &observed{since: now, groups: make(map[ReplicaRef]observedGroup)}
		o.nodes[l] = n
	}
	return n
}

// look begins to listen for the members, and forgets who is none any more. It
// must be called several times within suspectAfter: after a longer pause it was
// this process that stood still, and what it did not hear then proves nothing.
func (o *observations) look(members []Member, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	stood := !o.looked.IsZero() && now.Sub(o.looked) > o.suspectAfter
	o.looked = now
	current := make(map[life]bool, len(members))
	for _, m := range members {
		current[life{m.Name, m.Incarnation}] = true
		o.listen(life{m.Name, m.Incarnation}, now)
	}
	maps.DeleteFunc(o.nodes, func(l life, n *observed) bool {
		return !current[l] && now.Sub(maxTime(n.heard, n.since)) > o.downAfter
	})
	if stood {
		for _, n := range o.nodes {
			n.since = now
		}
	}
}

// prune forgets what is known of replicas that the map does not have any more,
// when they have become many.
func (o *observations) prune(shards []Shard) {
	o.mu.Lock()
	defer o.mu.Unlock()
	count := 0
	for _, s := range shards {
		count += len(s.Replicas)
	}
	if len(o.durable) < 2*count+leastPruned {
		return
	}
	current := make(map[ReplicaRef]uint64)
	for _, s := range shards {
		for _, r := range s.Replicas {
			ref := ReplicaRef{s.Group(), r.ID}
			if index, ok := o.durable[ref]; ok {
				current[ref] = index
			}
		}
	}
	o.durable = current
}

const leastPruned = 1000

// node judges a member.
func (o *observations) node(m Member, now time.Time) NodeView {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.judge(m, now)
}

func (o *observations) judge(m Member, now time.Time) NodeView {
	n := o.nodes[life{m.Name, m.Incarnation}]
	if n == nil {
		return NodeView{}
	}
	return NodeView{
		Alive: !n.heard.IsZero() && now.Sub(n.heard) < o.suspectAfter,
		Down:  now.Sub(maxTime(n.heard, n.since)) >= o.downAfter,
	}
}

// views judges all members.
func (o *observations) views(members []Member, now time.Time) map[string]NodeView {
	o.mu.Lock()
	defer o.mu.Unlock()
	views := make(map[string]NodeView, len(members))
	for _, m := range members {
		views[m.Name] = o.judge(m, now)
	}
	return views
}

// silence is for how long a member has said nothing, as far as this node has
// listened to it.
func (o *observations) silence(m Member, now time.Time) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.nodes[life{m.Name, m.Incarnation}]
	if n == nil {
		return 0
	}
	return now.Sub(maxTime(n.heard, n.since))
}

// state is the word for what is known of a member.
func (o *observations) state(m Member, now time.Time) string {
	switch node := o.node(m, now); {
	case m.Leaving:
		return nodeLeaving
	case node.Down:
		return nodeDown
	case o.silence(m, now) >= o.suspectAfter:
		return nodeSuspect
	}
	return nodeAlive
}

// states counts the members in each state.
func (o *observations) states(members []Member, now time.Time) map[string]int {
	states := map[string]int{nodeAlive: 0, nodeSuspect: 0, nodeDown: 0, nodeLeaving: 0}
	for _, m := range members {
		states[o.state(m, now)]++
	}
	return states
}

// latest is a member's latest whole report, without its groups; false if there
// is none.
func (o *observations) latest(m Member) (Report, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.nodes[life{m.Name, m.Incarnation}]
	if n == nil || n.report.Node == "" {
		return Report{}, false
	}
	return n.report, true
}

// groups is what the members that are alive say of each group.
func (o *observations) groups(members []Member, now time.Time) map[uint64]GroupView {
	o.mu.Lock()
	defer o.mu.Unlock()
	views := make(map[uint64]GroupView)
	for _, m := range members {
		n := o.nodes[life{m.Name, m.Incarnation}]
		if n == nil || !o.judge(m, now).Alive {
			continue
		}
		for ref, g := range n.groups {
			if age := now.Sub(g.heard); age < o.suspectAfter {
				v := views[ref.Group]
				v.add(g.aged(age))
				views[ref.Group] = v
			}
		}
		for _, ref := range n.report.Lost {
			v := views[ref.Group]
			v.lose(ref.ID)
			views[ref.Group] = v
		}
	}
	return views
}

// add takes one more replica's report into the view of its group.
func (v *GroupView) add(g GroupReport) {
	if v.Reports == nil {
		v.Reports = make(map[raft.ServerID]GroupReport)
	}
	v.Reports[g.Replica] = g
	if g.Leading != nil && (v.Leader == nil || v.Leader.Term < g.Term) {
		v.Leader = &g
	}
}

// lose notes a replica that its node cannot open any more.
func (v *GroupView) lose(id raft.ServerID) {
	if v.Lost == nil {
		v.Lost = make(map[raft.ServerID]bool)
	}
	v.Lost[id] = true
}

// aged is the report as it has to be read some time after it was made.
func (o observedGroup) aged(age time.Duration) GroupReport {
	g := o.GroupReport
	if g.Leading == nil {
		return g
	}
	leading := *g.Leading
	leading.Followers = maps.Clone(leading.Followers)
	for id, f := range leading.Followers {
		if f.Acked >= 0 {
			f.Acked += age
			leading.Followers[id] = f
		}
	}
	g.Leading = &leading
	return g
}

// lastChange is when anything was last heard of the group that was new.
func (o *observations) lastChange(group uint64, replicas []Replica) time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	var last time.Time
	for _, r := range replicas {
		if n := o.nodes[life{r.Node(), r.Incarnation}]; n != nil {
			last = maxTime(last, n.groups[ReplicaRef{group, r.ID}].changed)
		}
	}
	return last
}

// floor is up to where a witness of the shard may forget its log: the least
// index that the shard's data replicas are known to have in their state files;
// false while one is unknown. Those in the map include all members of the group,
// dead ones too, and the one that is about to become a member.
func (o *observations) floor(s Shard) (uint64, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var durable []uint64
	for _, r := range s.Replicas {
		if r.Role() != Data {
			continue
		}
		index, known := o.durable[ReplicaRef{s.Group(), r.ID}]
		if !known {
			return 0, false
		}
		durable = append(durable, index)
	}
	if len(durable) == 0 {
		return 0, false
	}
	return slices.Min(durable), true
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
