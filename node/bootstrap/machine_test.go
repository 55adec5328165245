package bootstrap

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

var deepFlag = flag.Bool("deep", false, "search the model of formation for minutes")

// The model: the machines of one cluster under an adversary who chooses what happens next. A question and its answer
// are separate events, so answers can arrive long after their sender has died, lost its disk and come back.

type world struct {
	nodes     []*modelNode
	inc       uint64              // incarnations given out
	members   map[uint64][]Member // by cluster id: as changed by rejoins
	order     []uint64            // cluster ids as decided, for printing
	held      map[uint64]int      // by cluster id: how many have ever held its record
	wiped     int                 // disks lost
	did       map[string]int      // events and steps, to notice vacuous runs
	violation string
}

type modelNode struct {
	m       machine
	refused error
	asks    map[string]*modelAsk
}

type modelAsk struct {
	captured *Status // what the peer answered, on its way
	done     bool
	result   answer
}

func newWorld(n int, planted faults) *world {
	w := &world{members: map[uint64][]Member{}, held: map[uint64]int{}, did: map[string]int{}}
	peers := map[string]string{}
	for i := range n {
		peers[fmt.Sprintf("n%d", i+1)] = fmt.Sprintf("host%d:1", i+1)
	}
	for i := range n {
		node := &modelNode{}
		node.m.faults = planted
		node.m.set = Settings{Name: fmt.Sprintf("n%d", i+1), Common: Common{Token: "t", Strategy: "full"}, Peers: peers}
		w.nodes = append(w.nodes, node)
		w.reborn(node)
	}
	return w
}

// reborn gives the node an empty directory.
func (w *world) reborn(n *modelNode) {
	w.inc++
	n.m.id = identity{Name: n.m.set.Name, Incarnation: w.inc, Common: Common{Token: "t", Strategy: "full"}}
	n.m.record = nil
	w.restart(n)
}

// restart keeps what is durable.
func (w *world) restart(n *modelNode) {
	n.m.view, n.refused = nil, nil
	n.newRound()
}

func (n *modelNode) newRound() {
	n.asks = map[string]*modelAsk{}
	for _, name := range n.m.peers() {
		n.asks[name] = &modelAsk{}
	}
}

func (n *modelNode) active() bool { return n.refused == nil && n.m.id.ClusterID == 0 }

func (w *world) node(name string) *modelNode {
	return w.nodes[slices.IndexFunc(w.nodes, func(n *modelNode) bool { return n.m.set.Name == name })]
}

func (w *world) clone() *world {
	c := *w
	c.held = maps.Clone(w.held)
	c.members, c.did, c.order = maps.Clone(w.members), maps.Clone(w.did), slices.Clone(w.order)
	c.nodes = nil
	for _, n := range w.nodes {
		copied := *n
		copied.asks = map[string]*modelAsk{}
		for name, a := range n.asks {
			ask := *a
			copied.asks[name] = &ask
		}
		c.nodes = append(c.nodes, &copied)
	}
	return &c
}

// key describes everything that the future depends on.
func (w *world) key() string {
	var b strings.Builder
	status := func(s *Status) string {
		if s == nil {
			return "-"
		}
		return fmt.Sprint(s.Incarnation, s.View, w.number(s.Record), s.ClusterID != 0, s.Members)
	}
	for _, n := range w.nodes {
		fmt.Fprint(&b, n.m.id.Incarnation, n.m.view, w.number(n.m.record), n.m.id.ClusterID != 0, n.refused != nil)
		for _, name := range slices.Sorted(maps.Keys(n.asks)) {
			a := n.asks[name]
			fmt.Fprint(&b, "|", status(a.captured), a.done, status(a.result.status))
		}
		b.WriteByte('\n')
	}
	for i, id := range w.order {
		fmt.Fprint(&b, i, w.members[id])
	}
	return b.String()
}

func (w *world) number(r *Record) int {
	if r == nil {
		return -1
	}
	return slices.Index(w.order, r.ClusterID)
}

// event is one choice of the adversary.
type event struct {
	what string
	node int
	peer string
}

func (w *world) events() (possible []event) {
	for i, n := range w.nodes {
		possible = append(possible, event{"crash", i, ""}, event{"wipe", i, ""})
		if !n.active() {
			continue
		}
		all := true
		for _, name := range slices.Sorted(maps.Keys(n.asks)) {
			switch a := n.asks[name]; {
			case a.done:
			case a.captured != nil:
				possible = append(possible, event{"deliver", i, name}, event{"lose", i, name})
				all = false
			default:
				possible = append(possible, event{"ask", i, name}, event{"reach", i, name}, event{"lose", i, name})
				all = false
			}
		}
		if all {
			possible = append(possible, event{"step", i, ""})
		}
	}
	return possible
}

