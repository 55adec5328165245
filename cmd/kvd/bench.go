package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kvd/bench"
)

const formatCSV = "csv"

var benchFormats = []string{formatTable, formatJSON, formatCSV}

// benchCLI are the flags of kvd bench.
type benchCLI struct {
	options      bench.Options
	format       string
	timeline     string
	order, shape string
	consistency  string
}

func newBenchCommand(client *clientOptions) *cobra.Command {
	return newParentCommand("bench", "Put load on a server and measure how it answers",
		newBenchWorkload(client, bench.Put, "Write random keys", `  kvd bench put
  kvd bench put --clients 1000 --duration 30s --warmup 5s
  kvd bench put --rate 2000 --endpoints n1:2379,n2:2379,n3:2379   # open loop: a stalling server can't hide it`),
		newBenchWorkload(client, bench.Get, "Read keys one by one", `  kvd bench get
  kvd bench get --consistency s --order zipfian --keys 100000`),
		newBenchWorkload(client, bench.Range, "Read ranges of neighbouring keys", `  kvd bench range --limit 100`),
		newBenchWorkload(client, bench.Txn, "Write keys if nobody else has since they were read (compare-and-put)", `  kvd bench txn
  kvd bench txn --order zipfian   # many clients want the same keys`),
		newBenchWorkload(client, bench.Mixed, "Read and write as one of YCSB's core workloads, A to F", `  kvd bench mixed --shape B
  kvd bench mixed --shape F --rate 5000 --format json`),
		newBenchWorkload(client, bench.Watch, "Write keys that many watch, and measure how soon they see it", `  kvd bench watch --watchers 1000 --rate 100`),
		newBenchReportCommand(),
	)
}

var benchLong = map[bench.Kind]string{
	bench.Put:   "Write random keys.",
	bench.Get:   "Read keys one by one, after writing them.",
	bench.Range: `Read ranges of neighbouring keys, after writing them.`,
	bench.Txn: `Write keys in transactions: if the key is as this process knew it last, put it, else get it. Those that find the key
changed by another client are counted as done, and named under the table.`,
	bench.Mixed: `Read and write as one of YCSB's core workloads, with keys chosen by its scrambled zipfian distribution:

  A  50% reads, 50% updates
  B  95% reads, 5% updates
  C  reads only
  D  95% reads of the newest keys, 5% inserts
  E  95% scans of 1 to 100 keys, 5% inserts
  F  50% reads, 50% read-modify-writes: a get, then a put if the key is still as read; one operation`,
	bench.Watch: `Write keys at a rate while watchers, who share the connections, watch them all. The latency of an event is the time
from when its put was due until one watcher had it.`,
}

const benchMore = `

With --rate R, R requests become due every second, whatever becomes of those before them, and a request's latency
counts from when it was due (open loop). Without it, each of --clients sends its next request when its last is answered
(closed loop): this finds how much a server can take, but a server that stalls also stalls the measurement.

The keys, <prefix>0000000000 and up, stay: remove them with  kvd del --prefix bench/
The server may be any that speaks etcd's API.`

func newBenchWorkload(client *clientOptions, kind bench.Kind, short, example string) *cobra.Command {
	var b benchCLI
	b.options.Workload.Kind = kind
	cmd := &cobra.Command{
		Use: string(kind), Short: short, Long: benchLong[kind] + benchMore, Example: example, Args: arguments(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error { return b.run(cmd, client) },
	}
	b.AddFlags(cmd.Flags())
	complete := func(flag string, values ...string) {
		if cmd.Flags().Lookup(flag) == nil {
			return
		}
		if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err)
		}
	}
	complete("format", benchFormats...)
	complete("order", "random", "sequential", "zipfian")
	complete("consistency", "l", "s")
	complete("shape", "A", "B", "C", "D", "E", "F")
	return cmd
}

