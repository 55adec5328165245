// Command compare measures kvd, with either strategy, beside etcd and beside a server that does nothing, in turns on this
// machine, and prints what each takes, the ratios, and which targets are met. See docs/performance.md for the method.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

type options struct {
	rounds   int
	only     string
	keys     int
	watchers int
	leases   int
	ending   int
	duration time.Duration
	quick    bool

	dir, out, jsonOut string
}

func (o *options) addFlags(f *flag.FlagSet) {
	f.IntVar(&o.rounds, "rounds", 5, "`rounds`: each measures every server once, with fresh data")
	f.StringVar(&o.only, "only", "", "comma-separated `parts` to measure: "+strings.Join(partNames(), ", ")+" (default: all)")
	f.IntVar(&o.keys, "keys", 1_000_000, "`keys` in the store for memory, disk, restart and disruption")
	f.IntVar(&o.watchers, "watchers", 10_000, "`watchers` at once, of one key and of a key each")
	f.IntVar(&o.leases, "leases", 100_000, "`leases` to grant and to keep alive")
	f.IntVar(&o.ending, "ending", 10_000, "further `leases`, with a key each, that end at once; etcd ends at most 1000 per second")
	f.DurationVar(&o.duration, "duration", 3*time.Second, "of each load")
	f.BoolVar(&o.quick, "quick", false, "only show that it works: 1 round, short and small; the figures mean nothing")
	f.StringVar(&o.dir, "dir", "", "`directory` for binaries and data (default: the system's for temporary files)")
	f.StringVar(&o.out, "out", "", "Markdown `file` in which to replace what is between the two markers")
	f.StringVar(&o.jsonOut, "json", "", "`file` for every single figure, as JSON")
}

func (o *options) validate() error {
	if o.rounds < 1 || o.duration <= 0 {
		return errors.New("-rounds and -duration must be above 0")
	}
	if o.keys < minKeys {
		return fmt.Errorf("-keys must be at least %d", minKeys)
	}
	if o.watchers < 1 || o.leases < 1 || o.ending < 1 {
		return errors.New("-watchers, -leases and -ending must be above 0")
	}
	_, err := chosenParts(o.only)
	return err
}

func main() {
	var o options
	o.addFlags(flag.CommandLine)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Stdout, os.Stderr, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

// errIncomplete: figures are missing from the table. What was measured has been written.
var errIncomplete = errors.New("not everything could be measured")

// run measures, and writes the table to out and what goes on to progress.
func run(ctx context.Context, out, progress io.Writer, o options) error {
	if err := o.validate(); err != nil {
		return err
	}
	if err := checkMarkers(o.out); err != nil {
		return err // now rather than in an hour
	}
	dir, err := os.MkdirTemp(o.dir, "kvd-compare-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c, err := newComparison(ctx, dir, progress, o)
	if err != nil {
		return err
	}
	err = c.run(ctx)
	text := c.markdown()
	if len(c.figures) > 0 { // also what was measured until an interrupt
		if _, err := io.WriteString(out, text); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	if err := replaceBetweenMarkers(o.out, text); err != nil {
		return err
	}
	if o.jsonOut != "" {
		data, err := json.MarshalIndent(c.report(), "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(o.jsonOut, append(data, '\n'), 0o644); err != nil {
			return err
		}
	}
	if len(c.failures) > 0 {
		return fmt.Errorf("%w: see what failed above", errIncomplete)
	}
	return nil
}
