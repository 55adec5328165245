package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

const testCluster = 0xc1

// testNet is a network of transports, over memory or over TCP loopback.
type testNet struct {
	tb     testing.TB
	memory *MemoryNetwork // nil = TCP
	logs   *logBuffer
	calm   bool // raft's timers are too long to elect anybody: a busy machine cannot move the leadership

	mu    sync.Mutex
	addrs map[string]string
}

// logBuffer keeps what is logged; it is shown when a test fails.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func newTestNet(tb testing.TB, memory bool) *testNet {
	n := &testNet{tb: tb, logs: &logBuffer{}, addrs: map[string]string{}}
	if memory {
		n.memory = NewMemoryNetwork()
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("log:\n%s", n.logs)
		}
	})
	return n
}

func (n *testNet) resolve(node string) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	addr, ok := n.addrs[node]
	return addr, ok
}

// listen returns a listener for a node and makes its address known.
func (n *testNet) listen(node string) net.Listener {
	var l net.Listener
	var err error
	if n.memory != nil {
		l, err = n.memory.Listen(node)
	} else {
		l, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		n.tb.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs[node] = l.Addr().String()
	return l
}

func (n *testNet) config(node string) Config {
	l := n.listen(node)
	c := Config{
		Identity: func() Peer { return Peer{ClusterID: testCluster, Node: node, PeerAddr: l.Addr().String()} },
		Listener: l, Resolve: n.resolve, Logger: n.logs.logger().With("self", node),
	}
	if n.memory != nil {
		c.Dial = n.memory.Dialer(node)
	} else {
		c.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		}
	}
	return c
}

// start starts a node's transport; tweak, if not nil, changes its config first.
func (n *testNet) start(node string, tweak func(*Config)) *Transport {
	n.tb.Helper()
	c := n.config(node)
	if tweak != nil {
		tweak(&c)
	}
	t, err := New(c)
	if err != nil {
		n.tb.Fatal(err)
	}
	n.tb.Cleanup(func() { _ = t.Close() })
	return t
}

// eventually waits until f is true. The deadline only ends a test that hangs.
func eventually(tb testing.TB, what string, f func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(60 * time.Second); !f(); {
		if time.Now().After(deadline) {
			tb.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func echo(_ context.Context, _ Peer, payload []byte) ([]byte, error) { return payload, nil }

func noInstall(context.Context, *raft.InstallSnapshotRequest, io.Reader) (*raft.InstallSnapshotResponse, error) {
	return nil, errors.New("no snapshots here")
}

// testFSM remembers the commands applied.
type testFSM struct {
	mu      sync.Mutex
	applied []string
}

func (f *testFSM) Apply(l *raft.Log) any {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applied = append(f.applied, string(l.Data))
	return len(f.applied)
}

func (f *testFSM) commands() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.applied)
}

func (f *testFSM) Snapshot() (raft.FSMSnapshot, error) { return nil, errors.New("no snapshots") }
func (f *testFSM) Restore(io.ReadCloser) error         { return errors.New("no snapshots") }

// member is one raft replica of a test cluster.
type member struct {
	node  string
	id    raft.ServerID
	trans *Transport
	group *Group
	raft  *raft.Raft
	fsm   *testFSM
	seen  *spy
}

// spy stands between raft and its Group and counts what passes.
type spy struct {
	*Group
	mu         sync.Mutex
	preVotes   int
	pipelines  int
	heartbeats int // calls of raft's heartbeat fast path
	handler    bool
	refuse     int // AppendEntries with entries to answer without success, in raft's place
	filtered   chan raft.RPC
}

// refuseNext makes the spy refuse that many AppendEntries with entries.
func (s *spy) refuseNext(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = n
}

// Consumer passes on what the Group receives, except what is to be refused.
func (s *spy) Consumer() <-chan raft.RPC {
	s.filtered = make(chan raft.RPC)
	s.tasks.Go(func() {
		for {
			select {
			case rpc := <-s.Group.Consumer():
				s.filter(rpc)
			case <-s.ctx.Done():
				return
			}
		}
	})
	return s.filtered
}

func (s *spy) filter(rpc raft.RPC) {
	if req, ok := rpc.Command.(*raft.AppendEntriesRequest); ok && len(req.Entries) > 0 {
		s.mu.Lock()
		refuse := s.refuse > 0
		if refuse {
			s.refuse--
		}
		s.mu.Unlock()
		if refuse {
			rpc.Respond(&raft.AppendEntriesResponse{Term: req.Term, LastLog: req.PrevLogEntry, NoRetryBackoff: true}, nil)
			return
		}
	}
	select {
	case s.filtered <- rpc:
	case <-s.ctx.Done():
	}
}

func (s *spy) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	s.mu.Lock()
	s.preVotes++
	s.mu.Unlock()
	return s.Group.RequestPreVote(id, target, args, resp)
}

func (s *spy) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	s.mu.Lock()
	s.pipelines++
	s.mu.Unlock()
	return s.Group.AppendEntriesPipeline(id, target)
}

// SetHeartbeatHandler passes a handler on that counts its calls.
func (s *spy) SetHeartbeatHandler(cb func(raft.RPC)) {
	s.handler = true
	s.Group.SetHeartbeatHandler(func(rpc raft.RPC) {
		s.mu.Lock()
		s.heartbeats++
		s.mu.Unlock()
		cb(rpc)
	})
}

