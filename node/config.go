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

	"kvd/node/bootstrap"
	"kvd/shard"
	"kvd/transport"
)

// Strategies of a cluster.
const (
	StrategyFull = "full"
)

// Network is how nodes reach each other; the default is TCP.
type Network interface {
	Listen(addr string) (net.Listener, error)
	Dial(ctx context.Context, addr string) (net.Conn, error)
}

// OpenLogFunc opens the durable log of one replica in its directory. guard is
// the highest index that truncation of the log's beginning may delete.
type OpenLogFunc func(dir string, group uint64, guard func() uint64) (shard.LogStore, error)

// Config says what a node is made of. The zero value of a field means its
// default.
type Config struct {
	Name         string // n1
	DataDir      string // ./<Name>.kvd
	ClusterToken string // kvd
	Strategy     string // full
	// Peers are the founding members and their peer addresses, this node
	// included or not; empty: a cluster of this node alone.
	Peers map[string]string

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

	Version     string
	Logger      *slog.Logger
	Registry    *prometheus.Registry
	OnFatal     func(error) // told why the node cannot go on; the process must end
	MinDiskFree uint64      // bytes below which writes are refused; 256 MiB

	// Network and OpenLog are replaced by simulations. NoSync gives up
	// durability, for simulations only.
	Network Network
	OpenLog OpenLogFunc
	NoSync  bool
	Faults  shard.Faults
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
	setDefault(&c.ListenClient, "127.0.0.1:2379")
	setDefault(&c.ListenPeer, "127.0.0.1:2380")
	setDefault(&c.ListenHTTP, "127.0.0.1:2381")
	setDefault(&c.AdvertiseClient, c.ListenClient)
	setDefault(&c.AdvertisePeer, c.ListenPeer)
	setDefault(&c.HeartbeatTimeout, time.Second)
	setDefault(&c.ElectionTimeout, max(time.Second, c.HeartbeatTimeout))
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

// Validate names the flag of the first setting that cannot work.
func (c *Config) Validate() error {
	if c.Strategy != StrategyFull {
		return fmt.Errorf("--strategy: %q is not known: use %q", c.Strategy, StrategyFull)
	}
	if err := c.settings().Validate(); err != nil {
		return err
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
	switch {
	case c.HeartbeatTimeout < 10*time.Millisecond:
		return fmt.Errorf("--heartbeat-timeout: %v is below 10ms", c.HeartbeatTimeout)
	case c.ElectionTimeout < c.HeartbeatTimeout:
		return fmt.Errorf("--election-timeout: %v is below --heartbeat-timeout %v", c.ElectionTimeout, c.HeartbeatTimeout)
	case c.SnapshotBytes < 0:
		return errors.New("--snapshot-bytes: must not be negative")
	case c.TrailingEntries > shard.MaxTrailingEntries:
		return fmt.Errorf("--trailing-entries: %d is above %d", c.TrailingEntries, shard.MaxTrailingEntries)
	}
	return nil
}

func (c *Config) settings() bootstrap.Settings {
	return bootstrap.Settings{Name: c.Name, Token: c.ClusterToken, Strategy: c.Strategy, Peers: c.Peers}
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