func (w *world) do(e event) {
	n := w.nodes[e.node]
	w.did[e.what]++
	switch e.what {
	case "crash":
		w.restart(n)
	case "wipe":
		w.wiped++
		w.reborn(n)
	case "ask": // reached and delivered at once
		w.do(event{"reach", e.node, e.peer})
		w.do(event{"deliver", e.node, e.peer})
	case "reach":
		peer := w.node(e.peer)
		n.asks[e.peer].captured = peer.m.status(w.members[peer.m.id.ClusterID])
	case "deliver":
		a := n.asks[e.peer]
		a.done, a.result.status, a.captured = true, a.captured, nil
		if s := a.result.status; s.Incarnation != w.node(e.peer).m.id.Incarnation {
			w.did["deliver from the dead"]++
		}
		a.result.err = a.result.status.validate()
	case "lose":
		n.asks[e.peer] = &modelAsk{done: true, result: answer{err: errors.New("lost")}}
	case "step":
		w.step(n)
	}
	w.check()
}

func (w *world) step(n *modelNode) {
	answers := map[string]answer{}
	for name, a := range n.asks {
		answers[name] = a.result
		if a.result.err != nil && a.result.status != nil {
			w.violation = "malformed status: " + a.result.err.Error()
		}
	}
	n.m.observe(answers)
	s, err := n.m.next(answers)
	if err != nil {
		n.refused = err
		w.did["refuse"]++
		return
	}
	id := n.m.id
	switch s.do {
	case decide:
		w.did["decide"]++
		if err := s.record.Validate(); err != nil {
			w.violation = "decided a malformed record: " + err.Error()
			return
		}
		w.order = append(w.order, s.record.ClusterID)
		w.members[s.record.ClusterID] = s.record.Members
		w.held[s.record.ClusterID]++
		n.m.become(id, s.record)
	case adopt:
		w.did["adopt"]++
		w.held[s.record.ClusterID]++
		n.m.become(id, s.record)
	case finish:
		w.did["finish"]++
		if r := n.m.record; w.held[r.ClusterID] <= len(r.Members)/2 {
			w.violation = "finished a record that no majority ever held"
		}
		id.ClusterID, id.Replica = n.m.record.ClusterID, ReplicaID(id.Name, 1)
		n.m.become(id, n.m.record)
	case abandon:
		w.did["abandon"]++
		w.inc++
		id.Incarnation = w.inc
		n.m.become(id, nil)
	case rejoin:
		w.rejoin(n, s.rejoin.ClusterID)
	}
	n.newRound()
}

// rejoin is executed only by a cluster with a quorum: raft's part of the bargain.
func (w *world) rejoin(n *modelNode, clusterID uint64) {
	w.did["rejoin asked"]++
	if !w.quorum(clusterID) {
		return
	}
	w.did["rejoin"]++
	members := slices.Clone(w.members[clusterID])
	for i := range members {
		if members[i].Name == n.m.set.Name {
			_, number, _ := ParseReplicaID(members[i].Replica)
			members[i] = Member{members[i].Name, n.m.id.Incarnation, ReplicaID(members[i].Name, number+1)}
		}
	}
	w.members[clusterID] = members
	id := n.m.id
	id.ClusterID, id.Replica = clusterID, "x/2"
	var record *Record
	for _, other := range w.nodes {
		if other.m.id.ClusterID == clusterID {
			record = other.m.record
		}
	}
	n.m.become(id, record)
}

// live counts the cluster's members whose directory still is the one the cluster knows.
func (w *world) live(clusterID uint64) (live int) {
	for _, m := range w.members[clusterID] {
		if id := w.node(m.Name).m.id; id.ClusterID == clusterID && id.Incarnation == m.Incarnation {
			live++
		}
	}
	return live
}

func (w *world) quorum(clusterID uint64) bool {
	return w.live(clusterID) > len(w.members[clusterID])/2
}

// check holds after every event: whoever is bound to a record is bound to the same one.
func (w *world) check() {
	var bound uint64
	for _, n := range w.nodes {
		id, r := n.m.id, n.m.record
		if id.ClusterID == 0 && r != nil && !r.Names(id.Name, id.Incarnation) {
			w.violation = fmt.Sprintf("%s holds a record that names another incarnation", id.Name)
		}
		cluster := id.ClusterID
		if cluster == 0 && r != nil {
			cluster = r.ClusterID
		}
		if cluster == 0 {
			continue
		}
		if bound != 0 && bound != cluster {
			w.violation = fmt.Sprintf("two records: %016x and %016x", bound, cluster)
		}
		bound = cluster
	}
}

