package node

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	etcdtransport "go.etcd.io/etcd/client/pkg/v3/transport"

	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/server"
	"kvd/shard"
	"kvd/transport"
)

// identity is what this node announces when it connects.
func (n *Node) identity() transport.Peer {
	return transport.Peer{
		ClusterID: n.dir.ClusterID(), Node: n.cfg.Name, Incarnation: n.dir.Incarnation(),
		PeerAddr: n.cfg.AdvertisePeer, ClientAddr: n.cfg.AdvertiseClient, HTTPAddr: n.cfg.ListenHTTP,
	}
}

// resolve finds a node's peer address: --peers wins over what nodes announce.
func (n *Node) resolve(name string) (string, bool) {
	if addr, ok := n.cfg.Peers[name]; ok {
		return addr, true
	}
	n.reconsider(name)
	return n.book.Resolve(name)
}

// learn keeps what a peer of this cluster announces.
func (n *Node) learn(p transport.Peer) {
	if id := n.dir.ClusterID(); id == 0 || p.ClusterID != id || p.Node == n.cfg.Name {
		return
	}
	if n.stranger(p) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.strangers[p.Node] = p
		return
	}
	n.welcome(p)
}

func (n *Node) welcome(p transport.Peer) {
	n.announce(p.Node, bootstrap.Addresses{Peer: p.PeerAddr, Client: p.ClientAddr, HTTP: p.HTTPAddr})
}

// stranger reports whether the map has another incarnation of the peer: it has
// been replaced and does not know it, and must not draw its successor's messages
// to itself; or it is the successor, and this node's map is a moment behind.
func (n *Node) stranger(p transport.Peer) bool {
	for _, m := range n.members() {
		if m.Name == p.Node {
			return m.Incarnation != p.Incarnation
		}
	}
	return false
}

// reconsider takes over what a stranger has announced, if it is none any more.
func (n *Node) reconsider(name string) {
	n.mu.Lock()
	p, ok := n.strangers[name]
	n.mu.Unlock()
	if !ok || n.stranger(p) {
		return
	}
	n.welcome(p)
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.strangers, name)
}

// announce writes a node's addresses into the book, in the place of nodes that
// have left if need be.
func (n *Node) announce(name string, addresses bootstrap.Addresses) {
	err := n.book.Announce(name, addresses)
	if errors.Is(err, bootstrap.ErrBookFull) {
		if members := n.members(); len(members) > 0 {
			n.book.Retain(func(name string) bool {
				return slices.ContainsFunc(members, func(m placement.Member) bool { return m.Name == name })
			})
			err = n.book.Announce(name, addresses)
		}
	}
	if err != nil {
		n.log.Warn("ignoring a node's addresses", "node", name, "error", err)
	}
}

// replicaOf implements server.Config.Replica.
func (n *Node) replicaOf(group uint64) server.Replica {
	if group == group0 {
		if r := n.Replica(); r != nil {
			return r
		}
		return nil
	}
	if r := (*n.groups.usable.Load())[group]; r != nil {
		return r
	}
	return nil
}

// founders are the members of the bootstrap record, if this node has it.
func (n *Node) founders() []placement.Member {
	record := n.outcome().Record
	if record == nil {
		return nil
	}
	var members []placement.Member
	for _, m := range record.Members {
		members = append(members, placement.Member{Name: m.Name, Incarnation: m.Incarnation, Replica: raft.ServerID(m.Replica)})
	}
	return members
}

// members reads the cluster map from this node's own state, as it is.
func (n *Node) members() []placement.Member {
	replica := n.Replica()
	if replica == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	state, release, err := replica.AcquireState(ctx, 0)
	if err != nil {
		return nil
	}
	defer release()
	members, err := placement.Load(ctx, state)
	if err != nil {
		n.log.Warn("cannot read the cluster map", "error", err)
		return nil
	}
	return members
}

func (n *Node) bootstrapMembers() []bootstrap.Member {
	var members []bootstrap.Member
	for _, m := range n.members() {
		members = append(members, bootstrap.Member{Name: m.Name, Incarnation: m.Incarnation, Replica: string(m.Replica)})
	}
	return members
}

// cluster is the cluster as clients see it; it implements server.Cluster.
type cluster struct{ n *Node }

func (c cluster) ClusterID() uint64 { return c.n.clusterID.Load() }
func (c cluster) MemberID() uint64  { return c.n.memberID.Load() }

func (c cluster) Members() []server.Member {
	members := c.n.members()
	if len(members) == 0 {
		members = c.n.founders() // the leader has not written the map yet
	}
	voters := make(map[string]bool)
	if replica := c.n.Replica(); replica != nil {
		for _, m := range replica.Status().Members {
			voters[string(m.ID)] = m.Voter
		}
	}
	list := make([]server.Member, 0, len(members))
	for _, m := range members {
		// Where the keys are in shards, every node serves some.
		learner := !voters[string(m.Replica)] && c.n.cfg.Strategy == StrategyFull
		list = append(list, c.member(m, learner))
	}
	return list
}

