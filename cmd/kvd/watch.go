package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// watchPause is between two tries of a watch while the cluster has no leader.
const watchPause = 250 * time.Millisecond

type watchOptions struct {
	prefix, fromKey, prevKV, progress bool
	rev                               int64
}

func (o *watchOptions) AddFlags(f *pflag.FlagSet) {
	f.BoolVar(&o.prefix, "prefix", false, "all keys that begin with <key>")
	f.BoolVar(&o.fromKey, "from-key", false, "all keys from <key> on, in byte order")
	f.Int64Var(&o.rev, "rev", 0, "from this revision on (0: from now on)")
	f.BoolVar(&o.prevKV, "prev-kv", false, "also what the key held before")
	f.BoolVar(&o.progress, "progress-notify", false, "also, now and then while nothing happens, up to which revision that is")
	f.BoolVar(&o.progress, "progress", false, "the same")
}

func newWatchCommand(client *clientOptions) *cobra.Command {
	var o watchOptions
	cmd := &cobra.Command{
		Use:   "watch <key> [<range-end>] [-- <command> [<argument>...]]",
		Short: "Follow the changes of a key or a range of keys",
		Long: `Follow the changes of a key, of the keys from <key> up to but without <range-end>, or of those that --prefix or
--from-key say, until it is interrupted: every change once, in order. Elections and restarts of servers interrupt it
without a gap.

A command after -- is run for each change, one after the other, with the new value as its input, and with
  KVD_WATCH_EVENT_TYPE   PUT or DELETE
  KVD_WATCH_KEY          the key
  KVD_WATCH_VALUE        its new value; unset if it does not fit into an environment
  KVD_WATCH_PREV_VALUE   with --prev-kv, if there was one
  KVD_WATCH_REVISION     of the change: kvd watch --rev goes on with the one above it
and etcdctl's ETCD_WATCH_EVENT_TYPE, _KEY, _VALUE and _REVISION. If it fails, so does kvd watch.`,
		Example: `  kvd watch greeting
  kvd watch --prefix config/ --rev 7 --prev-kv
  kvd watch --prefix config/ -- sh -c 'echo "$KVD_WATCH_KEY changed"'`,
		Args: func(cmd *cobra.Command, args []string) error {
			args, command := splitCommand(cmd, args)
			if cmd.ArgsLenAtDash() >= 0 && len(command) == 0 {
				return fmt.Errorf("%s wants a command after --", cmd.CommandPath())
			}
			return arguments(1, 2, "a key and perhaps the end of a range")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			args, command := splitCommand(cmd, args)
			return o.run(cmd, client, args, command)
		},
	}
	o.AddFlags(cmd.Flags())
	if err := cmd.Flags().MarkHidden("progress"); err != nil {
		panic(err)
	}
	return cmd
}

// splitCommand separates the arguments before -- from the command after it.
func splitCommand(cmd *cobra.Command, args []string) (before, command []string) {
	if dash := cmd.ArgsLenAtDash(); dash >= 0 {
		return args[:dash], args[dash:]
	}
	return args, nil
}

func (o *watchOptions) run(cmd *cobra.Command, client *clientOptions, args, command []string) error {
	key, opts, err := keyRange("watch", args, o.prefix, o.fromKey)
	switch {
	case err != nil:
		return err
	case key == "":
		return usagef(`watch wants a key: the empty one is for --prefix and --from-key, and means all keys`)
	case o.rev < 0:
		return usagef("--rev must not be negative")
	}
	p := client.printer(cmd)
	if err := p.noTable(cmd); err != nil {
		return err
	}
	if o.prevKV {
		opts = append(opts, clientv3.WithPrevKV())
	}
	if o.progress {
		opts = append(opts, clientv3.WithProgressNotify())
	}
	c, err := client.connect(cmd.Context())
	if err != nil {
		return err
	}
	defer c.Close()
	f := &follower{cmd: cmd, printer: p, command: command, next: o.rev}
	return f.run(c, key, opts)
}

// follower prints what a watch sees, and runs the command for it.
type follower struct {
	cmd     *cobra.Command
	printer *printer
	command []string
	next    int64 // the first revision that it has not seen; 0 = that of the server's next change
}

