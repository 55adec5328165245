package placement

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/raft"

	"kvd/ring"
	"kvd/shard"
)

// The world is a cluster with the few rules of raft that matter to placement:
// logs, terms, elections, commits, snapshots, and configurations that count from
// when they are appended. It knows nothing of the planner; what it must never
// see is in oracle_test.go. Time is in seconds.

// chooser draws everything that is random.
type chooser interface {
	pick(n int, label string) int // 0..n-1
}

type world struct {
	chooser
	config  ClusterConfig
	clock   int
	nodes   map[string]*machine
	members map[string]Member // the map
	shards  []Shard           // the map
	groups  []*group
	counter int
	pending []*pendingStep
	rings   map[string]*ring.Ring
	faults  faults
	checked bool // steps pass Check

	// What group 0's present leader has observed.
	since   int
	heard   map[string]int
	reports map[GroupAndID]observation

	history []string
}

// GroupAndID names a replica.
type GroupAndID struct {
	group uint64
	id    raft.ServerID
}

type observation struct {
	report GroupReport
	at     int
}

// machine is a node.
type machine struct {
	name        string
	incarnation uint64
	up          bool
	upSince     int
	downSince   int
	muted       bool // its reports do not arrive
	isolated    bool // its raft messages do not arrive
}

// entry is one of a log; two entries are the same if they are the same pointer.
type entry struct {
	term   uint64
	config []shard.Member // nil = a command
}

// replica is one node's part of a group: its files.
type replica struct {
	id          raft.ServerID
	node        string
	incarnation uint64
	log         []*entry // from index 1 on
	first       uint64   // of the log; what is before is in the state, or of a witness nowhere
	term        uint64
	commit      uint64
	lost        bool // its files are gone
	lostAt      int
}

func (r *replica) last() uint64 { return uint64(len(r.log)) }

func (r *replica) lastTerm() uint64 {
	if len(r.log) == 0 {
		return 0
	}
	return r.log[len(r.log)-1].term
}

// configuration is the latest one in the log, and its index.
func (r *replica) configuration() ([]shard.Member, uint64) {
	for i := len(r.log); i > 0; i-- {
		if c := r.log[i-1].config; c != nil {
			return c, uint64(i)
		}
	}
	return nil, 0
}

type group struct {
	number    uint64
	replicas  map[raft.ServerID]*replica // lost ones too
	leader    *replica                   // nil = none
	term      uint64
	began     uint64 // index of the leader's first entry
	match     map[raft.ServerID]uint64
	acked     map[raft.ServerID]int
	committed []*entry
	removed   map[raft.ServerID]bool // were members once and are not
}

// committedConfiguration is the latest one that is committed.
func (g *group) committedConfiguration() []shard.Member {
	for _, e := range slices.Backward(g.committed) {
		if e.config != nil {
			return e.config
		}
	}
	return nil
}

type pendingStep struct {
	step   ShardStep
	record Shard // in the view
	total  int   // members that were staying
}

func newWorld(c chooser, faults faults, checked bool) *world {
	w := &world{
		chooser: c, nodes: make(map[string]*machine), members: make(map[string]Member),
		rings: make(map[string]*ring.Ring), faults: faults, checked: checked,
		heard: make(map[string]int), reports: make(map[GroupAndID]observation),
	}
	w.config = ClusterConfig{
		Strategy: "consistent", Shards: 1 + c.pick(3, "shards"), ReplicationFactor: 1 + c.pick(4, "rf"),
		Witnesses: []string{WitnessesAuto, WitnessesAuto, WitnessesNone}[c.pick(3, "witnesses")],
	}
	nodes := 1 + c.pick(8, "nodes")
	for range nodes {
		w.join()
	}
	r := w.ring(slices.Sorted(maps.Keys(w.members)))
	for i := range w.config.Shards {
		w.found(i, Target(w.config, i, r, nodes))
	}
	return w
}

func (w *world) logf(format string, args ...any) {
	w.history = append(w.history, fmt.Sprintf("%4d ", w.clock)+fmt.Sprintf(format, args...))
}

