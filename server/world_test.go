package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/ring"
	"kvd/shard"
)

// world is a cluster of nodes over real states, without raft: the nodes n1, n2
// and so on, and the groups 1..S with data replicas on some of them. Followers
// apply no more than they are asked for.
type world struct {
	t       testing.TB
	nodes   []string
	groups  []uint64
	shards  map[uint64]*fakeShard
	servers map[string]*Server
	zero    *fakeReplica // of group 0, for all nodes
	unknown atomic.Bool  // the map is not known yet
	eager   bool         // followers hear of everything at once

	inTurn sync.Mutex // writes of all groups, for onWritten

	mu        sync.Mutex
	newest    int64                                               // handed out
	onReserve func(group uint64, floor int64)                     // the revision is handed out, and not used yet
	onWritten func(group uint64, floor int64, data []byte)        // in the order of revisions
	onGate    func(group uint64, at int64)                        // the gate has been passed
	onLatest  func()                                              // the newest revision has been asked for
	onCall    func(from, to, method string) (before, after error) // what the network does
	calls     map[string]int                                      // by method
	hung      map[string]bool                                     // nodes that do not answer
}

// newWorld makes S shards with data replicas on the given number of nodes each.
func newWorld(t testing.TB, nodes, shards, replicas int, edit func(*Config)) *world {
	t.Helper()
	w := &world{t: t, shards: make(map[uint64]*fakeShard), servers: make(map[string]*Server), newest: 1, calls: make(map[string]int)}
	for i := range nodes {
		w.nodes = append(w.nodes, fmt.Sprintf("n%d", i+1))
	}
	w.zero = newFakeReplica(openStore(t), shard.Leader{Node: "n1", ID: "n1/1", Term: 7, Self: true})
	for i := range shards {
		group := uint64(i + 1)
		w.groups = append(w.groups, group)
		s := &fakeShard{w: w, group: group, term: 1, changed: make(chan struct{}), replicas: make(map[string]*shardReplica)}
		for j := range replicas {
			node := w.nodes[(i+j)%nodes]
			s.order = append(s.order, node)
			s.replicas[node] = &shardReplica{s: s, node: node, store: openShardStore(t, group)}
		}
		s.leader = s.order[0]
		w.shards[group] = s
	}
	for _, name := range w.nodes {
		cfg := Config{
			OnlyGRPCGo: onlyGRPCGo,
			Node:       name, Replica: func(group uint64) Replica { return w.replica(name, group) },
			Groups: w, Revisions: w, Cluster: fakeCluster{}, Peers: worldPeers{w, name},
			NotDelivered: func(err error) bool { return errors.Is(err, errNeverSent) },
			Logger:       slog.New(slog.DiscardHandler), TempDir: t.TempDir(),
		}
		if edit != nil {
			edit(&cfg)
		}
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		w.servers[name] = s
	}
	t.Cleanup(w.close)
	return w
}

// close also sees that nothing is left of all requests.
func (w *world) close() {
	for name, s := range w.servers {
		if err := s.Close(); err != nil {
			w.t.Error(err)
		}
		if n := s.router.answers.bytes.Load(); n != 0 {
			w.t.Errorf("%s: %d bytes of answers are left", name, n)
		}
	}
	for _, s := range w.shards {
		for _, r := range s.replicas {
			if r.pinned != 0 {
				w.t.Errorf("group %d on %s: %d states were pinned and never released", s.group, r.node, r.pinned)
			}
		}
	}
}

