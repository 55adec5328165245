// Package nemesis breaks a cluster in random ways, one fault at a time, and mends it again.
package nemesis

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"kvd/integration/linearizability"
)

// Cluster is what can be broken. Kill, Pause and their opposites do nothing to a node that is in that state
// already.
type Cluster interface {
	Names() []string
	Leader(ctx context.Context) (string, error)
	Kill(name string) error
	Start(name string) error // a killed node; does not wait until it serves
	Pause(name string) error
	Resume(name string) error
	Cut(from, to string)    // resets and refuses connections that one node opens to another
	Freeze(from, to string) // delivers nothing, and closes nothing
	HealAll()
	Settle(ctx context.Context) error // waits until every node serves
}

// Fault is a way to break a cluster.
type Fault struct {
	Name string
	// Live says that a connected majority is left: changes must succeed while the fault lasts.
	Live   bool
	Inject func(ctx context.Context, c Cluster, r *rand.Rand) (victims []string, err error)
}

// Faults returns all there are.
func Faults() []Fault {
	return []Fault{
		{"kill", true, onSome(one, Cluster.Kill)},
		{"kill leader", true, onSome(leader, Cluster.Kill)},
		{"kill majority", false, onSome(majority, Cluster.Kill)},
		{"kill all", false, onSome(all, Cluster.Kill)},
		{"pause", true, onSome(one, Cluster.Pause)},
		{"pause leader", true, onSome(leader, Cluster.Pause)},
		{"pause majority", false, onSome(majority, Cluster.Pause)},
		{"cut leader off", true, split(leader, Cluster.Cut)},
		{"freeze leader out", true, split(leader, Cluster.Freeze)},
		{"split off a minority", true, split(minority, Cluster.Cut)},
		{"freeze a minority out", true, split(minority, Cluster.Freeze)},
		{"cut one way from leader", true, oneWay(true)},
		{"cut one way to leader", true, oneWay(false)},
	}
}

// A choice of victims.
type choice func(ctx context.Context, c Cluster, r *rand.Rand) []string

func shuffled(c Cluster, r *rand.Rand, n int) []string {
	names := c.Names()
	r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names[:n]
}

func one(_ context.Context, c Cluster, r *rand.Rand) []string { return shuffled(c, r, 1) }
func minority(_ context.Context, c Cluster, r *rand.Rand) []string {
	return shuffled(c, r, (len(c.Names())-1)/2)
}
func majority(_ context.Context, c Cluster, r *rand.Rand) []string {
	return shuffled(c, r, len(c.Names())/2+1)
}
func all(_ context.Context, c Cluster, r *rand.Rand) []string { return shuffled(c, r, len(c.Names())) }

// leader chooses the leader, or a random node where there is none.
func leader(ctx context.Context, c Cluster, r *rand.Rand) []string {
	fallback := one(ctx, c, r) // drawn always: the choices that follow must depend on the seed alone
	if name, err := c.Leader(ctx); err == nil {
		return []string{name}
	}
	return fallback
}

func onSome(choose choice, do func(Cluster, string) error) func(context.Context, Cluster, *rand.Rand) ([]string, error) {
	return func(ctx context.Context, c Cluster, r *rand.Rand) ([]string, error) {
		victims := choose(ctx, c, r)
		var errs []error
		for _, name := range victims {
			errs = append(errs, do(c, name))
		}
		return victims, errors.Join(errs...)
	}
}

// split breaks every link between the chosen and the others, both ways.
func split(choose choice, breakLink func(c Cluster, from, to string)) func(context.Context, Cluster, *rand.Rand) ([]string, error) {
	return func(ctx context.Context, c Cluster, r *rand.Rand) ([]string, error) {
		victims := choose(ctx, c, r)
		inside := make(map[string]bool)
		for _, name := range victims {
			inside[name] = true
		}
		for _, from := range c.Names() {
			for _, to := range c.Names() {
				if inside[from] != inside[to] {
					breakLink(c, from, to)
				}
			}
		}
		return victims, nil
	}
}

