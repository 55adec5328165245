package integration

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
)

// Flags of long campaigns (scripts/soak).
var (
	seedFlag     = flag.Uint64("seed", 0, "seed of the random choices; 0 = a random one, which is printed")
	nodesFlag    = flag.Int("nodes", 3, "how many nodes the campaigns under faults have")
	campaignFlag = flag.Duration("campaign", 0, "how long the campaigns under faults last; 0 = one round of faults")
)

// atOnce is how many tests run beside each other unless -parallel is set. They mostly wait for their nodes.
const atOnce = 4

func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", strconv.Itoa(atOnce)); err != nil {
		panic(err)
	}
	flag.Parse()
	code := m.Run()
	cluster.RemoveBinary()
	os.Exit(code)
}

// seed returns the seed of a test and prints it.
func seed(t *testing.T) uint64 {
	s := *seedFlag
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("seed %d (repeat with -seed)", s)
	return s
}

// liveness bounds a step of a test: a cluster that takes that long is stuck.
func liveness(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), cluster.Liveness)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// quick makes nodes notice a dead leader sooner than by default.
var quick = []string{"--heartbeat-timeout=500ms", "--election-timeout=500ms"}

func with(flags ...string) []string { return append(append([]string(nil), quick...), flags...) }

func client(t *testing.T, c *cluster.Cluster, name string) *clientv3.Client {
	t.Helper()
	cl, err := c.Client(name)
	must(t, err)
	return cl
}

// pair is a key with its value.
type pair struct{ key, value string }

func pairs(prefix string, from, to int) []pair {
	var out []pair
	for i := from; i < to; i++ {
		out = append(out, pair{fmt.Sprintf("%s/%05d", prefix, i), fmt.Sprintf("%s-value-%d", prefix, i)})
	}
	return out
}

// write puts pairs through a node, several at a time. Each is tried until it is acknowledged.
func write(t *testing.T, c *cluster.Cluster, name string, pairs []pair) {
	t.Helper()
	ctx, cl := liveness(t), client(t, c, name)
	work := make(chan pair)
	errs := make(chan error, 8)
	var group sync.WaitGroup
	for range cap(errs) {
		group.Go(func() {
			for p := range work {
				err := cluster.Until(ctx, func(ctx context.Context) error {
					_, err := cl.Put(ctx, p.key, p.value)
					return err
				})
				if err != nil {
					select {
					case errs <- fmt.Errorf("put %s through %s: %w", p.key, name, err):
					default:
					}
				}
			}
		})
	}
	for _, p := range pairs {
		work <- p
	}
	close(work)
	group.Wait()
	close(errs)
	for err := range errs {
		t.Fatal(err)
	}
}

// read gets every pair through a node with linearizable reads.
func read(t *testing.T, c *cluster.Cluster, name string, pairs []pair) {
	t.Helper()
	ctx, cl := liveness(t), client(t, c, name)
	for _, p := range pairs {
		var resp *clientv3.GetResponse
		err := cluster.Until(ctx, func(ctx context.Context) error {
			var err error
			resp, err = cl.Get(ctx, p.key)
			return err
		})
		must(t, err)
		if len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != p.value {
			t.Fatalf("lost: %s should be %q, and %s answers %v", p.key, p.value, name, resp.Kvs)
		}
	}
}

// leader waits for a leader other than the given nodes.
func leader(t *testing.T, c *cluster.Cluster, not ...string) string {
	t.Helper()
	name, err := c.WaitLeader(liveness(t), not...)
	must(t, err)
	return name
}

// others returns the names of the nodes but the given ones.
func others(c *cluster.Cluster, not ...string) []string {
	var names []string
	for _, name := range c.Names() {
		keep := true
		for _, n := range not {
			keep = keep && n != name
		}
		if keep {
			names = append(names, name)
		}
	}
	return names
}

// metric reads a metric of a node that serves.
func metric(t *testing.T, c *cluster.Cluster, node, name string) float64 {
	t.Helper()
	value, err := c.Metric(liveness(t), node, name)
	must(t, err)
	return value
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func(ctx context.Context) (bool, error)) {
	t.Helper()
	err := cluster.Until(liveness(t), func(ctx context.Context) error {
		ok, err := holds(ctx)
		if err == nil && !ok {
			err = fmt.Errorf("not yet: %s", what)
		}
		return err
	})
	must(t, err)
}

// caughtUp waits until a node's state has everything that is committed on the leader now.
func caughtUp(t *testing.T, c *cluster.Cluster, name, leader string) {
	t.Helper()
	goal := metric(t, c, leader, "kvd_shard_commit_index")
	eventually(t, name+" has caught up", func(ctx context.Context) (bool, error) {
		applied, err := c.Metric(ctx, name, "kvd_shard_applied_index")
		return applied >= goal, err
	})
}

// readAll reads everything through a node, a page at a time.
func readAll(t *testing.T, c *cluster.Cluster, name string) map[string]string {
	t.Helper()
	ctx, cl := liveness(t), client(t, c, name)
	got, from, revision := make(map[string]string), "\x00", int64(0)
	for {
		resp, err := cl.Get(ctx, from, clientv3.WithFromKey(), clientv3.WithLimit(2000), clientv3.WithRev(revision))
		must(t, err)
		for _, kv := range resp.Kvs {
			got[string(kv.Key)] = string(kv.Value)
		}
		if !resp.More {
			return got
		}
		if revision == 0 {
			revision = resp.Header.Revision // every page is of the first one's moment
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}