func (w *world) ring(names []string) *ring.Ring {
	key := strings.Join(names, " ")
	if w.rings[key] == nil {
		var nodes []ring.Node
		for _, n := range names {
			nodes = append(nodes, ring.Node{Name: n, Weight: 1})
		}
		r, err := ring.New(ring.Config{Shards: w.config.Shards, Replicas: w.config.ReplicationFactor, VirtualNodes: 8}, nodes...)
		if err != nil {
			panic(err)
		}
		w.rings[key] = r
	}
	return w.rings[key]
}

func (w *world) join() {
	name := fmt.Sprintf("n%d", len(w.nodes)+1)
	w.nodes[name] = &machine{name: name, incarnation: 1, up: true, upSince: -excuse - 1}
	w.members[name] = Member{Name: name, Incarnation: 1, Replica: raft.ServerID(name + "/1")}
	w.logf("%s joins", name)
}

func (w *world) found(number int, target []TargetReplica) {
	s := Shard{Number: number}
	g := &group{number: GroupOf(number), replicas: make(map[raft.ServerID]*replica), removed: make(map[raft.ServerID]bool)}
	first := &entry{term: 1}
	for _, t := range target {
		w.counter++
		id := replicaName(t.Node, w.counter, t.Role)
		s.Founders = append(s.Founders, id)
		s.Replicas = append(s.Replicas, Replica{ID: id, Incarnation: 1})
		first.config = append(first.config, shard.Member{ID: id, Node: t.Node, Voter: true})
	}
	g.committed = []*entry{first}
	for _, r := range s.Replicas {
		g.replicas[r.ID] = &replica{id: r.ID, node: r.Node(), incarnation: 1, log: []*entry{first}, first: 1, term: 1, commit: 1}
	}
	w.shards = append(w.shards, s)
	w.groups = append(w.groups, g)
	w.logf("shard %d is founded by %v", number, s.Founders)
}

func replicaName(node string, number int, role Role) raft.ServerID {
	suffix := map[Role]string{Data: "", Witness: "w"}[role]
	return raft.ServerID(fmt.Sprintf("%s/%d%s", node, number, suffix))
}

// runs reports whether the replica's files are there and its node is up.
func (w *world) runs(r *replica) bool {
	n := w.nodes[r.node]
	return r != nil && !r.lost && n.up && n.incarnation == r.incarnation
}

// reachable reports whether raft messages reach it.
func (w *world) reachable(r *replica) bool { return w.runs(r) && !w.nodes[r.node].isolated }

func sortedReplicas(g *group) []*replica {
	return slices.SortedFunc(maps.Values(g.replicas), func(a, b *replica) int { return cmp.Compare(a.id, b.id) })
}

// elect lets one of those that can win an election win it.
func (w *world) elect(g *group) {
	var winners []*replica
	for _, c := range sortedReplicas(g) {
		config, _ := c.configuration()
		if !w.reachable(c) || !slices.ContainsFunc(config, func(m shard.Member) bool { return m.ID == c.id && m.Voter }) {
			continue
		}
		votes, voters := 0, 0
		for _, m := range config {
			if !m.Voter {
				continue
			}
			voters++
			v := g.replicas[m.ID]
			if v != nil && w.reachable(v) && (c.lastTerm() > v.lastTerm() || c.lastTerm() == v.lastTerm() && c.last() >= v.last()) {
				votes++
			}
		}
		if 2*votes > voters {
			winners = append(winners, c)
		}
	}
	g.leader = nil
	if len(winners) > 0 {
		w.lead(g, winners[w.pick(len(winners), "winner")])
	}
}

// lead makes r the leader. A witness feeds a data replica and hands over at once.
func (w *world) lead(g *group, r *replica) {
	for _, other := range g.replicas {
		if w.reachable(other) {
			g.term = max(g.term, other.term)
		}
	}
	g.term++
	for _, other := range g.replicas {
		if w.reachable(other) {
			other.term = g.term
		}
	}
	g.leader, g.match, g.acked = r, make(map[raft.ServerID]uint64), make(map[raft.ServerID]int)
	w.oracleElected(g)
	r.log = append(slices.Clip(r.log), &entry{term: g.term})
	g.began = r.last()
	w.logf("%s leads group %d in term %d", r.id, g.number, g.term)
	if RoleOf(r.id) != Witness {
		return
	}
	config, _ := r.configuration()
	for _, m := range config {
		if d := g.replicas[m.ID]; m.Voter && RoleOf(m.ID) == Data && d != nil && w.reachable(d) && w.replicate(g, d, r.last()) {
			w.lead(g, d)
			return
		}
	}
}