// AddFlags adds those that the workload has.
func (b *benchCLI) AddFlags(f *pflag.FlagSet) {
	o, w := &b.options, &b.options.Workload
	rate, clients := 0.0, "clients, each with one request under way"
	if w.Kind == bench.Watch {
		rate, clients = 100, "most puts under way"
	}
	f.IntVar(&o.Clients, "clients", 100, clients)
	f.IntVar(&o.Conns, "conns", 0, "connections that the clients share (0: one for 50 clients, and one for each endpoint)")
	f.Float64Var(&o.Rate, "rate", rate, "requests that become due per second (0: closed loop)")
	f.IntVar(&o.Total, "total", 0, "end after this many requests (0: after --duration)")
	f.DurationVar(&o.Duration, "duration", 0, "end after this time (default 10s, if there is no --total)")
	f.IntVar(&o.Keys, "keys", bench.DefaultKeys, "different keys")
	f.IntVar(&o.KeyBytes, "key-size", 0, "bytes of a key (default: the prefix and 10 digits)")
	f.IntVar(&o.ValueBytes, "val-size", bench.DefaultValueBytes, "bytes of a value; they are random")
	f.StringVar(&o.Prefix, "prefix", bench.DefaultPrefix, "what all keys begin with")
	f.Uint64Var(&o.Seed, "seed", 1, "of what is random")
	f.DurationVar(&o.Interval, "interval", bench.DefaultInterval, "of the timeline")
	f.StringVar(&b.timeline, "timeline", "", "write requests and latency of every --interval to this `file`, as CSV")
	f.StringVar(&b.format, "format", "", "table, json or csv (default table)")
	if w.Kind != bench.Mixed && w.Kind != bench.Watch {
		f.StringVar(&b.order, "order", string(bench.Random), "of the keys: random, sequential or zipfian")
	}
	if w.Kind == bench.Get || w.Kind == bench.Range || w.Kind == bench.Mixed {
		f.StringVar(&b.consistency, "consistency", "l", "l: linearizable; s: serializable, what one node has, maybe stale")
	}
	if w.Kind != bench.Watch {
		f.DurationVar(&o.Warmup, "warmup", 0, "put the load on this long before measuring")
	}
	if w.Kind != bench.Put && w.Kind != bench.Watch {
		f.BoolVar(&o.SkipLoad, "skip-load", false, "the keys are there already: do not write them first")
	}
	switch w.Kind {
	case bench.Range:
		f.IntVar(&w.RangeKeys, "limit", bench.DefaultRangeKeys, "keys in a range")
	case bench.Mixed:
		f.StringVar(&b.shape, "shape", "A", "which of YCSB's core workloads: A, B, C, D, E or F")
	case bench.Watch:
		f.IntVar(&w.Watchers, "watchers", bench.DefaultWatchers, "watchers of all keys")
	}
}

func (b *benchCLI) run(cmd *cobra.Command, client *clientOptions) error {
	o, err := b.complete(cmd, client)
	if err != nil {
		return err
	}
	var timeline *os.File
	if b.timeline != "" {
		if timeline, err = os.Create(b.timeline); err != nil {
			return err
		}
		defer timeline.Close()
	}
	p := newBenchProgress(cmd.ErrOrStderr())
	o.Progress = p.show
	paceGC()
	result, err := bench.Run(cmd.Context(), o)
	p.clear()
	if result == nil {
		return b.explain(cmd.Context(), client, err)
	}
	if err := b.write(cmd.OutOrStdout(), result); err != nil {
		return err
	}
	if timeline != nil {
		if err := errors.Join(result.TimelineCSV(timeline), timeline.Close()); err != nil {
			return fmt.Errorf("write %s: %w", b.timeline, err)
		}
	}
	if err != nil {
		return fmt.Errorf("%w: the figures are of what was measured until then", errInterrupted)
	}
	return noneSucceeded(result)
}

// complete checks the flags and makes options of them.
func (b *benchCLI) complete(cmd *cobra.Command, client *clientOptions) (o bench.Options, err error) {
	if b.format == "" {
		b.format = formatTable
		if client.writeOut == formatJSON {
			b.format = formatJSON
		}
	}
	if err := b.check(cmd.Flags()); err != nil {
		return o, err
	}
	o = b.options
	o.Workload.Order, o.Workload.Shape = bench.Order(b.order), strings.ToUpper(b.shape)
	o.Workload.Serializable = b.consistency == "s"
	if o.ValueBytes == 0 {
		o.ValueBytes = -1
	}
	o.Timeout = client.commandTimeout
	for _, endpoint := range client.endpoints {
		o.Endpoints = append(o.Endpoints, hostPort(endpoint))
	}
	if o.TLS, err = client.tls(); err != nil {
		return o, err
	}
	if err := o.Validate(); err != nil {
		return o, usagef("%s", strings.TrimPrefix(err.Error(), bench.ErrOptions.Error()+": "))
	}
	return o, nil
}

