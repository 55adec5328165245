package placement

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"

	"kvd/shard"
)

// model is a group and its map, with the few rules of raft that matter here.
type model struct {
	members   map[string]Member // the map
	group     map[raft.ServerID]shard.Member
	match     map[raft.ServerID]uint64 // what the present leader has measured
	commit    uint64
	committed []Step
}

func newModel(nodes int) *model {
	m := &model{members: make(map[string]Member), group: make(map[raft.ServerID]shard.Member), match: make(map[raft.ServerID]uint64), commit: 1000}
	for i := range nodes {
		name := fmt.Sprintf("n%d", i+1)
		id := raft.ServerID(name + "/1")
		m.members[name] = Member{Name: name, Incarnation: 1, Replica: id}
		m.group[id] = shard.Member{ID: id, Node: name, Voter: i < maxVoters}
	}
	return m
}

func (m *model) view() View {
	v := View{Commit: m.commit, Match: maps.Clone(m.match)}
	for _, name := range slices.Sorted(maps.Keys(m.members)) {
		v.Members = append(v.Members, m.members[name])
	}
	v.Group = slices.SortedFunc(maps.Values(m.group), func(a, b shard.Member) int { return cmp.Compare(a.ID, b.ID) })
	return v
}

// wipe gives a node another incarnation.
func (m *model) wipe(t *rapid.T, name string) {
	next, err := m.members[name].next(m.members[name].Incarnation + 1)
	if err != nil {
		t.Fatal(err)
	}
	m.members[name] = next
}

// votes reports whether a replica of the node votes.
func (m *model) votes(node string) bool {
	for _, g := range m.group {
		if g.Node == node && g.Voter {
			return true
		}
	}
	return false
}

// apply carries a step out, or fails if it breaks a rule.
func (m *model) apply(t *rapid.T, s Step) {
	node := shard.NodeOf(s.Replica)
	current := m.members[node].Replica
	g, in := m.group[s.Replica]
	switch s.Action {
	case AddLearner:
		if in || s.Replica != current {
			t.Fatalf("%v: in the group %v, the node's replica is %s", s, in, current)
		}
		m.group[s.Replica] = shard.Member{ID: s.Replica, Node: node}
	case Promote:
		if !in || g.Voter || s.Replica != current || m.votes(node) || m.match[s.Replica] == 0 || m.match[s.Replica]+maxLag < m.commit {
			t.Fatalf("%v: %+v, match %d of %d", s, g, m.match[s.Replica], m.commit)
		}
		g.Voter = true
		m.group[s.Replica] = g
	case Remove:
		next, added := m.group[current]
		ready := added && (next.Voter || m.match[current] > 0 && m.match[current]+maxLag >= m.commit)
		if !in || s.Replica == current || g.Voter && !ready {
			t.Fatalf("%v: a voter without a replacement that has caught up", s)
		}
		delete(m.group, s.Replica)
	default:
		t.Fatalf("%v", s)
	}
	m.committed = append(m.committed, s)
}

// Whatever is wiped, however often the leader changes and forgets what it has
// measured, and whether or not a step is carried out: no rule is broken, and
// once the wiping ends the group becomes what the map says.
func TestPlanConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := rapid.IntRange(1, 10).Draw(t, "nodes")
		m := newModel(nodes)
		for range rapid.IntRange(0, 40).Draw(t, "events") {
			name := fmt.Sprintf("n%d", rapid.IntRange(1, nodes).Draw(t, "node"))
			switch rapid.IntRange(0, 4).Draw(t, "event") {
			case 0:
				m.wipe(t, name)
			case 1: // another leader has measured nothing yet
				clear(m.match)
			case 2:
				for _, id := range slices.Sorted(maps.Keys(m.group)) {
					m.match[id] = m.commit - min(m.commit, rapid.SampledFrom([]uint64{0, maxLag, maxLag + 1, 5000}).Draw(t, "lag"))
				}
			case 3:
				m.commit += rapid.Uint64Range(0, 200).Draw(t, "commits")
			default:
				v := m.view()
				step, ok := Plan(v)
				if again, okAgain := Plan(v); again != step || okAgain != ok {
					t.Fatalf("planned %v and %v from the same view", step, again)
				}
				if ok && rapid.Bool().Draw(t, "commits in time") {
					m.apply(t, step)
				}
			}
		}
		for range 10 * nodes {
			for id := range m.group {
				m.match[id] = m.commit
			}
			step, ok := Plan(m.view())
			if !ok {
				break
			}
			m.apply(t, step)
		}
		if step, ok := Plan(m.view()); ok {
			t.Fatalf("does not come to rest: %v after %v", step, m.committed)
		}
		voters := 0
		for _, member := range m.members {
			g, in := m.group[member.Replica]
			if !in {
				t.Errorf("%s is not in the group", member.Replica)
			}
			if g.Voter {
				voters++
			}
		}
		if len(m.group) != nodes || voters != min(nodes, maxVoters) {
			t.Errorf("%d replicas with %d voters for %d nodes", len(m.group), voters, nodes)
		}
	})
}

