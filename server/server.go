// Package server answers clients: it speaks etcd's v3 gRPC API and the HTTP
// endpoints, validates requests, routes them to the leader of their group and
// waits through elections.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"

	"github.com/prometheus/client_golang/prometheus"

	"kvd/fsm"
	"kvd/server/h2"
	"kvd/shard"
	"kvd/snapshot"
)

// Replica is this node's replica of a group; *shard.Replica is one. Its
// documentation holds here too.
type Replica interface {
	Propose(ctx context.Context, request fsm.Request) (fsm.Result, error)
	ReadIndex(ctx context.Context) (uint64, error)
	ReadIndexAt(ctx context.Context, at int64) (uint64, error)
	Confirm(ctx context.Context) (index, term uint64, err error)
	AcquireState(ctx context.Context, minIndex uint64) (*fsm.Store, func(), error)
	Leader() shard.Leader
	LeaderChanged() <-chan struct{}
	// AdvanceFollower hurries an index that node has asked for; it may do nothing.
	AdvanceFollower(node string, index uint64)
	TransferLeadership(ctx context.Context, toNode string) error
	Status() shard.Status
}

// Peers calls the other nodes. An answer is what that node's handler (Handlers)
// returned.
type Peers interface {
	Call(ctx context.Context, node, method string, payload []byte) ([]byte, error)
}

// Cluster names the cluster and its members. It is asked at every request, so
// it must be cheap and may change.
type Cluster interface {
	ClusterID() uint64
	MemberID() uint64 // of this node
	Members() []Member
}

// Member is one node as clients see it. Name is the node's name.
type Member struct {
	Name       string
	ID         uint64
	PeerURLs   []string
	ClientURLs []string
	Learner    bool
}

// Config says what a Server is made of. The zero value of every bound and
// duration means its default.
type Config struct {
	Node string // this node's name
	// Replica is this node's replica of a group; nil while there is none. A
	// shard's that has no state, or cannot be expected to catch up soon, must
	// not be returned: its group's requests go to other nodes.
	Replica func(group uint64) Replica
	// Groups spreads the keys; nil = all in group 0.
	Groups Groups
	// Revisions is required if Groups are sharded.
	Revisions Revisions
	Cluster   Cluster
	// Members lets clients remove members through the etcd API; nil = they cannot.
	Members Members
	Peers   Peers
	// NotDelivered reports whether an error of Peers.Call proves that the
	// request never reached the peer. All other errors mean that it may have.
	NotDelivered func(error) bool
	// NoSpace reports that this node's disk is too full to take writes that
	// make the state grow. nil means never.
	NoSpace func() bool

	// Services registers further gRPC services for clients; nil = none.
	Services func(grpc.ServiceRegistrar)
	// TempDir is where backups of a sharded key space are put together, on the
	// disk that has the room for them; "" = the system's. Only one Server may use
	// a TempDir: New removes what a crash has left of backups there.
	TempDir string

	// Streams says how fast backups are made and sent; nil = as fast as possible.
	Streams *snapshot.Limit

	TLS *tls.Config // for gRPC and HTTP; nil = plain text
	// OnlyGRPCGo has grpc-go serve all calls of clients, and package h2 none.
	OnlyGRPCGo bool
	Pprof      bool // serve /debug/pprof
	// Version of kvd, for /version. Clients are told the etcd version that the
	// API is compatible with.
	Version string

	RequestTimeout       time.Duration // of a request without a deadline; 5 s
	DrainTimeout         time.Duration // for requests to end when the server closes; 5 s
	MaxRequestBytes      int           // of one request in the log; 1.5 MiB
	MaxTxnOps            int           // compares, or operations of one branch; 128; other nodes take no more than MaxMaxTxnOps
	MaxPendingBytes      int64         // of writes under way on this node; above it they are shed; 128 MiB
	MaxAnswerBytes       int64         // of large answers to reads under way on this node; above it they are shed; 512 MiB
	MaxConcurrentStreams uint32        // requests under way on one connection; 16384
	MaxConnections       int           // of gRPC clients; more wait to be accepted; 8192, or half of the files that may be open
	MaxHTTPConnections   int           // the same for HTTP; 1024, or an eighth
	MaxSnapshotStreams   int           // backups under way on this node; 4
	LeaveWait            time.Duration // that the answer to a member's removal waits for the member to be gone; 2 s
	SnapshotTimeout      time.Duration // for the client to read the next 64 KiB of a backup; 30 s
	MaxWatchStreams      int           // on this node; more are refused; 8192
	MaxWatches           int           // on this node; more are refused; 262144
	MaxStreamWatches     int           // of one stream; 65536
	MaxWatchBytes        int64         // kept for clients' watches until they read, and as much of what is too large for that; 256 MiB
	WatchTimeout         time.Duration // for the client to take what its stream tells it; 30 s
	// WatchProgressInterval is how often watches that want it and see no events are told how far they are; 10 minutes.
	WatchProgressInterval time.Duration
	MaxHashes             int   // Hash and HashKV under way on this node; more wait; 4
	MinLeaseTTL           int64 // seconds that a lease has at least; 2
	// LeaseCheckpointInterval is how long a lease goes on before what remains of its time is kept in the log, for the
	// next leader; 5 minutes, less than 0 = never.
	LeaseCheckpointInterval time.Duration

	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Gatherer   prometheus.Gatherer // for /metrics; nil = not served

	faults faults
	follow func(ctx context.Context, deliver func(watchDelivery) error) watchFeed // of tests, instead of newWatches
}