// check refuses what the library would take for a default, and what only flags can get wrong.
func (b *benchCLI) check(flags *pflag.FlagSet) error {
	o := &b.options
	for _, f := range []struct {
		name  string
		value int
	}{{"clients", o.Clients}, {"keys", o.Keys}, {"key-size", o.KeyBytes}, {"limit", o.Workload.RangeKeys}, {"watchers", o.Workload.Watchers}} {
		if flags.Changed(f.name) && f.value < 1 {
			return usagef("--%s must be at least 1", f.name)
		}
	}
	switch {
	case !slices.Contains(benchFormats, b.format):
		return usagef("--format: %q is not a format: use table, json or csv", b.format)
	case b.consistency != "" && b.consistency != "l" && b.consistency != "s":
		return usagef("--consistency: %q is neither l nor s", b.consistency)
	case flags.Changed("duration") && o.Duration <= 0, flags.Changed("total") && o.Total <= 0 && o.Duration <= 0:
		return usagef("--total and --duration must be above 0")
	case flags.Changed("interval") && o.Interval <= 0:
		return usagef("--interval must be above 0")
	case o.Prefix == "":
		return usagef("--prefix must not be empty: the keys of the load would be among others")
	case o.ValueBytes < 0:
		return usagef("--val-size must not be below 0")
	}
	return nil
}

// tls is nil where nothing asks for TLS.
func (o *clientOptions) tls() (*tls.Config, error) {
	cfg, err := o.config(o.endpoints...)
	if err != nil {
		return nil, err
	}
	https := func(endpoint string) bool { return strings.HasPrefix(endpoint, "https:") }
	if cfg.TLS == nil && slices.ContainsFunc(o.endpoints, https) {
		return new(tls.Config), nil
	}
	return cfg.TLS, nil
}

// explain says why there is no result.
func (b *benchCLI) explain(ctx context.Context, client *clientOptions, err error) error {
	if unreachable, ok := errors.AsType[*bench.UnreachableError](err); ok {
		return client.diagnose(ctx, []string{unreachable.Endpoint})
	}
	if errors.Is(err, bench.ErrNoWatch) {
		return errors.New("this server offers no watches (it answers Unimplemented): kvd bench watch needs one that does, such as etcd")
	}
	if ctx.Err() != nil {
		return errInterrupted
	}
	return errors.New(strings.TrimPrefix(err.Error(), "bench: "))
}

func (b *benchCLI) write(w io.Writer, r *bench.Result) error {
	switch b.format {
	case formatJSON:
		return r.JSON(w)
	case formatCSV:
		return r.CSV(w)
	}
	return r.Table(w)
}

// noneSucceeded is an error if all requests failed.
func noneSucceeded(r *bench.Result) error {
	if r.Count() > 0 || r.Failed() == 0 {
		return nil
	}
	for _, o := range r.Operations {
		for _, e := range o.Errors {
			return fmt.Errorf("no request succeeded: %s (%s)", e.Example, e.Code)
		}
	}
	return nil
}

// benchProgress draws how far a run is, where somebody looks.
type benchProgress struct {
	out   io.Writer // nil: draw nothing
	drawn bool
}

func newBenchProgress(out io.Writer) *benchProgress {
	return &benchProgress{out: newProgress(out, "", 0).out}
}

func (p *benchProgress) show(now bench.Progress) {
	if p.out != nil {
		p.drawn = true
		fmt.Fprintf(p.out, "\r%s\x1b[K", benchLine(now))
	}
}

func (p *benchProgress) clear() {
	if p.drawn {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}

func benchLine(now bench.Progress) string {
	fraction := 0.0
	if now.Total > 0 {
		fraction = float64(now.Done+now.Errors) / float64(now.Total)
	}
	if now.Duration > 0 {
		fraction = max(fraction, float64(now.Elapsed)/float64(now.Duration))
	}
	title := map[string]string{"load": "write keys", "warmup": "warm up", "run": "measure"}[now.Phase]
	line := fmt.Sprintf("%-10s %s  %s  %.0f ops/s", title, bar(min(fraction, 1)), now.Elapsed.Round(time.Second), now.PerSecond)
	if now.Errors > 0 {
		line += fmt.Sprintf("  %d failed", now.Errors)
	}
	return line
}