// While replicas are replaced, no step makes the group need more living voters
// than it did: a node that loses its disk again in the middle, with whatever
// vote it has just been given, stops nobody. Nor are two nodes without a vote at
// the same time.
func TestPlanNeverNeedsMoreLivingVoters(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := rapid.IntRange(2, maxVoters).Draw(t, "nodes")
		m := newModel(nodes)
		wiped := rapid.IntRange(1, (nodes+1)/2).Draw(t, "wiped")
		for i := range wiped {
			m.wipe(t, fmt.Sprintf("n%d", i+1))
		}
		for range 10 * nodes {
			for id := range m.group {
				m.match[id] = m.commit
			}
			step, ok := Plan(m.view())
			if !ok {
				return
			}
			m.apply(t, step)
			voters := 0
			for _, g := range m.group {
				if g.Voter {
					voters++
				}
			}
			if voters > nodes || voters < nodes-1 {
				t.Fatalf("%d voters on %d nodes after %v", voters, nodes, m.committed)
			}
		}
		t.Fatal("does not come to rest")
	})
}

// A node that loses its disk again just when its replacement gets its vote must
// not cost the others their quorum.
func TestAReplacementThatIsLostAtItsPromotionStopsNobody(t *testing.T) {
	m := newModel(3)
	m.members["n3"] = Member{Name: "n3", Incarnation: 2, Replica: "n3/2"}
	for range 3 {
		for id := range m.group {
			m.match[id] = m.commit
		}
		step, ok := Plan(m.view())
		if !ok {
			t.Fatalf("no step after %v", m.committed)
		}
		switch step.Action {
		case AddLearner:
			m.group[step.Replica] = shard.Member{ID: step.Replica, Node: "n3"}
		case Remove:
			delete(m.group, step.Replica)
		case Promote:
			m.group[step.Replica] = shard.Member{ID: step.Replica, Node: "n3", Voter: true}
		}
		m.committed = append(m.committed, step)
		voters := 0
		for _, g := range m.group {
			if g.Voter {
				voters++
			}
		}
		if quorum := voters/2 + 1; quorum > 2 {
			t.Errorf("n1 and n2 alone are no quorum of %d after %v", voters, m.committed)
		}
	}
}

// A node that the map does not know leaves by an explicit removal only.
func TestPlanLeavesStrangersAlone(t *testing.T) {
	m := newModel(3)
	m.group["old/1"] = shard.Member{ID: "old/1", Node: "old", Voter: true}
	if step, ok := Plan(m.view()); ok {
		t.Errorf("planned %v", step)
	}
}

func TestAMemberOfAMalformedReplicaHasNoSuccessor(t *testing.T) {
	for _, id := range []raft.ServerID{"", "n1", "n1/", "n1/x", "n1/99999999999"} {
		if next, err := (Member{Name: "n1", Replica: id}).next(2); err == nil {
			t.Errorf("%q is followed by %+v", id, next)
		}
	}
	next, err := Member{Name: "n1", Incarnation: 5, Replica: "n1/9"}.next(6)
	if want := (Member{Name: "n1", Incarnation: 6, Replica: "n1/10"}); err != nil || next != want {
		t.Errorf("n1/9 is followed by %+v, %v", next, err)
	}
}

func TestMemberRecords(t *testing.T) {
	want := Member{Name: "n1", Incarnation: 1<<64 - 1, Replica: "n1/3"}
	if got, err := decodeMember(want.encode()); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := decodeMember([]byte("{")); err == nil {
		t.Error("half a record was accepted")
	}
}
