// Package node builds one kvd node: production, tests and simulation all start
// nodes here. Start reads from top to bottom, and Close is its reverse.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"kvd/fsm"
	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/placement/sequencer"
	"kvd/server"
	"kvd/server/kvdpb"
	"kvd/shard"
	"kvd/transport"
)

// Node is one running kvd node. All methods are safe for concurrent use.
type Node struct {
	cfg       Config
	log       *slog.Logger
	dir       *bootstrap.Dir
	book      *bootstrap.Book
	logs      raftLogs
	formation *bootstrap.Formation
	transport *transport.Transport
	server    *server.Server
	disk      prometheus.Collector // free space
	groups    *groups              // this node's replicas of shards; empty in `full`

	clusterID, memberID atomic.Uint64 // 0 until this node is a member

	mu         sync.Mutex
	member     bootstrap.Outcome // zero until this node is a member
	replica    *shard.Replica    // of group 0; nil until this node is a member
	reconciler *placement.Reconciler
	sequencer  *sequencer.Server // nil in `full`
	sequences  *sequencer.Client // its client here
	// strangers are the last that connected under the names of members, but as
	// other incarnations.
	strangers map[string]transport.Peer

	ready   chan struct{}
	cancel  context.CancelFunc
	tasks   sync.WaitGroup
	closing sync.Once
	closed  error
}

// group0 is the group that every node takes part in.
const group0 = 0

// Start starts a node and returns when it takes part in its cluster; whether it
// can serve yet is another matter (Ready). A node of a new cluster waits here
// for its peers, until ctx ends. An error says in one line what to correct.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Network == nil {
		network, err := newTCPNetwork(cfg.PeerTLS)
		if err != nil {
			return nil, fmt.Errorf("--peer-cert-file, --peer-key-file, --peer-trusted-ca-file: %w", err)
		}
		cfg.Network = network
	}
	n := &Node{cfg: cfg, log: cfg.Logger, ready: make(chan struct{}), strangers: make(map[string]transport.Peer)}
	n.groups = newGroups(n)
	background, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	if err := n.start(ctx, background); err != nil {
		return nil, errors.Join(err, n.Abort())
	}
	return n, nil
}

func (n *Node) start(ctx, background context.Context) error {
	var err error
	if n.dir, err = bootstrap.Open(n.cfg.DataDir, n.cfg.settings()); err != nil {
		return err
	}
	n.book = n.dir.Book(n.log)
	if err := n.openLogs(); err != nil {
		return err
	}

	listeners, err := n.listen()
	if err != nil {
		return err
	}
	if err := n.connect(listeners); err != nil {
		return errors.Join(err, listeners.close())
	}
	if listeners.http != nil {
		n.server.StartHTTP(listeners.http)
		listeners.http = nil
	}
	if err := n.join(ctx); err != nil {
		return errors.Join(err, listeners.close())
	}
	if err := n.openReplica(); err != nil {
		return errors.Join(err, listeners.close())
	}
	n.reconcile()
	if n.cfg.Strategy == StrategyConsistent {
		n.sequence()
		if err := n.groups.scan(); err != nil {
			return errors.Join(err, listeners.close())
		}
		n.tasks.Go(func() { n.groups.run(background) })
	}
	if listeners.client != nil {
		n.server.StartGRPC(listeners.client)
	}
	n.tasks.Go(func() { n.awaitReady(background) })
	n.tasks.Go(func() { n.introduce(background) })
	n.tasks.Go(func() { n.watchDisplacement(background) })
	n.tasks.Go(func() { n.watchReach(background) })
	return nil
}