// serves reports whether the leader answers clients.
func (w *world) serves(g *group) bool {
	return g.leader != nil && w.reachable(g.leader) && RoleOf(g.leader.id) == Data && g.leader.commit >= g.began
}

// replicate brings a follower up to an index of the leader's log, and reports
// whether it got there.
func (w *world) replicate(g *group, f *replica, to uint64) bool {
	l := g.leader
	if f == l {
		return true
	}
	common := uint64(0)
	for common < min(f.last(), l.last()) && f.log[common] == l.log[common] {
		common++
	}
	to = max(min(to, l.last()), common)
	if l.first > common+1 { // not by entries
		if RoleOf(l.id) == Witness {
			return false
		}
		// By a snapshot of what the leader has committed; a witness has nothing
		// from before it afterwards.
		f.first, to = l.commit+1, max(to, l.commit)
	}
	f.log = l.log[:to:to]
	f.first = max(1, f.first)
	f.commit = max(f.commit, min(to, l.commit))
	f.term = g.term
	g.match[f.id], g.acked[f.id] = to, w.clock
	return to == l.last()
}

// commit advances the leader's commit index.
func (w *world) commit(g *group) {
	l := g.leader
	config, _ := l.configuration()
	for n := l.last(); n > l.commit && l.log[n-1].term == g.term; n-- {
		have, voters := 0, 0
		for _, m := range config {
			if m.Voter {
				voters++
				if m.ID == l.id || g.match[m.ID] >= n {
					have++
				}
			}
		}
		if 2*have > voters {
			l.commit = n
			w.oracleCommitted(g)
			break
		}
	}
	if config, at := l.configuration(); at <= l.commit && !slices.ContainsFunc(config, func(m shard.Member) bool { return m.ID == l.id }) {
		g.leader = nil // it has removed itself
	}
}

// spread replicates to everybody, or to some of them.
func (w *world) spread(g *group, all bool) {
	if g.leader == nil {
		return
	}
	config, _ := g.leader.configuration()
	for _, m := range config {
		f := w.open(g, m.ID)
		if f == nil || !w.reachable(f) || f == g.leader || !all && w.pick(3, "skips") == 0 {
			continue
		}
		to := g.leader.last()
		if !all && w.pick(3, "partly") == 0 {
			to -= uint64(w.pick(int(min(to, 100)), "lag"))
		}
		w.replicate(g, f, to)
	}
	w.commit(g)
	if g.leader == nil {
		return
	}
	for _, m := range config { // the commit index gets there with the next message
		if f := g.replicas[m.ID]; f != nil && w.reachable(f) {
			f.commit = max(f.commit, min(f.last(), g.match[m.ID], g.leader.commit))
		}
	}
}

// open returns the files of a replica, made when its node first opens it; nil
// if the node has not.
func (w *world) open(g *group, id raft.ServerID) *replica {
	return g.replicas[id]
}

// housekeep is what each node does by itself: open what the map gives it, and
// delete what the map does not have any more.
func (w *world) housekeep() {
	for i, g := range w.groups {
		for _, r := range w.shards[i].Replicas {
			n := w.nodes[r.Node()]
			if g.replicas[r.ID] == nil && n.up && n.incarnation == r.Incarnation {
				g.replicas[r.ID] = &replica{id: r.ID, node: n.name, incarnation: r.Incarnation, first: 1}
			}
		}
		for _, r := range sortedReplicas(g) {
			has := slices.ContainsFunc(w.shards[i].Replicas, func(m Replica) bool { return m.ID == r.id })
			if !has && w.runs(r) {
				w.lose(g, r)
			}
		}
	}
	for name, m := range w.members { // who leaves and holds nothing is gone
		if m.Leaving && !w.holds(name) {
			delete(w.members, name)
		}
	}
}

func (w *world) holds(node string) bool {
	return slices.ContainsFunc(w.shards, func(s Shard) bool {
		return slices.ContainsFunc(s.Replicas, func(r Replica) bool { return r.Node() == node })
	})
}

func (w *world) lose(g *group, r *replica) {
	if !r.lost {
		r.lost, r.lostAt = true, w.clock
	}
	if g.leader == r {
		g.leader = nil
	}
}

