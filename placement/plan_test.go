package placement

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"kvd/ring"
	"kvd/shard"
)

func TestSlots(t *testing.T) {
	for _, test := range []struct {
		factor, nodes   int
		data, witnesses int
	}{
		{1, 0, 0, 0}, {1, 1, 1, 0}, {1, 9, 1, 0},
		{2, 1, 1, 0}, {2, 2, 2, 0}, {2, 3, 2, 1}, {2, 9, 2, 1},
		{3, 2, 2, 0}, {3, 3, 3, 0}, {3, 4, 3, 0}, {3, 5, 3, 2}, {3, 9, 3, 2},
		{4, 4, 4, 0}, {4, 5, 4, 1}, {4, 6, 4, 1}, {4, 7, 4, 3},
		{7, 7, 7, 0}, {7, 12, 7, 4}, {7, 13, 7, 6}, {7, 20, 7, 6},
	} {
		cfg := ClusterConfig{ReplicationFactor: test.factor, Witnesses: WitnessesAuto}
		if data, witnesses := Slots(cfg, test.nodes); data != test.data || witnesses != test.witnesses {
			t.Errorf("%d copies on %d nodes: %d data replicas and %d witnesses, want %d and %d", test.factor, test.nodes, data, witnesses, test.data, test.witnesses)
		}
		cfg.Witnesses = WitnessesNone
		if data, witnesses := Slots(cfg, test.nodes); data != test.data || witnesses != 0 {
			t.Errorf("%d copies on %d nodes without witnesses: %d and %d", test.factor, test.nodes, data, witnesses)
		}
	}
}

func TestTargetIsTheBeginningOfTheRingsOrder(t *testing.T) {
	cfg := ClusterConfig{ReplicationFactor: 3, Witnesses: WitnessesAuto}
	for live, want := range []string{"", "data", "data data", "data data data", "data data data witness", "data data data witness witness", "data data data witness witness"} {
		r := ringOf(8, 3, names7[:live]...)
		for n := range 8 {
			target := Target(cfg, n, r, 6)
			var nodes, roles []string
			for _, slot := range target {
				nodes, roles = append(nodes, slot.Node), append(roles, string(slot.Role))
			}
			if !slices.Equal(nodes, r.Order(n)[:len(nodes)]) || strings.Join(roles, " ") != want {
				t.Errorf("shard %d on %d live nodes of 6: %v, the order is %v", n, live, target, r.Order(n))
			}
		}
	}
}

var names7 = []string{"n1", "n2", "n3", "n4", "n5", "n6", "n7"}

func ringOf(shards, copies int, names ...string) *ring.Ring {
	var nodes []ring.Node
	for _, n := range names {
		nodes = append(nodes, ring.Node{Name: n, Weight: 1})
	}
	r, err := ring.New(ring.Config{Shards: shards, Replicas: copies, VirtualNodes: 32}, nodes...)
	if err != nil {
		panic(err)
	}
	return r
}

// atRest is a cluster where everything is as it should be. All groups have the
// same commit index, and their first data replica leads.
func atRest(cfg ClusterConfig, nodes ...string) ClusterView {
	v := ClusterView{
		Map: Map{Config: &cfg}, Ring: ringOf(cfg.Shards, cfg.ReplicationFactor, nodes...),
		Nodes: make(map[string]NodeView), Groups: make(map[uint64]GroupView),
	}
	for _, n := range nodes {
		v.Map.Members = append(v.Map.Members, Member{Name: n, Incarnation: 1})
		v.Nodes[n] = NodeView{Alive: true}
	}
	for n := range cfg.Shards {
		s := Shard{Number: n}
		for i, slot := range Target(cfg, n, v.Ring, len(nodes)) {
			s.Replicas = append(s.Replicas, Replica{ID: replicaID(slot.Node, uint64(10*n+i+1), slot.Role), Incarnation: 1})
		}
		v.Map.Shards = append(v.Map.Shards, s)
		v.Groups[s.Group()] = ledBy(s, s.Replicas[0].ID)
	}
	return v
}

// ledBy is the view of a group whose replicas in the map all vote and have
// everything.
func ledBy(s Shard, leader raft.ServerID) GroupView {
	g := GroupView{Reports: make(map[raft.ServerID]GroupReport)}
	leading := &Leading{Committed: true, Followers: make(map[raft.ServerID]Following)}
	for _, r := range s.Replicas {
		leading.Members = append(leading.Members, shard.Member{ID: r.ID, Node: r.Node(), Voter: true})
		report := GroupReport{Group: s.Group(), Replica: r.ID, Term: 2, Commit: 100, Applied: 100, First: 1, Last: 100, ConfigurationIndex: 7}
		if r.ID == leader {
			report.Leading = leading
			g.Leader = &report
		} else {
			leading.Followers[r.ID] = Following{Match: 100, Acked: time.Second}
		}
		g.Reports[r.ID] = report
	}
	return g
}

