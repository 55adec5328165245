// Command throughput compares how many puts and gets per second clusters of kvd, with either strategy, and a cluster of
// etcd take, in turns on this machine. The servers of every round are fresh real processes, with their data on one file
// system. The puts are made by etcd's own benchmark tool; the gets are linearizable reads of single random keys. It
// exits 0 whatever the figures are, unless -at-least says otherwise.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"time"

	"kvd/integration/compare/servers"
)

type options struct {
	rounds, nodes, total, clients, conns, keySize, keySpace, valueSize int
	shards, replicationFactor                                          int

	dir     string
	atLeast float64
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 3, "rounds of each server")
	flag.IntVar(&o.nodes, "nodes", 3, "nodes of each server")
	flag.IntVar(&o.total, "total", 50000, "puts in a round, and then gets")
	flag.IntVar(&o.clients, "clients", 100, "concurrent clients")
	flag.IntVar(&o.conns, "conns", 100, "connections of the clients")
	flag.IntVar(&o.keySize, "key-size", 16, "bytes of a key")
	flag.IntVar(&o.keySpace, "key-space-size", 100000, "number of possible keys")
	flag.IntVar(&o.valueSize, "val-size", 256, "bytes of a value")
	flag.IntVar(&o.shards, "shards", 16, "shards of kvd consistent")
	flag.IntVar(&o.replicationFactor, "replication-factor", 3, "copies of each key of kvd consistent")
	flag.StringVar(&o.dir, "dir", "", "`directory` for binaries and data (default: the system's for temporary files)")
	flag.Float64Var(&o.atLeast, "at-least", 0, "fail if kvd full takes less than this many times etcd's puts per second, in the median of rounds")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := compare(ctx, os.Stdout, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "throughput:", err)
		os.Exit(1)
	}
}

// contestant is one of the servers.
type contestant struct {
	name       string
	start      func(ctx context.Context, dir string) (*servers.Cluster, error)
	gaps       bool // in its revisions
	puts, gets []result
}

// result is what one round has measured.
type result struct {
	perSecond float64
	cpu       time.Duration // of all nodes together, per operation; 0 where it can't be known
	p50, p99  time.Duration // latency
}

func compare(ctx context.Context, out io.Writer, o options) error {
	if o.rounds < 1 || o.nodes < 1 || o.total < 1 || o.clients < 1 || o.conns < 1 {
		return errors.New("-rounds, -nodes, -total, -clients and -conns must be at least 1")
	}
	dir, err := os.MkdirTemp(o.dir, "kvd-throughput-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binaries := map[string]string{}
	for _, pkg := range []string{servers.Etcd, servers.KVD, servers.Benchmark} {
		if binaries[pkg], err = servers.Build(ctx, pkg, dir); err != nil {
			return err
		}
	}
	contestants := contestantsOf(binaries, o)
	fmt.Fprintf(out, "%d puts and gets a round, %d clients on %d connections to %d nodes, values of %d bytes, %d keys; consistent: %d shards, %d copies\n",
		o.total, o.clients, o.conns, o.nodes, o.valueSize, o.keySpace, o.shards, o.replicationFactor)
	for round := range o.rounds {
		for i := range contestants {
			c := contestants[(round+i)%len(contestants)] // none is always the first
			if err := c.round(ctx, binaries[servers.Benchmark], dir, o); err != nil {
				return fmt.Errorf("round %d of %s: %w", round+1, c.name, err)
			}
			fmt.Fprintf(out, "round %d  %s\n  puts %v\n  gets %v\n", round+1, c.name, c.puts[round], c.gets[round])
		}
	}
	return report(out, contestants, o.atLeast)
}

// contestantsOf lists etcd first, then kvd full.
func contestantsOf(binaries map[string]string, o options) []*contestant {
	etcd := func(ctx context.Context, dir string) (*servers.Cluster, error) {
		return servers.StartEtcd(ctx, binaries[servers.Etcd], dir, o.nodes)
	}
	full := func(ctx context.Context, dir string) (*servers.Cluster, error) {
		return servers.StartKVD(ctx, binaries[servers.KVD], dir, o.nodes)
	}
	consistent := func(ctx context.Context, dir string) (*servers.Cluster, error) {
		cluster, err := servers.StartKVD(ctx, binaries[servers.KVD], dir, o.nodes, "--strategy", "consistent",
			"--shards", strconv.Itoa(o.shards), "--replication-factor", strconv.Itoa(o.replicationFactor))
		if err == nil {
			if err = settle(ctx, binaries[servers.KVD], cluster.Endpoints()); err != nil {
				err = fmt.Errorf("%w\n%s", err, cluster.Logs())
				cluster.Close()
			}
		}
		return cluster, err
	}
	return []*contestant{{name: "etcd", start: etcd}, {name: "kvd full", start: full}, {name: "kvd consistent", start: consistent, gaps: true}}
}

// round measures fresh servers once.
func (c *contestant) round(ctx context.Context, tool, parent string, o options) error {
	dir, err := os.MkdirTemp(parent, "round-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	cluster, err := c.start(ctx, dir)
	if err != nil {
		return err
	}
	defer cluster.Close()
	puts, err := metered(cluster, o.total, func() (result, error) { return benchmarkPuts(ctx, tool, cluster.Endpoints(), o) })
	if err != nil {
		return fmt.Errorf("%w\n%s", err, cluster.Logs())
	}
	keys, err := verify(ctx, cluster.Endpoints()[0], o.total, c.gaps)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, cluster.Logs())
	}
	gets, err := newGets(ctx, cluster.Endpoints(), keys, o)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, cluster.Logs())
	}
	defer gets.close()
	got, err := metered(cluster, o.total, func() (result, error) { return gets.run(ctx) })
	if err != nil {
		return fmt.Errorf("%w\n%s", err, cluster.Logs())
	}
	c.puts, c.gets = append(c.puts, puts), append(c.gets, got)
	return nil
}

// metered adds what processor time the cluster has used for each operation.
func metered(cluster *servers.Cluster, operations int, measure func() (result, error)) (result, error) {
	before, beforeErr := cluster.CPU()
	r, err := measure()
	after, afterErr := cluster.CPU()
	if beforeErr == nil && afterErr == nil {
		r.cpu = (after - before) / time.Duration(operations)
	}
	return r, err
}
