package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"kvd/bench/local"
	"kvd/node"
)

type demoOptions struct {
	strategy string
	nodes    int // 0: as many as the strategy's story needs
	keep     bool
}

// strategyBoth shows one strategy after the other.
const strategyBoth = "both"

func newDemoCommand() *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See clusters lose nodes and get them back, on this machine",
		Long: `See what kvd is for: real nodes on this machine, as processes of their own on free ports and in a temporary
directory. They take writes and reads, lose nodes to kill -9 and get them back. Everything that was ever acknowledged is
read back after each step.

With --strategy full, three nodes hold every key: they lose their leader, elect another, get the lost node back, and
lose another one. With --strategy consistent, five nodes share the keys, three copies of each: one node dies and stays
away, its keys are redistributed, another node dies, both come back, and the keys go home.

It exits with 5 if anything was lost. Ctrl-C removes everything.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			strategies, err := o.strategies()
			if err != nil {
				return err
			}
			ctx, cancel := orHangup(cmd.Context())
			defer cancel()
			for i, strategy := range strategies {
				if i > 0 {
					fmt.Fprintln(cmd.OutOrStdout())
				}
				if err := o.run(ctx, cmd.OutOrStdout(), strategy, i == len(strategies)-1); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&o.strategy, "strategy", strategyBoth, "full, consistent, or both one after the other")
	cmd.Flags().IntVar(&o.nodes, "nodes", 0, "how many nodes, 3 to 7; consistent needs 5 (default: 3 for full, 5 for consistent)")
	cmd.Flags().BoolVar(&o.keep, "keep", false, "leave the nodes running until Ctrl-C; of both strategies, those of consistent")
	completeStrategy(cmd)
	return cmd
}

func completeStrategy(cmd *cobra.Command) {
	if err := cmd.RegisterFlagCompletionFunc("strategy", cobra.FixedCompletions(
		[]string{node.StrategyFull, node.StrategyConsistent, strategyBoth}, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

// strategiesOf lists what a value of --strategy names.
func strategiesOf(value string) ([]string, error) {
	switch value {
	case node.StrategyFull, node.StrategyConsistent:
		return []string{value}, nil
	case strategyBoth:
		return []string{node.StrategyFull, node.StrategyConsistent}, nil
	}
	return nil, usagef("--strategy: %q is none of %s, %s and %s", value, node.StrategyFull, node.StrategyConsistent, strategyBoth)
}

// strategies lists what is to be shown.
func (o *demoOptions) strategies() ([]string, error) {
	list, err := strategiesOf(o.strategy)
	if err != nil {
		return nil, err
	}
	least := 3
	if slices.Contains(list, node.StrategyConsistent) {
		least = 5
	}
	if o.nodes != 0 && (o.nodes < least || o.nodes > 7) {
		return nil, usagef("--nodes: %d is not between %d (fewer do not survive what is shown) and 7", o.nodes, least)
	}
	return list, nil
}

// orHangup ends ctx also when the terminal is closed: the children must not outlive it.
func orHangup(ctx context.Context) (context.Context, context.CancelFunc) {
	if signal.Ignored(syscall.SIGHUP) {
		return context.WithCancel(ctx)
	}
	return signal.NotifyContext(ctx, syscall.SIGHUP)
}

// run shows one strategy; last says that nothing comes after it.
func (o *demoOptions) run(ctx context.Context, out io.Writer, strategy string, last bool) (err error) {
	dir, err := os.MkdirTemp("", "kvd-demo-")
	if err != nil {
		return err
	}
	size := map[string]int{node.StrategyFull: 3, node.StrategyConsistent: 5}[strategy]
	cluster, err := local.New(cmp.Or(o.nodes, size), dir)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	d := &demo{Cluster: cluster, out: out, start: time.Now()}
	defer func() {
		d.Close()
		switch {
		case ctx.Err() != nil && err != nil && !errors.Is(err, errDataLost):
			fmt.Fprintln(out)
			err = errors.Join(fmt.Errorf("%w: the nodes and their data are removed", errInterrupted), os.RemoveAll(dir))
		case err != nil:
			err = fmt.Errorf("%w; the logs are in %s", err, filepath.Join(dir, "*.log"))
		default:
			err = os.RemoveAll(dir)
		}
	}()
	keep := o.keep && last
	if strategy == node.StrategyConsistent {
		s := newShardedDemo(d)
		err = s.steps(ctx)
		d.measured = s.measurements
	} else {
		err = d.steps(ctx, keep)
		d.measured = d.measurements
	}
	if err != nil {
		return err
	}
	d.report()
	switch {
	case keep:
		return d.stay(ctx)
	case last:
		d.tryNext(strategy)
	}
	return nil
}

// report sums up what was done.
func (d *demo) report() {
	fmt.Fprintf(d.out, "\nNothing was lost.\n")
	lines := append([][2]string{
		{"acknowledged writes", fmt.Sprintf("%d, all read back after each failure", len(d.acked))},
	}, d.measured()...)
	for _, line := range append(lines, [2]string{"total", short(time.Since(d.start))}) {
		fmt.Fprintf(d.out, "  %-20s  %s\n", line[0], line[1])
	}
}

func (d *demo) measurements() [][2]string {
	return [][2]string{
		{"writes", fmt.Sprintf("%s on average, %d at a time, each on the disks of a majority", short(d.writeMean), demoClients)},
		{"reads", fmt.Sprintf("%s on average, linearizable, through every node", short(d.readMean))},
		{"failover", fmt.Sprintf("%s from kill -9 of the leader to the next successful write", short(d.failover))},
		{"recovery", fmt.Sprintf("%s from the start of the process to having all writes", short(d.recovery))},
	}
}

func (d *demo) tryNext(strategy string) {
	self := programName()
	fmt.Fprintf(d.out, `
Try next, in two terminals:
  %[1]s start
  %[1]s put greeting hello && %[1]s get greeting
or look at this cluster while it runs:
  %[1]s demo --strategy %[2]s --keep
`, self, strategy)
}

// stay leaves the nodes running until ctx ends.
func (d *demo) stay(ctx context.Context) error {
	self, endpoints, more := programName(), strings.Join(d.Endpoints(), ","), ""
	if len(d.Flags) > 0 {
		more = " && " + self + " shards"
	}
	fmt.Fprintf(d.out, `
The nodes stay until Ctrl-C. Talk to them from another terminal:
  export KVD_ENDPOINTS=%[2]s
  %[1]s put greeting hello && %[1]s get greeting
  %[1]s status%[6]s
  kill -9 %[3]d          # %[4]s
Their data and logs are in %[5]s
`, self, endpoints, d.Nodes[0].Pid(), d.Nodes[0].Name, filepath.Dir(d.Nodes[0].Dir), more)
	<-ctx.Done()
	fmt.Fprintln(d.out, "\nstopping the nodes")
	for _, n := range d.Nodes {
		n.Terminate()
	}
	for _, n := range d.Nodes {
		n.Await(10 * time.Second)
	}
	return nil
}

// programName is how the caller can run this program again.
func programName() string {
	program, err := os.Executable()
	switch {
	case err == nil && strings.Contains(program, "go-build"):
		return "go run ./cmd/kvd"
	case strings.ContainsRune(os.Args[0], filepath.Separator):
		return os.Args[0]
	}
	return "kvd"
}

// short writes a duration for people.
func short(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
