// Package servers builds kvd and etcd and runs them as real processes on free loopback ports.
package servers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Packages that Build can build; the versions are those of this module's go.mod.
const (
	KVD       = "kvd/cmd/kvd"
	Etcd      = "go.etcd.io/etcd/server/v3"
	Etcdctl   = "go.etcd.io/etcd/etcdctl/v3"
	Benchmark = "go.etcd.io/etcd/v3/tools/benchmark"
	Floor     = "kvd/integration/compare/cmd/floor"
)

// readyTimeout bounds the start of a cluster: processes, first election, first read on every node.
const readyTimeout = time.Minute

// envKVD names a kvd binary to use instead of building one.
const envKVD = "KVD_INTEGRATION_BINARY"

// Build builds one of the packages above into dir and returns the binary's path.
func Build(ctx context.Context, pkg, dir string) (string, error) {
	module, err := moduleDir(ctx)
	if err != nil {
		return "", err
	}
	name := map[string]string{KVD: "kvd", Etcd: "etcd", Etcdctl: "etcdctl", Benchmark: "benchmark", Floor: "floor"}[pkg]
	if pkg == KVD {
		if path := os.Getenv(envKVD); path != "" {
			return filepath.Abs(path)
		}
		module = filepath.Join(module, "..", "..") // with kvd's own go.mod, as its users build it
	}
	path := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-o", path, pkg)
	cmd.Dir = module
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return path, nil
}

// moduleDir returns the directory of this module, from any directory inside it.
func moduleDir(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOMOD: %w", err)
	}
	file := strings.TrimSpace(string(out))
	if filepath.Base(file) != "go.mod" {
		return "", errors.New("not inside the comparison module: run this from its folder")
	}
	return filepath.Dir(file), nil
}

// Cluster is a set of server processes. Nodes are numbered from 0. Its methods are not for concurrent use.
type Cluster struct {
	nodes []*process

	// rejoin makes ready what a node that lost its data needs before it is started with an empty directory.
	rejoin func(ctx context.Context, c *Cluster, node int) error
}

// Memory is what processes use of it, in bytes.
type Memory struct {
	Resident  int64 // all pages in memory, those of mapped files, too
	Anonymous int64 // those that are no file's: heap and stacks
	Peak      int64 // the most that was ever resident
}

// StartKVD starts nodes fresh kvd processes that form one cluster, with their data below dir and with further flags,
// and waits until every node answers a linearizable read of all keys.
func StartKVD(ctx context.Context, binary, dir string, nodes int, flags ...string) (*Cluster, error) {
	return anew(func() (*Cluster, error) { return startKVD(ctx, binary, dir, nodes, flags) })
}

func startKVD(ctx context.Context, binary, dir string, nodes int, flags []string) (*Cluster, error) {
	ports, err := FreeAddresses(3 * nodes)
	if err != nil {
		return nil, err
	}
	peers := make([]string, nodes)
	for i := range peers {
		peers[i] = fmt.Sprintf("n%d=%s", i+1, ports[nodes+i])
	}
	c := &Cluster{rejoin: rejoinKVD}
	for i := range nodes {
		p := newProcess(dir, fmt.Sprintf("n%d", i+1), ports[i], ports[nodes+i])
		p.http = ports[2*nodes+i]
		p.argv = append([]string{
			binary, "start", "--name", p.name, "--data-dir", p.dir,
			"--listen-client", p.endpoint, "--listen-peer", p.peer, "--listen-http", p.http,
			"--peers", strings.Join(peers, ","), "--log-level", "warn", "--pprof",
		}, flags...)
		c.nodes = append(c.nodes, p)
	}
	return c, c.start(ctx)
}

// StartEtcd is StartKVD for etcd, with etcd's default settings.
func StartEtcd(ctx context.Context, binary, dir string, nodes int) (*Cluster, error) {
	return anew(func() (*Cluster, error) { return startEtcd(ctx, binary, dir, nodes) })
}

func startEtcd(ctx context.Context, binary, dir string, nodes int) (*Cluster, error) {
	ports, err := FreeAddresses(2 * nodes)
	if err != nil {
		return nil, err
	}
	peers := make([]string, nodes)
	for i := range peers {
		peers[i] = fmt.Sprintf("e%d=http://%s", i+1, ports[nodes+i])
	}
	c := &Cluster{rejoin: rejoinEtcd}
	for i := range nodes {
		p := newProcess(dir, fmt.Sprintf("e%d", i+1), ports[i], ports[nodes+i])
		p.http = p.endpoint
		client, peer := "http://"+p.endpoint, "http://"+p.peer
		p.argv = []string{
			binary, "--name", p.name, "--data-dir", p.dir,
			"--listen-client-urls", client, "--advertise-client-urls", client,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
			"--initial-cluster", strings.Join(peers, ","), "--log-level", "warn", "--enable-pprof",
		}
		c.nodes = append(c.nodes, p)
	}
	return c, c.start(ctx)
}

