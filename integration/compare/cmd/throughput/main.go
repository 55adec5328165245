// Command throughput compares how many puts per second a cluster of kvd and a cluster of etcd take, by etcd's own
// benchmark tool, in turns on this machine. The servers of every round are fresh real processes, with their data on
// one file system. It exits 0 whatever the figures are, unless -at-least says otherwise.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"kvd/integration/compare/servers"
)

type options struct {
	rounds, nodes, total, clients, conns, keySize, keySpace, valueSize int

	dir     string
	atLeast float64
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 3, "rounds of each server")
	flag.IntVar(&o.nodes, "nodes", 3, "nodes of each server")
	flag.IntVar(&o.total, "total", 50000, "puts in a round")
	flag.IntVar(&o.clients, "clients", 100, "concurrent clients")
	flag.IntVar(&o.conns, "conns", 100, "connections of the clients")
	flag.IntVar(&o.keySize, "key-size", 16, "bytes of a key")
	flag.IntVar(&o.keySpace, "key-space-size", 100000, "number of possible keys")
	flag.IntVar(&o.valueSize, "val-size", 256, "bytes of a value")
	flag.StringVar(&o.dir, "dir", "", "`directory` for binaries and data (default: the system's for temporary files)")
	flag.Float64Var(&o.atLeast, "at-least", 0, "fail if kvd takes less than this many times etcd's puts per second, in the median of rounds")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := compare(ctx, os.Stdout, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "throughput:", err)
		os.Exit(1)
	}
}

// contestant is one of the two servers.
type contestant struct {
	name, binary string
	start        func(ctx context.Context, binary, dir string, nodes int) (*servers.Cluster, error)
	results      []result
}

// result is what one round has measured.
type result struct {
	putsPerSecond float64
	cpuPerPut     time.Duration // of all nodes together; 0 where it can't be known
	latencies     []string      // median, 99th, as the benchmark tool prints them, in seconds
}

func compare(ctx context.Context, out io.Writer, o options) error {
	if o.rounds < 1 || o.nodes < 1 || o.total < 1 {
		return errors.New("-rounds, -nodes and -total must be at least 1")
	}
	dir, err := os.MkdirTemp(o.dir, "kvd-throughput-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	contestants := []*contestant{{name: "etcd", start: servers.StartEtcd}, {name: "kvd", start: servers.StartKVD}}
	for i, pkg := range []string{servers.Etcd, servers.KVD} {
		if contestants[i].binary, err = servers.Build(ctx, pkg, dir); err != nil {
			return err
		}
	}
	tool, err := servers.Build(ctx, servers.Benchmark, dir)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d puts a round, %d clients on %d connections to %d nodes, values of %d bytes, %d keys\n",
		o.total, o.clients, o.conns, o.nodes, o.valueSize, o.keySpace)
	for round := range o.rounds {
		for _, c := range contestants {
			r, err := c.round(ctx, tool, dir, o)
			if err != nil {
				return fmt.Errorf("round %d of %s: %w", round+1, c.name, err)
			}
			c.results = append(c.results, r)
			fmt.Fprintf(out, "round %d  %-4s  %8.0f puts/s  %7.0f µs of CPU per put  latency p50 %s s, p99 %s s\n",
				round+1, c.name, r.putsPerSecond, micros(r.cpuPerPut), r.latencies[0], r.latencies[1])
		}
	}
	return report(out, contestants[0], contestants[1], o.atLeast)
}

// round measures fresh servers once.
func (c *contestant) round(ctx context.Context, tool, parent string, o options) (result, error) {
	dir, err := os.MkdirTemp(parent, c.name+"-")
	if err != nil {
		return result{}, err
	}
	defer os.RemoveAll(dir)
	cluster, err := c.start(ctx, c.binary, dir, o.nodes)
	if err != nil {
		return result{}, err
	}
	defer cluster.Close()
	before, cpuErr := cluster.CPU()
	out, err := benchmark(ctx, tool, cluster.Endpoints(), o)
	if err != nil {
		return result{}, fmt.Errorf("%w\n%s", err, cluster.Logs())
	}
	after, err := cluster.CPU()
	r, parseErr := parse(out)
	if err := errors.Join(parseErr, verify(ctx, cluster.Endpoints()[0], o.total)); err != nil {
		return result{}, fmt.Errorf("%w\n%s", err, cluster.Logs())
	}
	if errors.Join(cpuErr, err) == nil {
		r.cpuPerPut = (after - before) / time.Duration(o.total)
	}
	return r, nil
}

