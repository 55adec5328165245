package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kvd/fsm"
	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/placement/sequencer"
	"kvd/ring"
	"kvd/server"
	"kvd/shard"
	"kvd/shard/wal/vfs"
	"kvd/transport"
)

// Strategies of a cluster.
const (
	StrategyFull       = "full"       // every key on every node
	StrategyConsistent = "consistent" // keys hashed to shards, shards placed by the ring
)

// Defaults and limits of what StrategyConsistent adds.
const (
	DefaultShards            = 64
	DefaultReplicationFactor = 3
	DefaultDownAfter         = 30 * time.Second
	MinDownAfter             = 2 * time.Second // nodes report once a second
)

// Bounds of MaxRequestBytes: kvd's own commands have to fit, and a group takes
// entries of up to 16 MiB.
const (
	MinMaxRequestBytes = 256
	MaxMaxRequestBytes = 10 << 20
)

// Network is how nodes reach each other; the default is TCP.
type Network interface {
	Listen(addr string) (net.Listener, error)
	Dial(ctx context.Context, addr string) (net.Conn, error)
}

// Config says what a node is made of. The zero value of a field means its
// default.
type Config struct {
	Name         string // n1
	DataDir      string // ./<Name>.kvd
	ClusterToken string // kvd
	Strategy     string // full
	// Peers are the founding members and their peer addresses, this node
	// included or not; empty, without Join: a cluster of this node alone.
	Peers map[string]string
	// Join is the peer address of a member of a running cluster, which this
	// node joins if its directory is empty. Not together with Peers.
	Join string

	// Of StrategyConsistent only, the same on all nodes.
	Shards            int    // 64
	ReplicationFactor int    // data replicas of each shard; 3
	Witnesses         string // placement.WitnessesAuto or WitnessesNone; auto

	DownAfter time.Duration // silence after which a node's replicas are made elsewhere; 30 s
	Weight    float64       // this node's share of the shards, relative to the others'; 1

	ListenClient    string // host:port for gRPC; 127.0.0.1:2379; "none": no listener
	ListenPeer      string // host:port for the other nodes; 127.0.0.1:2380
	ListenHTTP      string // host:port for HTTP; 127.0.0.1:2381; "none": no listener
	AdvertiseClient string // what clients are told; ListenClient
	AdvertisePeer   string // what other nodes are told; ListenPeer
	ClientTLS       transport.TLSConfig
	PeerTLS         transport.TLSConfig
	Pprof           bool

	HeartbeatTimeout time.Duration // 1 s
	ElectionTimeout  time.Duration // 1 s
	SnapshotEntries  uint64        // log entries between truncations; shard's default
	SnapshotBytes    int64         // log bytes between truncations; shard's default
	TrailingEntries  uint64        // log entries kept for lagging nodes; shard's default

	// RaftLog is RaftLogShared or RaftLogBolt; empty: what the data directory
	// has, DefaultRaftLog for a new one.
	RaftLog string
	// WatchProgressInterval is how often watches that want it and see no events
	// are told how far they are; server's default.
	WatchProgressInterval time.Duration
	// GRPCServer is GRPCServerKVD, the default, or GRPCServerGo.
	GRPCServer string
	// What one request of this node's clients may have; server's defaults.
	MaxRequestBytes, MaxTxnOps int

	Version     string
	Logger      *slog.Logger
	Registry    *prometheus.Registry
	OnFatal     func(error) // told why the node cannot go on; the process must end
	MinDiskFree uint64      // bytes below which writes are refused; 256 MiB

	// Network and the shared log's file system and size of files are replaced by
	// simulations. NoSync gives up the durability of all that is not in LogFS,
	// for simulations only.
	Network         Network
	LogFS           vfs.FS
	LogSegmentBytes int64
	NoSync          bool
	Faults          shard.Faults
	// These are planted by tests, as Faults are.
	SequencerFaults sequencer.Faults
	ServerFaults    server.Faults
	StateFaults     fsm.Faults
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c *Config) setDefaults() {
	setDefault(&c.Name, "n1")
	setDefault(&c.DataDir, "./"+c.Name+".kvd")
	setDefault(&c.ClusterToken, "kvd")
	setDefault(&c.Strategy, StrategyFull)
	if c.Strategy == StrategyConsistent {
		setDefault(&c.Shards, DefaultShards)
		setDefault(&c.ReplicationFactor, DefaultReplicationFactor)
		setDefault(&c.Witnesses, placement.WitnessesAuto)
	}
	setDefault(&c.DownAfter, DefaultDownAfter)
	setDefault(&c.Weight, 1)
	setDefault(&c.ListenClient, "127.0.0.1:2379")
	setDefault(&c.ListenPeer, "127.0.0.1:2380")
	setDefault(&c.ListenHTTP, "127.0.0.1:2381")
	setDefault(&c.AdvertiseClient, c.ListenClient)
	setDefault(&c.AdvertisePeer, c.ListenPeer)
	setDefault(&c.HeartbeatTimeout, time.Second)
	setDefault(&c.ElectionTimeout, max(time.Second, c.HeartbeatTimeout))
	setDefault(&c.GRPCServer, GRPCServerKVD)
	setDefault(&c.MaxRequestBytes, server.DefaultMaxRequestBytes)
	setDefault(&c.MaxTxnOps, server.DefaultMaxTxnOps)
	setDefault(&c.MinDiskFree, 256<<20)
	setDefault(&c.Version, "dev")
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Registry == nil {
		c.Registry = prometheus.NewRegistry()
	}
	if c.OnFatal == nil {
		c.OnFatal = func(error) {}
	}
}