func joins(v *ClusterView, node string) {
	v.Map.Members = append(v.Map.Members, Member{Name: node, Incarnation: 1})
	v.Nodes[node] = NodeView{Alive: true}
	next, err := v.Ring.Add(ring.Node{Name: node, Weight: 1})
	if err != nil {
		panic(err)
	}
	v.Ring = next
}

func TestNothingIsDoneToAClusterAtRest(t *testing.T) {
	for _, cfg := range []ClusterConfig{
		{Shards: 16, ReplicationFactor: 1, Witnesses: WitnessesAuto},
		{Shards: 16, ReplicationFactor: 2, Witnesses: WitnessesAuto},
		{Shards: 16, ReplicationFactor: 3, Witnesses: WitnessesAuto},
		{Shards: 16, ReplicationFactor: 3, Witnesses: WitnessesNone},
		{Shards: 16, ReplicationFactor: 4, Witnesses: WitnessesAuto},
		{Shards: 16, ReplicationFactor: 7, Witnesses: WitnessesAuto},
	} {
		for _, e := range ExplainShards(atRest(cfg, names7...)) {
			if e.Step != nil || len(e.Waits) > 0 {
				t.Errorf("%+v: %+v", cfg, e)
			}
		}
	}
}

// However much there is to do, few replicas are being filled on one node, and by
// one node, at the same time. Witnesses take nothing and do not count.
func TestTransfersAreBounded(t *testing.T) {
	for _, limits := range []Limits{{}, {Incoming: 1, Outgoing: 100}, {Incoming: 100, Outgoing: 3}} {
		v := atRest(ClusterConfig{Shards: 64, ReplicationFactor: 2, Witnesses: WitnessesNone}, names7[:4]...)
		v.Limits = limits
		home := make(map[uint64][]TargetReplica)
		for _, e := range ExplainShards(v) {
			home[e.Group] = e.Target
		}
		joins(&v, "n5")
		joins(&v, "n6")
		incoming, outgoing := make(map[string]int), make(map[string]int)
		for _, e := range ExplainShards(v) {
			from := v.Groups[e.Group].Leader.Replica
			if e.Step != nil && e.Step.Action == Create {
				incoming[e.Step.Node]++
				outgoing[shard.NodeOf(from)]++
			} else if waits := strings.Join(e.Waits, "; "); !slices.Equal(e.Target, home[e.Group]) && !strings.Contains(waits, " is to have a data replica, but ") && !strings.Contains(waits, " is to lead") {
				t.Errorf("group %d has no step and waits for %q", e.Group, waits)
			}
		}
		bounds := limits.withDefaults()
		most := func(m map[string]int) (n int) {
			for _, count := range m {
				n = max(n, count)
			}
			return n
		}
		if in, out := most(incoming), most(outgoing); in > bounds.Incoming || out > bounds.Outgoing || in < bounds.Incoming && out < bounds.Outgoing {
			t.Errorf("%+v: %v come in, %v go out", limits, incoming, outgoing)
		}
	}
}

// What is being filled already counts, until it has caught up.
func TestTransfersUnderWayCount(t *testing.T) {
	v := atRest(ClusterConfig{Shards: 64, ReplicationFactor: 2, Witnesses: WitnessesNone}, names7[:4]...)
	v.Limits = Limits{Incoming: 3, Outgoing: 100}
	joins(&v, "n5")
	create := func() (groups []uint64) {
		for _, step := range PlanShards(v) {
			if step.Action == Create && step.Node == "n5" {
				groups = append(groups, step.Group)
			}
		}
		return groups
	}
	first := create()
	if len(first) != 3 {
		t.Fatalf("%d are created", len(first))
	}
	for i, group := range first {
		s := &v.Map.Shards[group-1]
		s.Replicas = append(s.Replicas, Replica{ID: replicaID("n5", uint64(1000+i), Data), Incarnation: 1})
	}
	if more := create(); len(more) > 0 {
		t.Fatalf("%v are created beside %v", more, first)
	}
	// One has caught up: there is room for another one.
	group := v.Groups[first[0]]
	id := v.Map.Shards[first[0]-1].Replicas[2].ID
	group.Leader.Leading.Members = append(group.Leader.Leading.Members, shard.Member{ID: id, Node: "n5"})
	group.Leader.Leading.Followers[id] = Following{Match: 100, Acked: time.Second}
	group.Reports[id] = GroupReport{Group: first[0], Replica: id, Commit: 100, Applied: 100, First: 1, Last: 100}
	if more := create(); len(more) != 1 {
		t.Errorf("%v are created", more)
	}
}