func benchmark(ctx context.Context, tool string, endpoints []string, o options) ([]byte, error) {
	cmd := exec.CommandContext(ctx, tool, "put",
		"--endpoints", strings.Join(endpoints, ","),
		"--clients", strconv.Itoa(o.clients), "--conns", strconv.Itoa(o.conns),
		"--total", strconv.Itoa(o.total), "--key-size", strconv.Itoa(o.keySize),
		"--key-space-size", strconv.Itoa(o.keySpace), "--val-size", strconv.Itoa(o.valueSize))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("benchmark: %w\n%s", err, stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

var (
	rateLine    = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	latencyLine = regexp.MustCompile(`(50|99)% in ([0-9.]+) secs`)
)

// parse reads the benchmark tool's report.
func parse(out []byte) (result, error) {
	if bytes.Contains(out, []byte("Error distribution:")) {
		return result{}, fmt.Errorf("some puts failed:\n%s", out)
	}
	rate, latencies := rateLine.FindSubmatch(out), latencyLine.FindAllSubmatch(out, -1)
	if rate == nil || len(latencies) != 2 {
		return result{}, fmt.Errorf("not a report of the benchmark tool:\n%s", out)
	}
	r := result{latencies: []string{string(latencies[0][2]), string(latencies[1][2])}}
	var err error
	r.putsPerSecond, err = strconv.ParseFloat(string(rate[1]), 64)
	return r, err
}

// verify checks that every put has been applied: each makes one revision, and a fresh store is at revision 1.
func verify(ctx context.Context, endpoint string, puts int) error {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	response, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})
	if err != nil {
		return err
	}
	if revision := response.Header.Revision; revision != int64(puts)+1 {
		return fmt.Errorf("revision %d after %d puts", revision, puts)
	}
	return nil
}

// report prints a table. Its last line compares the two rounds that were neighbours in time, since whatever else the
// machine does comes and goes.
func report(out io.Writer, etcd, kvd *contestant, atLeast float64) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\tputs/s min\tmedian\tmax\tCPU µs/put min\tmedian\tmax\t")
	row := func(name, format string, rates, cpus []float64) {
		fmt.Fprintf(table, name+strings.Repeat("\t"+format, 6)+"\t\n",
			slices.Min(rates), median(rates), slices.Max(rates), slices.Min(cpus), median(cpus), slices.Max(cpus))
	}
	var rateRatios, cpuRatios []float64
	for i, r := range kvd.results {
		rateRatios = append(rateRatios, r.putsPerSecond/etcd.results[i].putsPerSecond)
		cpuRatios = append(cpuRatios, micros(r.cpuPerPut)/micros(etcd.results[i].cpuPerPut))
	}
	for _, c := range []*contestant{etcd, kvd} {
		var rates, cpus []float64
		for _, r := range c.results {
			rates, cpus = append(rates, r.putsPerSecond), append(cpus, micros(r.cpuPerPut))
		}
		row(c.name, "%.0f", rates, cpus)
	}
	row("kvd/etcd", "%.2f", rateRatios, cpuRatios)
	if err := table.Flush(); err != nil {
		return err
	}
	if ratio := median(rateRatios); ratio < atLeast {
		return fmt.Errorf("kvd takes %.2f times etcd's puts, less than %.2f", ratio, atLeast)
	}
	return nil
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	middle := len(values) / 2
	if len(values)%2 == 1 {
		return values[middle]
	}
	return (values[middle-1] + values[middle]) / 2
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
