package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"kvd/integration/cluster"
	"kvd/placement"
)

// Two nodes join three, and leave again, while clients use all of them: the answers are those of one store throughout.
func TestGrowAndShrinkUnderLoad(t *testing.T) {
	t.Parallel()
	seed := seed(t)
	const shards = 8
	c := cluster.Run(t, sharded(3, shards, 2, with("--snapshot-entries=300", "--trailing-entries=50")...))
	data := pairs("grown", 0, 200)
	write(t, c, "n1", data)
	awaitHome(t, c, "n1")
	g := begin(t, c, seed, shards, c.Names()...)
	began := time.Now()
	var joined []string
	for range 2 {
		name, err := c.Join(liveness(t), "n1")
		must(t, err)
		joined = append(joined, name)
		g.through(t, name)
	}
	view := awaitHolding(t, c, true, joined...)
	grown := time.Since(began)
	onDisk(t, c, view)
	for _, name := range joined {
		snapshotOf(t, c, name, "grown/", data)
	}

	began = time.Now()
	for _, name := range joined {
		out, err := c.Run(liveness(t), "n2", "member", "remove", name)
		must(t, err)
		t.Logf("kvd member remove %s: %.200s", name, out)
		code, err := c.Node(name).Exit(liveness(t)) // it has nothing left to do
		must(t, err)
		if code == 0 {
			t.Errorf("%s, which has left, ended as if it had been stopped", name)
		}
		c.Forget(name)
	}
	view = awaitHolding(t, c, false, joined...)
	shrunk := time.Since(began)
	onDisk(t, c, view)
	for _, name := range c.Names() {
		snapshotOf(t, c, name, "grown/", data)
	}
	g.end(t)
	t.Logf("3 nodes, %v joined and had their shares after %v, and had left after %v", joined, grown.Round(time.Millisecond), shrunk.Round(time.Millisecond))
}

// awaitHolding waits until everything is at home, and nodes hold data or don't exist any more.
func awaitHolding(t *testing.T, c *cluster.Cluster, hold bool, names ...string) placement.Overview {
	t.Helper()
	return awaitShards(t, c, "n1", func(view placement.Overview) error {
		for _, name := range names {
			count, known := dataOn(view, name), false
			for _, n := range view.Nodes {
				known = known || n.Name == name
			}
			if known != hold || (count > 0) != hold {
				return fmt.Errorf("%s has the data of %d shards, is a member: %t", name, count, known)
			}
		}
		return eachShard(home)(view)
	})
}

// tally counts requests.
type tally struct {
	mu       sync.Mutex
	answered int
	failures []string
}

func (y *tally) add(what string, err error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if err != nil {
		y.failures = append(y.failures, fmt.Sprintf("%v: %s: %v", time.Now().Format("15:04:05.000"), what, err))
		return
	}
	y.answered++
}

func (y *tally) count() int { y.mu.Lock(); defer y.mu.Unlock(); return y.answered }

// use sends requests through clients with all endpoints, as applications have them, until ctx is done. Each request
// has a minute: what takes that long is stuck, even on a busy machine.
func (y *tally) use(ctx context.Context, t *testing.T, c *cluster.Cluster, workers int, seed uint64) (wait func()) {
	t.Helper()
	var endpoints []string
	for _, name := range c.Names() {
		endpoints = append(endpoints, c.Node(name).ClientAddr())
	}
	var group sync.WaitGroup
	for i := range workers {
		cl, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
		must(t, err)
		t.Cleanup(func() { cl.Close() })
		random := rand.New(rand.NewPCG(seed, uint64(i)))
		group.Go(func() {
			for ctx.Err() == nil {
				request, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
				y.one(request, cl, random)
				cancel()
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	return group.Wait
}

func (y *tally) one(ctx context.Context, cl *clientv3.Client, random *rand.Rand) {
	key := fmt.Sprintf("rolling/%03d", random.IntN(200))
	switch n := random.IntN(10); {
	case n < 5:
		_, err := cl.Put(ctx, key, fmt.Sprint(random.Uint64()))
		y.add("put "+key, err)
	case n < 9:
		_, err := cl.Get(ctx, key)
		y.add("get "+key, err)
	default:
		_, err := cl.Get(ctx, "rolling/", clientv3.WithPrefix(), clientv3.WithLimit(10))
		y.add("get of all shards", err)
	}
}

// Every node is stopped (SIGTERM) and started, one after the other, while clients use the cluster: no request fails.
func TestRollingRestartFailsNoRequest(t *testing.T) {
	t.Parallel()
	seed := seed(t)
	c := cluster.Run(t, sharded(3, 8, 2))
	awaitHome(t, c, "n1")
	var y tally
	ctx, cancel := context.WithCancel(t.Context())
	wait := y.use(ctx, t, c, 8, seed)
	defer wait()
	defer cancel()
	for _, name := range c.Names() {
		before := y.count()
		eventually(t, "requests are answered", func(context.Context) (bool, error) { return y.count() > before+50, nil })
		code, err := c.Node(name).Stop(liveness(t))
		must(t, err)
		if code != 0 {
			t.Errorf("%s stopped with exit code %d", name, code)
		}
		down := y.count()
		eventually(t, "requests are answered without "+name, func(context.Context) (bool, error) { return y.count() > down+50, nil })
		must(t, c.StartNodes(liveness(t), name))
		awaitHome(t, c, name)
	}
	cancel()
	wait()
	for _, failure := range y.failures {
		t.Error(failure)
	}
	t.Logf("stopped and started each of %v: %d requests answered, %d failed", c.Names(), y.answered, len(y.failures))
}

// A node loses its directory while the copies that it had are being made anew elsewhere, and comes back as another
// one: the answers are those of one store throughout.
func TestWipedNodeInTheMiddleOfMoves(t *testing.T) {
	t.Parallel()
	seed := seed(t)
	const shards = 8
	c := cluster.Run(t, sharded(4, shards, 2, with("--down-after=2s", "--snapshot-entries=300", "--trailing-entries=50")...))
	data := pairs("wiped", 0, 200)
	write(t, c, "n1", data)
	awaitHome(t, c, "n1")
	wiped := leader(t, c)
	g := begin(t, c, seed, shards, others(c, wiped)...)
	watch := watchMoves(c)
	must(t, c.Node(wiped).Kill())
	must(t, c.Node(wiped).Wipe())
	step := watch.await(t, placement.Promote)
	must(t, c.StartNodes(liveness(t), wiped))
	view := awaitHome(t, c, wiped)
	if dataOn(view, wiped) == 0 {
		t.Fatalf("%s got nothing back: %+v", wiped, view)
	}
	g.end(t)
	onDisk(t, c, view)

	// What it has counts: another node may fail.
	killed := others(c, wiped)[0]
	must(t, c.Node(killed).Kill())
	readWithin(t, c, []string{wiped}, data, failoverBusy)
	snapshotOf(t, c, wiped, "wiped/", data)
	t.Logf("%s, which led group 0, lost its directory, came back after shard %d had a new copy on %s, and had all its copies again; then %s was killed and nothing was lost",
		wiped, step.shard, step.node, killed)
}
