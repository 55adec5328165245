package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"kvd/integration/compare/servers"
)

// Sizes of everything that is measured.
const (
	nodes             = 3
	shards            = 16
	replicationFactor = 3
	valueBytes        = 256
	keyBytes          = 16
	maxConns          = 100 // of a load's clients together
)

// comparison is one run of the command.
type comparison struct {
	o        options
	chosen   map[string]bool // parts
	dir      string
	binaries map[string]string
	progress io.Writer
	readKeys int // of the loads that read, and of those that compare and put
	begun    time.Time
	took     time.Duration

	machine  machine
	figures  figures
	failures []failure
	others   []float64 // processors that all but servers and client have used, per load
}

// failure is what could not be measured.
type failure struct {
	Round  int
	Stage  string
	Server string
	Error  string
}

func newComparison(ctx context.Context, dir string, progress io.Writer, o options) (*comparison, error) {
	chosen, err := chosenParts(o.only)
	if err != nil {
		return nil, err
	}
	c := &comparison{o: o, chosen: chosen, dir: dir, binaries: map[string]string{}, progress: progress, readKeys: 10_000, begun: time.Now(), figures: figures{}}
	if o.quick {
		c.readKeys = 500
		c.o.rounds, c.o.duration, c.o.keys = 1, 150*time.Millisecond, min(o.keys, minKeys)
		c.o.watchers, c.o.leases, c.o.ending = min(o.watchers, 200), min(o.leases, 500), min(o.ending, 200)
	}
	for _, pkg := range []string{servers.Etcd, servers.KVD, servers.Benchmark, servers.Floor} {
		if c.binaries[pkg], err = servers.Build(ctx, pkg, dir); err != nil {
			return nil, err
		}
	}
	c.machine, err = describeMachine(ctx, c.binaries, dir)
	return c, err
}

// stage is what is measured of the same servers, one thing after the other.
type stage struct {
	name  string
	parts []string // what -only may name; the stage is left out if none is chosen
	of    []string // servers
	run   func(t *trial, ctx context.Context) error
}

var stages = []stage{
	{"loads", []string{"put", "get", "sget", "range", "txn", "tool"}, []string{etcd, full, consistent, floor}, (*trial).loads},
	{"watch 1", []string{"watch"}, []string{etcd, full, consistent}, (*trial).watchOne},
	{"watch 2", []string{"watch"}, []string{etcd, full, consistent}, (*trial).watchOwn},
	{"leases", []string{"lease"}, []string{etcd, full, consistent}, (*trial).leases},
	{"failover", []string{"failover"}, []string{etcd, full, consistent}, (*trial).failover},
	{"data", []string{"memory", "restart", "backup", "compaction", "install"}, []string{etcd, full, consistent}, (*trial).data},
	{"idle", []string{"idle"}, []string{etcd, full, consistent, consistent256}, (*trial).idle},
}

func partNames() (names []string) {
	for _, s := range stages {
		for _, part := range s.parts {
			if !slices.Contains(names, part) {
				names = append(names, part)
			}
		}
	}
	return names
}

// chosenParts reads -only.
func chosenParts(only string) (map[string]bool, error) {
	names := partNames()
	chosen := map[string]bool{}
	if only == "" {
		for _, name := range names {
			chosen[name] = true
		}
		return chosen, nil
	}
	for name := range strings.SplitSeq(only, ",") {
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("-only: %q is no part: there are %s", name, strings.Join(names, ", "))
		}
		chosen[name] = true
	}
	return chosen, nil
}

// run measures all stages, round by round. Its errors are those after which there is no use in going on.
func (c *comparison) run(ctx context.Context) error {
	defer func() { c.took = time.Since(c.begun) }()
	for round := range c.o.rounds {
		for _, s := range stages {
			if !slices.ContainsFunc(s.parts, func(part string) bool { return c.chosen[part] }) {
				continue
			}
			if err := c.runStage(ctx, s, round); err != nil {
				return err
			}
		}
	}
	if len(c.figures) == 0 {
		return errors.New("nothing could be measured")
	}
	return nil
}