func (s *spy) counts() (preVotes, pipelines, heartbeats int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.preVotes, s.pipelines, s.heartbeats
}

const testGroup = 7

// newCluster starts n raft replicas of one group, on nodes n1..nN.
func newCluster(net *testNet, n int, tweak func(*Config)) []*member {
	net.tb.Helper()
	var members []*member
	var conf raft.Configuration
	for i := 1; i <= n; i++ {
		node := fmt.Sprintf("n%d", i)
		m := &member{node: node, id: raft.ServerID(node + "/1"), trans: net.start(node, tweak), fsm: &testFSM{}}
		members = append(members, m)
		conf.Servers = append(conf.Servers, raft.Server{ID: m.id, Address: raft.ServerAddress(m.id)})
	}
	for _, m := range members {
		m.open(net, conf)
	}
	return members
}

func (m *member) open(net *testNet, conf raft.Configuration) {
	net.tb.Helper()
	var err error
	if m.group, err = m.trans.Group(testGroup, raft.ServerAddress(m.id), noInstall); err != nil {
		net.tb.Fatal(err)
	}
	m.seen = &spy{Group: m.group}
	store := raft.NewInmemStore()
	c := raft.DefaultConfig()
	c.LocalID = m.id
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = 500*time.Millisecond, 500*time.Millisecond, 250*time.Millisecond
	if net.calm {
		c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = time.Hour, time.Hour, time.Hour
	}
	c.Logger = hclog.New(&hclog.LoggerOptions{Name: m.node, Output: net.logs, Level: hclog.Info})
	c.NoLegacyTelemetry = true
	snaps := raft.NewInmemSnapshotStore()
	if err := raft.BootstrapCluster(c, store, store, snaps, m.group, conf); err != nil {
		net.tb.Fatal(err)
	}
	if m.raft, err = raft.NewRaft(c, m.fsm, store, store, snaps, m.seen); err != nil {
		net.tb.Fatal(err)
	}
	net.tb.Cleanup(m.stop)
}

func (m *member) stop() {
	_ = m.group.Close()
	_ = m.raft.Shutdown().Error()
}

// newCalmCluster is newCluster in real time: its first member leads, and goes on to.
func newCalmCluster(net *testNet, n int) []*member {
	net.tb.Helper()
	net.calm = true
	members := newCluster(net, n, nil)
	first, other := members[0], members[1]
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(other.id), Addr: []byte(other.id)}
	if err := other.group.TimeoutNow(first.id, raft.ServerAddress(first.id), &raft.TimeoutNowRequest{RPCHeader: header}, new(raft.TimeoutNowResponse)); err != nil {
		net.tb.Fatal(err)
	}
	eventually(net.tb, first.node+" leads", func() bool { return first.raft.State() == raft.Leader })
	return members
}

// leader waits for a leader among the members.
func leader(tb testing.TB, members []*member) *member {
	tb.Helper()
	var found *member
	eventually(tb, "a leader", func() bool {
		found = nil
		for _, m := range members {
			if m.raft.State() == raft.Leader && m.raft.VerifyLeader().Error() == nil {
				found = m
			}
		}
		return found != nil
	})
	return found
}

func others(members []*member, not *member) (rest []*member) {
	for _, m := range members {
		if m != not {
			rest = append(rest, m)
		}
	}
	return rest
}

// rawPeer plays a node by hand: it shakes hands and then does what a test wants with the connection.
type rawPeer struct {
	l     net.Listener
	conns chan *wire
}

// acceptAs listens as a node and accepts connections with a proper handshake.
func (n *testNet) acceptAs(t *testing.T, node string) *rawPeer {
	return n.acceptWith(t, node, helloReply{version: maxVersion, from: Peer{ClusterID: testCluster, Node: node}})
}

// acceptWith listens as a node and accepts connections with the given reply.
func (n *testNet) acceptWith(t *testing.T, node string, reply helloReply) *rawPeer {
	p := &rawPeer{l: n.listen(node), conns: make(chan *wire, 100)}
	go func() {
		for {
			nc, err := p.l.Accept()
			if err != nil {
				close(p.conns)
				return
			}
			w := newWire(nc, 128<<20)
			if _, err := firstMessage(w, kindHello); err != nil {
				t.Error(err)
			}
			if _, err := w.Write(appendFrame(nil, kindHelloReply, 0, appendHelloReply(nil, &reply))); err != nil {
				t.Error(err)
			}
			p.conns <- w
		}
	}()
	t.Cleanup(p.close)
	return p
}

func (p *rawPeer) close() {
	_ = p.l.Close()
	for w := range p.conns {
		_ = w.Close()
	}
}

// dialAs connects to a node as another one would, by hand.
func (n *testNet) dialAs(t *testing.T, from, to string, why purpose) *wire {
	t.Helper()
	addr, _ := n.resolve(to)
	var nc net.Conn
	var err error
	if n.memory != nil {
		nc, err = n.memory.Dial(t.Context(), from, addr)
	} else {
		nc, err = net.Dial("tcp", addr)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := newWire(nc, 128<<20)
	if _, err := greet(w, &hello{minVersion, maxVersion, why, to, Peer{ClusterID: testCluster, Node: from}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

// counted returns the value of a counter.
func counted(c prometheus.Counter) float64 {
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		panic(err)
	}
	return m.GetCounter().GetValue()
}