// connect makes the transport and the server, and lets them answer each
// other's calls before this node's replica takes part in its group.
func (n *Node) connect(l *listeners) error {
	peer := l.peer
	l.peer = nil // the transport's, also if it fails
	var err error
	n.transport, err = transport.New(transport.Config{
		Identity: n.identity, Listener: peer, Dial: n.cfg.Network.Dial, Resolve: n.resolve, OnPeer: n.learn,
		Logger: n.log, Registerer: n.cfg.Registry,
	})
	if err != nil {
		return err
	}
	n.formation, err = bootstrap.New(bootstrap.Config{Dir: n.dir, Asker: n.transport, Logger: n.log, Members: n.bootstrapMembers})
	if err != nil {
		return err
	}
	clientTLS, err := n.cfg.clientTLS()
	if err != nil {
		return err
	}
	n.server, err = server.New(server.Config{
		Node:         n.cfg.Name,
		Replica:      n.replicaOf,
		Cluster:      cluster{n},
		Peers:        n.transport,
		NotDelivered: notDelivered,
		Groups:       newKeyspace(n.cfg.Shards, n.groups),
		Revisions:    revisions{n},
		Members:      membership{n},
		Services:     func(s grpc.ServiceRegistrar) { kvdpb.RegisterAdminServer(s, newAdmin(n)) },
		TempDir:      n.cfg.DataDir,
		Streams:      n.groups.streams,
		MinLeaseTTL:  minLeaseTTL(n.cfg.ElectionTimeout),
		NoSpace:      newDiskGuard(n.log, n.cfg.DataDir, n.freeBytes, n.cfg.MinDiskFree).full,
		TLS:          clientTLS,

		MaxRequestBytes: n.cfg.MaxRequestBytes, MaxTxnOps: n.cfg.MaxTxnOps,
		WatchProgressInterval: n.cfg.WatchProgressInterval,

		OnlyGRPCGo: n.cfg.GRPCServer == GRPCServerGo,
		Pprof:      n.cfg.Pprof, Version: n.cfg.Version,
		Logger: n.log, Registerer: n.cfg.Registry, Gatherer: n.cfg.Registry,
	}.Planted(n.cfg.ServerFaults))
	if err != nil {
		return err
	}
	n.disk = n.diskGauge()
	if err := n.cfg.Registry.Register(n.disk); err != nil {
		return err
	}
	n.warnOpenPeers()
	n.handleAdministration()
	n.handleSequencer()
	for method, handle := range n.server.Handlers() {
		n.transport.Handle(method, func(ctx context.Context, from transport.Peer, payload []byte) ([]byte, error) {
			return handle(ctx, from.Node, payload)
		})
	}
	n.transport.HandleAsk(bootstrap.MethodStatus, func(ctx context.Context, _ transport.Peer, payload []byte) ([]byte, error) {
		return n.formation.HandleAsk(ctx, payload)
	})
	n.handleRejoins()
	n.handleReach()
	return nil
}

// openReplica opens this node's replica of group 0.
func (n *Node) openReplica() error {
	replica, err := n.openReplicaFiles(n.group0Config())
	if errors.Is(err, errReplicaLost) && !errors.Is(err, bootstrap.ErrReplicaUsed) {
		return fmt.Errorf("data directory %s is damaged: %w: delete its contents so that the node rejoins its cluster with an empty one, or restore a backup if it was alone; an older copy of the directory loses writes", n.cfg.DataDir, err)
	}
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.replica = replica
	return nil
}

