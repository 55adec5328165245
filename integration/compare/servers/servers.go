// Package servers builds kvd and etcd and runs them as real processes on free loopback ports.
package servers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Packages that Build can build; the versions are those of this module's go.mod.
const (
	KVD       = "kvd/cmd/kvd"
	Etcd      = "go.etcd.io/etcd/server/v3"
	Etcdctl   = "go.etcd.io/etcd/etcdctl/v3"
	Benchmark = "go.etcd.io/etcd/v3/tools/benchmark"
)

// readyTimeout bounds the start of a cluster: processes, first election, first read on every node.
const readyTimeout = 30 * time.Second

// envKVD names a kvd binary to use instead of building one.
const envKVD = "KVD_INTEGRATION_BINARY"

// Build builds one of the packages above into dir and returns the binary's path.
func Build(ctx context.Context, pkg, dir string) (string, error) {
	module, err := moduleDir(ctx)
	if err != nil {
		return "", err
	}
	name := map[string]string{KVD: "kvd", Etcd: "etcd", Etcdctl: "etcdctl", Benchmark: "benchmark"}[pkg]
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

// Cluster is a set of running server processes. Its methods are not for concurrent use.
type Cluster struct {
	nodes []*process
}

type process struct {
	name, endpoint string
	logPath        string
	cmd            *exec.Cmd
	exited         chan struct{} // closed once the process has been waited for
}

// StartKVD starts nodes fresh kvd processes that form one cluster, with their data below dir and with further flags,
// and waits until every node answers a linearizable read of all keys.
func StartKVD(ctx context.Context, binary, dir string, nodes int, flags ...string) (*Cluster, error) {
	ports, err := FreeAddresses(2 * nodes)
	if err != nil {
		return nil, err
	}
	peers := make([]string, nodes)
	for i := range peers {
		peers[i] = fmt.Sprintf("n%d=%s", i+1, ports[nodes+i])
	}
	return start(ctx, nodes, func(i int) *process {
		name := fmt.Sprintf("n%d", i+1)
		args := append([]string{
			"start",
			"--name", name, "--data-dir", filepath.Join(dir, name),
			"--listen-client", ports[i], "--listen-peer", ports[nodes+i], "--listen-http", "none",
			"--peers", strings.Join(peers, ","), "--log-level", "warn",
		}, flags...)
		return newProcess(dir, name, ports[i], exec.Command(binary, args...))
	})
}

// StartEtcd is StartKVD for etcd, with etcd's default settings.
func StartEtcd(ctx context.Context, binary, dir string, nodes int) (*Cluster, error) {
	ports, err := FreeAddresses(2 * nodes)
	if err != nil {
		return nil, err
	}
	peers := make([]string, nodes)
	for i := range peers {
		peers[i] = fmt.Sprintf("e%d=http://%s", i+1, ports[nodes+i])
	}
	return start(ctx, nodes, func(i int) *process {
		name := fmt.Sprintf("e%d", i+1)
		client, peer := "http://"+ports[i], "http://"+ports[nodes+i]
		return newProcess(dir, name, ports[i], exec.Command(binary,
			"--name", name, "--data-dir", filepath.Join(dir, name),
			"--listen-client-urls", client, "--advertise-client-urls", client,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
			"--initial-cluster", strings.Join(peers, ","), "--log-level", "warn"))
	})
}

func newProcess(dir, name, endpoint string, cmd *exec.Cmd) *process {
	return &process{
		name: name, endpoint: endpoint, logPath: filepath.Join(dir, name+".log"),
		cmd: cmd, exited: make(chan struct{}),
	}
}

func start(ctx context.Context, nodes int, newNode func(i int) *process) (*Cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	c := &Cluster{}
	for i := range nodes {
		p := newNode(i)
		if err := p.start(); err != nil {
			c.Close()
			return nil, err
		}
		c.nodes = append(c.nodes, p)
	}
	for _, p := range c.nodes {
		if err := p.waitReady(ctx); err != nil {
			err = fmt.Errorf("%s: %w\n%s", p.name, err, c.Logs())
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

// start runs the process. The goroutine keeps the thread that forked it: the kernel kills the child when that
// thread ends, which is then when this program ends, however it does.
func (p *process) start() error {
	log, err := os.Create(p.logPath)
	if err != nil {
		return err
	}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = dieWithParent()
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer log.Close()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.cmd.Wait() // how it exited is no news: Close kills it
			close(p.exited)
		}
	}()
	return <-started
}

// waitReady returns when the node has answered a linearizable read of all keys, whatever shards they are in.
func (p *process) waitReady(ctx context.Context) error {
	conn, err := grpc.NewClient(p.endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	for {
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := pb.NewKVClient(conn).Range(attempt, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return fmt.Errorf("exited while starting: %v", p.cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Endpoints returns the client addresses, host:port, one per node.
func (c *Cluster) Endpoints() []string {
	endpoints := make([]string, len(c.nodes))
	for i, p := range c.nodes {
		endpoints[i] = p.endpoint
	}
	return endpoints
}

// Logs returns the end of each node's log.
func (c *Cluster) Logs() string {
	var all strings.Builder
	for _, p := range c.nodes {
		text, err := os.ReadFile(p.logPath)
		if err != nil {
			text = []byte(err.Error())
		}
		const tailBytes = 4 << 10
		if len(text) > tailBytes {
			text = append([]byte("..."), text[len(text)-tailBytes:]...)
		}
		fmt.Fprintf(&all, "--- %s\n%s\n", p.name, bytes.TrimSpace(text))
	}
	return all.String()
}

// Close kills the processes and waits for them. Their data stays.
func (c *Cluster) Close() {
	for _, p := range c.nodes {
		p.cmd.Process.Signal(syscall.SIGKILL) // fails only for a process that has exited
	}
	for _, p := range c.nodes {
		<-p.exited
	}
	c.nodes = nil
}

// FreeAddresses returns n loopback addresses that were free a moment ago. They are below the range from which the kernel
// takes the ports of outgoing connections, so that a connection doesn't grab one before its server listens.
func FreeAddresses(n int) ([]string, error) {
	const low, high, attempts = 12000, 32000, 1000
	var found []string
	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	for range attempts {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", low+rand.IntN(high-low)))
		if err != nil {
			continue
		}
		listeners = append(listeners, l) // held until all are found: no address twice
		if found = append(found, l.Addr().String()); len(found) == n {
			return found, nil
		}
	}
	return nil, fmt.Errorf("found only %d of %d free ports", len(found), n)
}
