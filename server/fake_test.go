package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"kvd/fsm"
	"kvd/shard"
)

// fakeReplica is a replica over a real state, without raft: what is proposed is
// applied at once. Hooks replace parts of it.
type fakeReplica struct {
	store *fsm.Store

	onPropose   func(context.Context, fsm.Request) (fsm.Result, error)
	onReadIndex func(context.Context) (uint64, error)
	onConfirm   func(context.Context) (index, term uint64, err error)
	onTransfer  func(ctx context.Context, node string) error

	mu       sync.Mutex
	index    uint64
	leader   shard.Leader
	changed  chan struct{}
	advanced []string
	acquired int // states pinned and not released
}

func newFakeReplica(store *fsm.Store, leader shard.Leader) *fakeReplica {
	f := &fakeReplica{store: store, leader: leader, changed: make(chan struct{})}
	if store != nil {
		f.index = store.AppliedIndex()
	}
	return f
}

func (f *fakeReplica) Propose(ctx context.Context, r fsm.Request) (fsm.Result, error) {
	if f.onPropose != nil {
		return f.onPropose(ctx, r)
	}
	return f.apply(r)
}

func (f *fakeReplica) apply(r fsm.Request) (fsm.Result, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var b fsm.EntryBuilder
	b.Add(r)
	f.index++
	results, err := f.store.Apply(f.index, max(f.leader.Term, 1), b.Bytes())
	if err != nil {
		return fsm.Result{}, err
	}
	return results[0], nil
}

func (f *fakeReplica) ReadIndex(ctx context.Context) (uint64, error) {
	if f.onReadIndex != nil {
		return f.onReadIndex(ctx)
	}
	return f.store.AppliedIndex(), nil
}

func (f *fakeReplica) ReadIndexAt(ctx context.Context, _ int64) (uint64, error) {
	return f.ReadIndex(ctx)
}

func (f *fakeReplica) Confirm(ctx context.Context) (index, term uint64, err error) {
	if f.onConfirm != nil {
		return f.onConfirm(ctx)
	}
	leader := f.Leader()
	if !leader.Self || f.store == nil {
		return 0, 0, shard.ErrNotLeader
	}
	return f.store.AppliedIndex(), leader.Term, nil
}

func (f *fakeReplica) AcquireState(ctx context.Context, index uint64) (*fsm.Store, func(), error) {
	if f.store == nil {
		return nil, nil, shard.ErrClosed
	}
	if err := f.store.WaitApplied(ctx, index); err != nil {
		return nil, nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.acquired++
	return f.store, sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.acquired--
	}), nil
}

func (f *fakeReplica) Leader() shard.Leader {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leader
}

func (f *fakeReplica) LeaderChanged() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// elect makes the replica hear of a leader; an empty node is none.
func (f *fakeReplica) elect(node string, self bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leader = shard.Leader{Node: node, ID: raft.ServerID(node + "/1"), Term: f.leader.Term + 1, Self: self}
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeReplica) AdvanceFollower(node string, _ uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.advanced = append(f.advanced, node)
}

func (f *fakeReplica) TransferLeadership(ctx context.Context, node string) error {
	return f.onTransfer(ctx, node)
}

func (f *fakeReplica) Status() shard.Status {
	leader := f.Leader()
	return shard.Status{
		Replica: "n1/1", State: "leader", Leader: leader, Term: leader.Term,
		CommitIndex: f.store.AppliedIndex() + 1, AppliedIndex: f.store.AppliedIndex(),
		Members: []shard.Member{{ID: "n1/1", Node: "n1", Voter: true}, {ID: "n2/1", Node: "n2", Voter: true}},
	}
}

// fakeCluster has the members n1, n2 (voters) and n3 (learner).
type fakeCluster struct{}

func (fakeCluster) ClusterID() uint64 { return 0xc1 }
func (fakeCluster) MemberID() uint64  { return 0xa1 }
func (fakeCluster) Members() []Member {
	return []Member{
		{Name: "n1", ID: 0xa1, PeerURLs: []string{"http://n1:2380"}, ClientURLs: []string{"http://n1:2379"}},
		{Name: "n2", ID: 0xa2, PeerURLs: []string{"http://n2:2380"}},
		{Name: "n3", ID: 0xa3, Learner: true},
	}
}

// errNeverSent stands for transport's definite errors.
var errNeverSent = errors.New("peer is unreachable")

// fakePeers calls handlers in memory.
type fakePeers struct {
	mu       sync.Mutex
	handlers map[string]map[string]HandlerFunc // by node and method
	calls    int
}

func (p *fakePeers) Call(ctx context.Context, node, method string, payload []byte) ([]byte, error) {
	p.mu.Lock()
	p.calls++
	h := p.handlers[node][method]
	p.mu.Unlock()
	if h == nil {
		return nil, errNeverSent
	}
	return h(ctx, "n1", payload)
}

func (p *fakePeers) serve(node, method string, h HandlerFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handlers == nil {
		p.handlers = make(map[string]map[string]HandlerFunc)
	}
	if p.handlers[node] == nil {
		p.handlers[node] = make(map[string]HandlerFunc)
	}
	p.handlers[node][method] = h
}

func testConfig(replica *fakeReplica, peers Peers) Config {
	return Config{
		Node: "n1",
		Replica: func(group uint64) Replica {
			if group != userGroup || replica == nil {
				return nil
			}
			return replica
		},
		Cluster:      fakeCluster{},
		Peers:        peers,
		NotDelivered: func(err error) bool { return errors.Is(err, errNeverSent) },
		Logger:       slog.New(slog.DiscardHandler),
		OnlyGRPCGo:   onlyGRPCGo,
	}
}

// onlyGRPCGo runs all tests without package h2.
var onlyGRPCGo = os.Getenv("KVD_GRPC_SERVER") == "grpc-go"

func newTestServer(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func openStore(t testing.TB) *fsm.Store {
	t.Helper()
	store, err := fsm.Open(fsm.Config{Path: filepath.Join(t.TempDir(), "state.db"), NoSync: true, InitialMmapBytes: 1 << 24})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return store
}

// node is a Server on a loopback address, with its replica and clients.
type node struct {
	*Server
	replica  *fakeReplica
	registry *prometheus.Registry
	address  string
	httpURL  string
}

func startNode(t testing.TB, edit func(*Config)) *node {
	t.Helper()
	replica := newFakeReplica(openStore(t), shard.Leader{Node: "n1", ID: "n1/1", Term: 7, Self: true})
	registry := prometheus.NewRegistry()
	cfg := testConfig(replica, &fakePeers{})
	cfg.Registerer, cfg.Gatherer = registry, registry
	if edit != nil {
		edit(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		replica.mu.Lock()
		defer replica.mu.Unlock()
		if replica.acquired != 0 {
			t.Errorf("%d states were pinned and never released", replica.acquired)
		}
	})
	n := &node{Server: s, replica: replica, registry: registry}
	client, web := listen(t), listen(t)
	n.address, n.httpURL = client.Addr().String(), "http://"+web.Addr().String()
	s.StartGRPC(client)
	s.StartHTTP(web)
	return n
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// dial connects with plain gRPC.
func (n *node) dial(t testing.TB, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	options = append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, options...)
	conn, err := grpc.NewClient(n.address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// client is etcd's own.
func (n *node) client(t testing.TB) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{n.address}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func putData(t testing.TB, key, value string) *pb.PutRequest {
	t.Helper()
	return &pb.PutRequest{Key: []byte(key), Value: []byte(value)}
}