// StartCommand starts nodes processes of a command that serves KV on the address that is its last argument.
func StartCommand(ctx context.Context, binary, dir string, nodes int, args ...string) (*Cluster, error) {
	return anew(func() (*Cluster, error) { return startCommand(ctx, binary, dir, nodes, args) })
}

func startCommand(ctx context.Context, binary, dir string, nodes int, args []string) (*Cluster, error) {
	ports, err := FreeAddresses(nodes)
	if err != nil {
		return nil, err
	}
	c := &Cluster{}
	for i := range nodes {
		p := newProcess(dir, fmt.Sprintf("p%d", i+1), ports[i], "")
		p.argv = append(append([]string{binary}, args...), p.endpoint)
		c.nodes = append(c.nodes, p)
	}
	return c, c.start(ctx)
}

func newProcess(parent, name, endpoint, peer string) *process {
	dir := filepath.Join(parent, name)
	return &process{name: name, endpoint: endpoint, peer: peer, dir: dir, logPath: dir + ".log"}
}

// anew starts a cluster on other ports, without what the nodes have stored, if another process was faster to take one.
func anew(start func() (*Cluster, error)) (*Cluster, error) {
	for attempt := 1; ; attempt++ {
		c, err := start()
		if err == nil || attempt == maxStarts || !strings.Contains(err.Error(), "address already in use") {
			return c, err
		}
		for _, p := range c.nodes {
			if err := errors.Join(os.RemoveAll(p.dir), os.RemoveAll(p.logPath)); err != nil {
				return c, err
			}
		}
	}
}

// maxStarts is how often a cluster is started on other ports.
const maxStarts = 5

// start starts all nodes and waits for them; if that fails, none is left.
func (c *Cluster) start(ctx context.Context) error {
	err := c.Start(c.all()...)
	if err == nil {
		err = c.WaitReady(ctx)
	}
	for _, p := range c.nodes {
		if err == nil && !p.running() {
			err = fmt.Errorf("%s exited while starting: %v", p.name, p.cmd.ProcessState)
		}
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, c.Logs())
		c.Close()
	}
	return err
}

func (c *Cluster) all() []int {
	nodes := make([]int, len(c.nodes))
	for i := range nodes {
		nodes[i] = i
	}
	return nodes
}

// Endpoints returns the client addresses, host:port, one per node.
func (c *Cluster) Endpoints() []string {
	endpoints := make([]string, len(c.nodes))
	for i, p := range c.nodes {
		endpoints[i] = p.endpoint
	}
	return endpoints
}

// Node returns the number of a node, given its name, or -1.
func (c *Cluster) Node(name string) int {
	return slices.IndexFunc(c.nodes, func(p *process) bool { return p.name == name })
}

// Close kills the processes and waits for them. Their data stays.
func (c *Cluster) Close() {
	for _, p := range c.nodes {
		if p.cmd != nil {
			p.cmd.Process.Signal(syscall.SIGKILL) // fails only for a process that has exited
		}
	}
	for _, p := range c.nodes {
		p.kill()
	}
}

// held are the UDP ports of all addresses that were found, for as long as this process lives: whoever looks for addresses
// takes them first, so that no other process gets the port of a server, or tries it, while that is down.
var held struct {
	sync.Mutex
	ports []net.PacketConn
}

// FreeAddresses returns n loopback addresses where nobody listens, and which nobody else gets from here. They are below the
// range from which the kernel takes the ports of outgoing connections, so that a connection doesn't grab one before its
// server listens, and above those of bench/local, integration and integration/e2e, which may run beside this.
func FreeAddresses(n int) ([]string, error) {
	const low, high, attempts = 25000, 32000, 1000
	var found []string
	for range attempts {
		address := fmt.Sprintf("127.0.0.1:%d", low+rand.IntN(high-low))
		if !hold(address) {
			continue
		}
		if found = append(found, address); len(found) == n {
			return found, nil
		}
	}
	return nil, fmt.Errorf("found only %d of %d free ports", len(found), n)
}

// hold reports whether an address was free, and is this process's now.
func hold(address string) bool {
	port, err := net.ListenPacket("udp", address)
	if err != nil {
		return false
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		port.Close()
		return false
	}
	l.Close()
	held.Lock()
	defer held.Unlock()
	held.ports = append(held.ports, port)
	return true
}