// truncate lets logs forget their beginnings: a data replica what is in its
// state, a witness what all data replicas have in theirs.
func (w *world) truncate(g *group) {
	config := g.committedConfiguration()
	for _, r := range sortedReplicas(g) {
		if !w.runs(r) {
			continue
		}
		upTo := r.commit
		if RoleOf(r.id) == Witness {
			for _, m := range config {
				if d := g.replicas[m.ID]; RoleOf(m.ID) == Data {
					upTo = min(upTo, d.commit)
				}
			}
		}
		r.first = max(r.first, upTo+1)
	}
}

// report is what a node tells of its replica.
func (w *world) report(g *group, r *replica) GroupReport {
	report := GroupReport{
		Group: g.number, Replica: r.id, Term: r.term, Commit: r.commit, Applied: r.commit, Durable: r.commit,
		First: r.first, Last: r.last(),
	}
	if r.first > r.last() {
		report.First = 0
	}
	for i := r.commit; i > 0 && report.ConfigurationIndex == 0; i-- {
		if r.log[i-1].config != nil {
			report.ConfigurationIndex = i
		}
	}
	if g.leader != r || !w.serves(g) {
		return report
	}
	config, at := r.configuration()
	report.Leading = &Leading{Members: slices.Clone(config), Committed: at <= r.commit, Followers: make(map[raft.ServerID]Following)}
	for _, m := range config {
		if m.ID == r.id {
			continue
		}
		f := Following{Match: g.match[m.ID], Acked: -1}
		if at, ok := g.acked[m.ID]; ok {
			f.Acked = seconds(w.clock - at)
		}
		report.Leading.Followers[m.ID] = f
	}
	return report
}

// tick lets time pass.
func (w *world) tick(by int) {
	w.clock += by
	w.housekeep()
	for _, g := range w.groups {
		if g.leader != nil && !w.reachable(g.leader) {
			g.leader = nil
		}
		if g.leader == nil || RoleOf(g.leader.id) == Witness {
			w.elect(g)
		}
		w.spread(g, true)
		w.spread(g, true)
	}
	for name := range w.nodes {
		w.reportIn(name)
	}
}

// reportIn brings a node's report to group 0's leader.
func (w *world) reportIn(name string) {
	n, m := w.nodes[name], w.members[name]
	if !n.up || n.muted || n.incarnation != m.Incarnation {
		return
	}
	w.heard[name] = w.clock
	for _, g := range w.groups {
		for _, r := range g.replicas {
			if r.node == name {
				delete(w.reports, GroupAndID{g.number, r.id})
				if w.runs(r) {
					w.reports[GroupAndID{g.number, r.id}] = observation{w.report(g, r), w.clock}
				}
			}
		}
	}
}

const (
	suspectAfter = 3
	downAfter    = 10
)

// view is what group 0's leader plans from.
func (w *world) view() ClusterView {
	v := ClusterView{Nodes: make(map[string]NodeView), Groups: make(map[uint64]GroupView), faults: w.faults}
	v.Map.Config = &w.config
	for _, s := range w.shards {
		v.Map.Shards = append(v.Map.Shards, Shard{s.Number, slices.Clone(s.Founders), slices.Clone(s.Replicas)})
	}
	var live []string
	for _, name := range slices.Sorted(maps.Keys(w.members)) {
		v.Map.Members = append(v.Map.Members, w.members[name])
		heard, ok := w.heard[name]
		node := NodeView{Alive: ok && w.clock-heard < suspectAfter, Down: w.clock-max(heard, w.since) >= downAfter}
		v.Nodes[name] = node
		if !node.Down && !w.members[name].Leaving {
			live = append(live, name)
		}
	}
	v.Ring = w.ring(live)
	for _, g := range w.groups {
		v.Groups[g.number] = w.groupView(g, v.Nodes)
	}
	return v
}

func (w *world) groupView(g *group, nodes map[string]NodeView) GroupView {
	v := GroupView{Reports: make(map[raft.ServerID]GroupReport), Lost: make(map[raft.ServerID]bool)}
	for _, r := range sortedReplicas(g) {
		n := w.nodes[r.node]
		if r.lost && n.up && n.incarnation == r.incarnation {
			v.Lost[r.id] = nodes[r.node].Alive
		}
		o, ok := w.reports[GroupAndID{g.number, r.id}]
		if !ok || !nodes[r.node].Alive || w.clock-o.at >= suspectAfter {
			continue
		}
		report := o.report
		if report.Leading != nil {
			leading := *report.Leading
			leading.Followers = maps.Clone(leading.Followers)
			for id, f := range leading.Followers {
				if f.Acked >= 0 {
					f.Acked += seconds(w.clock - o.at)
					leading.Followers[id] = f
				}
			}
			report.Leading = &leading
			if v.Leader == nil || v.Leader.Term < report.Term {
				v.Leader = &report
			}
		}
		v.Reports[r.id] = report
	}
	return v
}

