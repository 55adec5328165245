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

	"kvd/node"
	"kvd/placement"
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
	probes []string         // of each shard a key
	home   map[int][]string // of each shard the nodes that had its data at first

	allServe, redistributed, cameHome time.Duration // how long it took
}

func newShardedDemo(d *demo) *shardedDemo {
	d.flags = []string{
		"--strategy", node.StrategyConsistent, "--shards", fmt.Sprint(demoShards),
		"--replication-factor", fmt.Sprint(demoCopies), "--down-after", demoDownAfter.String(),
	}
	return &shardedDemo{demo: d}
}

// steps runs the demo; all nodes run in the end. An errDataLost means what it says.
func (d *shardedDemo) steps(ctx context.Context) error {
	fmt.Fprintf(d.out, "kvd demo, strategy consistent: %d nodes on this machine share %d shards, %d copies of each\n\n", len(d.nodes), demoShards, demoCopies)
	if err := d.form(ctx); err != nil {
		return err
	}
	if err := d.spread(ctx); err != nil {
		return err
	}
	if err := d.write(ctx, demoPairs); err != nil {
		return err
	}
	if err := d.readBack(ctx, "through all nodes", d.endpoints()...); err != nil {
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

// view asks where the shards are.
func (d *shardedDemo) view(ctx context.Context) (placement.Overview, error) {
	o := d.options()
	o.endpoints = d.endpoints()
	return o.overview(ctx)
}

// spread waits until every shard is where it belongs, and shows where that is.
func (d *shardedDemo) spread(ctx context.Context) error {
	var view placement.Overview
	err := d.until(ctx, "wait for all shards", d.nodes, func(ctx context.Context) (err error) {
		if view, err = d.view(ctx); err != nil {
			return err
		}
		return allOK(view)
	})
	if err != nil {
		return err
	}
	d.home = make(map[int][]string)
	for _, s := range view.Shards {
		d.home[s.Number] = dataNodes(s)
	}
	d.say("the shards are spread: %s", shardsPerNode(view))
	if err := d.findProbes(ctx); err != nil {
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

// allOK is an error unless all shards are at rest.
func allOK(view placement.Overview) error {
	rest := 0
	for _, s := range view.Shards {
		if s.State == stateOK {
			rest++
		}
	}
	if rest == 0 || rest < len(view.Shards) {
		return fmt.Errorf("%d of %d shards are ok", rest, demoShards)
	}
	return nil
}

// dataNodes are the nodes that live and have the data of a shard and a vote, in order.
func dataNodes(s placement.ShardOverview) (nodes []string) {
	for _, r := range s.Replicas {
		if r.Role == placement.Data && r.State == replicaVoter && r.Alive {
			nodes = append(nodes, r.Node)
		}
	}
	slices.Sort(nodes)
	return nodes
}

// shardsPerNode counts the live copies on each node.
func shardsPerNode(view placement.Overview) string {
	count := make(map[string]int)
	for _, s := range view.Shards {
		for _, name := range dataNodes(s) {
			count[name]++
		}
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(count)) {
		list = append(list, fmt.Sprintf("%s has %d", name, count[name]))
	}
	return strings.Join(list, ", ")
}

func (d *shardedDemo) locate(ctx context.Context, key string) (shard int, err error) {
	o := d.options()
	o.endpoints = d.endpoints()
	err = o.admin(ctx, func(ctx context.Context, c kvdpb.AdminClient) error {
		at, err := c.Locate(ctx, &kvdpb.LocateRequest{Key: []byte(key)})
		shard = int(at.GetShard())
		return err
	})
	return shard, err
}

// findProbes finds a key for each shard.
func (d *shardedDemo) findProbes(ctx context.Context) error {
	o := d.options()
	o.endpoints = d.endpoints()
	d.probes = make([]string, demoShards)
	return o.admin(ctx, func(ctx context.Context, c kvdpb.AdminClient) error {
		for i, found := 0, 0; found < demoShards; i++ {
			key := fmt.Sprintf("%sprobe/%03d", demoPrefix, i)
			at, err := c.Locate(ctx, &kvdpb.LocateRequest{Key: []byte(key)})
			if err != nil {
				return err
			}
			if shard := int(at.GetShard()); shard >= demoShards {
				return fmt.Errorf("key %s is in shard %d of %d", key, shard, demoShards)
			} else if d.probes[shard] == "" {
				d.probes[shard] = key
				found++
			}
		}
		return nil
	})
}

// readAcross reads all pairs at once. What is missing or different is an errDataLost.
func (d *shardedDemo) readAcross(ctx context.Context) error {
	client, err := d.options().connect(ctx, d.endpoints()...)
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
func (d *shardedDemo) loseForGood(ctx context.Context) (*demoNode, error) {
	lost, _, err := d.leader(ctx)
	if err != nil {
		return nil, err
	}
	led := 0
	if view, err := d.view(ctx); err == nil {
		for _, s := range view.Shards {
			led += b2i(s.Leader == lost.name)
		}
	}
	lost.kill()
	killed := time.Now()
	d.say("kill -9 %s, which leads %s and keeps the cluster map", lost.name, plural(led, "shard"))
	first, err := d.writeAll(ctx, killed)
	if err != nil {
		return nil, err
	}
	d.allServe = time.Since(killed)
	d.say("all %d shards take writes %s after the kill, the first one after %s", demoShards, short(d.allServe), short(first))
	if err := d.readBack(ctx, "through the survivors", d.endpoints()...); err != nil {
		return nil, err
	}
	view, err := d.awaitCopies(ctx, lost)
	if err != nil {
		return nil, err
	}
	d.redistributed = time.Since(killed)
	d.say("%s stayed away: %s after the kill every shard has %d live copies again", lost.name, short(d.redistributed), demoCopies)
	d.say("the shards now: %s", shardsPerNode(view))
	return lost, nil
}

// writeAll writes a key of each shard, all at once, each until it succeeds. first is when the first one did.
func (d *shardedDemo) writeAll(ctx context.Context, since time.Time) (first time.Duration, err error) {
	client, err := d.options().connect(ctx, d.endpoints()...)
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
func (d *shardedDemo) awaitCopies(ctx context.Context, lost *demoNode) (view placement.Overview, err error) {
	said, last := time.Now(), ""
	err = d.within(ctx, demoMoveLimit, "make copies elsewhere", nil, func(ctx context.Context) (err error) {
		if view, err = d.view(ctx); err != nil {
			return err
		}
		short := 0
		for _, s := range view.Shards {
			short += b2i(len(dataNodes(s)) < demoCopies || slices.Contains(dataNodes(s), lost.name))
		}
		if short == 0 && len(view.Shards) == demoShards {
			return nil
		}
		err = fmt.Errorf("%d of %d shards have not", short, demoShards)
		if now := fmt.Sprintf("%s is %s; %s lack a copy", lost.name, stateOf(view, lost.name), plural(short, "shard")); now != last && time.Since(said) >= demoSayEvery {
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

func stateOf(view placement.Overview, name string) string {
	for _, n := range view.Nodes {
		if n.Name == name {
			return n.State
		}
	}
	return "gone"
}

// loseSecond kills another node: with the first one gone, the new copies have to carry.
func (d *shardedDemo) loseSecond(ctx context.Context) (*demoNode, error) {
	var second *demoNode
	for _, n := range d.nodes {
		if n.running() {
			second = n
		}
	}
	second.kill()
	killed := time.Now()
	d.say("kill -9 %s, too", second.name)
	if _, err := d.writeAll(ctx, killed); err != nil {
		return nil, err
	}
	d.say("all %d shards take writes %s after the kill", demoShards, short(time.Since(killed)))
	return second, d.readBack(ctx, "through the survivors", d.endpoints()...)
}

// comeHome starts the killed nodes again and waits until all shards are where they were at first.
func (d *shardedDemo) comeHome(ctx context.Context, nodes ...*demoNode) error {
	begin := time.Now()
	for _, n := range nodes {
		if err := d.run(n); err != nil {
			return err
		}
		d.say("%s starts again (pid %d)", n.name, n.process.Process.Pid)
	}
	said := time.Now()
	var view placement.Overview
	err := d.within(ctx, demoMoveLimit, "bring the shards home", d.nodes, func(ctx context.Context) (err error) {
		if view, err = d.view(ctx); err != nil {
			return err
		}
		away := d.away(view)
		if away == 0 {
			return allOK(view)
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
		if err := d.readBack(ctx, "through "+n.name, n.client); err != nil {
			return err
		}
	}
	return nil
}

// away counts the shards that are not where they were at first.
func (d *shardedDemo) away(view placement.Overview) int {
	away := demoShards
	for _, s := range view.Shards {
		if slices.Equal(dataNodes(s), d.home[s.Number]) {
			away--
		}
	}
	return away
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
