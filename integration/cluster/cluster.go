// Package cluster starts real kvd processes on free loopback ports and breaks them: it kills them with
// SIGKILL, stops them with SIGSTOP, cuts the links between them, wipes their disks and moves their addresses.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Liveness is how long a healthy cluster may take for anything, on a slow and busy machine. It is no
// measurement: what takes that long is stuck.
const Liveness = 120 * time.Second

// TLS is what client and peer connections use.
type TLS uint8

const (
	Plain     TLS = iota
	ServerTLS     // servers have certificates
	MutualTLS     // clients need them too
)

// Config describes a cluster.
type Config struct {
	Nodes int      // named n1, n2, ...; 0 = 3
	Args  []string // further flags of `kvd start` for every node
	Links bool     // nodes reach each other through links that can be cut
	TLS   TLS
	Dirs  map[string]string // data directories by node; the default is below the cluster's directory
	Peers []string          // names in --peers; nil = all nodes, and no --peers for a single one
}

// Cluster is a set of nodes. Its methods may be called concurrently, except Start, RestartAll and Close.
type Cluster struct {
	Dir   string // of data directories, logs and certificates
	Certs Certificates

	cfg    Config
	binary string
	links  map[[2]string]*Link

	mu      sync.Mutex
	names   []string
	nodes   map[string]*Node
	joiners map[string]string           // nodes that join a running cluster, and through whom
	clients map[string]*clientv3.Client // by address
}

// New prepares a cluster and starts nothing. When the test ends it ends every process, prints the ends of the
// logs if the test has failed, and removes all files (unless KVD_INTEGRATION_KEEP is set and it has failed).
func New(tb testing.TB, cfg Config) *Cluster {
	tb.Helper()
	path, err := Binary()
	if err != nil {
		tb.Fatal(err)
	}
	c, err := prepare(path, cfg)
	if c != nil {
		tb.Cleanup(func() { c.finish(tb) })
	}
	if err != nil {
		tb.Fatalf("preparing a cluster: %v", err)
	}
	return c
}

// Run prepares a cluster, starts it and waits until every node serves.
func Run(tb testing.TB, cfg Config) *Cluster {
	tb.Helper()
	c := New(tb, cfg)
	ctx, cancel := context.WithTimeout(tb.Context(), Liveness)
	defer cancel()
	if err := c.Start(ctx); err != nil {
		tb.Fatal(err)
	}
	return c
}