// Leaders go home a few at a time.
func TestLeadersGoHomeAFewAtATime(t *testing.T) {
	v := atRest(ClusterConfig{Shards: 32, ReplicationFactor: 3, Witnesses: WitnessesNone}, names7[:5]...)
	for _, s := range v.Map.Shards {
		v.Groups[s.Group()] = ledBy(s, s.Replicas[2].ID)
	}
	steps := PlanShards(v)
	if len(steps) != 4 {
		t.Errorf("%d steps", len(steps))
	}
	for _, s := range steps {
		if want := v.Map.Shards[s.Group-1].Replicas[0].ID; s.Action != Transfer || s.Replica != want || s.Node != shard.NodeOf(want) {
			t.Errorf("%+v, want one to %s", s, want)
		}
	}
}

// A leader's home is the first node that lives, but only one that has caught up.
func TestALeaderGoesToTheFirstThatLives(t *testing.T) {
	cfg := ClusterConfig{Shards: 1, ReplicationFactor: 3, Witnesses: WitnessesAuto}
	home := func(change func(*ClusterView, []Replica)) string {
		v := atRest(cfg, names7...)
		replicas := v.Map.Shards[0].Replicas
		v.Groups[1] = ledBy(v.Map.Shards[0], replicas[2].ID)
		change(&v, replicas)
		steps := PlanShards(v)
		if len(steps) != 1 || steps[0].Action != Transfer {
			return fmt.Sprint(steps)
		}
		return fmt.Sprint(slices.IndexFunc(replicas, func(r Replica) bool { return r.ID == steps[0].Replica }))
	}
	if got := home(func(*ClusterView, []Replica) {}); got != "0" {
		t.Errorf("to %s", got)
	}
	if got := home(func(v *ClusterView, r []Replica) { v.Nodes[r[0].Node()] = NodeView{} }); got != "1" {
		t.Errorf("to %s though the first is silent", got)
	}
	lags := func(v *ClusterView, r []Replica) {
		v.Groups[1].Leader.Leading.Followers[r[0].ID] = Following{Match: 100 - maxLag - 1, Acked: time.Second}
	}
	if got := home(lags); got != "[]" {
		t.Errorf("to %s though the first will be there soon", got)
	}
}

// The neediest groups come first when there is not enough room for all.
func TestGroupsWithTheFewestCopiesComeFirst(t *testing.T) {
	v := atRest(ClusterConfig{Shards: 32, ReplicationFactor: 3, Witnesses: WitnessesNone}, names7[:6]...)
	needy := v.Map.Shards[31]
	v.Groups[32].Leader.Leading.Followers[needy.Replicas[1].ID] = Following{Acked: -1}
	v.Groups[32].Leader.Leading.Followers[needy.Replicas[2].ID] = Following{Match: 100}
	if first := ExplainShards(v)[0]; first.Group != 32 {
		t.Errorf("group %d comes before the one with two copies", first.Group)
	}
}

