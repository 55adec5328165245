package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
	"kvd/integration/linearizability"
	"kvd/integration/nemesis"
	"kvd/ring"
)

// taggedKeys are two keys for each of some tags, each tag in a shard of its own.
func taggedKeys(shards, tags int) (keys []string) {
	taken := make(map[int]bool)
	for i := 0; len(keys) < 2*tags; i++ {
		key := fmt.Sprintf("lin/{%d}", i)
		if shard := ring.ShardOf([]byte(key), shards); !taken[shard] {
			taken[shard] = true
			keys = append(keys, key+"a", key+"b")
		}
	}
	return keys
}

// campaign is concurrent clients on a few keys in several shards of a cluster.
type campaign struct {
	c       *cluster.Cluster
	shards  int
	traffic linearizability.Traffic
	history linearizability.History
	moving  bool    // shards move under faults: some may stand still meanwhile
	judges  *judges // nil = none
	ctx     context.Context
	cancel  context.CancelFunc
	group   sync.WaitGroup
}

// begin starts clients, some for each node.
func begin(t *testing.T, c *cluster.Cluster, seed uint64, shards int, names ...string) *campaign {
	t.Helper()
	g := &campaign{c: c, shards: shards, traffic: linearizability.Traffic{Keys: taggedKeys(shards, min(4, shards)), Seed: seed,
		Think: 15 * time.Millisecond, Timeout: 3 * time.Second, Sharded: true}}
	g.ctx, g.cancel = context.WithCancel(t.Context())
	t.Cleanup(g.stop)
	g.through(t, names...)
	return g
}

// through starts further clients.
func (g *campaign) through(t *testing.T, names ...string) {
	t.Helper()
	traffic := g.traffic
	for _, name := range slices.Repeat(names, 3) {
		traffic.Services = append(traffic.Services, newService(t, g.c, name))
	}
	traffic.Seed += uint64(len(g.history.Ops()))
	g.group.Go(func() { traffic.Run(g.ctx, &g.history) })
}

func (g *campaign) stop() {
	g.cancel()
	g.group.Wait()
}

// end stops the clients and judges what they were told.
func (g *campaign) end(t *testing.T, windows ...linearizability.Window) {
	t.Helper()
	g.stop()
	ops := g.history.Ops()
	summary := linearizability.Summarize(ops, windows)
	t.Logf("%+v", summary)
	if g.moving {
		clear(summary.SnapshotsDuring) // none need have succeeded
	}
	if err := errors.Join(summary.Vacuous(), summary.VacuousSnapshots()); err != nil {
		t.Error(err)
	}
	if err := linearizability.Check(ops, linearizability.Config{OneOrder: true, Sharded: true, Timeout: 2 * time.Minute}); err != nil {
		t.Error(err)
	}
	if g.judges != nil {
		g.judges.judge(t, ops, g.shards)
	}
}

// progress reports whether changes that were asked for after a moment have succeeded, and snapshots, for which every
// shard has to be there.
func (g *campaign) progress(since int64) bool {
	return g.history.ChangesSince(since) > 20 && (g.moving || g.history.SnapshotsSince(since) > 3)
}

// shardedPatient is a cluster whose nodes have settled when each has read all shards.
type shardedPatient struct{ patient }

func (p shardedPatient) Settle(ctx context.Context) error {
	if err := p.patient.Settle(ctx); err != nil {
		return err
	}
	for _, name := range p.Names() {
		if err := readsEveryShard(ctx, p.Cluster, name); err != nil {
			return fmt.Errorf("%s does not reach every shard: %w", name, err)
		}
	}
	return nil
}

// readsEveryShard waits until a node has read all shards, linearizably.
func readsEveryShard(ctx context.Context, c *cluster.Cluster, name string) error {
	cl, err := c.Client(name)
	if err != nil {
		return err
	}
	return cluster.Until(ctx, func(ctx context.Context) error {
		_, err := cl.Get(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithCountOnly())
		return err
	})
}

// Concurrent clients on few keys in different shards, which they also read all at one moment, while nodes are killed,
// stopped and cut off, the one that leads group 0 above all: the answers are those of one store that does one thing at a
// time. In a long campaign copies are also made anew meanwhile. A shard whose surplus copy makes room for a witness has
// two voters for a moment, and stands still if one is lost just then; so there less progress is asked for.
func TestShardsLinearizableUnderFaults(t *testing.T) {
	t.Parallel()
	seed := seed(t)
	const shards = 8
	moving := *campaignFlag > 0
	downAfter := "--down-after=30s"
	if moving {
		downAfter = "--down-after=2s"
	}
	cfg := sharded(*nodesFlag, shards, (*nodesFlag+1)/2, with("--snapshot-entries=300", "--trailing-entries=50", downAfter)...)
	cfg.Links = true
	c := cluster.Run(t, cfg)
	g := begin(t, c, seed, shards, c.Names()...)
	g.moving = moving
	g.judges = summon(t, c, seed, &g.history, g.traffic.Keys)
	until, end := context.WithTimeout(t.Context(), *campaignFlag)
	defer end()
	windows, err := nemesis.Run(until, shardedPatient{patient{c}}, nemesis.Config{
		Faults: faults(seed), Seed: seed, Hold: time.Second, Rest: 300 * time.Millisecond, Timeout: cluster.Liveness,
		Now: g.history.Now, Progress: g.progress, Broke: g.judges.leaseLog.Broke, Logf: t.Logf,
	})
	if err != nil {
		t.Error(err)
	}
	g.end(t, windows...)
	awaitHome(t, c, "n1")
	sameInEveryShard(t, c)
}

// faults are all there are in a campaign, and otherwise those that hit the leader of group 0, the end of everybody, and
// a few of the others.
func faults(seed uint64) (chosen []nemesis.Fault) {
	all := nemesis.Faults()
	if *campaignFlag > 0 {
		return all
	}
	random := rand.New(rand.NewPCG(seed, 1))
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	others := 3
	for _, f := range all {
		switch {
		case slices.Contains([]string{"kill leader", "pause leader", "cut leader off", "freeze leader out", "kill all"}, f.Name):
			chosen = append(chosen, f)
		case others > 0:
			others--
			chosen = append(chosen, f)
		}
	}
	return chosen
}

// sameInEveryShard checks that what all nodes answer for all shards together is the same (invariant I4).
func sameInEveryShard(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	resp, err := client(t, c, c.Names()[0]).Get(liveness(t), "\x00", clientv3.WithFromKey())
	must(t, err)
	var want uint32
	for i, name := range c.Names() {
		cl := client(t, c, name)
		hash, err := cl.HashKV(liveness(t), cl.Endpoints()[0], resp.Header.Revision)
		must(t, err)
		if i == 0 {
			want = hash.Hash
		}
		if hash.Hash != want {
			t.Errorf("at revision %d %s holds something else than %s", resp.Header.Revision, name, c.Names()[0])
		}
	}
}
