package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
	"kvd/placement"
)

// sharded configures a cluster of the strategy `consistent`.
func sharded(nodes, shards, copies int, flags ...string) cluster.Config {
	return cluster.Config{Nodes: nodes, Args: append([]string{"--strategy=consistent", fmt.Sprintf("--shards=%d", shards),
		fmt.Sprintf("--replication-factor=%d", copies)}, flags...)}
}

// failoverBusy is how long a cluster may take to serve again while other tests run. It is a bound for what is stuck.
const failoverBusy = cluster.Liveness / 2

// overview asks a node where the shards are, as `kvd shards` prints it.
func overview(ctx context.Context, c *cluster.Cluster, node string) (placement.Overview, error) {
	var view placement.Overview
	err := c.RunJSON(ctx, &view, node, "shards")
	if err == nil && (view.Config == nil || len(view.Shards) != view.Config.Shards) {
		err = fmt.Errorf("%d shards are shown", len(view.Shards))
	}
	return view, err
}

// awaitShards waits until what `kvd shards` prints pleases, and returns it.
func awaitShards(t *testing.T, c *cluster.Cluster, node string, pleases func(placement.Overview) error) (view placement.Overview) {
	t.Helper()
	err := cluster.Until(liveness(t), func(ctx context.Context) error {
		var err error
		if view, err = overview(ctx, c, node); err != nil {
			return err
		}
		return pleases(view)
	})
	must(t, err)
	return view
}

// eachShard asks something of every shard.
func eachShard(pleases func(placement.ShardOverview) error) func(placement.Overview) error {
	return func(view placement.Overview) error {
		for _, s := range view.Shards {
			if err := pleases(s); err != nil {
				return fmt.Errorf("shard %d (%s, led by %q): %w", s.Number, s.State, s.Leader, err)
			}
		}
		return nil
	}
}

// home says whether a shard is exactly where the ring wants it, with all its replicas alive, and led by the first node
// in the ring's order.
func home(s placement.ShardOverview) error {
	var want, have []string
	for _, r := range s.Target {
		want = append(want, r.Node+" "+string(r.Role))
	}
	for _, r := range s.Replicas {
		if r.State != "voter" || !r.Alive {
			return fmt.Errorf("%s is a %s, alive: %t", r.ID, r.State, r.Alive)
		}
		have = append(have, r.Node+" "+string(r.Role))
	}
	slices.Sort(want)
	slices.Sort(have)
	if s.State != "ok" || !slices.Equal(want, have) {
		return fmt.Errorf("it is on %v, wanted on %v", have, want)
	}
	if first := s.Target[0]; s.Leader != first.Node || first.Role != placement.Data {
		return fmt.Errorf("it is to be led by %s", first.Node)
	}
	return nil
}

// copied says whether a shard has its number of live, caught-up data replicas.
func copied(copies int) func(placement.ShardOverview) error {
	return func(s placement.ShardOverview) error {
		live := 0
		for _, r := range s.Replicas {
			if r.Role == placement.Data && r.State == "voter" && r.Alive && r.Match+64 >= r.Commit && r.Commit > 0 {
				live++
			}
		}
		if s.Leader == "" || live < copies {
			return fmt.Errorf("%d live copies of %d: %+v", live, copies, s.Replicas)
		}
		return nil
	}
}

// awaitHome waits until everything is where the ring wants it.
func awaitHome(t *testing.T, c *cluster.Cluster, node string) placement.Overview {
	t.Helper()
	return awaitShards(t, c, node, eachShard(home))
}

// onDisk checks that the directories of replicas on the nodes' disks are exactly those that the cluster has: what a
// node held for another one is gone.
func onDisk(t *testing.T, c *cluster.Cluster, view placement.Overview) {
	t.Helper()
	var want []string
	for _, s := range view.Shards {
		for _, r := range s.Replicas {
			_, number, _ := strings.Cut(string(r.ID), "/")
			want = append(want, filepath.Join(r.Node, strconv.FormatUint(placement.GroupOf(s.Number), 10), number))
		}
	}
	slices.Sort(want)
	eventually(t, "no more directories than replicas", func(context.Context) (bool, error) {
		var have []string
		for _, name := range c.Names() {
			base := filepath.Join(c.Node(name).Dir, "groups")
			dirs, err := filepath.Glob(filepath.Join(base, "*", "*"))
			if err != nil {
				return false, err
			}
			for _, dir := range dirs {
				info, err := os.Stat(dir)
				if errors.Is(err, os.ErrNotExist) || err == nil && !info.IsDir() {
					continue
				}
				path, err := filepath.Rel(base, dir)
				if err != nil {
					return false, err
				}
				have = append(have, filepath.Join(name, path))
			}
		}
		slices.Sort(have)
		if !slices.Equal(have, want) {
			return false, fmt.Errorf("on disk are %v, not %v", have, want)
		}
		return true, nil
	})
}

// readWithin gets every pair through each of the nodes, with linearizable reads that begin at once and have been
// answered by a deadline. It returns how long the last one took.
func readWithin(t *testing.T, c *cluster.Cluster, names []string, data []pair, limit time.Duration) time.Duration {
	t.Helper()
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	errs := make(chan error, len(names)*len(data))
	var group sync.WaitGroup
	for _, name := range names {
		cl := client(t, c, name)
		for _, p := range data {
			group.Go(func() {
				var resp *clientv3.GetResponse
				err := cluster.Until(ctx, func(ctx context.Context) (err error) {
					resp, err = cl.Get(ctx, p.key)
					return err
				})
				if err == nil && (len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != p.value) {
					err = fmt.Errorf("lost: it should be %q, and is %v", p.value, resp.Kvs)
				}
				if err != nil {
					errs <- fmt.Errorf("%s through %s: %w", p.key, name, err)
				}
			})
		}
	}
	group.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	if t.Failed() {
		t.FailNow()
	}
	return time.Since(began)
}

// snapshotOf reads everything under a prefix, in all shards at one moment, and compares it.
func snapshotOf(t *testing.T, c *cluster.Cluster, name, prefix string, want []pair) {
	t.Helper()
	var resp *clientv3.GetResponse
	cl := client(t, c, name)
	must(t, cluster.Until(liveness(t), func(ctx context.Context) (err error) {
		resp, err = cl.Get(ctx, prefix, clientv3.WithPrefix())
		return err
	}))
	if len(resp.Kvs) != len(want) || resp.Count != int64(len(want)) {
		t.Fatalf("%s has %d keys under %s (count %d), not %d", name, len(resp.Kvs), prefix, resp.Count, len(want))
	}
	for i, p := range want { // both are in the order of keys
		if kv := resp.Kvs[i]; string(kv.Key) != p.key || string(kv.Value) != p.value {
			t.Fatalf("%s has %s = %q where %s = %q should be", name, kv.Key, kv.Value, p.key, p.value)
		}
	}
}
