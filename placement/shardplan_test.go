package placement

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"kvd/shard"
)

type rapidChooser struct{ *rapid.T }

func (c rapidChooser) pick(n int, label string) int {
	if n <= 1 {
		return 0
	}
	return rapid.IntRange(0, n-1).Draw(c.T, label)
}

type seedChooser struct{ *rand.Rand }

func (c seedChooser) pick(n int, _ string) int { return c.IntN(max(1, n)) }

// live runs a world for a while, and then until it is at rest; the error is
// what it saw that must never be.
func live(c chooser, events int, faults faults, checked bool) (err error) {
	defer sees(&err)
	w := newWorld(c, faults, checked)
	for range events {
		w.event()
	}
	w.settle()
	return nil
}

// sees turns what the oracle says into an error.
func sees(err *error) {
	switch r := recover().(type) {
	case nil, misfortune:
	case violation:
		*err = r.error
	default:
		panic(r)
	}
}

// event is one thing that happens.
func (w *world) event() {
	g := w.groups[w.pick(len(w.groups), "group")]
	switch kind := w.pick(24, "event"); kind {
	case 0, 1, 2:
		w.tick(1 + w.pick(5, "seconds"))
	case 3:
		w.write(g)
	case 4, 5:
		w.plan()
		if !w.checked {
			w.carryOutAll()
		}
	case 6, 7, 8:
		w.stepNow()
	case 9, 10, 11, 12, 13: // all goes well for a while
		w.tick(1)
		w.plan()
		w.carryOutAll()
	case 14:
		w.forgetObservations()
	case 15:
		if g.leader != nil && w.pick(2, "elects") == 0 {
			w.elect(g)
		}
		w.spread(g, false)
	case 16:
		w.truncate(g)
	default:
		w.upset(kind)
	}
}

// write lets clients write.
func (w *world) write(g *group) {
	if !w.serves(g) {
		return
	}
	for range 1 + w.pick(200, "entries") {
		g.leader.log = append(g.leader.log, &entry{term: g.term})
	}
	w.spread(g, false)
	if w.pick(2, "truncates") == 0 {
		w.truncate(g)
	}
}

// stepNow carries out one of the steps that are on their way. It may happen
// again later.
func (w *world) stepNow() {
	if len(w.pending) == 0 {
		return
	}
	i := w.pick(len(w.pending), "step")
	p := w.pending[i]
	if fate := w.pick(8, "fate"); fate > 0 || !w.checked || len(w.pending) > 20 {
		w.pending = slices.Delete(w.pending, i, i+1)
		if fate == 1 {
			return // lost on its way
		}
	}
	w.carryOut(p)
	w.housekeep()
}

func (w *world) carryOutAll() {
	for len(w.pending) > 0 {
		w.stepNow()
	}
}

func (w *world) forgetObservations() {
	w.logf("another node leads group 0")
	w.since = w.clock
	clear(w.heard)
	clear(w.reports)
}

// upset is something that goes wrong, or is over.
func (w *world) upset(kind int) {
	n := w.nodes[fmt.Sprintf("n%d", 1+w.pick(len(w.nodes), "node"))]
	switch kind {
	case 17:
		if n.up {
			w.crash(n)
		}
	case 18, 19:
		w.restart(n)
	case 20:
		n.unreachable(w.clock, func() {
			n.muted, n.isolated = w.pick(2, "muted") == 0, w.pick(3, "isolated") == 0
		})
		w.logf("%s: muted %v, isolated %v", n.name, n.muted, n.isolated)
	case 21:
		if len(w.nodes) < 10 && w.pick(2, "joins") == 0 {
			w.join()
		} else if m, ok := w.members[n.name]; ok && w.staying() > 1 {
			m.Leaving = true
			w.members[n.name] = m
			w.logf("%s is to leave", n.name)
		}
	case 22:
		w.wipe(n)
	case 23:
		w.loseOne(n)
	}
}

func (w *world) staying() (n int) {
	for _, m := range w.members {
		if !m.Leaving {
			n++
		}
	}
	return n
}

// unreachable does what may take a node from raft, and notes when.
func (n *machine) unreachable(now int, do func()) {
	before := n.up && !n.isolated
	do()
	if before && (!n.up || n.isolated) {
		n.downSince = now
	}
}

func (w *world) crash(n *machine) {
	n.unreachable(w.clock, func() { n.up = false })
	for _, g := range w.groups {
		if g.leader != nil && g.leader.node == n.name {
			g.leader = nil
		}
	}
	w.logf("%s crashes", n.name)
}

// restart brings a node back, with its data or, if that is gone, with another
// incarnation that the map takes over.
func (w *world) restart(n *machine) {
	if n.up {
		return
	}
	m, member := w.members[n.name]
	if !member {
		return
	}
	n.up, n.upSince, n.muted, n.isolated = true, w.clock, false, false
	m.Incarnation = n.incarnation
	w.members[n.name] = m
	delete(w.heard, n.name)
	w.logf("%s starts as incarnation %d", n.name, n.incarnation)
}