// runStage measures the servers in turns; none is the first in every round. What fails is kept for the report.
func (c *comparison) runStage(ctx context.Context, s stage, round int) error {
	for i := range s.of {
		t := &trial{comparison: c, contestant: contestants[s.of[(round+i)%len(s.of)]], stage: s.name, round: round}
		err := t.measure(ctx, s.run)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			c.failures = append(c.failures, failure{Round: round + 1, Stage: s.name, Server: t.name, Error: err.Error()})
			t.logf("FAILED: %v", err)
		}
	}
	return nil
}

// trial measures a stage of one server in one round, with fresh data.
type trial struct {
	*comparison
	*contestant
	stage string
	round int

	dir     string
	cluster *servers.Cluster
	probed  probed
	all     []string // rows that have a figure of this trial
	noted   []string // to be told
}

func (t *trial) measure(ctx context.Context, run func(*trial, context.Context) error) (err error) {
	t.logf("starts")
	if t.dir, err = os.MkdirTemp(t.comparison.dir, "trial-"); err != nil {
		return err
	}
	defer os.RemoveAll(t.dir)
	if t.cluster, err = t.contestant.start(ctx, t.comparison, t.dir); err != nil {
		return err
	}
	defer t.cluster.Close()
	if err = t.settle(ctx); err == nil {
		err = run(t, ctx)
	}
	t.tell()
	if errors.Is(err, errWrong) {
		t.figures.drop(t.all, t.name, t.round)
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, t.cluster.Logs())
	}
	return err
}

// errWrong: the servers have not done what they said they had. What was measured of them means nothing.
var errWrong = errors.New("wrong, so no figure of this trial counts")

// settle waits until the cluster is as it is to be in the long run.
func (t *trial) settle(ctx context.Context) error {
	if t.shards == 0 {
		return nil
	}
	return settle(ctx, t.binaries[servers.KVD], t.cluster.Endpoints())
}

// note adds a figure to the table.
func (t *trial) note(row string, value float64) {
	r := rowOf(row)
	t.figures.set(row, t.name, t.round, value)
	t.all = append(t.all, row)
	t.noted = append(t.noted, fmt.Sprintf("%s %s %s", row, r.format(value), r.unit))
}

// tell says what was noted of late.
func (t *trial) tell() {
	if len(t.noted) > 0 {
		t.logf("%s", strings.Join(t.noted, ", "))
	}
	t.noted = nil
}

func (t *trial) logf(format string, args ...any) {
	fmt.Fprintf(t.progress, "%6.0fs round %d %-8s %-14s "+format+"\n",
		append([]any{time.Since(t.begun).Seconds(), t.round + 1, t.stage, t.name}, args...)...)
}

// figures are what was measured: by row, server and round.
type figures map[string]map[string]map[int]float64

func (f figures) set(row, server string, round int, value float64) {
	if f[row] == nil {
		f[row] = map[string]map[int]float64{}
	}
	if f[row][server] == nil {
		f[row][server] = map[int]float64{}
	}
	f[row][server][round] = value
}

// drop takes figures back.
func (f figures) drop(rows []string, server string, round int) {
	for _, row := range rows {
		delete(f[row][server], round)
	}
}

// of returns a server's figures in the order of rounds.
func (f figures) of(row, server string) spread {
	rounds := f[row][server]
	var s spread
	for _, round := range slices.Sorted(maps.Keys(rounds)) {
		s = append(s, rounds[round])
	}
	return s
}

// ratios compares two servers round by round: what else the machine does comes and goes, and neighbours in time see the
// same of it.
func (f figures) ratios(row, server, base string) spread {
	var s spread
	for _, round := range slices.Sorted(maps.Keys(f[row][server])) {
		if divisor, ok := f[row][base][round]; ok && divisor > 0 {
			s = append(s, f[row][server][round]/divisor)
		}
	}
	return s
}

// spread is figures of the same thing.
type spread []float64

func (s spread) min() float64 { return slices.Min(s) }
func (s spread) max() float64 { return slices.Max(s) }

func (s spread) median() float64 {
	sorted := slices.Sorted(slices.Values(s))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// rest waits; in a quick run, a tenth of the time.
func (t *trial) rest(ctx context.Context, d time.Duration) error {
	if t.o.quick {
		d /= 10
	}
	return sleep(ctx, d)
}

// parallel calls f for 0 to n-1 at the same time and returns the first error.
func parallel(n int, f func(i int) error) error {
	errs := make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { errs[i] = f(i) })
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// sleep waits, but not longer than the context lives.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