// Faults are those that simulations of whole nodes can plant, too.
type Faults struct {
	ProgressAhead bool // a client is told that it has everything before it has
	KeepReigns    bool // a leader goes on with the leases' time of an earlier term, whenever it leads
}

// Planted returns the configuration with faults.
func (c Config) Planted(f Faults) Config {
	c.faults.Faults = f
	return c
}

// faults are planted by tests to prove that the tests see them.
type faults struct {
	Faults

	joinSentRound      bool // a read joins a round whose request has already been sent
	joinBegunCut       bool // a read joins a cut whose revision has already been asked for
	missShard          bool // a cut lacks a group
	skipGates          bool // a cut does not make the groups complete
	readNewest         bool // a group answers at its newest revision instead of the cut's
	limitPerShard      bool // each group's answer is limited, and not the whole
	shardHeader        bool // an answer has the revision of a group
	retryUnknown       bool // a write of unknown outcome is proposed again
	readAfterTxn       bool // what a transaction reads in other groups is read at a later revision
	renewUnconfirmed   bool // leases are renewed by whoever thinks to lead
	keepCheckpoints    bool // a renewal leaves the checkpoint in the table
	attachUnregistered bool // the lease's home is not told of the groups that have its keys

	earlyProgress    bool // the progress of watches is ahead of their events
	unresolvedEvents bool // watches are told of what other groups may still come before
	relaySkips       bool // the last of several events that another node has for a watch is lost
	asideLost        bool // so are transactions that are too large to be kept
}

// Defaults of what one request may have, which are etcd's, and bounds for them.
const (
	DefaultMaxRequestBytes = 3 << 19
	DefaultMaxTxnOps       = 128
	MaxMaxTxnOps           = 1 << 14
)

const (
	// overheadBytes of a message beyond MaxRequestBytes still reach the
	// validation, which answers better than the codec does. As in etcd.
	overheadBytes = 512 << 10

	keepaliveMinTime  = 5 * time.Second // clients may not ping more often
	keepaliveInterval = 2 * time.Hour
	keepaliveTimeout  = 20 * time.Second
	connectTimeout    = 10 * time.Second // to shake hands
)

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c *Config) setDefaults() {
	setDefault(&c.RequestTimeout, 5*time.Second)
	setDefault(&c.DrainTimeout, 5*time.Second)
	setDefault(&c.MaxRequestBytes, DefaultMaxRequestBytes)
	setDefault(&c.MaxTxnOps, DefaultMaxTxnOps)
	setDefault(&c.MaxPendingBytes, 128<<20)
	setDefault(&c.MaxAnswerBytes, 512<<20)
	setDefault(&c.MaxConcurrentStreams, 16384)
	setDefault(&c.MaxConnections, min(8192, maxOpenFiles()/2))
	setDefault(&c.MaxHTTPConnections, min(1024, maxOpenFiles()/8))
	setDefault(&c.MaxSnapshotStreams, 4)
	setDefault(&c.LeaveWait, 2*time.Second)
	setDefault(&c.SnapshotTimeout, 30*time.Second)
	setDefault(&c.MaxHashes, 4)
	setDefault(&c.MaxWatchStreams, 8192)
	setDefault(&c.MaxWatches, 1<<18)
	setDefault(&c.MaxStreamWatches, 1<<16)
	setDefault(&c.MaxWatchBytes, 256<<20)
	setDefault(&c.WatchTimeout, 30*time.Second)
	setDefault(&c.WatchProgressInterval, 10*time.Minute)
	setDefault(&c.MinLeaseTTL, 2)
	setDefault(&c.LeaseCheckpointInterval, 5*time.Minute)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Groups == nil {
		c.Groups = everything{}
	}
	if c.NoSpace == nil {
		c.NoSpace = func() bool { return false }
	}
}

