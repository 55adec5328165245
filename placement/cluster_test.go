package placement

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
	"kvd/shard/raftlog"
	"kvd/transport"
)

// testCluster is a cluster of nodes in one process, over a network in memory and
// in virtual time. Its nodes follow the map as package node's do.
type testCluster struct {
	t        *testing.T
	dir      string
	network  *transport.MemoryNetwork
	nodes    map[string]*testNode
	cfg      *ClusterConfig
	founders []Member
	tune     func(*Config)
	tuneLogs func(*shard.Config)
	log      *slog.Logger
}

// testNode is one node: its directory outlives it.
type testNode struct {
	c           *testCluster
	name        string
	incarnation uint64
	replica     raft.ServerID // of group 0
	weight      float64

	transport  *transport.Transport
	group0     *shard.Replica
	reconciler *Reconciler
	cancel     context.CancelFunc
	tasks      sync.WaitGroup

	mu   sync.Mutex
	open map[ReplicaRef]*shard.Replica
	lost []ReplicaRef
}

// bubble founds a cluster of n nodes and runs a test in virtual time.
func bubble(t *testing.T, n int, cfg *ClusterConfig, test func(t *testing.T, c *testCluster)) {
	t.Helper()
	dir, err := os.MkdirTemp("", "placement")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	synctest.Test(t, func(t *testing.T) {
		c := &testCluster{
			t: t, dir: dir, network: transport.NewMemoryNetwork(), nodes: make(map[string]*testNode), cfg: cfg,
			log: slog.New(slog.DiscardHandler),
		}
		if os.Getenv("KVD_TEST_LOG") != "" {
			start := time.Now()
			c.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					a.Value = slog.DurationValue(a.Value.Time().Sub(start))
				}
				return a
			}}))
		}
		for i := range n {
			name := fmt.Sprintf("n%d", i+1)
			c.founders = append(c.founders, Member{Name: name, Incarnation: 1, Replica: raft.ServerID(name + "/1")})
		}
		for _, m := range c.founders {
			c.start(m)
		}
		defer func() {
			for name := range c.nodes {
				c.stop(name)
			}
		}()
		test(t, c)
	})
}

// start runs the node of a member on whatever its directory has.
func (c *testCluster) start(m Member) *testNode {
	c.t.Helper()
	n := &testNode{c: c, name: m.Name, incarnation: m.Incarnation, replica: m.Replica, weight: m.Weight, open: make(map[ReplicaRef]*shard.Replica)}
	listener, err := c.network.Listen(m.Name)
	if err != nil {
		c.t.Fatal(err)
	}
	n.transport, err = transport.New(transport.Config{
		Identity: func() transport.Peer {
			return transport.Peer{ClusterID: 7, Node: m.Name, Incarnation: m.Incarnation}
		},
		Listener: listener, Dial: c.network.Dialer(m.Name),
		Resolve: func(node string) (string, bool) { return node, true },
	})
	if err != nil {
		c.t.Fatal(err)
	}
	var founders []raft.ServerID
	for _, f := range c.founders {
		founders = append(founders, f.Replica)
	}
	if n.group0, err = n.openReplica(ReplicaRef{0, m.Replica}, founders); err != nil {
		c.t.Fatal(err)
	}
	cfg := Config{
		Node: m.Name, Incarnation: m.Incarnation, Weight: m.Weight, Replica: n.group0, Founders: c.founders, Cluster: c.cfg,
		Host: n, Peers: n.transport, Logger: c.log.With("node", m.Name),
	}
	if c.tune != nil {
		c.tune(&cfg)
	}
	n.reconciler = Start(cfg)
	for _, method := range Methods {
		n.transport.Handle(method, func(ctx context.Context, from transport.Peer, payload []byte) ([]byte, error) {
			return n.reconciler.Handle(ctx, method, from.Node, payload)
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	n.tasks.Go(func() { n.follow(ctx) })
	c.nodes[m.Name] = n
	return n
}

// stop ends a node as a crash would, as far as the others can see.
func (c *testCluster) stop(name string) {
	n := c.nodes[name]
	delete(c.nodes, name)
	n.cancel()
	n.tasks.Wait()
	n.reconciler.Close()
	errs := []error{n.transport.Close(), n.group0.Close()}
	for _, r := range n.Replicas() {
		errs = append(errs, r.Close())
	}
	if err := errors.Join(errs...); err != nil {
		c.t.Error(err)
	}
}

// member is how a node that was stopped is started again.
func (n *testNode) member() Member {
	return Member{Name: n.name, Incarnation: n.incarnation, Replica: n.replica, Weight: n.weight}
}

func (n *testNode) openReplica(ref ReplicaRef, founders []raft.ServerID) (*shard.Replica, error) {
	dir := filepath.Join(n.c.dir, fmt.Sprint(n.name, "-", n.incarnation), fmt.Sprint(ref.Group, "-", strings.ReplaceAll(string(ref.ID), "/", "-")))
	cfg := shard.Config{
		Group: ref.Group, ClusterID: 7, Replica: ref.ID, Dir: dir,
		NewTransport: func(install shard.InstallFunc) (shard.Transport, error) {
			g, err := n.transport.Group(ref.Group, raft.ServerAddress(ref.ID), transport.InstallFunc(install))
			if errors.Is(err, transport.ErrClosed) {
				return nil, fmt.Errorf("%w: %w", shard.ErrClosed, err)
			}
			return g, err
		},
		OpenLog: func(guard func() uint64) (shard.LogStore, error) {
			return raftlog.Open(raftlog.Options{Path: filepath.Join(dir, "raft.db"), Guard: guard, NoSync: true})
		},
		State:   fsm.Config{NoSync: true},
		OnFatal: func(err error) { n.c.t.Errorf("%s: %v", ref.ID, err) },
	}
	if slices.Contains(founders, ref.ID) {
		cfg.Bootstrap = &raft.Configuration{}
		for _, id := range founders {
			cfg.Bootstrap.Servers = append(cfg.Bootstrap.Servers, raft.Server{ID: id, Address: raft.ServerAddress(id)})
		}
	}
	if n.c.tuneLogs != nil {
		n.c.tuneLogs(&cfg)
	}
	return shard.Open(cfg)
}

// follow opens and deletes replicas as the map says.
func (n *testNode) follow(ctx context.Context) {
	for ctx.Err() == nil {
		state, release, err := n.group0.AcquireState(ctx, 0)
		if err != nil {
			return
		}
		applied := state.AppliedIndex()
		m, err := LoadMap(ctx, state)
		release()
		if err != nil {
			return
		}
		n.settle(&m)
		wait, cancel := context.WithTimeout(ctx, time.Second)
		if _, release, err := n.group0.AcquireState(wait, applied+1); err == nil {
			release()
		}
		cancel()
	}
}

func (n *testNode) settle(m *Map) {
	changed := false
	wanted := make(map[ReplicaRef]bool)
	for _, s := range m.Shards {
		for _, r := range s.Replicas {
			ref := ReplicaRef{s.Group(), r.ID}
			if r.Node() != n.name || r.Incarnation != n.incarnation {
				continue
			}
			wanted[ref] = true
			if n.Replicas()[ref] == nil && !slices.Contains(n.Lost(), ref) {
				replica, err := n.openReplica(ref, s.Founders)
				if err != nil {
					n.c.t.Errorf("open %v: %v", ref, err)
					continue
				}
				n.mu.Lock()
				n.open[ref] = replica
				n.mu.Unlock()
				changed = true
			}
		}
	}
	for ref, replica := range n.Replicas() {
		if !wanted[ref] {
			if err := replica.Close(); err != nil {
				n.c.t.Error(err)
			}
			n.mu.Lock()
			delete(n.open, ref)
			n.mu.Unlock()
			changed = true
		}
	}
	if changed {
		n.reconciler.Nudge()
	}
}

func (n *testNode) Replicas() map[ReplicaRef]*shard.Replica {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.open)
}

func (n *testNode) Lost() []ReplicaRef {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.lost)
}

func (n *testNode) DiskFree() uint64 { return 1 << 30 }

// leader is the node that leads group 0 and serves; nil if none does.
func (c *testCluster) leader() *testNode {
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		if n := c.nodes[name]; n.group0.Serving() {
			return n
		}
	}
	return nil
}