// wipe takes all of a node's files, if all groups can bear that: no more is
// promised.
func (w *world) wipe(n *machine) {
	if !w.bearable(func(r *replica) bool { return r.node == n.name }) {
		return
	}
	if n.up {
		w.crash(n)
	}
	n.incarnation++
	w.logf("%s has lost its disk", n.name)
	for _, g := range w.groups {
		for _, r := range g.replicas {
			if r.node == n.name {
				w.lose(g, r)
			}
		}
		w.oracleKept(g)
	}
}

// loseOne takes one replica's files.
func (w *world) loseOne(n *machine) {
	for _, g := range w.groups {
		for _, r := range sortedReplicas(g) {
			if r.node == n.name && w.runs(r) && w.bearable(func(other *replica) bool { return other == r }) {
				w.logf("%s has lost the files of %s", n.name, r.id)
				w.lose(g, r)
				w.oracleKept(g)
				return
			}
		}
	}
}

// bearable reports whether every group would keep a quorum of replicas that have
// their files, by any configuration that may be in force.
func (w *world) bearable(hit func(*replica) bool) bool {
	for _, g := range w.groups {
		configs := [][]shard.Member{g.committedConfiguration()}
		for _, r := range g.replicas {
			if c, at := r.configuration(); int(at) > len(g.committed) && !r.lost {
				configs = append(configs, c)
			}
		}
		for _, config := range configs {
			voters := votersOf(config)
			left := countIf(voters, func(m shard.Member) bool { r := g.replicas[m.ID]; return r != nil && !r.lost && !hit(r) })
			if 2*left <= len(voters) {
				return false
			}
		}
	}
	return true
}

// settle ends what goes wrong, except that some nodes stay dead where every
// group can do without them, and expects everything where the ring wants it.
func (w *world) settle() {
	w.logf("nothing more goes wrong")
	for len(w.pending) > 0 && w.pick(4, "late") > 0 {
		w.stepNow()
	}
	w.pending = nil
	for i := 1; i <= len(w.nodes); i++ {
		n := w.nodes[fmt.Sprintf("n%d", i)]
		n.muted, n.isolated = false, false
		if n.up || w.seenNode(n) || w.pick(3, "stays dead") > 0 || !w.bearable(func(r *replica) bool { return r.node == n.name || !w.nodes[r.node].up }) {
			w.restart(n)
		}
	}
	quiet := 0
	for range 600 {
		w.tick(1)
		for _, g := range w.groups {
			w.truncate(g)
		}
		w.plan()
		quiet++
		for _, p := range w.pending {
			quiet = 0
			w.carryOut(p)
		}
		w.pending = nil
		if quiet > downAfter+2 {
			w.oracleSettled()
			return
		}
	}
	w.broken("does not come to rest")
}

