package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"kvd/bench/report"
)

type benchReportOptions struct {
	out      string
	strategy string
	report.Options
}

func newBenchReportCommand() *cobra.Command {
	var o benchReportOptions
	cmd := &cobra.Command{
		Use:   "report",
		Short: "Measure both strategies on this machine, kill nodes, and write a report with plots",
		Long: `Measure what kvd does on this machine, with real nodes: processes of their own on free ports and in a temporary
directory. For the strategy full with 3 nodes, and for consistent with 2 copies on 3 nodes and 3 copies on 5:

  writes and reads    1000 pairs, one after the other and many at a time, and for a while
  node failure        kill -9 of the leader and of a follower under steady load: how long until writes succeed again,
                      which requests failed, how long until every key has all its copies again (consistent)
  node recovery       the node starts again: how long until it has caught up, and until every key is home (consistent)
  fault tolerance     three tests: a node fails, two nodes fail at once, a node fails and recovers, then another one fails

It writes report.md, report.html (one file, with plots) and report.json (all figures), and takes about three minutes.
Ctrl-C ends all nodes and removes what they have written.

It exits with 1 if a step failed, and with 5 if an acknowledged write was lost; the report is written and says so.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			strategies, err := strategiesOf(o.strategy)
			if err != nil {
				return err
			}
			if err := o.Validate(); err != nil {
				return &usageError{err}
			}
			o.Strategies = strategies
			ctx, cancel := orHangup(cmd.Context())
			defer cancel()
			return o.run(ctx, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.out, "out", "kvd-report", "directory for the report; it is made if it does not exist")
	f.StringVar(&o.strategy, "strategy", strategyBoth, "full, consistent, or both")
	f.StringVar(&o.Dir, "dir", "", "existing directory for the nodes' data, to measure its disk (default: the system's for temporary files)")
	f.IntVar(&o.Pairs, "pairs", 0, "pairs to write and read (default 1000)")
	f.IntVar(&o.Clients, "clients", 0, "how many write or read at the same time (default 32)")
	f.IntVar(&o.ValueBytes, "val-size", 0, "bytes of a value (default 256)")
	f.Float64Var(&o.Rate, "rate", 0, "writes per second, and about as many reads, while nodes fail and recover (default 100)")
	f.BoolVar(&o.Quick, "quick", false, "fewer pairs and shorter waits: to see that it works, not to compare")
	completeStrategy(cmd)
	return cmd
}

func (o *benchReportOptions) run(ctx context.Context, out io.Writer) error {
	if err := os.MkdirAll(o.out, 0o755); err != nil { // before minutes of work
		return err
	}
	p := &stepPrinter{out: out, begin: time.Now()}
	if file, ok := out.(*os.File); ok {
		p.live = term.IsTerminal(int(file.Fd()))
	}
	o.Progress = p.step
	o.Program = report.Program{Version: version, Command: strings.Join(append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...), " ")}
	r, err := report.Run(ctx, o.Options)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(out)
		return errors.Join(fmt.Errorf("%w: the nodes and their data are removed, and there is no report", errInterrupted), withoutInterruption(err))
	case err != nil:
		return err
	}
	files, err := r.Save(o.out)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%s\n", strings.Join(files, "\n"))
	return verdict(r)
}

// withoutInterruption drops what only says that ctx has ended.
func withoutInterruption(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// verdict is the error of a report with steps that failed.
func verdict(r *report.Report) error {
	problems := r.Problems()
	if len(problems) == 0 {
		return nil
	}
	first := problems[0]
	for _, p := range problems {
		if p.Lost {
			return fmt.Errorf("%w: %s", errDataLost, p.Where)
		}
	}
	return fmt.Errorf("%d of the steps failed: %s: %s", len(problems), first.Where, first.Why)
}

// stepPrinter prints a line for each step and, on a terminal, what is being done now.
type stepPrinter struct {
	out   io.Writer
	live  bool
	begin time.Time
	where string
}

func (p *stepPrinter) step(s report.Step) {
	ended := s.Err != nil || s.Result != ""
	if !ended {
		if p.where != s.Where {
			fmt.Fprintf(p.out, "\n%s\n", s.Where)
			p.where = s.Where
		}
		if p.live {
			filled := progressWidth * (s.Number - 1) / s.Total
			fmt.Fprintf(p.out, "[%s%s] %d of %d: %s", strings.Repeat("#", filled), strings.Repeat(".", progressWidth-filled), s.Number, s.Total, s.What)
		}
		return
	}
	if p.live {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
	result := s.Result
	if s.Err != nil {
		result = "FAILED: " + strings.Join(strings.Fields(result), " ")
	}
	fmt.Fprintf(p.out, "%6.1f s  %s: %s\n", time.Since(p.begin).Seconds(), s.What, result)
}