// oneWay cuts the connections that the leader opens to one other node, or those that node opens to it.
func oneWay(fromLeader bool) func(context.Context, Cluster, *rand.Rand) ([]string, error) {
	return func(ctx context.Context, c Cluster, r *rand.Rand) ([]string, error) {
		from := leader(ctx, c, r)[0]
		others := shuffled(c, r, 2)
		to := others[0]
		if to == from {
			to = others[1]
		}
		if !fromLeader {
			from, to = to, from
		}
		c.Cut(from, to)
		return []string{from, to}, nil
	}
}

// Config says how long and how often.
type Config struct {
	Seed    uint64
	Faults  []Fault       // nil = all of them
	Hold    time.Duration // the least time that a fault lasts; it lasts up to twice as long
	Rest    time.Duration // the same, between faults
	Timeout time.Duration // for progress under a fault and for settling after it
	Now     func() int64  // the history's clock
	// Progress reports whether a change that was asked for after a moment has succeeded. A live fault lasts
	// until it does.
	Progress func(since int64) bool
	Broke    func(from, to time.Time) // told of every fault with the time it took to settle; nil = nobody
	Logf     func(format string, args ...any)
}

// ErrStuck says that the cluster made no progress where it should have.
var ErrStuck = errors.New("nemesis: the cluster is stuck")

// Run injects every fault once, in random order, and starts over until until is done; at least once each. The
// cluster is whole when it returns, unless the error says otherwise. The windows are those of live faults.
func Run(until context.Context, c Cluster, cfg Config) ([]linearizability.Window, error) {
	r := rand.New(rand.NewPCG(cfg.Seed, 0))
	faults := append([]Fault(nil), cfg.Faults...)
	if faults == nil {
		faults = Faults()
	}
	var windows []linearizability.Window
	for {
		r.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
		for _, fault := range faults {
			w, err := strike(c, cfg, fault, r)
			if fault.Live {
				windows = append(windows, w)
			}
			if err != nil {
				return windows, fmt.Errorf("%s: %w", fault.Name, err)
			}
			time.Sleep(between(cfg.Rest, r))
		}
		if until.Err() != nil {
			return windows, nil
		}
	}
}

func between(least time.Duration, r *rand.Rand) time.Duration {
	return least + time.Duration(r.Int64N(int64(least)+1))
}

// strike injects one fault, waits, mends everything and waits until the cluster has settled.
func strike(c Cluster, cfg Config, fault Fault, r *rand.Rand) (linearizability.Window, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*cfg.Timeout)
	defer cancel()
	hold := between(cfg.Hold, r)
	began := time.Now()
	defer func() {
		if cfg.Broke != nil {
			cfg.Broke(began, time.Now())
		}
	}()
	victims, err := fault.Inject(ctx, c, r)
	w := linearizability.Window{Fault: fault.Name, From: cfg.Now()}
	cfg.Logf("nemesis: %s (%s) for %v", fault.Name, strings.Join(victims, ", "), hold.Round(time.Millisecond))
	var stuck error
	if err == nil {
		stuck = wait(cfg, fault, w.From, hold)
	}
	w.To = cfg.Now()
	if err := errors.Join(err, stuck, mend(c)); err != nil {
		return w, err
	}
	if err := c.Settle(ctx); err != nil {
		return w, fmt.Errorf("%w after it was mended: %w", ErrStuck, err)
	}
	return w, nil
}

// wait lasts for hold and, under a live fault, until changes succeed.
func wait(cfg Config, fault Fault, since int64, hold time.Duration) error {
	time.Sleep(hold)
	deadline := time.Now().Add(cfg.Timeout)
	for fault.Live && !cfg.Progress(since) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: no change succeeded in %v", ErrStuck, hold+cfg.Timeout)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

// mend undoes every fault there is.
func mend(c Cluster) error {
	c.HealAll()
	var errs []error
	for _, name := range c.Names() {
		errs = append(errs, c.Resume(name), c.Start(name))
	}
	return errors.Join(errs...)
}