// await waits for at most d of virtual time until good is true of the map and
// what the leader has seen.
func (c *testCluster) await(d time.Duration, what string, good func(m *Map, o Overview) bool) time.Duration {
	c.t.Helper()
	start := time.Now()
	var m *Map
	var o Overview
	for time.Since(start) < d {
		if leader := c.leader(); leader != nil {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			var err error
			if m, err = leader.reconciler.fresh(ctx); err == nil {
				if o, err = leader.reconciler.Overview(ctx); err == nil && good(m, o) {
					cancel()
					return time.Since(start)
				}
			}
			cancel()
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Errorf("%s: not within %v", what, d)
	for _, n := range o.Nodes {
		c.t.Logf("%+v", n)
	}
	for _, s := range o.Shards {
		c.t.Logf("%+v", s)
	}
	c.t.FailNow()
	return 0
}

// home reports whether every shard has exactly the replicas that its target
// names, all of them voters.
func home(m *Map, o Overview) bool {
	if m.Config == nil || len(o.Shards) != m.Config.Shards {
		return false
	}
	for _, s := range o.Shards {
		if len(s.Replicas) != len(s.Target) {
			return false
		}
		for _, r := range s.Replicas {
			if r.State != "voter" || !slices.Contains(s.Target, TargetReplica{Node: r.Node, Role: r.Role}) {
				return false
			}
		}
	}
	return true
}

// on counts the replicas on a node.
func on(o Overview, node string) int {
	count := 0
	for _, s := range o.Shards {
		for _, r := range s.Replicas {
			if r.Node == node {
				count++
			}
		}
	}
	return count
}

// at finds the replica that leads a group and serves; nil if none does.
func (c *testCluster) at(group uint64) *shard.Replica {
	for _, n := range c.nodes {
		for ref, r := range n.Replicas() {
			if ref.Group == group && r.Serving() {
				return r
			}
		}
	}
	return nil
}

// put writes to a shard, waiting for its leader.
func (c *testCluster) put(group uint64, key, value string) {
	c.t.Helper()
	data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}})
	if err != nil {
		c.t.Fatal(err)
	}
	for range 300 {
		if r := c.at(group); r != nil {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			result, err := r.Propose(ctx, fsm.Request{Data: data})
			cancel()
			if err == nil && result.Err == nil {
				return
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	c.t.Fatalf("group %d takes no writes", group)
}

// get reads a key of a shard linearizably.
func (c *testCluster) get(group uint64, key string) string {
	c.t.Helper()
	for range 300 {
		if r := c.at(group); r != nil {
			if value, err := read(r, key); err == nil {
				return value
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	c.t.Fatalf("group %d cannot be read", group)
	return ""
}

func read(r *shard.Replica, key string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	index, err := r.ReadIndex(ctx)
	if err != nil {
		return "", err
	}
	state, release, err := r.AcquireState(ctx, index)
	if err != nil {
		return "", err
	}
	defer release()
	answer, err := state.Range(ctx, fsm.User, &pb.RangeRequest{Key: []byte(key)})
	if err != nil || len(answer.Kvs) == 0 {
		return "", err
	}
	return string(answer.Kvs[0].Value), nil
}
