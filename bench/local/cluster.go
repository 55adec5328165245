// Package local runs a cluster of kvd nodes on this machine, each one a child process with a directory of its own, and
// breaks it: for demonstrations and measurements.
package local

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// ErrNoLeader says that no node that runs takes itself for the leader.
var ErrNoLeader = errors.New("local: no leader")

// Cluster is a set of nodes. Close ends them; their files are the caller's.
type Cluster struct {
	Nodes   []*Node
	Flags   []string // of `kvd start`, the same for all nodes
	Program string   // kvd; empty = this program

	held []net.PacketConn // keeps its ports from other clusters
}

// New plans n nodes, n1 to nN, on free loopback ports, with their data and logs under dir. It starts nothing.
func New(n int, dir string) (*Cluster, error) {
	addresses, held, err := freeAddresses(3 * n)
	if err != nil {
		return nil, err
	}
	c := &Cluster{held: held}
	for i := range n {
		name := fmt.Sprintf("n%d", i+1)
		c.Nodes = append(c.Nodes, &Node{
			Name: name, Client: addresses[3*i], Peer: addresses[3*i+1], HTTP: addresses[3*i+2], Dir: filepath.Join(dir, name+".kvd"),
		})
	}
	return c, nil
}

// freeAddresses finds n loopback addresses that nobody listens on. They are below the range that the kernel hands out
// for outgoing connections: nobody's connection takes the port of a node that is down for a moment. Those from 13000 on
// are of package integration/cluster. As long as the connections in held are open, no other cluster of this package gets
// them, whichever process it is of.
func freeAddresses(n int) (addresses []string, held []net.PacketConn, err error) {
	const firstPort, ports, attempts = 10000, 3000, 100
	for failed := 0; len(addresses) < n; {
		address := fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(ports))
		hold, err := holdPort(address)
		if err == nil {
			addresses, held = append(addresses, address), append(held, hold)
		} else if failed++; failed == attempts {
			closeAll(held)
			return nil, nil, fmt.Errorf("find a free port: %w", err)
		}
	}
	return addresses, held, nil
}

// holdPort takes the UDP port of an address whose TCP port is free, and stays so for who listens there.
func holdPort(address string) (net.PacketConn, error) {
	hold, err := net.ListenPacket("udp", address)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		_ = hold.Close()
		return nil, err
	}
	return hold, l.Close()
}

func closeAll(held []net.PacketConn) {
	for _, hold := range held {
		_ = hold.Close()
	}
}

// Peers is what all nodes get as --peers.
func (c *Cluster) Peers() string {
	var list []string
	for _, n := range c.Nodes {
		list = append(list, n.Name+"="+n.Peer)
	}
	return strings.Join(list, ",")
}

// Start starts nodes, without waiting until they serve.
func (c *Cluster) Start(nodes ...*Node) error {
	program := c.Program
	if program == "" {
		var err error
		if program, err = os.Executable(); err != nil {
			return err
		}
	}
	for _, n := range nodes {
		if err := n.start(program, append([]string{"--peers", c.Peers()}, c.Flags...)...); err != nil {
			return err
		}
	}
	return nil
}

// Close kills the nodes that run, and gives up their ports. It may be called again.
func (c *Cluster) Close() {
	var all sync.WaitGroup
	for _, n := range c.Nodes {
		all.Go(n.Kill)
	}
	all.Wait()
	closeAll(c.held)
}

// Running are the nodes that run, without those named.
func (c *Cluster) Running(without ...*Node) (nodes []*Node) {
next:
	for _, n := range c.Nodes {
		for _, not := range without {
			if n == not {
				continue next
			}
		}
		if n.Running() {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// Endpoints are the client addresses of the nodes that run.
func (c *Cluster) Endpoints() (list []string) {
	for _, n := range c.Running() {
		list = append(list, n.Client)
	}
	return list
}

// quickBackoff: nodes come back soon.
var quickBackoff = backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 200 * time.Millisecond}

// Connect returns a client of these endpoints, of all nodes that run if none is given. The caller closes it.
func (c *Cluster) Connect(endpoints ...string) (*clientv3.Client, error) {
	if len(endpoints) == 0 {
		endpoints = c.Endpoints()
	}
	return clientv3.New(clientv3.Config{
		Endpoints: endpoints, MaxUnaryRetries: 1, Logger: zap.NewNop(), DialKeepAliveTime: 2 * time.Second, DialKeepAliveTimeout: 6 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: quickBackoff})},
	})
}

// With runs one request with a client of its own.
func (c *Cluster) With(request func(*clientv3.Client) error, endpoints ...string) error {
	client, err := c.Connect(endpoints...)
	if err != nil {
		return err
	}
	defer client.Close()
	return request(client)
}

const (
	attemptLimit = 5 * time.Second
	pollEvery    = 20 * time.Millisecond
)

// Until repeats try until it succeeds, limit has passed, or one of the nodes has ended. what names it in the error.
func Until(ctx context.Context, limit time.Duration, what string, nodes []*Node, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := attempt(ctx, nodes, try)
		if err == nil {
			return nil
		}
		for _, n := range nodes {
			if ended := n.LastWords(); ended != nil {
				return ended
			}
		}
		select {
		case <-time.After(pollEvery):
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) { // the caller's
				return fmt.Errorf("%s: %w", what, ctx.Err())
			}
			return fmt.Errorf("%s: not within %v: %w", what, limit, err)
		}
	}
}

// attempt is one try. It is over when one of the nodes ends.
func attempt(ctx context.Context, nodes []*Node, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, attemptLimit)
	var watchers sync.WaitGroup
	defer watchers.Wait()
	defer cancel()
	for _, n := range nodes {
		watchers.Go(func() {
			select {
			case <-n.exited:
				cancel()
			case <-ctx.Done():
			}
		})
	}
	return try(ctx)
}

// AwaitServing waits until each of the nodes answers a linearizable read of key, and none of them ends meanwhile: a new
// cluster waits for all of its nodes.
func (c *Cluster) AwaitServing(ctx context.Context, limit time.Duration, key string, nodes ...*Node) error {
	for _, n := range nodes {
		err := Until(ctx, limit, "wait for "+n.Name, nodes, func(ctx context.Context) error {
			return c.With(func(client *clientv3.Client) error {
				_, err := client.Get(ctx, key)
				return err
			}, n.Client)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Leader asks the nodes that run which one of them leads (with shards: group 0), and returns it with its status. Of
// several, it is the one of the highest term.
func (c *Cluster) Leader(ctx context.Context) (*Node, *pb.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	nodes := c.Running()
	answers := make([]*pb.StatusResponse, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() {
			_ = c.With(func(client *clientv3.Client) error { // who does not answer does not count
				status, err := client.Status(ctx, n.Client)
				answers[i] = (*pb.StatusResponse)(status)
				return err
			}, n.Client)
		})
	}
	all.Wait()
	var leader *Node
	var best *pb.StatusResponse
	for i, a := range answers {
		if a.GetLeader() != 0 && a.GetLeader() == a.GetHeader().GetMemberId() && a.GetRaftTerm() >= best.GetRaftTerm() {
			leader, best = nodes[i], a
		}
	}
	if leader == nil {
		return nil, nil, ErrNoLeader
	}
	return leader, best, nil
}
