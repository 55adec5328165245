package placement

import (
	"fmt"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"

	"kvd/shard"
)

// mapModel is group 0 with nodes that die, return, join and leave. Whoever lives
// has everything.
type mapModel struct {
	members   []Member
	group     []shard.Member
	leader    raft.ServerID
	maxVoters int
	dead      map[string]bool // for long enough to be down
	holding   map[string]bool
	history   []string
}

func (m *mapModel) view() View {
	v := View{Members: m.members, Group: m.group, Leader: m.leader, Commit: 1000, MaxVoters: m.maxVoters,
		Match: make(map[raft.ServerID]uint64), Nodes: make(map[string]NodeView), Holding: m.holding}
	for _, member := range m.members {
		v.Nodes[member.Name] = NodeView{Alive: !m.dead[member.Name], Down: m.dead[member.Name]}
	}
	for _, g := range m.group {
		if !m.dead[g.Node] {
			v.Match[g.ID] = 1000
		}
	}
	return v
}

func (m *mapModel) voters(is func(shard.Member) bool) (n int) {
	for _, g := range m.group {
		if g.Voter && is(g) {
			n++
		}
	}
	return n
}

func (m *mapModel) lives(g shard.Member) bool { return !m.dead[g.Node] }

func (m *mapModel) quorum() bool {
	return 2*m.voters(m.lives) > m.voters(func(shard.Member) bool { return true })
}

func (m *mapModel) member(name string) *Member {
	i := slices.IndexFunc(m.members, func(member Member) bool { return member.Name == name })
	if i < 0 {
		return nil
	}
	return &m.members[i]
}

// apply carries out a step, or fails if it breaks a rule.
func (m *mapModel) apply(t *rapid.T, s Step) {
	m.history = append(m.history, fmt.Sprintf("%s %s: %s", s.Action, s.Replica, s.Why))
	i := slices.IndexFunc(m.group, func(g shard.Member) bool { return g.ID == s.Replica })
	node := shard.NodeOf(s.Replica)
	member := m.member(node)
	switch s.Action {
	case AddLearner:
		if i >= 0 || member == nil || member.Replica != s.Replica {
			t.Fatalf("%+v", s)
		}
		m.group = append(m.group, shard.Member{ID: s.Replica, Node: node})
	case Promote:
		if i < 0 || m.group[i].Voter || m.dead[node] || member == nil || member.Leaving {
			t.Fatalf("%+v of %+v", s, m.group)
		}
		m.group[i].Voter = true
	case Remove:
		m.remove(t, s, i, member)
	case Transfer:
		if i < 0 || !m.group[i].Voter || m.dead[node] || member.Leaving {
			t.Fatalf("%+v of %+v", s, m.group)
		}
		m.leader = s.Replica
	}
	leave := m.voters(func(g shard.Member) bool { return m.member(g.Node).Leaving })
	if n := m.voters(func(shard.Member) bool { return true }); n > m.maxVoters+1+leave || !m.quorum() {
		t.Fatalf("%d voters of at most %d, a quorum lives: %v\n%v", n, m.maxVoters, m.quorum(), m.history)
	}
	if len(s.Why) < 15 {
		t.Fatalf("%+v says nothing", s)
	}
}

func (m *mapModel) remove(t *rapid.T, s Step, i int, member *Member) {
	if i < 0 || s.Replica == m.leader || member == nil {
		t.Fatalf("%+v of %+v led by %s", s, m.group, m.leader)
	}
	spare := m.voters(func(g shard.Member) bool { return !m.member(g.Node).Leaving }) > m.maxVoters
	switch g := m.group[i]; {
	case g.Voter && m.dead[g.Node] && spare: // it is added again without a vote
	case member.Leaving && m.holding[member.Name]:
		t.Fatalf("%s leaves and still holds replicas", member.Name)
	case g.Voter && !member.Leaving:
		t.Fatalf("%s loses its vote before another node has it", g.ID)
	case !g.Voter && !member.Leaving:
		t.Fatalf("%s is removed", g.ID)
	}
	m.group = slices.Delete(m.group, i, i+1)
}

// upset lets something happen, as long as a quorum lives.
func (m *mapModel) upset(t *rapid.T) {
	name := fmt.Sprintf("n%d", rapid.IntRange(1, 12).Draw(t, "node"))
	member := m.member(name)
	switch event := rapid.IntRange(0, 4).Draw(t, "event"); {
	case member == nil:
		m.members = append(m.members, Member{Name: name, Incarnation: 1, Replica: raft.ServerID(name + "/1")})
	case event == 0:
		m.dead[name] = true
		if !m.quorum() {
			delete(m.dead, name)
		}
	case event == 1:
		delete(m.dead, name)
	case event == 2 && len(m.members) > 2:
		member.Leaving = true
		m.holding[name] = rapid.Bool().Draw(t, "holds")
	case event == 3:
		delete(m.holding, name)
	}
	if m.dead[shard.NodeOf(m.leader)] {
		i := slices.IndexFunc(m.group, func(g shard.Member) bool { return g.Voter && m.lives(g) })
		m.leader = m.group[i].ID
	}
}

// Group 0 keeps a quorum whatever nodes do, has as many votes as it may on nodes
// that live and stay, and is left by those that leave and hold nothing.
func TestVotesOfTheMapGoToNodesThatLiveAndStay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &mapModel{maxVoters: rapid.IntRange(1, 7).Draw(t, "max voters"), leader: "n1/1", dead: make(map[string]bool), holding: make(map[string]bool)}
		m.members = []Member{{Name: "n1", Incarnation: 1, Replica: "n1/1"}}
		m.group = []shard.Member{{ID: "n1/1", Node: "n1", Voter: true}}
		for range rapid.IntRange(0, 60).Draw(t, "events") {
			m.upset(t)
			if step, ok := Plan(m.view()); ok && rapid.IntRange(0, 3).Draw(t, "carried out") > 0 {
				m.apply(t, step)
			}
		}
		for range 200 {
			step, ok := Plan(m.view())
			if !ok {
				m.rests(t)
				return
			}
			m.apply(t, step)
		}
		t.Fatalf("does not come to rest: %v", m.history)
	})
}

func (m *mapModel) rests(t *rapid.T) {
	able := 0 // nodes that may have a vote
	for _, member := range m.members {
		in := slices.ContainsFunc(m.group, func(g shard.Member) bool { return g.ID == member.Replica })
		stays := !member.Leaving || m.holding[member.Name]
		if in && !stays && len(m.group) > 1 && !m.mustStay(member) || !in && stays {
			t.Fatalf("%+v, in the group %v: %+v\n%v", member, in, m.group, m.history)
		}
		if !member.Leaving && !m.dead[member.Name] {
			able++
		}
	}
	good := m.voters(func(g shard.Member) bool { return m.lives(g) && !m.member(g.Node).Leaving })
	if good < min(able, m.maxVoters) {
		t.Fatalf("%d votes on %d nodes that could have %d: %+v\n%v", good, able, m.maxVoters, m.group, m.history)
	}
}

// mustStay reports whether the others would be without a quorum, or a leader.
func (m *mapModel) mustStay(member Member) bool {
	left := func(g shard.Member) bool { return g.Node != member.Name }
	live := m.voters(func(g shard.Member) bool { return left(g) && m.lives(g) })
	heirs := m.voters(func(g shard.Member) bool { return left(g) && m.lives(g) && !m.member(g.Node).Leaving })
	return 2*live <= m.voters(left) || member.Replica == m.leader && heirs == 0
}