func openShardStore(t testing.TB, group uint64) *fsm.Store {
	t.Helper()
	store, err := fsm.Open(fsm.Config{Path: filepath.Join(t.TempDir(), "state.db"), Group: group, NoSync: true, InitialMmapBytes: 1 << 20})
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

// The world is Groups and Revisions of every node.

func (w *world) Sharded() bool { return true }

func (w *world) Group(key []byte) uint64 { return uint64(ring.ShardOf(key, len(w.groups))) + 1 }

func (w *world) Lease(id int64) uint64 { return uint64(ring.ShardOfLease(id, len(w.groups))) + 1 }

func (w *world) All() []uint64 {
	if w.unknown.Load() {
		return nil
	}
	return w.groups
}

func (w *world) Nodes(group uint64) []string { return w.shards[group].order }

func (w *world) Latest(ctx context.Context) (int64, error) {
	w.mu.Lock()
	newest, hook := w.newest, w.onLatest
	w.mu.Unlock()
	if hook != nil {
		hook()
	}
	return newest, ctx.Err()
}

func (w *world) reserve(group uint64) int64 {
	w.mu.Lock()
	w.newest++
	floor, hook := w.newest, w.onReserve
	w.mu.Unlock()
	if hook != nil {
		hook(group, floor)
	}
	return floor
}

func (w *world) replica(node string, group uint64) Replica {
	if group == userGroup {
		return w.zero
	}
	s := w.shards[group]
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.replicas[node]; r != nil && !r.hidden {
		return r
	}
	return nil
}

// worldPeers is one node's way to the others.
type worldPeers struct {
	w    *world
	from string
}

func (p worldPeers) Call(ctx context.Context, node, method string, payload []byte) ([]byte, error) {
	if node == p.from {
		return nil, fmt.Errorf("node %s calls itself: %s", node, method)
	}
	p.w.mu.Lock()
	p.w.calls[method]++
	hook, hangs := p.w.onCall, p.w.hung[node]
	p.w.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	var before, after error
	if hook != nil {
		before, after = hook(p.from, node, method)
	}
	s := p.w.servers[node]
	if before != nil || s == nil {
		return nil, errors.Join(before, errNeverSent)
	}
	reply, err := s.Handlers()[method](ctx, p.from, bytes.Clone(payload))
	if err := errors.Join(err, after, ctx.Err()); err != nil {
		return nil, err
	}
	return bytes.Clone(reply), nil
}

// callsOf is how often a method has been called.
func (w *world) callsOf(method string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls[method]
}

// fakeShard is a group's log and its replicas.
type fakeShard struct {
	w     *world
	group uint64
	order []string // nodes

	turn sync.Mutex // batches one after the other, from their revision to the log

	mu       sync.Mutex
	log      []fakeEntry
	gate     int64
	leader   string // "" = none
	term     uint64
	changed  chan struct{}
	replicas map[string]*shardReplica
}

type fakeEntry struct {
	term uint64
	data []byte
}

// elect makes a node lead, or none.
func (s *fakeShard) elect(node string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leader = node
	s.term++
	close(s.changed)
	s.changed = make(chan struct{})
}

// shardReplica is a replica of a fakeShard on a node.
type shardReplica struct {
	s     *fakeShard
	node  string
	store *fsm.Store

	// under s.mu
	applied int
	stale   uint64 // thinks to lead in this term; 0 = does not
	hidden  bool   // Config.Replica does not return it
	frozen  bool   // applies nothing
	deaf    bool   // does not hear who leads
	heard   string // what it took for the leader when it became deaf
	pinned  int
}

func (r *shardReplica) leads() bool { return r.s.leader == r.node }

// change makes a replica hidden, frozen, or deaf.
func (r *shardReplica) change(f func(*shardReplica)) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	f(r)
}

func (r *shardReplica) Propose(ctx context.Context, request fsm.Request) (fsm.Result, error) {
	s := r.s
	s.turn.Lock()
	defer s.turn.Unlock()
	if s.w.onWritten != nil {
		s.w.inTurn.Lock()
		defer s.w.inTurn.Unlock()
	}
	for ctx.Err() == nil {
		s.mu.Lock()
		leads := r.leads()
		s.mu.Unlock()
		if !leads {
			return fsm.Result{}, shard.ErrNotLeader
		}
		floor := s.w.reserve(s.group)
		if result, ok, err := r.append(floor, request); ok || err != nil {
			return result, err
		}
	}
	return fsm.Result{}, shard.ErrNotProposed
}

// append fails if the floor has been dropped.
func (r *shardReplica) append(floor int64, request fsm.Request) (result fsm.Result, ok bool, err error) {
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if floor <= s.gate || !r.leads() {
		return result, false, nil
	}
	var b fsm.EntryBuilder
	b.SetFloor(floor, s.term)
	b.Add(request)
	s.log = append(s.log, fakeEntry{s.term, bytes.Clone(b.Bytes())})
	for r.applied < len(s.log) {
		results, err := r.applyNext()
		if err != nil {
			return result, false, err
		}
		result = results[0]
	}
	for _, follower := range s.replicas {
		for s.w.eager && follower.applied < len(s.log) {
			if _, err := follower.applyNext(); err != nil {
				return result, false, err
			}
		}
	}
	if s.w.onWritten != nil {
		s.w.onWritten(s.group, floor, request.Data)
	}
	return result, true, nil
}

func (r *shardReplica) applyNext() ([]fsm.Result, error) {
	e := r.s.log[r.applied]
	results, err := r.store.Apply(uint64(r.applied)+1, e.term, e.data)
	r.applied++
	return results, err
}

func (r *shardReplica) ReadIndex(ctx context.Context) (uint64, error) {
	r.s.turn.Lock() // what has asked for its revision comes first
	defer r.s.turn.Unlock()
	return r.index(ctx, 0)
}

func (r *shardReplica) ReadIndexAt(ctx context.Context, at int64) (uint64, error) {
	index, err := r.index(ctx, at)
	r.s.w.mu.Lock()
	hook := r.s.w.onGate
	r.s.w.mu.Unlock()
	if hook != nil && err == nil {
		hook(r.s.group, at)
	}
	return index, err
}