const noListener = "none"

// Who serves the calls that clients make most. All others are grpc-go's.
const (
	GRPCServerKVD = "kvd" // package server/h2
	GRPCServerGo  = "grpc-go"
)

// Validate names the flag of the first setting that cannot work.
func (c *Config) Validate() error {
	if err := c.validatePlacement(); err != nil {
		return err
	}
	if err := c.settings().Validate(); err != nil {
		return err
	}
	if err := c.validateAddresses(); err != nil {
		return err
	}
	switch {
	case c.RaftLog != "" && c.RaftLog != RaftLogShared && c.RaftLog != RaftLogBolt:
		return fmt.Errorf("--raft-log: %q is neither %s nor %s", c.RaftLog, RaftLogShared, RaftLogBolt)
	case c.GRPCServer != GRPCServerKVD && c.GRPCServer != GRPCServerGo:
		return fmt.Errorf("--grpc-server: %q is neither %s nor %s", c.GRPCServer, GRPCServerKVD, GRPCServerGo)
	case c.HeartbeatTimeout < 10*time.Millisecond:
		return fmt.Errorf("--heartbeat-timeout: %v is below 10ms", c.HeartbeatTimeout)
	case c.ElectionTimeout < c.HeartbeatTimeout:
		return fmt.Errorf("--election-timeout: %v is below --heartbeat-timeout %v", c.ElectionTimeout, c.HeartbeatTimeout)
	case c.WatchProgressInterval < 0:
		return errors.New("--watch-progress-notify-interval: must not be negative")
	case c.MaxRequestBytes < MinMaxRequestBytes || c.MaxRequestBytes > MaxMaxRequestBytes:
		return fmt.Errorf("--max-request-bytes: %d is not between %d and %d", c.MaxRequestBytes, MinMaxRequestBytes, MaxMaxRequestBytes)
	case c.MaxTxnOps < 1 || c.MaxTxnOps > server.MaxMaxTxnOps:
		return fmt.Errorf("--max-txn-ops: %d is not between 1 and %d", c.MaxTxnOps, server.MaxMaxTxnOps)
	case c.SnapshotBytes < 0:
		return errors.New("--snapshot-bytes: must not be negative")
	case c.TrailingEntries > shard.MaxTrailingEntries:
		return fmt.Errorf("--trailing-entries: %d is above %d", c.TrailingEntries, shard.MaxTrailingEntries)
	}
	return nil
}