// maxOpenFiles is what the system allows this process. Clients must leave some
// for the other nodes and for the data.
func maxOpenFiles() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1024
	}
	return int(min(limit.Cur, math.MaxInt32))
}

// Validate names the first field that cannot work.
func (c *Config) Validate() error {
	switch {
	case c.Node == "":
		return errors.New("server: no node name")
	case c.Replica == nil || c.Cluster == nil || c.Peers == nil || c.NotDelivered == nil:
		return errors.New("server: Replica, Cluster, Peers and NotDelivered are required")
	case c.Groups.Sharded() && c.Revisions == nil:
		return errors.New("server: Revisions are required for a sharded key space")
	case c.MaxRequestBytes < 0 || c.MaxRequestBytes > 1<<30:
		return fmt.Errorf("server: request limit of %d bytes is not between 0 and 1 GiB", c.MaxRequestBytes)
	case c.MaxTxnOps > MaxMaxTxnOps:
		return fmt.Errorf("server: more than %d operations in a transaction", MaxMaxTxnOps)
	case c.MaxTxnOps < 0 || c.MinLeaseTTL < 0 || c.MinLeaseTTL > maxLeaseTTL || c.MaxPendingBytes < int64(c.MaxRequestBytes) || c.MaxSnapshotStreams < 0 || c.LeaveWait < 0 || c.SnapshotTimeout < 0 || c.MaxHashes < 0 || c.MaxAnswerBytes < 0 || c.MaxConnections < 1 || c.MaxHTTPConnections < 1:
		return errors.New("server: a limit is negative, or less may be pending than one request has")
	case c.MaxWatchStreams < 0 || c.MaxWatches < 0 || c.MaxStreamWatches < 0 || c.MaxWatchBytes < 0 || c.WatchTimeout < 0 || c.WatchProgressInterval < 0:
		return errors.New("server: a limit of watches is negative")
	}
	return nil
}

// Server serves clients of one node. All methods are safe for concurrent use.
type Server struct {
	cfg         Config
	router      *router
	kv          *kv
	watch       *watch
	lease       *lease
	maintenance *maintenance
	members     *members
	sessions    *sessions
	metrics     *metrics
	receipts    *receipts

	front   *h2.Server   // clients over the network; nil if that is grpc-go's
	grpc    *grpc.Server // their calls that quick does not serve
	inner   *bufconn.Listener
	gateway *gateway // the JSON gateway's own way in
	health  *health.Server
	http    *http.Server

	ready   atomic.Bool // clients are served, and not yet sent away
	serving sync.WaitGroup
	closing sync.Once
}

// New makes a Server that can be called (KV, Handlers) but does not listen yet.
func New(cfg Config) (*Server, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, health: health.NewServer()}
	err := removeBackups(cfg.TempDir)
	if err != nil {
		return nil, err
	}
	if s.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, err
	}
	s.router = newRouter(&s.cfg, s.metrics)
	s.receipts = &receipts{router: s.router}
	s.kv = newKV(s.router)
	s.watch = newWatch(s.router, s.recovered)
	s.lease = &lease{router: s.router}
	s.maintenance = newMaintenance(s.router)
	s.members = newMembers(s.router)
	s.sessions = newSessions()
	s.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	s.grpc = s.newGRPC(s.grpcOptions()...)
	s.metrics.calls.add(s.grpc)
	if s.gateway, err = newGateway(s.newGRPC(), s.cfg.MaxRequestBytes); err != nil {
		s.metrics.unregister()
		return nil, err
	}
	s.sessions.connect(s.gateway.conn)
	if !s.cfg.OnlyGRPCGo {
		s.front = s.newQuick()
		s.serving.Go(func() { _ = s.grpc.Serve(closable{s.inner}) })
	}
	s.http = s.newHTTP()
	s.router.spawn(s.router.leases.run)
	return s, nil
}

