package node

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/node/bootstrap"
	"kvd/shard"
	"kvd/shard/wal/vfs"
	"kvd/transport"
)

// town is a cluster of nodes over a network in memory, in a synctest bubble.
type town struct {
	t       *testing.T
	dir     string
	network *transport.MemoryNetwork
	peers   map[string]string
	nodes   map[string]*Node
	shards  int             // 0: full
	copies  int             // with shards; 0: 2
	raftLog string          // of nodes that start from now on
	logFS   vfs.FS          // with RaftLogShared; nil: the real one
	deaf    map[string]bool // addresses that nobody connects to from now on

	mu    sync.Mutex
	fatal map[string]error
	logs  bytes.Buffer
}

// Write keeps the nodes' logs for a test that fails.
func (w *town) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.logs.Write(p)
}

type townNetwork struct {
	*transport.MemoryNetwork
	dial func(context.Context, string) (net.Conn, error)
}

func (n townNetwork) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return n.dial(ctx, addr)
}

// inTown runs a test with the names of n nodes, none of which is started.
func inTown(t *testing.T, n int, test func(w *town)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := &town{t: t, dir: dir, network: transport.NewMemoryNetwork(), peers: make(map[string]string), nodes: make(map[string]*Node), fatal: make(map[string]error)}
		for i := range n {
			name := fmt.Sprintf("n%d", i+1)
			w.peers[name] = name + ":1"
		}
		test(w)
		for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
			w.stop(name)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.fatal) > 0 {
			t.Errorf("nodes halted: %v", w.fatal)
		}
		if t.Failed() {
			t.Logf("%s", w.logs.Bytes())
		}
	})
}

func (w *town) config(name, dir string) Config {
	addr := w.peers[name]
	cfg := Config{
		Name: name, DataDir: filepath.Join(w.dir, dir), Peers: w.peers,
		ListenClient: "none", ListenHTTP: "none", ListenPeer: addr, MinDiskFree: 1, NoSync: true, RaftLog: w.raftLog, LogFS: w.logFS,
		Network: townNetwork{w.network, w.dialer(addr)},
		Logger:  slog.New(slog.NewTextHandler(w, nil)).With("on", name),
		OnFatal: func(err error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.fatal[name] = err
		},
	}
	if w.shards > 0 {
		cfg.Strategy, cfg.Shards, cfg.ReplicationFactor = StrategyConsistent, w.shards, cmp.Or(w.copies, 2)
	}
	return cfg
}

func (w *town) dialer(from string) func(context.Context, string) (net.Conn, error) {
	dial := w.network.Dialer(from)
	return func(ctx context.Context, addr string) (net.Conn, error) {
		w.mu.Lock()
		deaf := w.deaf[addr]
		w.mu.Unlock()
		if deaf {
			return nil, syscall.ECONNREFUSED
		}
		return dial(ctx, addr)
	}
}

// start starts the named nodes together, each in the directory of its name.
func (w *town) start(names ...string) {
	w.t.Helper()
	var all sync.WaitGroup
	started := make([]*Node, len(names))
	for i, name := range names {
		all.Go(func() { started[i] = w.startIn(name, name) })
	}
	all.Wait()
	for i, name := range names {
		w.nodes[name] = started[i]
	}
}

func (w *town) startIn(name, dir string) *Node {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	n, err := Start(ctx, w.config(name, dir))
	if err != nil {
		w.t.Errorf("start %s: %v", name, err)
	}
	return n
}

func (w *town) stop(name string) {
	w.t.Helper()
	if n := w.nodes[name]; n != nil {
		if err := n.Close(); err != nil {
			w.t.Errorf("close %s: %v", name, err)
		}
	}
	delete(w.nodes, name)
}

func (w *town) awaitReady(names ...string) {
	w.t.Helper()
	for _, name := range names {
		select {
		case <-w.nodes[name].Ready():
		case <-time.After(2 * time.Minute):
			w.t.Fatalf("%s is not ready after two minutes", name)
		}
	}
}

