package shard

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard/raftlog/raftlogtest"
	"kvd/transport"
)

// cluster is one group of replicas over a network in memory, to be used in a
// synctest bubble.
type cluster struct {
	t        *testing.T
	dir      string
	network  *transport.MemoryNetwork
	members  []string
	witness  string // the member whose replica is one
	replicas map[string]*Replica
	nodes    map[string]*transport.Transport
	logs     map[string]*testLog
	metrics  *prometheus.Registry // of the nodes' transports
	fatal    atomic.Pointer[error]
	tune     func(*Config)
}

// bubble runs a test of n voters in virtual time.
func bubble(t *testing.T, n int, tune func(*Config), test func(c *cluster)) {
	bubbleWith(t, n, "", tune, test)
}

// bubbleWith is bubble with one of the voters, if it is named, a witness.
func bubbleWith(t *testing.T, n int, witness string, tune func(*Config), test func(c *cluster)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{
			t: t, dir: dir, witness: witness, network: transport.NewMemoryNetwork(), tune: tune, metrics: prometheus.NewRegistry(),
			replicas: make(map[string]*Replica), nodes: make(map[string]*transport.Transport), logs: make(map[string]*testLog),
		}
		for i := range n {
			c.members = append(c.members, fmt.Sprintf("n%d", i+1))
		}
		for _, name := range c.members {
			c.start(name, 1, c.configuration())
		}
		test(c)
		for name := range c.replicas {
			c.stop(name)
		}
		if err := c.fatal.Load(); err != nil {
			t.Errorf("a replica halted: %v", *err)
		}
	})
}

func (c *cluster) configuration() *raft.Configuration {
	conf := &raft.Configuration{}
	for _, name := range c.members {
		id := c.id(name, 1)
		conf.Servers = append(conf.Servers, raft.Server{ID: id, Address: raft.ServerAddress(id)})
	}
	return conf
}

func (c *cluster) id(name string, number int) raft.ServerID {
	if name == c.witness {
		return raft.ServerID(fmt.Sprintf("%s/%dw", name, number))
	}
	return raft.ServerID(fmt.Sprintf("%s/%d", name, number))
}

// start opens the replica <name>/<number> on its node.
func (c *cluster) start(name string, number int, bootstrap *raft.Configuration) *Replica {
	c.t.Helper()
	listener, err := c.network.Listen(name)
	if err != nil {
		c.t.Fatal(err)
	}
	node, err := transport.New(transport.Config{
		Identity: func() transport.Peer { return transport.Peer{ClusterID: 7, Node: name, Incarnation: 1} },
		Listener: listener, Dial: c.network.Dialer(name),
		Resolve:    func(node string) (string, bool) { return node, true },
		Registerer: prometheus.WrapRegistererWith(prometheus.Labels{"node": name}, c.metrics),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	id := c.id(name, number)
	log := c.logs[string(id)]
	if log == nil {
		log = &testLog{Memory: raftlogtest.NewMemory()}
		c.logs[string(id)] = log
	}
	cfg := Config{
		Group: 3, ClusterID: 7, Replica: id, Dir: filepath.Join(c.dir, string(id)), Bootstrap: bootstrap,
		NewTransport: func(install InstallFunc) (Transport, error) {
			return node.Group(3, raft.ServerAddress(id), transport.InstallFunc(install))
		},
		OpenLog: func(guard func() uint64) (LogStore, error) { log.Guard(guard); return log, nil },
		State:   fsm.Config{NoSync: true},
		OnFatal: func(err error) { c.fatal.Store(&err) },
	}
	if c.tune != nil {
		c.tune(&cfg)
	}
	r, err := Open(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	c.nodes[name], c.replicas[name] = node, r
	return r
}

func (c *cluster) stop(name string) {
	c.t.Helper()
	if r := c.replicas[name]; r != nil {
		if err := r.Close(); err != nil {
			c.t.Error(err)
		}
		if err := c.nodes[name].Close(); err != nil {
			c.t.Error(err)
		}
		delete(c.replicas, name)
	}
}

// leader waits for a leader that serves, other than those named.
func (c *cluster) leader(except ...string) (string, *Replica) {
	c.t.Helper()
	for range 600 {
		for _, name := range c.members {
			if r := c.replicas[name]; r != nil && r.Serving() && !contains(except, name) {
				return name, r
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	c.t.Fatal("no leader within a minute")
	return "", nil
}

func (c *cluster) follower(leader string) (string, *Replica) {
	for _, name := range c.members {
		if name != leader && c.replicas[name] != nil {
			return name, c.replicas[name]
		}
	}
	c.t.Fatal("no follower")
	return "", nil
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

func putRequest(key, value string) fsm.Request {
	data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}})
	if err != nil {
		panic(err)
	}
	return fsm.Request{Data: data}
}

func put(r *Replica, key, value string) error {
	ctx, cancel := within(5 * time.Second)
	defer cancel()
	result, err := r.Propose(ctx, putRequest(key, value))
	return errors.Join(err, result.Err)
}

func (c *cluster) mustPut(r *Replica, key, value string) {
	c.t.Helper()
	if err := put(r, key, value); err != nil {
		c.t.Fatalf("put %s: %v", key, err)
	}
}

// get reads from the replica's own state once it has applied index.
func (c *cluster) get(r *Replica, key string, index uint64) string {
	c.t.Helper()
	ctx, cancel := within(10 * time.Second)
	defer cancel()
	state, release, err := r.AcquireState(ctx, index)
	if err != nil {
		c.t.Fatalf("state at %d: %v", index, err)
	}
	defer release()
	answer, err := state.Range(ctx, fsm.User, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		c.t.Fatal(err)
	}
	if len(answer.Kvs) == 0 {
		return ""
	}
	return string(answer.Kvs[0].Value)
}

// testLog is a log in memory that can fail, and counts.
type testLog struct {
	*raftlogtest.Memory

	mu       sync.Mutex
	resets   int
	failWith error
	unread   bool          // reads of entries fail
	takes    time.Duration // each write
	refuse   error         // what writes fail with
}

func (l *testLog) breakReads(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unread = on
}

func (l *testLog) GetLog(index uint64, entry *raft.Log) error {
	l.mu.Lock()
	unread := l.unread
	l.mu.Unlock()
	if unread {
		return errors.New("input/output error")
	}
	return l.InmemStore.GetLog(index, entry)
}

func (l *testLog) Reset() error {
	l.mu.Lock()
	l.resets++
	l.mu.Unlock()
	return l.Memory.Reset()
}

func (l *testLog) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failWith
}