// settle lets everybody be reached, in turns, and then wants everybody to be a member; or a cluster that has lost more
// disks than it could.
func (w *world) settle() {
	for range 40 {
		for i, n := range w.nodes {
			for _, name := range slices.Sorted(maps.Keys(n.asks)) {
				if n.active() && !n.asks[name].done && n.asks[name].captured == nil {
					w.do(event{"reach", i, name})
				}
				if n.active() && !n.asks[name].done {
					w.do(event{"deliver", i, name})
				}
			}
			if n.active() && w.violation == "" {
				w.do(event{"step", i, ""})
			}
		}
	}
	if w.violation != "" {
		return
	}
	members, cluster := 0, uint64(0)
	for _, n := range w.nodes {
		if n.refused != nil {
			w.violation = fmt.Sprintf("%s refuses a consistent cluster: %v", n.m.set.Name, n.refused)
			return
		}
		if n.m.id.ClusterID != 0 {
			members, cluster = members+1, n.m.id.ClusterID
		}
	}
	tolerated := (len(w.nodes) - 1) / 2
	switch {
	case members == len(w.nodes) && (w.wiped > 0 || w.did["rejoin asked"] == 0):
	case members == len(w.nodes):
		w.violation = "a node had to rejoin although no disk was lost"
	case cluster != 0 && !w.quorum(cluster) && w.wiped > tolerated:
		w.did["quorum lost"]++
	default:
		w.violation = fmt.Sprintf("%d of %d nodes are members in the end, %d disks lost", members, len(w.nodes), w.wiped)
	}
}

// walk is one random run; at most maxWipes disks are lost.
func walk(seed uint64, planted faults) *world {
	rng := rand.New(rand.NewPCG(seed, 2))
	w := newWorld(1+rng.IntN(5), planted)
	wipes, crashes, losses := rng.IntN(5), rng.IntN(4), rng.IntN(20)
	weight := map[string]int{"reach": 20, "deliver": 2 + rng.IntN(20), "step": 20}
	for range 60 * len(w.nodes) {
		weight["wipe"], weight["crash"], weight["lose"] = min(wipes, 1), min(crashes, 1), min(losses, 1)
		e := pick(rng, w.events(), weight)
		switch e.what {
		case "":
			continue
		case "wipe":
			wipes--
		case "crash":
			crashes--
		case "lose":
			losses--
		}
		if w.do(e); w.violation != "" {
			return w
		}
	}
	w.settle()
	return w
}

func pick(rng *rand.Rand, possible []event, weight map[string]int) event {
	total := 0
	for _, e := range possible {
		total += weight[e.what]
	}
	if total == 0 {
		return event{}
	}
	at := rng.IntN(total)
	for _, e := range possible {
		if at -= weight[e.what]; at < 0 {
			return e
		}
	}
	panic("unreachable")
}

func TestFormationModelRandom(t *testing.T) {
	first, walks := rand.Uint64(), 3000
	switch {
	case *deepFlag:
		walks = 100000
	case testing.Short(): // for the race detector, which has nothing to see in one goroutine
		walks = 1000
	}
	t.Logf("seeds %d..+%d", first, walks)
	did := map[string]int{}
	for i := range uint64(walks) {
		w := walk(first+i, faults{})
		if w.violation != "" {
			t.Fatalf("seed %d: %s", first+i, w.violation)
		}
		for what, n := range w.did {
			did[what] += n
		}
	}
	for _, what := range []string{"decide", "adopt", "finish", "abandon", "rejoin", "quorum lost", "wipe", "crash", "lose", "deliver from the dead"} {
		if did[what] == 0 {
			t.Errorf("no run had the event %q", what)
		}
	}
	t.Log(did)
}