// Under load a replica's report is older than its leader's measurement.
func TestHasApplied(t *testing.T) {
	for _, test := range []struct {
		applied, last, commit uint64
		want                  bool
	}{
		{0, 0, 0, false}, {0, 0, 100, false}, {100, 0, 100, true}, // a log that begins after a snapshot
		{100, 100, 100, true}, {100, 164, 164, true}, {100, 165, 165, false}, {100, 165, 164, true},
		{1000, 1000, 1000 + maxReportLag, true}, {1000, 1000, 1001 + maxReportLag, false},
		{900, 1000, 1000 + maxReportLag, false},
	} {
		if got := hasApplied(GroupReport{Applied: test.applied, Last: test.last}, test.commit); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
}

// A witness whose log is empty goes on after its snapshot.
func TestAWitnessWithAnEmptyLogBeginsAfterItsSnapshot(t *testing.T) {
	v := atRest(ClusterConfig{Shards: 1, ReplicationFactor: 2, Witnesses: WitnessesAuto}, names7[:4]...)
	s := &v.Map.Shards[0]
	old := s.Replicas[2]
	s.Replicas[2] = Replica{ID: replicaID(old.Node(), 99, Witness), Incarnation: 1}
	group := ledBy(*s, s.Replicas[0].ID)
	group.Leader.Leading.Members[2].Voter = false
	v.Groups[1] = group
	promoted := func(first, last, applied uint64) bool {
		report := group.Reports[s.Replicas[2].ID]
		report.First, report.Last, report.Applied = first, last, applied
		group.Reports[s.Replicas[2].ID] = report
		steps := PlanShards(v)
		return len(steps) == 1 && steps[0].Action == Promote
	}
	if !promoted(0, 100, 100) || !promoted(101, 100, 100) || !promoted(1, 100, 100) {
		t.Error("one that reaches every data replica gets no vote")
	}
	data := s.Replicas[1].ID
	group.Leader.Leading.Followers[data] = Following{Match: 60, Acked: time.Second}
	report := group.Reports[data]
	report.Last, report.Commit, report.Applied = 60, 60, 60
	group.Reports[data] = report
	if promoted(0, 100, 100) || promoted(62, 100, 100) || !promoted(61, 100, 100) {
		t.Error("a data replica has 60 entries, and the witness's log decides nothing")
	}
}

// Without its leader, or with a configuration that may not last, a group is left
// alone.
func TestAGroupThatCannotBeJudgedIsLeftAlone(t *testing.T) {
	for name, change := range map[string]func(*GroupView){
		"no leader is known":           func(g *GroupView) { g.Leader = nil },
		"is not committed yet":         func(g *GroupView) { g.Leader.Leading.Committed = false },
		"is about to leave":            func(g *GroupView) { g.Leader.Leading.Members[0].Voter = false },
		"too few for any change":       func(g *GroupView) { clear(g.Leader.Leading.Followers) },
		"a change of the group's memb": func(g *GroupView) { g.Leader.ConfigurationIndex = 0 },
	} {
		v := atRest(ClusterConfig{Shards: 1, ReplicationFactor: 3, Witnesses: WitnessesNone}, names7[:3]...)
		joins(&v, "n9")
		v.Ring = ringOf(1, 3, "n9", "n1", "n2")
		group := v.Groups[1]
		change(&group)
		v.Groups[1] = group
		e := ExplainShards(v)[0]
		if e.Step != nil || len(e.Waits) != 1 || !strings.Contains(e.Waits[0], name) {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func TestWithoutShardsThereIsNothingToPlan(t *testing.T) {
	if e := ExplainShards(ClusterView{}); e != nil {
		t.Errorf("%v", e)
	}
	cfg := ClusterConfig{Shards: 1, ReplicationFactor: 1}
	if e := ExplainShards(ClusterView{Map: Map{Config: &cfg, Shards: []Shard{{}}}}); e != nil {
		t.Errorf("without a ring: %v", e)
	}
}

// What a node says it has lost is replaced.
func TestALostReplicaIsReplacedOnItsNode(t *testing.T) {
	v := atRest(ClusterConfig{Shards: 1, ReplicationFactor: 3, Witnesses: WitnessesNone}, names7[:3]...)
	lost := v.Map.Shards[0].Replicas[1]
	o := listening(1)
	now := time.Now()
	o.look(v.Map.Members, now)
	for _, m := range v.Map.Members {
		report := Report{Node: m.Name, Incarnation: 1}
		for _, r := range v.Groups[1].Reports {
			if shard.NodeOf(r.Replica) == m.Name && r.Replica != lost.ID {
				report.Groups = append(report.Groups, r)
			}
		}
		if m.Name == lost.Node() {
			report.Lost = []ReplicaRef{{Group: 1, ID: lost.ID}}
		}
		o.accept(report, true, now)
	}
	v.Groups = o.groups(v.Map.Members, now)
	steps := PlanShards(v)
	if len(steps) != 1 || steps[0].Action != Create || steps[0].Node != lost.Node() || steps[0].Role != Data {
		t.Errorf("%+v", steps)
	}
}

func BenchmarkPlanShards(b *testing.B) {
	for _, shards := range []int{64, 1024, 4096} {
		b.Run(fmt.Sprint(shards), func(b *testing.B) {
			var nodes []string
			for i := range 50 {
				nodes = append(nodes, fmt.Sprintf("n%d", i))
			}
			v := atRest(ClusterConfig{Shards: shards, ReplicationFactor: 3, Witnesses: WitnessesAuto}, nodes...)
			b.ReportAllocs()
			for b.Loop() {
				PlanShards(v)
			}
		})
	}
}
