package main

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kvd/node"
	"kvd/placement"
	"kvd/server"
	"kvd/transport"
)

type startOptions struct {
	config string

	name, dataDir, clusterToken, strategy string
	peers, join                           string
	shards, replicationFactor             int
	witnesses                             string
	downAfter                             time.Duration
	weight                                float64
	listenClient, advertiseClient         string
	listenPeer, advertisePeer             string
	listenHTTP                            string
	pprof                                 bool

	certFile, keyFile, trustedCAFile string
	clientCertAuth                   bool

	peerCertFile, peerKeyFile, peerTrustedCAFile string

	heartbeatTimeout, electionTimeout time.Duration
	snapshotEntries, trailingEntries  uint64
	snapshotBytes                     int64
	watchProgressInterval             time.Duration
	maxRequestBytes, maxTxnOps        int
	raftLog, grpcServer               string

	logLevel, logFormat string
}

// Defaults of addresses.
const (
	defaultClient = "127.0.0.1:2379"
	defaultPeer   = "127.0.0.1:2380"
	defaultHTTP   = "127.0.0.1:2381"
)

// addClusterFlags adds what says which node of which cluster this is.
func (o *startOptions) addClusterFlags(f *pflag.FlagSet) {
	f.StringVar(&o.name, "name", "n1", "this node's name in its cluster; it never changes")
	f.StringVar(&o.dataDir, "data-dir", "", `this node's directory, made on the first start (default "./<name>.kvd")`)
	f.StringVar(&o.peers, "peers", "", "founding nodes and their peer addresses, n1=host:port,n2=host:port,...; the same on all of them (default: this node alone)")
	f.StringVar(&o.strategy, "strategy", node.StrategyFull, "where keys are: full = every key on every node; consistent = each on as many as --replication-factor says; the same on all nodes")
	f.IntVar(&o.shards, "shards", node.DefaultShards, "consistent: how many shards the keys are hashed to, for ever; the same on all nodes")
	f.IntVar(&o.replicationFactor, "replication-factor", node.DefaultReplicationFactor, "consistent: copies of each key; R copies survive R-1 failures, given 2R-1 nodes; the same on all nodes")
	f.StringVar(&o.witnesses, "witnesses", placement.WitnessesAuto, "consistent: auto = further nodes vote without holding data where that survives more failures; 0 = none; the same on all nodes")
	f.StringVar(&o.clusterToken, "cluster-token", "kvd", "keeps clusters apart that could reach each other by mistake; the same on all nodes")
}

func (o *startOptions) AddFlags(f *pflag.FlagSet) {
	f.SortFlags = false
	f.StringVar(&o.config, "config", "", "YAML file with settings; its keys are the names of these flags")
	o.addClusterFlags(f)
	f.StringVar(&o.join, "join", "", "peer address of any node of a running cluster that this node is to join, host:port; means nothing once it has joined")
	f.DurationVar(&o.downAfter, "down-after", node.DefaultDownAfter, "consistent: silence after which a node's copies are made anew on other nodes")
	f.Float64Var(&o.weight, "weight", 1, "consistent: this node's share of the shards, compared with the other nodes'")
	f.StringVar(&o.listenClient, "listen-client", defaultClient, "address for clients (gRPC)")
	f.StringVar(&o.advertiseClient, "advertise-client", "", "address that clients are told (default: --listen-client)")
	f.StringVar(&o.listenPeer, "listen-peer", "", `address for the other nodes (default: this node's in --peers, or "`+defaultPeer+`")`)
	f.StringVar(&o.advertisePeer, "advertise-peer", "", "address that the other nodes are told (default: this node's in --peers, or --listen-peer)")
	f.StringVar(&o.listenHTTP, "listen-http", defaultHTTP, `address for health, metrics and the JSON gateway; "none" for none`)
	f.StringVar(&o.certFile, "cert-file", "", "file of the certificate shown to clients; turns TLS on")
	f.StringVar(&o.keyFile, "key-file", "", "file of its key")
	f.StringVar(&o.trustedCAFile, "trusted-ca-file", "", "file of the CAs that client certificates must come from")
	f.BoolVar(&o.clientCertAuth, "client-cert-auth", false, "accept only clients with a certificate")
	f.StringVar(&o.peerCertFile, "peer-cert-file", "", "file of the certificate shown to other nodes; turns TLS on")
	f.StringVar(&o.peerKeyFile, "peer-key-file", "", "file of its key")
	f.StringVar(&o.peerTrustedCAFile, "peer-trusted-ca-file", "", "file of the CAs that other nodes' certificates must come from; demands one from each")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", "text", "text or json")
	f.BoolVar(&o.pprof, "pprof", false, "serve /debug/pprof on the HTTP address")
	f.DurationVar(&o.heartbeatTimeout, "heartbeat-timeout", time.Second, "time without the leader after which a node stands for election")
	f.DurationVar(&o.electionTimeout, "election-timeout", time.Second, "time after which an election without a result is repeated")
	f.Uint64Var(&o.snapshotEntries, "snapshot-entries", 0, "log entries after which the log is truncated (default 10000)")
	f.Int64Var(&o.snapshotBytes, "snapshot-bytes", 0, "log bytes after which the log is truncated (default 256 MiB)")
	o.addRaftLogFlag(f)
	f.StringVar(&o.grpcServer, "grpc-server", node.GRPCServerKVD, "kvd = puts, gets, deletions and transactions are served by kvd's own gRPC server, which needs less CPU; grpc-go = nothing is")
	f.IntVar(&o.maxRequestBytes, "max-request-bytes", server.DefaultMaxRequestBytes, "longest request that changes keys; of this node's clients")
	f.IntVar(&o.maxTxnOps, "max-txn-ops", server.DefaultMaxTxnOps, "most operations in a transaction; of this node's clients")
	f.DurationVar(&o.watchProgressInterval, "watch-progress-notify-interval", 0, "how often watches that want it and see no events are told how far they are (default 10m)")
	f.Uint64Var(&o.trailingEntries, "trailing-entries", 0, "log entries kept for nodes that lag (default 5000)")
}

