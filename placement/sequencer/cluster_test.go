package sequencer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
	"kvd/shard/raftlog/raftlogtest"
	"kvd/transport"
)

// cluster is three nodes with group 0 and some shards, over a network in
// memory, each node with the sequencer's server and client.
type cluster struct {
	t       testing.TB
	dir     string
	network *transport.MemoryNetwork
	groups  int // shards 1..groups
	window  int64
	faults  Faults
	shard   shard.Faults
	without bool // shards number their revisions themselves

	mu    sync.Mutex
	nodes map[string]*node
	logs  map[string]*raftlogtest.Memory
	fatal atomic.Pointer[error]
}

type node struct {
	name      string
	transport *transport.Transport
	replicas  []*shard.Replica // by group
	server    *Server
	client    *Client
}

var names = []string{"n1", "n2", "n3"}

// bubble runs a test with a whole cluster in virtual time.
func bubble(t *testing.T, c *cluster, test func(c *cluster)) {
	t.Helper()
	c.dir = t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c.t = t
		c.run(test)
	})
}

func (c *cluster) run(test func(c *cluster)) {
	c.network = transport.NewMemoryNetwork()
	c.nodes, c.logs = make(map[string]*node), make(map[string]*raftlogtest.Memory)
	for _, name := range names {
		c.start(name)
	}
	test(c)
	for _, name := range names {
		c.stop(name)
	}
	if err := c.fatal.Load(); err != nil {
		c.t.Errorf("a replica halted: %v", *err)
	}
}

func (c *cluster) start(name string) {
	c.t.Helper()
	listener, err := c.network.Listen(name)
	if err != nil {
		c.t.Fatal(err)
	}
	n := &node{name: name}
	n.transport, err = transport.New(transport.Config{
		Identity: func() transport.Peer { return transport.Peer{ClusterID: 7, Node: name, Incarnation: 1} },
		Listener: listener, Dial: c.network.Dialer(name),
		Resolve: func(node string) (string, bool) { return node, true },
	})
	if err != nil {
		c.t.Fatal(err)
	}
	group0 := c.open(n, 0, nil)
	n.replicas = append(n.replicas, group0)
	n.server = NewServer(ServerConfig{Group0: group0, Window: c.window, Faults: c.faults})
	n.transport.Handle(Method, func(ctx context.Context, from transport.Peer, payload []byte) ([]byte, error) {
		return n.server.Handle(ctx, from.Node, payload)
	})
	n.client = NewClient(ClientConfig{Node: name, Group0: group0, Server: n.server, Peers: n.transport})
	for g := 1; g <= c.groups; g++ {
		n.replicas = append(n.replicas, c.open(n, uint64(g), n.client))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes[name] = n
}

func (c *cluster) open(n *node, group uint64, client *Client) *shard.Replica {
	c.t.Helper()
	id := raft.ServerID(n.name + "/1")
	first := &raft.Configuration{}
	for _, name := range names {
		first.Servers = append(first.Servers, raft.Server{ID: raft.ServerID(name + "/1"), Address: raft.ServerAddress(name + "/1")})
	}
	log := c.log(n.name, group)
	cfg := shard.Config{
		Group: group, ClusterID: 7, Replica: id, Bootstrap: first,
		Dir: filepath.Join(c.dir, n.name, fmt.Sprint(group)),
		NewTransport: func(install shard.InstallFunc) (shard.Transport, error) {
			return n.transport.Group(group, raft.ServerAddress(id), transport.InstallFunc(install))
		},
		OpenLog: func(guard func() uint64) (shard.LogStore, error) { log.Guard(guard); return log, nil },
		State:   fsm.Config{NoSync: true},
		// Who was away for long gets a snapshot, and its replica a new life.
		SnapshotEntries: 100, TrailingEntries: 20,
		OnFatal: func(err error) { c.fatal.Store(&err) },
		Faults:  c.shard,
	}
	if client != nil && !c.without {
		cfg.Sequencer = client
	}
	r, err := shard.Open(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// log is the log of a replica, which outlives it.
func (c *cluster) log(name string, group uint64) *raftlogtest.Memory {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := fmt.Sprint(name, "/", group)
	if c.logs[key] == nil {
		c.logs[key] = raftlogtest.NewMemory()
	}
	return c.logs[key]
}

func (c *cluster) stop(name string) {
	c.t.Helper()
	c.mu.Lock()
	n := c.nodes[name]
	delete(c.nodes, name)
	c.mu.Unlock()
	if n == nil {
		return
	}
	var err error
	for _, r := range n.replicas[1:] {
		err = errors.Join(err, r.Close())
	}
	n.client.Close()
	n.server.Close()
	if err = errors.Join(err, n.replicas[0].Close(), n.transport.Close()); err != nil {
		c.t.Error(err)
	}
}

// up are the nodes that run, in order of names.
func (c *cluster) up() []*node {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*node
	for _, name := range slices.Sorted(maps.Keys(c.nodes)) {
		all = append(all, c.nodes[name])
	}
	return all
}

// leader waits for a node that serves a group, other than those named.
func (c *cluster) leader(group int, except ...string) (*node, *shard.Replica) {
	c.t.Helper()
	for range 6000 {
		for _, n := range c.up() {
			if n.replicas[group].Serving() && !slices.Contains(except, n.name) {
				return n, n.replicas[group]
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatalf("no leader of group %d within a minute", group)
	return nil, nil
}

// lead makes a node the leader of a group.
func (c *cluster) lead(group int, name string) *shard.Replica {
	c.t.Helper()
	for range 20 {
		n, r := c.leader(group)
		if n.name == name {
			return r
		}
		ctx, cancel := within(10 * time.Second)
		_ = r.TransferLeadership(ctx, name)
		cancel()
		time.Sleep(time.Second)
	}
	c.t.Fatalf("%s does not become the leader of group %d", name, group)
	return nil
}

func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

func put(ctx context.Context, r *shard.Replica, key, value string) (int64, error) {
	data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}})
	if err != nil {
		return 0, err
	}
	result, err := r.Propose(ctx, fsm.Request{Data: data})
	if err := errors.Join(err, result.Err); err != nil {
		return 0, err
	}
	return result.Response.(*pb.PutResponse).Header.Revision, nil
}

// row is a key at some revision; the zero row is no key.
type row struct {
	value    string
	revision int64
}

// get reads keys from a state that has applied index, at a revision that it may
// not have reached; 0: the newest.
func get(ctx context.Context, r *shard.Replica, index uint64, at int64, keys ...string) (map[string]row, error) {
	state, release, err := r.AcquireState(ctx, index)
	if err != nil {
		return nil, err
	}
	defer release()
	rows := make(map[string]row)
	if at > 0 {
		// Nothing at or below it comes any more: what the state has is all of it.
		if at = min(at, state.Revision(fsm.User)); at == 0 {
			return rows, nil
		}
	}
	for _, key := range keys {
		answer, err := state.Range(ctx, fsm.User, &pb.RangeRequest{Key: []byte(key), Revision: at})
		if err != nil {
			return nil, err
		}
		for _, kv := range answer.Kvs {
			rows[key] = row{string(kv.Value), kv.ModRevision}
		}
	}
	return rows, nil
}