// KV is the key-value service, for callers inside the process.
func (s *Server) KV() pb.KVServer { return s.kv }

// Watch is the watch service, for callers inside the process.
func (s *Server) Watch() pb.WatchServer { return s.watch }

// Lease is the lease service, for callers inside the process.
func (s *Server) Lease() pb.LeaseServer { return s.lease }

// AcquireSystem pins this node's state of group 0, which has applied every
// change of the system key space that was acknowledged before the call. release
// must be called exactly once. Errors are gRPC statuses.
func (s *Server) AcquireSystem(ctx context.Context) (_ *fsm.Store, release func(), _ error) {
	return s.router.acquire(ctx, 0, false)
}

// Handlers answer the other nodes' calls, by method name. They must be
// registered before this node's replicas take part in their groups.
func (s *Server) Handlers() map[string]HandlerFunc { return s.router.handlers() }

// StartGRPC serves clients on l, which the Server owns from now on.
func (s *Server) StartGRPC(l net.Listener) {
	l = netutil.LimitListener(l, s.cfg.MaxConnections)
	s.health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	s.ready.Store(true)
	serve := func(l net.Listener) error { return s.grpc.Serve(closable{l}) }
	if s.front != nil {
		serve = s.front.Serve
		if s.cfg.TLS != nil {
			l = tls.NewListener(l, onlyHTTP2(s.cfg.TLS))
		}
	}
	s.serving.Go(func() {
		if err := serve(l); err != nil && !errors.Is(err, h2.ErrClosed) && !errors.Is(err, grpc.ErrServerStopped) {
			s.cfg.Logger.Error("client listener failed", "address", l.Addr().String(), "error", err)
		}
	})
}

// StartHTTP serves the HTTP endpoints on l, which the Server owns from now on.
// It may start long before StartGRPC, to answer /livez and /metrics.
func (s *Server) StartHTTP(l net.Listener) {
	l = netutil.LimitListener(l, s.cfg.MaxHTTPConnections)
	if s.cfg.TLS != nil {
		conf := s.cfg.TLS.Clone()
		conf.NextProtos = []string{"h2", "http/1.1"}
		l = tls.NewListener(l, conf)
	}
	s.serving.Go(func() {
		if err := s.http.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			s.cfg.Logger.Error("HTTP listener failed", "address", l.Addr().String(), "error", err)
		}
	})
}

// Drain makes health checks fail, so that clients and balancers go elsewhere
// while everything is still being answered.
func (s *Server) Drain() {
	s.ready.Store(false)
	s.health.Shutdown()
}

func (s *Server) servingError() error {
	if !s.ready.Load() {
		return errors.New("clients are not served")
	}
	return nil
}

// Close stops listening, ends the streams that would go on for ever, so that
// their clients go elsewhere, gives the requests under way DrainTimeout to end,
// and returns when nothing of the Server runs any more. Idempotent.
func (s *Server) Close() error {
	s.closing.Do(func() {
		s.Drain()
		s.sessions.stop() // nobody waits for a lock any more
		ctx, cancel := context.WithTimeout(context.Background(), s.cfg.DrainTimeout)
		defer cancel()
		close(s.router.leaving)
		var stopping sync.WaitGroup
		stopping.Go(func() {
			if s.front != nil {
				s.front.Close(ctx)
			}
			stopGRPC(ctx, s.grpc)
		})
		stopping.Go(func() {
			if s.http.Shutdown(ctx) != nil {
				_ = s.http.Close()
			}
		})
		stopping.Wait()
		s.sessions.close()
		s.gateway.close(ctx) // its callers are the HTTP requests, locks and elections
		s.router.close()
		s.serving.Wait()
		s.metrics.unregister()
	})
	return nil
}

// stopGRPC stops gracefully until ctx is done, then at once.
func stopGRPC(ctx context.Context, server *grpc.Server) {
	stop := context.AfterFunc(ctx, server.Stop)
	defer stop()
	server.GracefulStop()
}