func (r *shardReplica) Confirm(ctx context.Context) (index, term uint64, err error) {
	r.s.turn.Lock() // as in ReadIndex
	defer r.s.turn.Unlock()
	index, err = r.index(ctx, 0)
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return index, r.s.term, err
}

func (r *shardReplica) index(ctx context.Context, at int64) (uint64, error) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if !r.leads() {
		return 0, shard.ErrNotLeader
	}
	r.s.gate = max(r.s.gate, at)
	return uint64(len(r.s.log)), ctx.Err()
}

func (r *shardReplica) AcquireState(ctx context.Context, index uint64) (*fsm.Store, func(), error) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.frozen && uint64(r.applied) < index {
		r.s.mu.Unlock()
		<-ctx.Done()
		r.s.mu.Lock()
		return nil, nil, ctx.Err()
	}
	for uint64(r.applied) < index {
		if r.applied == len(r.s.log) {
			return nil, nil, fmt.Errorf("group %d has no index %d", r.s.group, index)
		}
		if _, err := r.applyNext(); err != nil {
			return nil, nil, err
		}
	}
	r.pinned++
	return r.store, sync.OnceFunc(func() {
		r.s.mu.Lock()
		defer r.s.mu.Unlock()
		r.pinned--
	}), nil
}

func (r *shardReplica) Leader() shard.Leader {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	node := r.s.leader
	if r.deaf {
		node = r.heard
	}
	if r.stale > 0 && !r.leads() {
		return shard.Leader{Node: r.node, ID: raft.ServerID(r.node + "/1"), Term: r.stale, Self: true}
	}
	return shard.Leader{Node: node, ID: raft.ServerID(node + "/1"), Term: r.s.term, Self: r.leads()}
}

func (r *shardReplica) LeaderChanged() <-chan struct{} {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.s.changed
}

func (r *shardReplica) AdvanceFollower(string, uint64) {}
func (r *shardReplica) TransferLeadership(_ context.Context, node string) error {
	r.s.elect(node)
	return nil
}
func (r *shardReplica) Status() shard.Status { return shard.Status{} }

// oneStore is a state with the keys of all groups, to compare answers with.
// Requests must come one after the other.
type oneStore struct {
	w     *world
	store *fsm.Store
	index uint64
}

func newOneStore(w *world) *oneStore {
	o := &oneStore{w: w, store: openShardStore(w.t, 0)}
	w.onWritten = o.written
	return o
}

// written applies what a group has applied, at the same revision.
func (o *oneStore) written(group uint64, floor int64, data []byte) {
	var r pb.InternalRaftRequest
	if err := proto.Unmarshal(data, &r); err != nil {
		o.w.t.Fatal(err)
	}
	if d := r.DeleteRange; d != nil {
		if data = o.deletionIn(group, d); data == nil {
			return
		}
	}
	var b fsm.EntryBuilder
	b.SetFloor(floor, 1)
	b.Add(fsm.Request{Data: data})
	o.index++
	results, err := o.store.Apply(o.index, 1, b.Bytes())
	if err != nil {
		o.w.t.Fatal(err)
	}
	if errors.Is(results[0].Err, fsm.ErrStaleFloor) {
		o.w.t.Fatalf("revision %d comes after a later one", floor)
	}
}

// deletionIn deletes the group's part of a range.
func (o *oneStore) deletionIn(group uint64, d *pb.DeleteRangeRequest) []byte {
	found, err := o.store.Range(context.Background(), fsm.User, &pb.RangeRequest{Key: d.Key, RangeEnd: d.RangeEnd, KeysOnly: true})
	if err != nil {
		o.w.t.Fatal(err)
	}
	txn := &pb.TxnRequest{}
	for _, kv := range found.Kvs {
		if o.w.Group(kv.Key) == group {
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: kv.Key}}})
		}
	}
	if len(txn.Success) == 0 {
		return nil
	}
	data, err := proto.Marshal(&pb.InternalRaftRequest{Txn: txn})
	if err != nil {
		o.w.t.Fatal(err)
	}
	return data
}

// seeded is a generator whose seed a failed test prints.
func seeded(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

func pick[T any](g *rand.Rand, from ...T) T { return from[g.IntN(len(from))] }

// kv is the service of one of the nodes.
func (w *world) kv(node string) pb.KVServer { return w.servers[node].KV() }

func (w *world) anyKV(g *rand.Rand) pb.KVServer { return w.kv(pick(g, w.nodes...)) }

// put writes by way of a node and fails the test if that fails.
func (w *world) put(node, key, value string) *pb.PutResponse {
	w.t.Helper()
	resp, err := w.kv(node).Put(w.t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err != nil {
		w.t.Fatal(err)
	}
	return resp
}

// keyIn is a key of a group.
func (w *world) keyIn(group uint64, name string) string {
	for i := 0; ; i++ {
		if key := fmt.Sprintf("%s%d", name, i); w.Group([]byte(key)) == group {
			return key
		}
	}
}

var wholeRange = &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