func prepare(binary string, cfg Config) (*Cluster, error) {
	if cfg.Nodes == 0 {
		cfg.Nodes = 3
	}
	dir, err := os.MkdirTemp("", "kvd-cluster-")
	if err != nil {
		return nil, err
	}
	c := &Cluster{Dir: dir, cfg: cfg, binary: binary, nodes: make(map[string]*Node), links: make(map[[2]string]*Link),
		joiners: make(map[string]string), clients: make(map[string]*clientv3.Client)}
	if cfg.TLS != Plain {
		if c.Certs, err = NewCertificates(filepath.Join(dir, "certs")); err != nil {
			return c, err
		}
	}
	for i := range cfg.Nodes {
		if _, err := c.addNode(fmt.Sprintf("n%d", i+1)); err != nil {
			return c, err
		}
	}
	if !cfg.Links {
		return c, nil
	}
	for _, from := range c.Names() {
		for _, to := range c.Names() {
			if from == to {
				continue
			}
			if c.links[[2]string{from, to}], err = newLink(c.Node(to).PeerAddr); err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

func (c *Cluster) addNode(name string) (*Node, error) {
	n := &Node{Name: name, Dir: filepath.Join(c.Dir, name), binary: c.binary}
	if dir, ok := c.cfg.Dirs[name]; ok {
		n.Dir = dir
	}
	var err error
	if n.Log, err = newLog(filepath.Join(c.Dir, name+".log")); err != nil {
		return nil, err
	}
	n.args = func() []string { return c.args(n) }
	c.mu.Lock()
	c.names = append(c.names, name)
	c.nodes[name] = n
	c.mu.Unlock()
	return n, n.readdress()
}

// Join starts one more node, which joins the cluster through another one, and waits until it serves. Links, if
// there are any, do not stand between it and the others.
func (c *Cluster) Join(ctx context.Context, via string) (name string, err error) {
	name = fmt.Sprintf("n%d", len(c.Names())+1)
	c.mu.Lock()
	c.joiners[name] = via
	c.mu.Unlock()
	if _, err := c.addNode(name); err != nil {
		return "", err
	}
	return name, c.StartNodes(ctx, name)
}

// Forget takes a node that has left the cluster, and has been killed, off the list of nodes. Its log stays.
func (c *Cluster) Forget(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.names = slices.DeleteFunc(c.names, func(n string) bool { return n == name })
}

// args are the flags of a node's next start.
func (c *Cluster) args(n *Node) []string {
	args := []string{"start", "--name", n.Name, "--data-dir", n.Dir, "--listen-client", n.ClientAddr(),
		"--listen-peer", n.PeerAddr(), "--listen-http", n.HTTPAddr()}
	c.mu.Lock()
	via, joins := c.joiners[n.Name]
	c.mu.Unlock()
	if joins {
		args = append(args, "--join", c.Node(via).PeerAddr())
	} else if peers := c.peers(n); peers != "" {
		args = append(args, "--peers", peers)
	}
	if c.cfg.TLS != Plain {
		args = append(args, "--cert-file", c.Certs.Cert, "--key-file", c.Certs.Key,
			"--peer-cert-file", c.Certs.Cert, "--peer-key-file", c.Certs.Key, "--peer-trusted-ca-file", c.Certs.CA)
	}
	if c.cfg.TLS == MutualTLS {
		args = append(args, "--client-cert-auth", "--trusted-ca-file", c.Certs.CA) // either one asks for certificates, as in etcd
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return append(args, c.cfg.Args...)
}

// Drop takes a flag out of the next starts of all nodes.
func (c *Cluster) Drop(flag string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cfg.Args = slices.DeleteFunc(slices.Clone(c.cfg.Args), func(f string) bool { return f == flag })
}

// peers is a node's view of the others: their links if there are any, else their addresses.
func (c *Cluster) peers(n *Node) string {
	names := c.cfg.Peers
	if names == nil && c.cfg.Nodes > 1 {
		for i := range c.cfg.Nodes {
			names = append(names, fmt.Sprintf("n%d", i+1))
		}
	}
	var peers []string
	for _, name := range names {
		address := c.Node(name).PeerAddr()
		if link, ok := c.links[[2]string{n.Name, name}]; ok {
			address = link.Addr()
		}
		peers = append(peers, name+"="+address)
	}
	return strings.Join(peers, ",")
}

// Names returns the names of the nodes.
func (c *Cluster) Names() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.names)
}

// all returns every node that there has ever been.
func (c *Cluster) all() []*Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.SortedFunc(maps.Values(c.nodes), func(a, b *Node) int { return strings.Compare(a.Name, b.Name) })
}

// Node returns a node by name; it panics if there is none.
func (c *Cluster) Node(name string) *Node {
	c.mu.Lock()
	n, ok := c.nodes[name]
	c.mu.Unlock()
	if !ok {
		panic("no node named " + name)
	}
	return n
}

// Start starts all nodes and waits until each serves. If another process has taken a port meanwhile, it
// starts over with other ports: the cluster must not have any data yet.
func (c *Cluster) Start(ctx context.Context) error {
	for try := 1; ; try++ {
		err := c.StartNodes(ctx, c.Names()...)
		if err == nil || try == portRaceTries || !c.portTaken() {
			return err
		}
		for _, n := range c.all() {
			if err := errors.Join(n.Kill(), n.Wipe(), n.readdress()); err != nil {
				return err
			}
		}
	}
}

func (c *Cluster) portTaken() bool {
	for _, n := range c.all() {
		if !n.Running() && n.Log.Contains("address already in use") {
			return true
		}
	}
	return false
}

// StartNodes starts nodes together and waits until each serves.
func (c *Cluster) StartNodes(ctx context.Context, names ...string) error {
	for _, name := range names {
		if err := c.Node(name).Start(); err != nil {
			return err
		}
	}
	return c.WaitReady(ctx, names...)
}

// WaitReady waits until each node has logged that it serves and has answered a linearizable read.
func (c *Cluster) WaitReady(ctx context.Context, names ...string) error {
	for _, name := range names {
		if err := c.Node(name).WaitLogged(ctx); err != nil {
			return err
		}
		if err := c.WaitServing(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// Restart kills a node if it runs, starts it and waits until it serves.
func (c *Cluster) Restart(ctx context.Context, name string) error {
	if err := c.Node(name).Kill(); err != nil {
		return err
	}
	return c.StartNodes(ctx, name)
}

// KillAll kills all nodes at once.
func (c *Cluster) KillAll() error {
	nodes := c.all()
	errs := make([]error, len(nodes))
	var group sync.WaitGroup
	for i, n := range nodes {
		group.Go(func() { errs[i] = n.Kill() })
	}
	group.Wait()
	return errors.Join(errs...)
}

// RestartAll kills all nodes, gives them new addresses and starts them again with their data.
func (c *Cluster) RestartAll(ctx context.Context) error {
	if err := c.KillAll(); err != nil {
		return err
	}
	for _, n := range c.all() {
		if err := n.readdress(); err != nil {
			return err
		}
	}
	return c.StartNodes(ctx, c.Names()...)
}

// Link returns the way from one node to another. The cluster must have been configured with Links.
func (c *Cluster) Link(from, to string) *Link {
	l, ok := c.links[[2]string{from, to}]
	if !ok {
		panic(fmt.Sprintf("no link from %s to %s", from, to))
	}
	return l
}

// HealAll heals all links.
func (c *Cluster) HealAll() {
	for _, l := range c.links {
		l.Heal()
	}
}

// Close kills every process, closes links and clients, and waits for their goroutines. It keeps the files.
func (c *Cluster) Close() error {
	err := c.KillAll()
	for _, l := range c.links {
		l.Close()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, client := range c.clients {
		client.Close()
	}
	clear(c.clients)
	return err
}

// tailLines is how much of each log a failed test prints.
const tailLines = 40

func (c *Cluster) finish(tb testing.TB) {
	if err := c.Close(); err != nil {
		tb.Errorf("closing the cluster: %v", err)
	}
	for _, n := range c.all() {
		if text := n.Log.all(); strings.Contains(text, "DATA RACE") || strings.Contains(text, "panic: ") {
			tb.Errorf("node %s panicked or raced:\n%s", n.Name, around(text))
		}
		n.Log.file.Close()
	}
	if tb.Failed() {
		for _, n := range c.all() {
			tb.Logf("the end of %s's log (%d starts):\n%s", n.Name, n.Starts(), n.Log.Tail(tailLines))
		}
		if os.Getenv(envKeep) != "" {
			tb.Logf("all files are kept in %s", c.Dir)
			return
		}
	}
	if err := os.RemoveAll(c.Dir); err != nil {
		tb.Errorf("removing the cluster's files: %v", err)
	}
}

// around returns the part of a log that shows a panic or a race.
func around(text string) string {
	for _, mark := range []string{"DATA RACE", "panic: "} {
		if i := strings.Index(text, mark); i >= 0 {
			return text[max(0, i-500):min(len(text), i+6000)]
		}
	}
	return ""
}