// validatePlacement checks what says which keys go where.
func (c *Config) validatePlacement() error {
	switch c.Strategy {
	case StrategyFull:
		if c.Shards != 0 || c.ReplicationFactor != 0 || c.Witnesses != "" {
			return fmt.Errorf("--shards, --replication-factor, --witnesses: --strategy %s has none: every node holds every key", StrategyFull)
		}
	case StrategyConsistent:
		if err := c.validateShards(); err != nil {
			return err
		}
	default:
		return fmt.Errorf("--strategy: %q is not known: use %s or %s", c.Strategy, StrategyFull, StrategyConsistent)
	}
	switch {
	case c.DownAfter < MinDownAfter:
		return fmt.Errorf("--down-after: %v is below %v: nodes report once a second", c.DownAfter, MinDownAfter)
	case !(c.Weight >= ring.MinWeight && c.Weight <= ring.MaxWeight): // so that NaN fails
		return fmt.Errorf("--weight: %v is not between %v and %v", c.Weight, ring.MinWeight, ring.MaxWeight)
	}
	return nil
}

func (c *Config) validateShards() error {
	switch {
	case c.Shards < 1 || c.Shards > bootstrap.MaxShards:
		return fmt.Errorf("--shards: %d is not between 1 and %d", c.Shards, bootstrap.MaxShards)
	case c.ReplicationFactor < 1 || c.ReplicationFactor > bootstrap.MaxReplicas:
		return fmt.Errorf("--replication-factor: %d is not between 1 and %d", c.ReplicationFactor, bootstrap.MaxReplicas)
	case c.Witnesses != placement.WitnessesAuto && c.Witnesses != placement.WitnessesNone:
		return fmt.Errorf("--witnesses: %q is neither %s nor %s (none)", c.Witnesses, placement.WitnessesAuto, placement.WitnessesNone)
	}
	return nil
}

func (c *Config) validateAddresses() error {
	if c.Join != "" {
		if len(c.Peers) > 0 {
			return errors.New("--join: not together with --peers: a node joins a running cluster, or founds one with its peers")
		}
		if host, port, err := net.SplitHostPort(c.Join); err != nil || host == "" || port == "" {
			return fmt.Errorf("--join: %q is not host:port", c.Join)
		}
	}
	for _, a := range []struct {
		flag, addr string
		optional   bool
	}{
		{"--listen-client", c.ListenClient, true},
		{"--listen-peer", c.ListenPeer, false},
		{"--listen-http", c.ListenHTTP, true},
		{"--advertise-client", c.AdvertiseClient, true},
		{"--advertise-peer", c.AdvertisePeer, false},
	} {
		if a.optional && a.addr == noListener {
			continue
		}
		if _, _, err := net.SplitHostPort(a.addr); err != nil {
			return fmt.Errorf("%s: %q is not host:port", a.flag, a.addr)
		}
	}
	return nil
}

func (c *Config) settings() bootstrap.Settings {
	return bootstrap.Settings{Name: c.Name, Peers: c.Peers, Common: bootstrap.Common{
		Token: c.ClusterToken, Strategy: c.Strategy,
		Shards: c.Shards, ReplicationFactor: c.ReplicationFactor, Witnesses: c.Witnesses,
	}}
}

// founders lists the names of the founding members, in order.
func (c *Config) founders() []string {
	names := []string{c.Name}
	for name := range c.Peers {
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// cluster is what a new cluster with shards begins with; nil without shards.
func (c *Config) cluster() *placement.ClusterConfig {
	if c.Strategy != StrategyConsistent {
		return nil
	}
	return &placement.ClusterConfig{Strategy: c.Strategy, Shards: c.Shards, ReplicationFactor: c.ReplicationFactor, Witnesses: c.Witnesses}
}