// awaitFollower waits until the node hears a leader of group 0.
func (w *town) awaitFollower(name string) {
	for range 100 {
		if w.nodes[name].Replica().Leader().Node != "" {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	w.t.Errorf("%s hears no leader", name)
}

func kvPut(t *testing.T, n *Node, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := n.KV().Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}

func kvGet(t *testing.T, n *Node, key string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	answer, err := n.KV().Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if len(answer.Kvs) == 0 {
		return ""
	}
	return string(answer.Kvs[0].Value)
}

// awaitMembers waits until the node's group has exactly these voters.
func (w *town) awaitMembers(n *Node, want ...string) {
	w.t.Helper()
	var got []string
	for range 1200 {
		got = nil
		for _, m := range n.Replica().Status().Members {
			if m.Voter {
				got = append(got, string(m.ID))
			} else {
				got = append(got, string(m.ID)+" (learner)")
			}
		}
		if slices.Sort(got); slices.Equal(got, want) {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	w.t.Fatalf("members are %v, not %v", got, want)
}

func TestAClusterSurvivesRestarts(t *testing.T) {
	inTown(t, 3, func(w *town) {
		all := []string{"n1", "n2", "n3"}
		w.start(all...)
		w.awaitReady(all...)
		for i, name := range all {
			kvPut(t, w.nodes[name], name, fmt.Sprint(i))
		}
		for range 2 { // one after the other
			for _, name := range all {
				w.stop(name)
				w.start(name)
				w.awaitReady(name)
			}
		}
		for _, name := range all { // all at once
			w.stop(name)
		}
		w.start(all...)
		w.awaitReady(all...)
		for i, name := range all {
			for _, other := range all {
				if got := kvGet(t, w.nodes[other], name); got != fmt.Sprint(i) {
					t.Errorf("%s has %s = %q", other, name, got)
				}
			}
		}
		w.awaitMembers(w.nodes["n1"], "n1/1", "n2/1", "n3/1")
	})
}

// A node that has lost its directory comes back as another replica, and the one
// that it was leaves the group.
func TestAWipedNodeRejoinsAsAnotherReplica(t *testing.T) {
	inTown(t, 3, func(w *town) {
		w.start("n1", "n2", "n3")
		w.awaitReady("n1", "n2", "n3")
		kvPut(t, w.nodes["n1"], "k", "v")
		for number := 2; number < 4; number++ {
			w.stop("n3")
			if err := os.RemoveAll(filepath.Join(w.dir, "n3")); err != nil {
				t.Fatal(err)
			}
			w.start("n3")
			w.awaitReady("n3")
			w.awaitMembers(w.nodes["n1"], "n1/1", "n2/1", fmt.Sprint("n3/", number))
			if got := kvGet(t, w.nodes["n3"], "k"); got != "v" {
				t.Errorf("k = %q", got)
			}
		}
	})
}

// While a node was down another directory has taken its place. It must say so
// and end, rather than wait for ever; and the one that took its place must not.
func TestADisplacedNodeEnds(t *testing.T) {
	inTown(t, 3, func(w *town) {
		w.start("n1", "n2", "n3")
		w.awaitReady("n1", "n2", "n3")
		w.stop("n3")
		w.nodes["n3"] = w.startIn("n3", "elsewhere")
		w.awaitReady("n3")
		w.awaitMembers(w.nodes["n1"], "n1/1", "n2/1", "n3/2")
		w.stop("n3")

		w.start("n3")
		for range 300 {
			if w.fatalOf("n3") != nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		err := w.fatalOf("n3")
		if err == nil {
			t.Fatal("the displaced node goes on")
		}
		for _, want := range []string{`"n3"`, "n3/1", "n3/2", filepath.Join(w.dir, "n3")} {
			if text := err.Error(); !strings.Contains(text, want) || strings.Contains(text, "\n") {
				t.Errorf("%q does not say %s in one line", text, want)
			}
		}
		delete(w.fatal, "n3")
		w.stop("n3")
		w.nodes["n3"] = w.startIn("n3", "elsewhere")
		w.awaitReady("n3")
	})
}

func (w *town) fatalOf(name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fatal[name]
}

// A node alone, for long, with peers that are down, or unreachable, or whose
// maps are old, is not displaced. (Bubbles end with no node halted.)
func TestANodeWithoutALeaderIsNotDisplaced(t *testing.T) {
	inTown(t, 3, func(w *town) {
		w.start("n1", "n2", "n3")
		w.awaitReady("n1", "n2", "n3")
		w.stop("n2")
		w.stop("n3")
		time.Sleep(time.Minute)
		w.start("n2")
		w.awaitReady("n1", "n2")
		w.network.Isolate("n1:1")
		time.Sleep(time.Minute)
		w.network.Rejoin("n1:1")
		w.start("n3")
		w.awaitReady("n3")
		kvPut(t, w.nodes["n3"], "k", "v")
	})
}

// A replica whose files are gone has forgotten its votes: the node must not
// begin it afresh under the same id.
func TestANodeRefusesAReplicaThatLostItsFiles(t *testing.T) {
	group := filepath.Join(groupsDir, "0")
	for _, gone := range []struct{ raftLog, path string }{
		{RaftLogBolt, filepath.Join(group, shard.StateFile)}, {RaftLogBolt, filepath.Join(group, boltFile)}, {RaftLogBolt, group},
		{RaftLogShared, filepath.Join(group, shard.StateFile)}, {RaftLogShared, group}, {RaftLogShared, sharedDir},
	} {
		t.Run(gone.raftLog+" without "+filepath.Base(gone.path), func(t *testing.T) {
			inTown(t, 1, func(w *town) {
				w.raftLog = gone.raftLog
				w.start("n1")
				w.awaitReady("n1")
				w.stop("n1")
				if err := os.RemoveAll(filepath.Join(w.dir, "n1", gone.path)); err != nil {
					t.Fatal(err)
				}
				n, err := Start(context.Background(), w.config("n1", "n1"))
				if !errors.Is(err, bootstrap.ErrReplicaUsed) || n != nil {
					t.Errorf("started with %v", err)
				}
			})
		})
	}
}

func TestStartEndsWithItsContext(t *testing.T) {
	inTown(t, 3, func(w *town) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		n, err := Start(ctx, w.config("n1", "n1"))
		if !errors.Is(err, context.DeadlineExceeded) || n != nil {
			t.Errorf("start without peers: %v", err)
		}
		w.start("n1", "n2", "n3") // and the directory can be used again
		w.awaitReady("n1", "n2", "n3")
	})
}

func TestCloseAndAbortAreIdempotent(t *testing.T) {
	inTown(t, 1, func(w *town) {
		w.start("n1")
		w.awaitReady("n1")
		n := w.nodes["n1"]
		if err := errors.Join(n.Close(), n.Close(), n.Abort()); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if _, err := n.KV().Put(ctx, &pb.PutRequest{Key: []byte("k")}); err == nil {
			t.Error("a closed node has taken a write")
		}
	})
}

// loopback is the configuration of a node on the real network.
func loopback(t *testing.T, name string, peers map[string]string) Config {
	return Config{
		Name: name, DataDir: filepath.Join(t.TempDir(), name), Peers: peers, ListenPeer: peers[name],
		ListenClient: "127.0.0.1:0", ListenHTTP: "none", MinDiskFree: 1,
		HeartbeatTimeout: 2 * time.Second, ElectionTimeout: 2 * time.Second, // a machine that is busy deposes nobody
		OnFatal: func(err error) { t.Errorf("%s halted: %v", name, err) },
	}
}

// portsOfOwn is the real network with whatever ports are free: one chosen before it is listened on could be taken.
type portsOfOwn struct {
	tcpNetwork
	mu    sync.Mutex
	addrs map[string]string
}

func (p *portsOfOwn) Listen(addr string) (net.Listener, error) {
	l, err := p.tcpNetwork.Listen("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addrs[addr] = l.Addr().String()
	return l, nil
}

func (p *portsOfOwn) Dial(ctx context.Context, addr string) (net.Conn, error) {
	p.mu.Lock()
	at := p.addrs[addr]
	p.mu.Unlock()
	if at == "" {
		return nil, fmt.Errorf("nobody listens on %s yet", addr)
	}
	return p.tcpNetwork.Dial(ctx, at)
}

func TestAClusterOverLoopback(t *testing.T) {
	tcp, err := newTCPNetwork(transport.TLSConfig{})
	if err != nil {
		t.Fatal(err)
	}
	network := &portsOfOwn{tcpNetwork: tcp, addrs: make(map[string]string)}
	peers := map[string]string{"n1": "n1:1", "n2": "n2:1", "n3": "n3:1"}
	configs := make(map[string]Config)
	for name := range peers {
		cfg := loopback(t, name, peers)
		cfg.Network = network
		configs[name] = cfg
	}
	for round := range 2 {
		nodes := make(map[string]*Node)
		var mu sync.Mutex
		var all sync.WaitGroup
		for name, cfg := range configs {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
				defer cancel()
				n, err := Start(ctx, cfg)
				if err != nil {
					t.Errorf("start %s: %v", name, err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				nodes[name] = n
				select {
				case <-n.Ready():
				case <-ctx.Done():
					t.Errorf("%s is not ready", name)
				}
			})
		}
		all.Wait()
		if !t.Failed() {
			if round == 0 {
				kvPut(t, nodes["n2"], "k", "v")
			}
			for name, n := range nodes {
				if got := kvGet(t, n, "k"); got != "v" {
					t.Errorf("round %d: %s has %q", round, name, got)
				}
			}
		}
		for _, n := range nodes {
			if err := n.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestAPortInUseIsReportedByItsFlag(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	used := l.Addr().String()
	for flag, change := range map[string]func(*Config){
		"--listen-peer":   func(c *Config) { c.ListenPeer = used },
		"--listen-client": func(c *Config) { c.ListenClient = used },
		"--listen-http":   func(c *Config) { c.ListenHTTP = used },
	} {
		cfg := loopback(t, "n1", nil)
		cfg.ListenPeer = "127.0.0.1:0"
		change(&cfg)
		n, err := Start(context.Background(), cfg)
		if err == nil {
			t.Errorf("%s: started", flag)
			_ = n.Close()
			continue
		}
		if text := err.Error(); !strings.Contains(text, flag+" "+used) || strings.Contains(text, "\n") {
			t.Errorf("%s: %q", flag, text)
		}
	}
}

func TestValidateNamesTheFlag(t *testing.T) {
	for flag, change := range map[string]func(*Config){
		"--strategy":                       func(c *Config) { c.Strategy = "half" },
		"--name":                           func(c *Config) { c.Name = "a/b" },
		"--listen-client":                  func(c *Config) { c.ListenClient = "nowhere" },
		"--listen-peer":                    func(c *Config) { c.ListenPeer = "none" },
		"--listen-http":                    func(c *Config) { c.ListenHTTP = ":" + "x:y" },
		"--advertise-client":               func(c *Config) { c.AdvertiseClient = "nowhere" },
		"--advertise-peer":                 func(c *Config) { c.AdvertisePeer = "none" },
		"--grpc-server":                    func(c *Config) { c.GRPCServer = "x" },
		"--heartbeat-timeout":              func(c *Config) { c.HeartbeatTimeout = time.Millisecond },
		"--election-timeout":               func(c *Config) { c.HeartbeatTimeout, c.ElectionTimeout = time.Second, 500*time.Millisecond },
		"--max-request-bytes":              func(c *Config) { c.MaxRequestBytes = MinMaxRequestBytes - 1 },
		"--max-txn-ops":                    func(c *Config) { c.MaxTxnOps = -1 },
		"--watch-progress-notify-interval": func(c *Config) { c.WatchProgressInterval = -1 },
		"--snapshot-bytes":                 func(c *Config) { c.SnapshotBytes = -1 },
		"--trailing-entries":               func(c *Config) { c.TrailingEntries = 1 << 40 },
		"--peers":                          func(c *Config) { c.Peers = map[string]string{"n2": ""} },
	} {
		var cfg Config
		change(&cfg)
		cfg.setDefaults()
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), flag) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", flag, err)
		}
	}
	var cfg Config
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
}

// The writes that a full disk makes the cluster refuse are refused by one node
// only, the leader: its log has to say so, once.
func TestANearlyFullDiskIsSaidOnce(t *testing.T) {
	var said strings.Builder
	free := func() (uint64, error) { return 1 << 40, nil }
	guard := newDiskGuard(slog.New(slog.NewTextHandler(&said, nil)), t.TempDir(), free, 1<<62)
	for range 3 {
		guard.next.Store(0)
		if !guard.full() {
			t.Error("a tebibyte is not enough, and taken for enough")
		}
	}
	guard.minFree = 0
	for range 3 {
		guard.next.Store(0)
		if guard.full() {
			t.Error("nothing is wanted, and it is not free")
		}
	}
	if n := strings.Count(said.String(), "nearly full"); n != 1 || strings.Count(said.String(), "has room again") != 1 {
		t.Errorf("said: %s", said.String())
	}
}
