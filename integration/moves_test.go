package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvd/integration/cluster"
	"kvd/placement"
	"kvd/server/kvdpb"
)

// move is a step that a shard has taken.
type move struct {
	action placement.Action
	shard  int
	node   string // of the replica that was added, promoted or removed
}

// moved is how the node that leads group 0 says that a step was taken.
var moved = regexp.MustCompile(`changed a shard's replicas" step=("[a-z ]+"|[a-z]+) group=(\d+) replica=\S+ node=(\S+)`)

// moves watches the steps that are taken from now on.
type moves struct {
	c    *cluster.Cluster
	from map[string]int // the sizes of the nodes' logs when the watch began
}

func watchMoves(c *cluster.Cluster) moves {
	m := moves{c, make(map[string]int)}
	for _, name := range c.Names() {
		m.from[name] = c.Node(name).Log.Size()
	}
	return m
}

// seen returns the steps of a kind that have been taken, in no order.
func (m moves) seen(action placement.Action) (steps []move) {
	for name, from := range m.from {
		for _, found := range moved.FindAllStringSubmatch(m.c.Node(name).Log.Since(from), -1) {
			group, err := strconv.ParseUint(found[2], 10, 64)
			if err == nil && strings.Trim(found[1], `"`) == string(action) {
				steps = append(steps, move{action, int(group - 1), found[3]})
			}
		}
	}
	return steps
}

// await waits for a step of a kind.
func (m moves) await(t *testing.T, action placement.Action) move {
	t.Helper()
	ctx := liveness(t)
	for ctx.Err() == nil {
		if steps := m.seen(action); len(steps) > 0 {
			return steps[0]
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond): // several shards move at a time: the kill is to hit the middle of that
		}
	}
	t.Fatalf("no step %q is taken", action)
	return move{}
}

// Who dies when a step has been taken.
const (
	receiver    = "the node of the replica"
	shardLeader = "the shard's leader"
	reconciler  = "the leader of group 0"
)

// victim finds the node to kill. If that one is dead already, it is another.
func victim(t *testing.T, c *cluster.Cluster, who string, step move) string {
	t.Helper()
	var alive []string
	for _, name := range c.Names() {
		if c.Node(name).Running() {
			alive = append(alive, name)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	name := step.node
	switch who {
	case shardLeader:
		name = ""
		conn, err := c.Dial(alive[0])
		must(t, err)
		defer conn.Close()
		resp, err := kvdpb.NewAdminClient(conn).Shards(ctx, &kvdpb.ShardsRequest{Shards: []int32{int32(step.shard)}})
		if err == nil && len(resp.Shards) == 1 {
			name = resp.Shards[0].Leader
		}
	case reconciler:
		name, _ = c.Leader(ctx) // nobody, in an election
	}
	if !slices.Contains(alive, name) {
		name = alive[0]
	}
	return name
}

// fate is a kill in the middle of a move.
type fate struct {
	action placement.Action
	who    string
}

// While copies are made on other nodes for one that is down, and go home when it is back, nodes are killed right after
// each kind of step: nothing is lost, and everything comes home.
func TestKillsAtEveryStepOfAMove(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(seed(t), 0))
	c := cluster.Run(t, sharded(4, 8, 2, with("--down-after=2s")...))
	awaitHome(t, c, "n1")
	var l ledger
	ctx, cancel := context.WithCancel(t.Context())
	wait := trickle(ctx, t, c, &l, "moves", 10*time.Millisecond)
	defer wait()
	defer cancel()

	rounds := [][2]fate{ // while the copies are made, and while they go home
		{{placement.AddLearner, receiver}, {placement.AddLearner, reconciler}},
		{{placement.Promote, shardLeader}, {placement.Promote, receiver}},
		{{placement.Remove, reconciler}, {placement.Remove, shardLeader}},
	}
	random.Shuffle(len(rounds), func(i, j int) { rounds[i], rounds[j] = rounds[j], rounds[i] })
	for deadline := time.Now().Add(*campaignFlag); len(rounds) > 0; rounds = rounds[1:] {
		away := c.Names()[random.IntN(4)]
		strike(t, c, away, rounds[0])
		if len(rounds) == 1 && time.Now().Before(deadline) {
			actions, people := []placement.Action{placement.AddLearner, placement.Promote, placement.Remove}, []string{receiver, shardLeader, reconciler}
			any := func() fate { return fate{actions[random.IntN(3)], people[random.IntN(3)]} }
			rounds = append(rounds, [2]fate{any(), any()})
		}
	}
	cancel()
	wait()
	onDisk(t, c, awaitHome(t, c, "n1"))
	verify(t, c, &l)
	sameInEveryShard(t, c)
	t.Logf("all %d acknowledged writes are there", l.count())
}

// strike lets a node be away and come back, with a kill in the middle of each.
func strike(t *testing.T, c *cluster.Cluster, away string, fates [2]fate) {
	t.Helper()
	watch, before := watchMoves(c), time.Now()
	must(t, c.Node(away).Kill())
	said := killAfter(t, c, watch, fates[0])
	awaitHome(t, c, others(c, away)[0]) // without it, so that everything has to move again
	watch = watchMoves(c)
	must(t, c.StartNodes(liveness(t), away))
	said += "; " + away + " is back, " + killAfter(t, c, watch, fates[1])
	awaitHome(t, c, away)
	t.Logf("killed %s; %s; at home after %v", away, said, time.Since(before).Round(time.Millisecond))
}

// killAfter waits for a step, kills a node, and starts it again.
func killAfter(t *testing.T, c *cluster.Cluster, watch moves, f fate) string {
	t.Helper()
	step := watch.await(t, f.action)
	name := victim(t, c, f.who, step)
	must(t, c.Node(name).Kill())
	if err := c.Node(name).Start(); err != nil {
		t.Fatal(err)
	}
	must(t, c.Node(name).WaitLogged(liveness(t)))
	return fmt.Sprintf("%s of shard %d on %s: killed %s (%s)", step.action, step.shard, step.node, name, f.who)
}