// Every order of events of two and three nodes, within a budget of faults. A "reach" is an answer that arrives late,
// with any other events in between.
func TestFormationModelExhaustive(t *testing.T) {
	type scope struct {
		nodes  int
		budget map[string]int
	}
	scopes := []scope{
		{2, map[string]int{"wipe": 2, "crash": 0, "lose": 0, "reach": 1}},
		{2, map[string]int{"wipe": 1, "crash": 1, "lose": 1, "reach": 1}},
		{3, map[string]int{"wipe": 0, "crash": 0, "lose": 0, "reach": 1}},
		{3, map[string]int{"wipe": 0, "crash": 1, "lose": 0, "reach": 0}},
	}
	if *deepFlag {
		scopes = append(scopes,
			scope{2, map[string]int{"wipe": 2, "crash": 1, "lose": 1, "reach": 3}},
			scope{3, map[string]int{"wipe": 1, "crash": 0, "lose": 0, "reach": 1}},
			scope{3, map[string]int{"wipe": 0, "crash": 0, "lose": 1, "reach": 1}},
			scope{3, map[string]int{"wipe": 2, "crash": 0, "lose": 0, "reach": 0}})
	}
	if testing.Short() {
		scopes = scopes[:1]
	}
	for _, c := range scopes {
		t.Logf("%d nodes, %v: %d states", c.nodes, c.budget, explore(t, c.nodes, c.budget))
	}
}

func explore(t *testing.T, nodes int, budget map[string]int) int {
	type state struct {
		w      *world
		budget map[string]int
	}
	seen := map[[16]byte]bool{}
	todo := []state{{newWorld(nodes, faults{}), budget}}
	for len(todo) > 0 {
		s := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, e := range s.w.events() {
			left, bounded := s.budget[e.what]
			if bounded && left == 0 {
				continue
			}
			next := state{s.w.clone(), s.budget}
			if bounded {
				next.budget = maps.Clone(s.budget)
				next.budget[e.what]--
			}
			if next.w.do(e); next.w.violation != "" {
				t.Fatalf("%v: %s", e, next.w.violation)
			}
			sum := sha256.Sum256([]byte(fmt.Sprint(next.budget, next.w.wiped) + next.w.key()))
			key := [16]byte(sum[:])
			if seen[key] {
				continue
			}
			seen[key] = true
			if e.what == "step" {
				final := next.w.clone()
				if final.settle(); final.violation != "" {
					t.Fatalf("after %v: %s\n%s", e, final.violation, next.w.key())
				}
			}
			todo = append(todo, next)
		}
	}
	return len(seen)
}

// Each planted fault must be noticed by the same walks.
func TestFormationModelNoticesFaults(t *testing.T) {
	for name, planted := range map[string]faults{
		"decides without hearing from all":     {decideEarly: true},
		"adopts another incarnation's record":  {adoptAny: true},
		"decides although the views differ":    {ignoreViews: true},
		"finishes a record without a majority": {finishAlone: true},
	} {
		t.Run(name, func(t *testing.T) {
			first := rand.Uint64()
			for i := range uint64(20000) {
				if w := walk(first+i, planted); w.violation != "" {
					t.Logf("seed %d, walk %d: %s", first+i, i, w.violation)
					return
				}
			}
			t.Fatalf("seeds %d..+20000 noticed nothing", first)
		})
	}
}

// A node that held its record while the others went on without it.
func TestFormationComesLate(t *testing.T) {
	record := &Record{ClusterID: 7, Common: Common{Token: "t", Strategy: "full"}, Members: []Member{{"n1", 1, "n1/1"}, {"n2", 2, "n2/1"}, {"n3", 3, "n3/1"}}}
	m := machine{set: threeNodes("n2"), id: identity{Name: "n2", Incarnation: 2}, record: record}
	peer := func(members []Member) answer {
		return answer{status: &Status{Name: "n1", Incarnation: 1, Record: record, ClusterID: 7, Members: members}}
	}
	for name, c := range map[string]struct {
		members []Member
		want    error
	}{
		"members unknown": {nil, nil},
		"still a member":  {record.Members, nil},
		"removed":         {[]Member{{"n1", 1, "n1/1"}, {"n3", 3, "n3/1"}}, ErrUnknownMember},
		"replaced":        {[]Member{{"n1", 1, "n1/1"}, {"n2", 9, "n2/2"}}, ErrReplaced},
	} {
		s, err := m.next(map[string]answer{"n1": peer(c.members), "n3": {err: errors.New("down")}})
		if !errors.Is(err, c.want) || err == nil && s.do != finish {
			t.Errorf("%s: %v, %v", name, s, err)
		}
	}
	m.set.Peers = map[string]string{"n1": "a:1"}
	wrong := answer{status: &Status{Name: "n9", Incarnation: 9, Record: record, ClusterID: 7}}
	s, err := m.next(map[string]answer{"n1": wrong})
	if err != nil || s.do != wait || !strings.Contains(strings.Join(s.waiting, ";"), "n1: node n9 answers at its address a:1;n3: has no address in --peers") {
		t.Errorf("who to wait for: %+v, %v", s, err)
	}
}