// Whatever nodes do, and whenever steps take effect, if at all: nothing that
// must never be comes to be, and once nothing more goes wrong all shards are
// where the ring wants them. Without Check that needs steps that take effect at
// once: it is what makes those harmless that do so after the world has changed.
func TestShardsNeverLoseAnythingAndComeToRest(t *testing.T) {
	for _, checked := range []bool{true, false} {
		t.Run(fmt.Sprintf("checked=%v", checked), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				if err := live(rapidChooser{t}, rapid.IntRange(0, 120).Draw(t, "events"), faults{}, checked); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// seeded is what the run with that seed saw that must never be.
func seeded(seed uint64, events int, faults faults, checked bool) error {
	return live(seedChooser{rand.New(rand.NewPCG(seed, 1))}, events, faults, checked)
}

// The simulation notices a planner that breaks a rule.
func TestTheSimulationCatchesFaultyPlans(t *testing.T) {
	for name, test := range map[string]struct {
		faults faults
		want   string
	}{
		"a dead voter is removed before another one has its place": {faults{removeEarly: true}, `is dead and goes`},
		"a learner is promoted that was not measured":              {faults{promoteUnmeasured: true}, `has not caught up`},
		"the incarnation of a node is ignored":                     {faults{ignoreIncarnation: true}, `and wants|come to rest|no leader`},
		"members change without a live quorum":                     {faults{ignoreQuorum: true}, `voters live`},
		"a live copy goes while too few are left":                  {faults{lowerCopies: true}, `is a live copy and goes`},
		"a node keeps its second vote":                             {faults{keepSecondVote: true}, `vote on one node`},
		"a replica is forgotten that is in the group":              {faults{forgetEarly: true}, `is forgotten and in`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			caught := regexp.MustCompile(test.want)
			for seed := range uint64(3000) {
				if err := seeded(seed, 60, test.faults, false); err != nil && caught.MatchString(firstLine(err)) {
					t.Logf("seed %d: %s", seed, firstLine(err))
					return
				}
			}
			t.Error("not noticed")
		})
	}
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// scripted draws what it is told, and the highest of all else.
type scripted map[string]int

func (c scripted) pick(n int, label string) int {
	if v, ok := c[label]; ok {
		return v
	}
	return n - 1
}

// A data replica dies and is written past; the witness moves to a node that gets
// its log from a snapshot, and so from after what the dead one lacks. Given the
// vote then, and with the other data replica lost, it cannot bring the returning
// one up to date: what was acknowledged is gone.
func TestTheSimulationCatchesAWitnessThatBeginsTooLate(t *testing.T) {
	move := func(faults faults) (err error) {
		defer sees(&err)
		w := newWorld(scripted{"shards": 0, "rf": 1, "witnesses": 0, "nodes": 3, "winner": 0, "fate": 2}, faults, false)
		g, founders := w.groups[0], w.shards[0].Founders
		w.tick(1)
		w.crash(w.nodes[shard.NodeOf(founders[1])])
		w.tick(1)
		w.write(g)
		w.write(g)
		w.truncate(g)
		witness := w.members[shard.NodeOf(founders[2])]
		witness.Leaving = true
		w.members[witness.Name] = witness
		for range 6 {
			w.tick(1)
			w.plan()
			w.carryOutAll()
		}
		w.wipe(w.nodes[shard.NodeOf(founders[0])])
		return nil
	}
	if err := move(faults{}); err != nil {
		t.Error(err)
	}
	if err := move(faults{anyWitness: true}); err == nil || !strings.Contains(firstLine(err), "no witness can give") {
		t.Errorf("not noticed: %v", err)
	}
}

// Check keeps what must never be from happening even if the planner breaks the
// rules; what only the planner can know is left out.
func TestCheckStopsFaultyPlans(t *testing.T) {
	for name, faults := range map[string]faults{
		"remove early":       {removeEarly: true},
		"promote unmeasured": {promoteUnmeasured: true},
		"ignore quorum":      {ignoreQuorum: true},
		"lower copies":       {lowerCopies: true},
		"keep second vote":   {keepSecondVote: true},
		"forget early":       {forgetEarly: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rest := regexp.MustCompile(`and wants|come to rest|no leader|the map`)
			runs := uint64(80)
			if testing.Short() {
				runs = 20
			}
			for seed := range runs {
				if err := seeded(seed, 60, faults, true); err != nil && !rest.MatchString(firstLine(err)) {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
		})
	}
}

// The same from seeds: more runs, and longer ones.
func TestShardsComeToRestFromManySeeds(t *testing.T) {
	runs := uint64(800)
	if testing.Short() {
		runs = 100
	}
	for seed := range runs {
		if err := seeded(seed, 150, faults{}, seed%2 == 0); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// steps lets a world go on for a while and returns what was done.
func (w *world) steps(seconds int) (done []string) {
	for range seconds {
		w.tick(1)
		w.plan()
		for _, p := range w.pending {
			done = append(done, strings.TrimSpace(fmt.Sprintf("%s %s %s", p.step.Action, p.step.Role, p.step.Node)))
			w.carryOut(p)
		}
		w.pending = nil
	}
	return done
}

// Two copies on three nodes: when the node of one dies, the witness's node gets a
// copy and gives up the witness; when it returns, all goes home. While it is only
// silent nothing moves but the leadership.
func TestTheStepsOfAFailureAndOfAReturn(t *testing.T) {
	w := newWorld(scripted{"shards": 0, "rf": 1, "witnesses": 0, "nodes": 2, "winner": 0}, faults{}, true)
	first, witness := shard.NodeOf(w.shards[0].Founders[0]), shard.NodeOf(w.shards[0].Founders[2])
	equal := func(when string, got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	w.steps(5)
	equal("at rest", w.steps(20))
	w.crash(w.nodes[first])
	equal("while it is silent", w.steps(downAfter-1))
	equal("when it is down", w.steps(20),
		"create data "+witness, "add learner data "+witness, "promote data "+witness,
		"remove witness "+witness, "forget witness "+witness)
	w.restart(w.nodes[first])
	equal("when it is back", w.steps(20),
		"create witness "+witness, "add learner witness "+witness, "remove data "+witness, "promote witness "+witness,
		"forget data "+witness, "transfer data "+first)
	equal("at home", w.steps(20))
	w.wipe(w.nodes[first])
	w.restart(w.nodes[first])
	equal("when it is back without its disk", w.steps(20),
		"create data "+first, "add learner data "+first, "remove data "+first, "promote data "+first,
		"forget data "+first, "transfer data "+first)
	w.oracleSettled()
}
