package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/bench/local"
	"kvd/node"
	"kvd/server/kvdpb"
)

// What a demo of shards is made of.
const (
	demoShards    = 16
	demoCopies    = 3
	demoDownAfter = 3 * time.Second
	demoMoveLimit = 90 * time.Second // for all copies to be made elsewhere, or to come home
	demoSayEvery  = 2 * time.Second  // at most
)

// shardedDemo is a demo of the strategy that spreads keys over shards.
type shardedDemo struct {
	*demo
	probes []string           // of each shard a key
	home   map[int32][]string // of each shard the nodes that had its data at first

	allServe, redistributed, cameHome time.Duration // how long it took
}

func newShardedDemo(d *demo) *shardedDemo {
	d.Flags = []string{
		"--strategy", node.StrategyConsistent, "--shards", fmt.Sprint(demoShards),
		"--replication-factor", fmt.Sprint(demoCopies), "--down-after", demoDownAfter.String(),
	}
	return &shardedDemo{demo: d}
}

// steps runs the demo; all nodes run in the end. An errDataLost means what it says.
func (d *shardedDemo) steps(ctx context.Context) error {
	fmt.Fprintf(d.out, "kvd demo, strategy consistent: %d nodes on this machine share %d shards, %d copies of each\n\n", len(d.Nodes), demoShards, demoCopies)
	if err := d.form(ctx); err != nil {
		return err
	}
	if err := d.spread(ctx); err != nil {
		return err
	}
	if err := d.write(ctx, demoPairs); err != nil {
		return err
	}
	if err := d.readBack(ctx, "through all nodes", d.Endpoints()...); err != nil {
		return err
	}
	if err := d.readAcross(ctx); err != nil {
		return err
	}
	lost, err := d.loseForGood(ctx)
	if err != nil {
		return err
	}
	if err := d.write(ctx, demoMore); err != nil {
		return err
	}
	second, err := d.loseSecond(ctx)
	if err != nil {
		return err
	}
	return d.comeHome(ctx, lost, second)
}

// spread waits until every shard is where it belongs, and shows where that is.
func (d *shardedDemo) spread(ctx context.Context) error {
	var view *kvdpb.ShardsResponse
	err := d.until(ctx, "wait for all shards", d.Nodes, func(ctx context.Context) (err error) {
		if view, err = d.Shards(ctx); err != nil {
			return err
		}
		return local.AllOK(view)
	})
	if err != nil {
		return err
	}
	d.home = local.Homes(view)
	d.say("the shards are spread: %s", shardsPerNode(view))
	if d.probes, err = d.Probes(ctx, demoPrefix+"probe/", demoShards); err != nil {
		return err
	}
	key := fmt.Sprintf("%s%06d", demoPrefix, 0)
	at, err := d.locate(ctx, key)
	if err != nil {
		return err
	}
	d.say("%s will be in shard %d, on %s (kvd locate finds any key)", key, at, strings.Join(d.home[at], ", "))
	return nil
}

// shardsPerNode counts the live copies on each node.
func shardsPerNode(view *kvdpb.ShardsResponse) string {
	count := make(map[string]int)
	for _, s := range view.GetShards() {
		for _, name := range local.DataNodes(s) {
			count[name]++
		}
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(count)) {
		list = append(list, fmt.Sprintf("%s has %d", name, count[name]))
	}
	return strings.Join(list, ", ")
}

func (d *shardedDemo) locate(ctx context.Context, key string) (shard int32, err error) {
	err = d.With(func(client *clientv3.Client) error {
		at, err := adminOf(client).Locate(ctx, &kvdpb.LocateRequest{Key: []byte(key)})
		shard = at.GetShard()
		return err
	})
	return shard, err
}

// readAcross reads all pairs at once. What is missing or different is an errDataLost.
func (d *shardedDemo) readAcross(ctx context.Context) error {
	client, err := d.Connect()
	if err != nil {
		return err
	}
	defer client.Close()
	begin := time.Now()
	var got *clientv3.GetResponse
	err = d.until(ctx, "read all shards at once", nil, func(ctx context.Context) (err error) {
		got, err = client.Get(ctx, demoPrefix, clientv3.WithPrefix())
		return err
	})
	if err != nil {
		return err
	}
	values := make(map[string]string, len(got.Kvs))
	for _, kv := range got.Kvs {
		values[string(kv.Key)] = string(kv.Value)
	}
	for key, want := range d.acked {
		if values[key] != want {
			return fmt.Errorf("%w: %s is missing or wrong in a read of all shards", errDataLost, key)
		}
	}
	d.say("one read across all shards in %s: %d pairs as they all were at revision %d", short(time.Since(begin)), len(got.Kvs), got.Header.Revision)
	return nil
}

// loseForGood kills the node that leads group 0, which keeps the map, and waits until its copies are elsewhere.
func (d *shardedDemo) loseForGood(ctx context.Context) (*local.Node, error) {
	lost, _, err := d.leader(ctx)
	if err != nil {
		return nil, err
	}
	led := 0
	if view, err := d.Shards(ctx); err == nil {
		for _, s := range view.GetShards() {
			led += b2i(s.GetLeader() == lost.Name)
		}
	}
	lost.Kill()
	killed := time.Now()
	d.say("kill -9 %s, which leads %s and keeps the cluster map", lost.Name, plural(led, "shard"))
	first, err := d.writeAll(ctx, killed)
	if err != nil {
		return nil, err
	}
	d.allServe = time.Since(killed)
	d.say("all %d shards take writes %s after the kill, the first one after %s", demoShards, short(d.allServe), short(first))
	if err := d.readBack(ctx, "through the survivors", d.Endpoints()...); err != nil {
		return nil, err
	}
	view, err := d.awaitCopies(ctx, lost)
	if err != nil {
		return nil, err
	}
	d.redistributed = time.Since(killed)
	d.say("%s stayed away: %s after the kill every shard has %d live copies again", lost.Name, short(d.redistributed), demoCopies)
	d.say("the shards now: %s", shardsPerNode(view))
	return lost, nil
}

