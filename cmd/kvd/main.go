// Command kvd runs a node of a replicated key-value store, and talks to one.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/grpclog"
)

// version of kvd; set by releases with -ldflags "-X main.version=...".
var version = "0.1.0-dev"

// apiVersion is the version of etcd's API that kvd speaks.
const apiVersion = "3.7"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal ends ctx; from then on the next one ends the process.
	context.AfterFunc(ctx, stop)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	started := false
	root := newRootCommand(&started)
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if failed, ok := errors.AsType[*commandError](err); ok {
		return failed.code
	}
	if !started { // cobra itself refused the flags or the arguments
		err = &usageError{err}
	}
	if err != errInterrupted { // alone, it says what whoever interrupted it knows
		fmt.Fprintln(errOut, "Error:", describe(cmd, err))
	}
	return exitCode(ctx, err)
}

func newRootCommand(started *bool) *cobra.Command {
	var client clientOptions
	root := &cobra.Command{
		Use:   "kvd",
		Short: "A replicated key-value store that any etcd v3 client can use",
		Long: `kvd is a strongly consistent, fault-tolerant key-value store that any etcd v3 client can use.

  kvd demo                     three nodes, a killed leader, nothing lost: see it in a minute
  kvd start                    run a node on 127.0.0.1:2379, data in ./n1.kvd
  kvd put greeting hello       write a key
  kvd get greeting             read it back

` + exitCodesHelp,
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args:              unknownCommand,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { *started = true; return client.complete(cmd) },
	}
	client.AddFlags(root)
	root.AddGroup(&cobra.Group{ID: "run", Title: "Run:"}, &cobra.Group{ID: "keys", Title: "Keys:"},
		&cobra.Group{ID: "locks", Title: "Locks and elections:"}, &cobra.Group{ID: "cluster", Title: "Cluster:"})
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("run", newStartCommand(), newDemoCommand(), newBenchCommand(&client))
	add("keys", newGetCommand(&client), newPutCommand(&client), newDelCommand(&client), newTxnCommand(&client),
		newCompactionCommand(&client), newWatchCommand(&client), newLeaseCommand(&client))
	add("locks", newLockCommand(&client), newElectCommand(&client))
	add("cluster", newStatusCommand(&client), newHealthCommand(&client), newMemberCommand(&client),
		newMoveLeaderCommand(&client), newSnapshotCommand(&client), newShardsCommand(&client), newLocateCommand(&client),
		newExplainCommand(&client))
	add("", newLogCommand(&client), newVersionCommand())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	withoutClientFlags(root, started, "start", "demo", "bench report", "version", "completion", "help")
	return root
}

// newParentCommand makes a command that only holds others.
func newParentCommand(use, short string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: unknownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(children...)
	return cmd
}

// unknownCommand is the Args of a command that only holds others.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return fmt.Errorf("unknown command %q: did you mean %s?", args[0], strings.Join(near, " or "))
	}
	return fmt.Errorf("unknown command %q: see %s --help", args[0], cmd.CommandPath())
}

// arguments accepts between low and high arguments; want names them.
func arguments(low, high int, want string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if low <= len(args) && len(args) <= high {
			return nil
		}
		return fmt.Errorf("%s wants %s: see %s --help", cmd.CommandPath(), want, cmd.CommandPath())
	}
}

// withoutClientFlags makes commands that talk to no server refuse the client flags, and hides them from their help.
func withoutClientFlags(root *cobra.Command, started *bool, names ...string) {
	for _, name := range names {
		cmd, _, err := root.Find(strings.Fields(name))
		if err != nil {
			panic(err)
		}
		cmd.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".HasAvailableInheritedFlags", "false"))
		cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
			for _, f := range changedFlags(cmd) {
				if root.PersistentFlags().Lookup(f) != nil {
					return fmt.Errorf("%s has no flag --%s: see %s --help", cmd.CommandPath(), f, cmd.CommandPath())
				}
			}
			*started = true
			return nil
		}
	}
}