// reconcile begins to report this node's replicas, and to keep all groups what
// the cluster map says, for whenever this node leads group 0.
func (n *Node) reconcile() {
	r := placement.Start(placement.Config{
		Node: n.cfg.Name, Incarnation: n.dir.Incarnation(), Weight: n.cfg.Weight,
		Replica: n.Replica(), Founders: n.founders(), Cluster: n.cfg.cluster(), DownAfter: n.cfg.DownAfter,
		Host: n.groups, Peers: n.transport, Logger: n.log, Registerer: n.cfg.Registry,
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reconciler = r
}

// placement is nil until this node is a member.
func (n *Node) placement() *placement.Reconciler {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.reconciler
}

// group0Config describes this node's replica of group 0.
func (n *Node) group0Config() shard.Config {
	outcome := n.outcome()
	cfg := n.replicaConfig(placement.ReplicaRef{Group: group0, ID: raft.ServerID(outcome.Replica)}, group0CacheBytes)
	if outcome.Founder {
		cfg.Bootstrap = &raft.Configuration{}
		for _, m := range outcome.Record.Members {
			cfg.Bootstrap.Servers = append(cfg.Bootstrap.Servers, raft.Server{ID: raft.ServerID(m.Replica), Address: raft.ServerAddress(m.Replica)})
		}
	}
	return cfg
}

// group0CacheBytes bounds what of group 0's log, which has all keys in `full`,
// is kept in memory.
const group0CacheBytes = 16 << 20

// replicaConfig describes a replica of any group on this node, of whose log as
// much is kept in memory.
func (n *Node) replicaConfig(r placement.ReplicaRef, cacheBytes int) shard.Config {
	return shard.Config{
		Group: r.Group, ClusterID: n.outcome().ClusterID, Replica: r.ID, Dir: replicaDir(n.cfg.DataDir, r),
		NewTransport: func(install shard.InstallFunc) (shard.Transport, error) {
			g, err := n.transport.Group(r.Group, raft.ServerAddress(r.ID), transport.InstallFunc(install))
			if errors.Is(err, transport.ErrClosed) {
				return nil, fmt.Errorf("%w: %w", shard.ErrClosed, err)
			}
			return g, err
		},
		OpenLog:          func(guard func() uint64) (shard.LogStore, error) { return n.logs.open(r, guard, cacheBytes) },
		State:            fsm.Config{NoSync: n.cfg.NoSync, Pace: n.groups.pace}.Planted(n.cfg.StateFaults),
		Streams:          n.groups.streams,
		HeartbeatTimeout: n.cfg.HeartbeatTimeout, ElectionTimeout: n.cfg.ElectionTimeout,
		SnapshotEntries: n.cfg.SnapshotEntries, SnapshotBytes: n.cfg.SnapshotBytes, TrailingEntries: n.cfg.TrailingEntries,
		OnFatal: n.cfg.OnFatal, Logger: n.log, Registerer: n.cfg.Registry,
		Faults: n.cfg.Faults,
	}
}

// allShardsPatience is how long a node that starts waits for every shard to
// answer. After that, one has to do: some may have lost too many nodes.
const allShardsPatience = 15 * time.Second

// awaitReady waits for the first linearizable read that this node answers: of
// all keys, if they are in shards.
func (n *Node) awaitReady(ctx context.Context) {
	for start := time.Now(); ctx.Err() == nil; {
		request := &pb.RangeRequest{Key: []byte{0}, CountOnly: true}
		if n.cfg.Strategy == StrategyConsistent && time.Since(start) < allShardsPatience {
			request.RangeEnd = []byte{0}
		}
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := n.server.KV().Range(attempt, request)
		cancel()
		if err == nil {
			close(n.ready)
			n.log.Info("ready to serve client requests", "node", n.cfg.Name, "client", n.cfg.ListenClient, "cluster", fmt.Sprintf("%016x", n.dir.ClusterID()))
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// introduce connects to every other member once, so that all learn this node's
// addresses even if raft never makes the two talk, and this node learns theirs.
func (n *Node) introduce(ctx context.Context) {
	const least, most = 100 * time.Millisecond, 10 * time.Second
	met := make(map[string]bool)
	for pause := least; ; pause = min(2*pause, most) {
		if n.meet(ctx, met) {
			pause = most
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// meet calls the members, and those that the address book knows, that have not
// been met, and reports whether no member is left.
func (n *Node) meet(ctx context.Context, met map[string]bool) bool {
	members := n.members()
	all := len(members) > 0
	call := func(name string) bool {
		if name != n.cfg.Name && !met[name] {
			attempt, cancel := context.WithTimeout(ctx, pingTimeout)
			defer cancel()
			_, err := n.transport.Call(attempt, name, methodPing, nil)
			met[name] = err == nil
		}
		return name == n.cfg.Name || met[name]
	}
	for _, m := range members {
		all = call(m.Name) && all
	}
	if len(members) == 0 { // a node that joins is not told the members before they know its address
		for name := range n.book.All() {
			call(name)
		}
	}
	return all
}

// Ready is closed when the node has answered its first linearizable read.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// KV is the key-value service, for callers inside the process.
func (n *Node) KV() pb.KVServer { return n.server.KV() }

// Watch is the watch service, for callers inside the process.
func (n *Node) Watch() pb.WatchServer { return n.server.Watch() }

// Lease is the lease service, for callers inside the process.
func (n *Node) Lease() pb.LeaseServer { return n.server.Lease() }

// outcome is what this node is in its cluster.
func (n *Node) outcome() bootstrap.Outcome {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.member
}

// Replica is this node's replica of group 0; nil before it is a member.
func (n *Node) Replica() *shard.Replica {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.replica
}

// Shards are this node's open replicas of shards, witnesses included, in no
// order.
func (n *Node) Shards() []*shard.Replica { return slices.Collect(maps.Values(n.groups.Replicas())) }

// Close hands the leadership over if this node has it, answers the requests
// under way and stops the node. Idempotent.
func (n *Node) Close() error {
	n.closing.Do(func() {
		n.server.Drain()
		n.handOver()
		n.closed = n.stop()
	})
	return n.closed
}

// Abort stops the node as a crash would, as far as others can see: nothing is
// handed over and nobody is told.
func (n *Node) Abort() error {
	n.closing.Do(func() {
		if n.transport != nil {
			_ = n.transport.Close()
		}
		n.closed = n.stop()
	})
	return n.closed
}

// handOver hands over the leadership of every group that this node leads.
func (n *Node) handOver() {
	replicas := n.Shards()
	if r := n.Replica(); r != nil {
		replicas = append(replicas, r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*n.cfg.ElectionTimeout)
	defer cancel()
	var tasks sync.WaitGroup
	for _, replica := range replicas {
		if !replica.Serving() {
			continue
		}
		tasks.Go(func() {
			err := replica.TransferLeadership(ctx, "")
			if err != nil && !errors.Is(err, shard.ErrNotLeader) && !errors.Is(err, shard.ErrNoTarget) {
				n.log.Info("the leadership could not be handed over", "group", replica.Status().Group, "error", err)
			}
		})
	}
	tasks.Wait()
}

// stop stops whatever of the node runs, in the reverse order of start.
func (n *Node) stop() error {
	n.cancel()
	var errs []error
	if n.server != nil {
		errs = append(errs, n.server.Close())
	}
	n.tasks.Wait()
	if n.disk != nil {
		n.cfg.Registry.Unregister(n.disk)
	}
	if r := n.placement(); r != nil {
		r.Close()
	}
	errs = append(errs, n.groups.close())
	n.stopSequence()
	if replica := n.Replica(); replica != nil {
		errs = append(errs, replica.Close())
	}
	if n.transport != nil {
		errs = append(errs, n.transport.Close())
	}
	if n.logs != nil {
		errs = append(errs, n.logs.close())
	}
	if n.dir != nil {
		errs = append(errs, n.dir.Close())
	}
	return errors.Join(errs...)
}

// listeners are what start has opened and nobody owns yet.
type listeners struct{ client, peer, http net.Listener }

func (l *listeners) close() error {
	var errs []error
	for _, x := range []net.Listener{l.client, l.peer, l.http} {
		if x != nil {
			errs = append(errs, x.Close())
		}
	}
	return errors.Join(errs...)
}

// listen opens every port first, so that one in use is reported at once.
func (n *Node) listen() (*listeners, error) {
	l := &listeners{}
	var err error
	open := func(to *net.Listener, flag, addr string, listen func(string) (net.Listener, error)) {
		if err != nil || addr == noListener {
			return
		}
		if *to, err = listen(addr); err != nil {
			advice := "is it an address of this machine?"
			if errors.Is(err, syscall.EADDRINUSE) {
				advice = "another process is using the port: stop it, or choose another"
			}
			err = fmt.Errorf("%s %s: %w: %s", flag, addr, err, advice)
		}
	}
	tcp := func(addr string) (net.Listener, error) { return net.Listen("tcp", addr) }
	open(&l.peer, "--listen-peer", n.cfg.ListenPeer, n.cfg.Network.Listen)
	open(&l.client, "--listen-client", n.cfg.ListenClient, tcp)
	open(&l.http, "--listen-http", n.cfg.ListenHTTP, tcp)
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}