func (c cluster) member(m placement.Member, learner bool) server.Member {
	addrs := c.n.book.Lookup(m.Name)
	if m.Name == c.n.cfg.Name {
		addrs = bootstrap.Addresses{Peer: c.n.cfg.AdvertisePeer, Client: c.n.cfg.AdvertiseClient}
	}
	member := server.Member{Name: m.Name, ID: memberID(c.ClusterID(), string(m.Replica)), Learner: learner}
	if addrs.Peer != "" {
		member.PeerURLs = []string{scheme(c.n.cfg.PeerTLS) + addrs.Peer}
	}
	if addrs.Client != "" && addrs.Client != noListener {
		member.ClientURLs = []string{scheme(c.n.cfg.ClientTLS) + addrs.Client}
	}
	return member
}

func scheme(tls transport.TLSConfig) string {
	if tls.Enabled() {
		return "https://"
	}
	return "http://"
}

// memberID is a member's number for etcd's API: a new incarnation has another.
func memberID(clusterID uint64, replica string) uint64 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%016x %s", clusterID, replica))
	return binary.BigEndian.Uint64(sum[:])
}

// tcpNetwork is the real network, with TLS if it is configured.
type tcpNetwork struct {
	tls  transport.TLSConfig
	dial func(ctx context.Context, addr string) (net.Conn, error)
}

func newTCPNetwork(tls transport.TLSConfig) (tcpNetwork, error) {
	dial, err := tls.Dialer()
	return tcpNetwork{tls, dial}, err
}

func (t tcpNetwork) Listen(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	return t.tls.Listener(l)
}

func (t tcpNetwork) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return t.dial(ctx, addr)
}

// clientTLS is what clients meet; nil without TLS.
func (c *Config) clientTLS() (*tls.Config, error) {
	if !c.ClientTLS.Enabled() {
		return nil, nil
	}
	info := etcdtransport.TLSInfo{
		CertFile: c.ClientTLS.CertFile, KeyFile: c.ClientTLS.KeyFile,
		TrustedCAFile: c.ClientTLS.TrustedCAFile, ClientCertAuth: c.ClientTLS.ClientCertAuth,
	}
	conf, err := info.ServerConfig()
	if err != nil {
		return nil, fmt.Errorf("--cert-file, --key-file: %w", err)
	}
	return conf, nil
}

// notDelivered reports whether a failed call certainly never reached a handler.
func notDelivered(err error) bool {
	return errors.Is(err, transport.ErrUnreachable) || errors.Is(err, transport.ErrBusy) || errors.Is(err, transport.ErrNoHandler)
}

// diskGuard tells when the disk under a directory is nearly full, and logs when
// that changes. It looks at most once a second, when asked.
type diskGuard struct {
	log     *slog.Logger
	dir     string
	free    func() (uint64, error)
	minFree uint64
	start   time.Time
	next    atomic.Int64 // nanoseconds after start
	verdict atomic.Bool
}

func newDiskGuard(log *slog.Logger, dir string, free func() (uint64, error), minFree uint64) *diskGuard {
	return &diskGuard{log: log, dir: dir, free: free, minFree: minFree, start: time.Now()}
}

func (g *diskGuard) full() bool {
	now, next := int64(time.Since(g.start)), g.next.Load()
	if now >= next && g.next.CompareAndSwap(next, now+int64(time.Second)) {
		if free, err := g.free(); err == nil {
			g.judge(free)
		}
	}
	return g.verdict.Load()
}

func (g *diskGuard) judge(free uint64) {
	full := free < g.minFree
	switch was := g.verdict.Swap(full); {
	case full && !was:
		g.log.Error("the disk is nearly full: what this node leads (all keys, or its shards) takes no writes but deletes: make room, or with --strategy full kvd move-leader to another node",
			"dir", g.dir, "free_bytes", free, "wanted_bytes", g.minFree)
	case !full && was:
		g.log.Info("the disk has room again: writes are taken", "dir", g.dir, "free_bytes", free)
	}
}

// freeBytes is what the file system under dir has left for this process.
func freeBytes(dir string) (uint64, error) {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return 0, err
	}
	return fs.Bavail * uint64(fs.Bsize), nil
}

// diskGauge is the metric of the free space under the data directory and its
// logs.
func (n *Node) diskGauge() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kvd_node_disk_free_bytes", Help: "Free bytes of the file system that holds the data directory, or its log if that has less.",
	}, func() float64 {
		free, err := n.freeBytes()
		if err != nil {
			return -1
		}
		return float64(free)
	})
}

// warnOpenPeers tells an operator whose nodes anybody could talk to.
func (n *Node) warnOpenPeers() {
	host, _, err := net.SplitHostPort(n.cfg.ListenPeer)
	if err != nil || n.cfg.PeerTLS.Enabled() || host == "localhost" {
		return
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() {
		return
	}
	n.log.Warn("connections between nodes are neither encrypted nor authenticated: whoever reaches this port can read and change everything: set --peer-cert-file, --peer-key-file and --peer-trusted-ca-file, or keep the network closed", "listen_peer", n.cfg.ListenPeer)
}

var _ server.Replica = (*shard.Replica)(nil)