// writeAll writes a key of each shard, all at once, each until it succeeds. first is when the first one did.
func (d *shardedDemo) writeAll(ctx context.Context, since time.Time) (first time.Duration, err error) {
	client, err := d.Connect()
	if err != nil {
		return 0, err
	}
	defer client.Close()
	var mu sync.Mutex
	err = each(ctx, len(d.probes), func(ctx context.Context, i int) error {
		err := d.until(ctx, fmt.Sprintf("write to shard %d", i), nil, func(ctx context.Context) error {
			return d.put(ctx, client, d.probes[i])
		})
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		first = cmp.Or(first, time.Since(since))
		return nil
	})
	return first, err
}

// awaitCopies waits until every shard has all its copies on nodes that live: those of lost have been made elsewhere.
func (d *shardedDemo) awaitCopies(ctx context.Context, lost *local.Node) (view *kvdpb.ShardsResponse, err error) {
	said, last := time.Now(), ""
	err = local.Until(ctx, demoMoveLimit, "make copies elsewhere", nil, func(ctx context.Context) (err error) {
		if view, err = d.Shards(ctx); err != nil {
			return err
		}
		short := 0
		for _, s := range view.GetShards() {
			short += b2i(len(local.DataNodes(s)) < demoCopies || slices.Contains(local.DataNodes(s), lost.Name))
		}
		if short == 0 && len(view.GetShards()) == demoShards {
			return nil
		}
		err = fmt.Errorf("%d of %d shards have not", short, demoShards)
		if now := fmt.Sprintf("%s is %s; %s lack a copy", lost.Name, stateOf(view, lost.Name), plural(short, "shard")); now != last && time.Since(said) >= demoSayEvery {
			said, last = time.Now(), now
			d.say("%s", now)
		}
		return pauseFor(ctx, err)
	})
	return view, err
}

// pauseFor is err, a moment later: moves need not be looked at all the time.
func pauseFor(ctx context.Context, err error) error {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
	}
	return err
}

func stateOf(view *kvdpb.ShardsResponse, name string) string {
	for _, n := range view.GetNodes() {
		if n.GetName() == name {
			return n.GetState()
		}
	}
	return "gone"
}

// loseSecond kills another node: with the first one gone, the new copies have to carry.
func (d *shardedDemo) loseSecond(ctx context.Context) (*local.Node, error) {
	var second *local.Node
	for _, n := range d.Nodes {
		if n.Running() {
			second = n
		}
	}
	second.Kill()
	killed := time.Now()
	d.say("kill -9 %s, too", second.Name)
	if _, err := d.writeAll(ctx, killed); err != nil {
		return nil, err
	}
	d.say("all %d shards take writes %s after the kill", demoShards, short(time.Since(killed)))
	return second, d.readBack(ctx, "through the survivors", d.Endpoints()...)
}

// comeHome starts the killed nodes again and waits until all shards are where they were at first.
func (d *shardedDemo) comeHome(ctx context.Context, nodes ...*local.Node) error {
	begin := time.Now()
	for _, n := range nodes {
		if err := d.Start(n); err != nil {
			return err
		}
		d.say("%s starts again (pid %d)", n.Name, n.Pid())
	}
	said := time.Now()
	var view *kvdpb.ShardsResponse
	err := local.Until(ctx, demoMoveLimit, "bring the shards home", d.Nodes, func(ctx context.Context) (err error) {
		if view, err = d.Shards(ctx); err != nil {
			return err
		}
		away := local.Away(view, d.home)
		if away == 0 {
			return local.AllOK(view)
		}
		if time.Since(said) >= demoSayEvery {
			said = time.Now()
			d.say("%d of %d shards are not home yet", away, demoShards)
		}
		return pauseFor(ctx, fmt.Errorf("%d of %d shards are not where they were", away, demoShards))
	})
	if err != nil {
		return err
	}
	d.cameHome = time.Since(begin)
	d.say("the keys are home: every shard is where it was, %s after the starts: %s", short(d.cameHome), shardsPerNode(view))
	for _, n := range nodes {
		if err := d.readBack(ctx, "through "+n.Name, n.Client); err != nil {
			return err
		}
	}
	return nil
}

func (d *shardedDemo) measurements() [][2]string {
	return [][2]string{
		{"writes", fmt.Sprintf("%s on average, %d at a time, each on the disks of a majority of its shard", short(d.writeMean), demoClients)},
		{"reads", fmt.Sprintf("%s on average, linearizable, through every node", short(d.readMean))},
		{"failover", fmt.Sprintf("%s from kill -9 until all shards took writes", short(d.allServe))},
		{"redistribution", fmt.Sprintf("%s from kill -9 to %d live copies of every key, %v of it waiting (--down-after)", short(d.redistributed), demoCopies, demoDownAfter)},
		{"homecoming", fmt.Sprintf("%s from the starts until every shard was where it had been", short(d.cameHome))},
	}
}