// run follows until it is interrupted. A node that has no leader to follow ends its watches, so that nobody relies on
// them: it goes on from where it was, by way of another node if there is one.
func (f *follower) run(c *clientv3.Client, key string, opts []clientv3.OpOption) error {
	ctx := f.cmd.Context()
	for said := false; ; {
		err := f.follow(ctx, c.Watch(clientv3.WithRequireLeader(ctx), key, append(opts, clientv3.WithCreatedNotify(), clientv3.WithRev(f.next))...))
		switch {
		case ctx.Err() != nil:
			return errInterrupted
		case !errors.Is(err, rpctypes.ErrNoLeader):
			return err
		case !said:
			fmt.Fprintln(f.cmd.ErrOrStderr(), "The cluster has no leader: waiting for one.")
			said = true
		}
		select {
		case <-time.After(watchPause):
		case <-ctx.Done():
		}
	}
}

// follow returns why a watch has ended.
func (f *follower) follow(ctx context.Context, watch clientv3.WatchChan) error {
	for r := range watch {
		switch {
		case r.CompactRevision > 0:
			return fmt.Errorf("%w: what changed before revision %d is forgotten", r.Err(), r.CompactRevision)
		case r.Err() != nil:
			return r.Err()
		case r.Created:
			if f.next == 0 {
				f.next = r.Header.GetRevision() + 1
			}
			continue
		}
		if err := f.printer.watched(&r); err != nil {
			return err
		}
		for _, event := range r.Events {
			if err := f.execute(ctx, &r, event); err != nil {
				return err
			}
			f.next = event.GetKv().GetModRevision() + 1
		}
		if r.IsProgressNotify() {
			f.next = max(f.next, r.Header.GetRevision()+1)
		}
	}
	return errors.New("the server ended the watch")
}

func (f *follower) execute(ctx context.Context, r *clientv3.WatchResponse, event *clientv3.Event) error {
	if len(f.command) == 0 {
		return nil
	}
	run := newCommand(f.cmd, f.command, watchEnvironment(r.Header.GetRevision(), event))
	run.Stdin = bytes.NewReader(event.GetKv().GetValue())
	err := runCommand(ctx, run, nil)
	if failed, ok := errors.AsType[*commandError](err); ok {
		err = fmt.Errorf("exit code %d", failed.code) // of its own, kvd's is 1
	}
	if err != nil {
		return fmt.Errorf("%s failed at revision %d: %w", f.command[0], event.GetKv().GetModRevision(), err)
	}
	return ctx.Err()
}

// watchEnvironment tells a command of an event: as it is, and as etcdctl does.
func watchEnvironment(revision int64, event *clientv3.Event) (env []string) {
	kv := event.GetKv()
	add := func(name, value string) {
		if len(value) <= maxEnvironmentBytes && !strings.Contains(value, "\x00") {
			env = append(env, name+"="+value)
		}
	}
	add("KVD_WATCH_EVENT_TYPE", event.GetType().String())
	add("KVD_WATCH_KEY", string(kv.GetKey()))
	add("KVD_WATCH_VALUE", string(kv.GetValue()))
	if event.GetPrevKv() != nil {
		add("KVD_WATCH_PREV_VALUE", string(event.GetPrevKv().GetValue()))
	}
	add("KVD_WATCH_REVISION", fmt.Sprint(kv.GetModRevision()))
	add("ETCD_WATCH_REVISION", fmt.Sprint(revision))
	add("ETCD_WATCH_EVENT_TYPE", fmt.Sprintf("%q", event.GetType()))
	add("ETCD_WATCH_KEY", fmt.Sprintf("%q", kv.GetKey()))
	add("ETCD_WATCH_VALUE", fmt.Sprintf("%q", kv.GetValue()))
	return env
}

// watched prints what a watch sees at once.
func (p *printer) watched(r *clientv3.WatchResponse) error {
	if p.format == formatJSON {
		return p.json(r)
	}
	if r.IsProgressNotify() {
		fmt.Fprintf(p.out, "progress notify: %d\n", r.Header.GetRevision())
	}
	for _, event := range r.Events {
		fmt.Fprintln(p.out, event.GetType())
		if event.GetPrevKv() != nil {
			p.pairs(event.GetPrevKv())
		}
		p.pairs(event.GetKv())
	}
	return nil
}
