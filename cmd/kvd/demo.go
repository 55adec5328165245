package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

type demoOptions struct {
	nodes int
	keep  bool
}

func newDemoCommand() *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See a cluster lose its leader and get it back, on this machine",
		Long: `See what kvd is for: real nodes on this machine, as processes of their own on free ports and in a temporary
directory. They take writes and reads, lose their leader to kill -9, elect another, get the lost node back, and lose
another one. Everything that was ever acknowledged is read back after each step.

It exits with 5 if anything was lost. Ctrl-C removes everything.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.nodes < 3 || o.nodes > 7 {
				return usagef("--nodes: %d is not between 3 (fewer survive no failure) and 7", o.nodes)
			}
			ctx, cancel := orHangup(cmd.Context())
			defer cancel()
			return o.run(ctx, cmd.OutOrStdout())
		},
	}
	cmd.Flags().IntVar(&o.nodes, "nodes", 3, "how many nodes, 3 to 7")
	cmd.Flags().BoolVar(&o.keep, "keep", false, "leave the nodes running until Ctrl-C")
	return cmd
}

// orHangup ends ctx also when the terminal is closed: the children must not outlive it.
func orHangup(ctx context.Context) (context.Context, context.CancelFunc) {
	if signal.Ignored(syscall.SIGHUP) {
		return context.WithCancel(ctx)
	}
	return signal.NotifyContext(ctx, syscall.SIGHUP)
}

func (o *demoOptions) run(ctx context.Context, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "kvd-demo-")
	if err != nil {
		return err
	}
	nodes, err := newDemoNodes(o.nodes, dir)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	d := &demo{out: out, nodes: nodes, start: time.Now()}
	defer func() {
		for _, n := range d.nodes {
			n.kill()
		}
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
	if err := d.steps(ctx, o.keep); err != nil {
		return err
	}
	d.report()
	if o.keep {
		return d.stay(ctx)
	}
	d.tryNext()
	return nil
}

// report sums up what was done.
func (d *demo) report() {
	fmt.Fprintf(d.out, `
Nothing was lost.
  acknowledged writes   %d, all read back after each failure
  writes                %s on average, %d at a time, each on the disks of a majority
  reads                 %s on average, linearizable, through every node
  failover              %s from kill -9 of the leader to the next successful write
  recovery              %s from the start of the process to having all writes
  total                 %s
`, len(d.acked), short(d.writeMean), demoClients, short(d.readMean), short(d.failover), short(d.recovery), short(time.Since(d.start)))
}

func (d *demo) tryNext() {
	self := programName()
	fmt.Fprintf(d.out, `
Try next, in two terminals:
  %[1]s start
  %[1]s put greeting hello && %[1]s get greeting
or look at this cluster while it runs:
  %[1]s demo --keep
`, self)
}

// stay leaves the nodes running until ctx ends.
func (d *demo) stay(ctx context.Context) error {
	self, endpoints := programName(), strings.Join(d.endpoints(), ",")
	fmt.Fprintf(d.out, `
The nodes stay until Ctrl-C. Talk to them from another terminal:
  export KVD_ENDPOINTS=%[2]s
  %[1]s put greeting hello && %[1]s get greeting
  %[1]s status
  kill -9 %[3]d          # %[4]s
Their data and logs are in %[5]s
`, self, endpoints, d.nodes[0].process.Process.Pid, d.nodes[0].name, filepath.Dir(d.nodes[0].dir))
	<-ctx.Done()
	fmt.Fprintln(d.out, "\nstopping the nodes")
	for _, n := range d.nodes {
		n.terminate()
	}
	for _, n := range d.nodes {
		n.await(10 * time.Second)
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