// plan asks for steps, which take effect later or never.
func (w *world) plan() {
	v := w.view()
	steps := PlanShards(v)
	if again := PlanShards(v); !reflect.DeepEqual(steps, again) {
		w.broken("the same view has the plans %v and %v", steps, again)
	}
	groups := make(map[uint64]bool)
	total := 0
	for _, m := range v.Map.Members {
		if !m.Leaving {
			total++
		}
	}
	for _, s := range steps {
		if groups[s.Group] {
			w.broken("two steps for group %d in one plan", s.Group)
		}
		groups[s.Group] = true
		p := &pendingStep{step: s, record: v.Map.Shards[s.Group-1], total: total}
		w.oraclePlanned(p)
		w.pending = append(w.pending, p)
	}
}

// carryOut lets a step take effect now.
func (w *world) carryOut(p *pendingStep) {
	s, g := p.step, w.groups[p.step.Group-1]
	if s.Action != Create {
		if !w.serves(g) {
			return
		}
		// Nothing but Check can know that a report from before a learner was
		// added is out of date.
		if err := Check(s, w.report(g, g.leader)); (w.checked || s.Action == Forget && !w.faults.forgetEarly) && err != nil {
			w.logf("refused: %v", err)
			return
		}
	}
	switch s.Action {
	case Create, Forget:
		w.changeMap(p)
	case Transfer:
		config, _ := g.leader.configuration()
		to := g.replicas[s.Replica]
		if m, ok := find(config, s.Replica); ok && m.Voter && w.reachable(to) && w.replicate(g, to, g.leader.last()) {
			w.oracleTransferred(g, to)
			w.lead(g, to)
		}
	default:
		w.changeMembers(p)
	}
}

func (w *world) changeMap(p *pendingStep) {
	s := &w.shards[p.step.Group-1]
	if !reflect.DeepEqual(*s, p.record) {
		return
	}
	g := w.groups[p.step.Group-1]
	replicas := slices.Clone(s.Replicas)
	if p.step.Action == Create {
		w.counter++
		m, ok := w.members[p.step.Node]
		if !ok {
			return
		}
		r := Replica{ID: replicaName(p.step.Node, w.counter, p.step.Role), Incarnation: m.Incarnation}
		replicas = append(replicas, r)
		w.logf("group %d: create %s: %s", g.number, r.ID, p.step.Why)
	} else {
		w.oracleForgotten(g, p.step.Replica)
		replicas = slices.DeleteFunc(replicas, func(r Replica) bool { return r.ID == p.step.Replica })
		w.logf("group %d: forget %s: %s", g.number, p.step.Replica, p.step.Why)
	}
	s.Replicas = replicas
}

// changeMembers does what raft does with a configuration change.
func (w *world) changeMembers(p *pendingStep) {
	s, g := p.step, w.groups[p.step.Group-1]
	before, at := g.leader.configuration()
	if at != s.Prev || at > g.leader.commit {
		return
	}
	i := slices.IndexFunc(before, func(m shard.Member) bool { return m.ID == s.Replica })
	after := slices.Clone(before)
	switch {
	case s.Action == AddLearner && i < 0:
		after = append(after, shard.Member{ID: s.Replica, Node: shard.NodeOf(s.Replica)})
	case s.Action == Promote && i < 0:
		after = append(after, shard.Member{ID: s.Replica, Node: shard.NodeOf(s.Replica), Voter: true})
	case s.Action == Promote:
		after[i].Voter = true
	case s.Action == Remove && i >= 0:
		after = slices.Delete(after, i, i+1)
	}
	w.logf("group %d: %s %s: %s", g.number, s.Action, s.Replica, s.Why)
	w.oracleChanged(p, g, before, after)
	g.leader.log = append(slices.Clip(g.leader.log), &entry{term: g.term, config: after})
	w.commit(g)
}