func (o *startOptions) addRaftLogFlag(f *pflag.FlagSet) {
	f.StringVar(&o.raftLog, "raft-log", "", "shared = one raft log for all replicas of this node, boltdb = a file for each (default: what the directory has, "+node.DefaultRaftLog+" in a new one)")
}

func newStartCommand() *cobra.Command {
	var o startOptions
	cmd := &cobra.Command{
		Use:   "start",
		Short: "Run a node",
		Long: `Run a node. With no flags at all it is a cluster of its own on 127.0.0.1:2379, with its data in ./n1.kvd.

Every flag can also be set by an environment variable (KVD_DATA_DIR for --data-dir) and by a line of the YAML
file that --config names (data-dir: ./n1.kvd). A flag beats the environment, which beats the file.

SIGTERM or Ctrl-C hands the leadership over and stops in order; a second one ends the process at once, which
loses nothing either.`,
		Example: `  kvd start
  kvd start --name n2 --peers n1=10.0.0.1:2380,n2=10.0.0.2:2380,n3=10.0.0.3:2380 --listen-client 10.0.0.2:2379
  kvd start --name n4 --join 10.0.0.1:2380 --listen-client 10.0.0.4:2379 --listen-peer 10.0.0.4:2380
  kvd start --config /etc/kvd.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.complete(cmd.LocalFlags(), os.Getenv); err != nil {
				return err
			}
			log, err := o.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			cfg, err := o.nodeConfig()
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, log)
		},
	}
	o.AddFlags(cmd.Flags())
	for flag, values := range map[string][]string{
		"strategy": {node.StrategyFull, node.StrategyConsistent}, "witnesses": {placement.WitnessesAuto, placement.WitnessesNone},
		"raft-log": {node.RaftLogShared, node.RaftLogBolt}, "grpc-server": {node.GRPCServerKVD, node.GRPCServerGo},
		"log-level": {"debug", "info", "warn", "error"}, "log-format": {"text", "json"},
	} {
		if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err)
		}
	}
	return cmd
}

// complete fills in what the command line has not set: from the environment, then from the file.
func (o *startOptions) complete(flags *pflag.FlagSet, getenv func(string) string) error {
	if err := setFromEnv(flags, getenv); err != nil {
		return err
	}
	if o.config != "" {
		if err := setFromFile(flags, o.config); err != nil {
			return err
		}
	}
	return o.fitStrategy(flags)
}

// fitStrategy refuses settings that the strategy has not, and drops their defaults.
func (o *startOptions) fitStrategy(flags *pflag.FlagSet) error {
	if o.strategy != node.StrategyFull {
		return nil
	}
	for _, name := range []string{"shards", "replication-factor", "witnesses", "weight"} {
		if f := flags.Lookup(name); f != nil && f.Changed {
			return usagef("--%s: means nothing with --strategy %s, where every node holds every key: leave it out, or use --strategy %s",
				name, node.StrategyFull, node.StrategyConsistent)
		}
	}
	o.shards, o.replicationFactor, o.witnesses = 0, 0, ""
	return nil
}

func (o *startOptions) logger(out io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, usagef("--log-level: %q is not a level: use debug, info, warn or error", o.logLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch o.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(out, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(out, options)), nil
	}
	return nil, usagef("--log-format: %q is not a format: use text or json", o.logFormat)
}

// nodeConfig is the node that the options describe.
func (o *startOptions) nodeConfig() (node.Config, error) {
	peers, err := o.founders()
	if err != nil {
		return node.Config{}, err
	}
	cfg := node.Config{
		Name: o.name, DataDir: o.dataDir, ClusterToken: o.clusterToken, Peers: peers, Join: o.join,
		Strategy: o.strategy, Shards: o.shards, ReplicationFactor: o.replicationFactor, Witnesses: o.witnesses,
		DownAfter: o.downAfter, Weight: o.weight,
		ListenClient: o.listenClient, AdvertiseClient: o.advertiseClient,
		ListenPeer: o.listenPeer, AdvertisePeer: o.advertisePeer, ListenHTTP: o.listenHTTP,
		ClientTLS: transport.TLSConfig{CertFile: o.certFile, KeyFile: o.keyFile, TrustedCAFile: o.trustedCAFile, ClientCertAuth: o.clientCertAuth},
		PeerTLS: transport.TLSConfig{
			CertFile: o.peerCertFile, KeyFile: o.peerKeyFile, TrustedCAFile: o.peerTrustedCAFile, ClientCertAuth: o.peerTrustedCAFile != "",
		},
		Pprof: o.pprof, Version: version,
		HeartbeatTimeout: o.heartbeatTimeout, ElectionTimeout: o.electionTimeout,
		SnapshotEntries: o.snapshotEntries, SnapshotBytes: o.snapshotBytes, TrailingEntries: o.trailingEntries,
		MaxRequestBytes: o.maxRequestBytes, MaxTxnOps: o.maxTxnOps,
		WatchProgressInterval: o.watchProgressInterval, RaftLog: o.raftLog, GRPCServer: o.grpcServer,
	}
	completeAddresses(&cfg)
	if err := checkAdvertised(&cfg); err != nil {
		return node.Config{}, err
	}
	if err := cfg.Validate(); err != nil {
		return node.Config{}, &usageError{err}
	}
	return cfg, nil
}

// founders are the founding nodes and their peer addresses; empty for a cluster of this node alone.
func (o *startOptions) founders() (map[string]string, error) {
	peers, err := parsePeers(o.peers)
	if err != nil {
		return nil, usagef("--peers: %v", err)
	}
	if _, named := peers[o.name]; len(peers) > 0 && !named {
		return nil, usagef("--peers: this node, %s, is not among %s: correct --name or --peers", o.name, o.peers)
	}
	return peers, nil
}

// completeAddresses fills in the addresses and the directory that follow from the others.
func completeAddresses(cfg *node.Config) {
	own := cfg.Peers[cfg.Name]
	cfg.DataDir = cmp.Or(cfg.DataDir, "./"+cfg.Name+".kvd")
	cfg.ListenHTTP = cmp.Or(cfg.ListenHTTP, "none")
	cfg.ListenPeer = cmp.Or(cfg.ListenPeer, own, defaultPeer)
	cfg.AdvertisePeer = cmp.Or(cfg.AdvertisePeer, own, cfg.ListenPeer)
	cfg.AdvertiseClient = cmp.Or(cfg.AdvertiseClient, cfg.ListenClient)
}

// checkAdvertised refuses to tell others an address that only means something here.
func checkAdvertised(cfg *node.Config) error {
	for _, a := range []struct{ flag, addr string }{
		{"advertise-client", cfg.AdvertiseClient}, {"advertise-peer", cfg.AdvertisePeer},
	} {
		host, _, err := net.SplitHostPort(a.addr)
		if err != nil {
			continue // the node's validation says so
		}
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
			return usagef("--%s: others cannot connect to %s: give the address that they can use", a.flag, a.addr)
		}
	}
	return nil
}

// parsePeers reads n1=host:port,n2=host:port.
func parsePeers(list string) (map[string]string, error) {
	peers := make(map[string]string)
	if strings.TrimSpace(list) == "" {
		return peers, nil
	}
	for item := range strings.SplitSeq(list, ",") {
		name, addr, ok := strings.Cut(strings.TrimSpace(item), "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("%q is not name=host:port", item)
		}
		if _, taken := peers[name]; taken {
			return nil, fmt.Errorf("%s appears twice", name)
		}
		if host, port, err := net.SplitHostPort(addr); err != nil || host == "" || port == "" {
			return nil, fmt.Errorf("%s: %q is not host:port", name, addr)
		}
		peers[name] = addr
	}
	return peers, nil
}
