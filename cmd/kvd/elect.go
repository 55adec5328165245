package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func newElectCommand(client *clientOptions) *cobra.Command {
	var o holdOptions
	var listen bool
	cmd := &cobra.Command{
		Use:   "elect <name> (<value> [-- <command> [<argument>...]] | --listen)",
		Short: "Wait to be elected, and lead while a command runs; or show who leads",
		Long: `Wait to be elected in the election called <name>, with a <value> for all to see, such as an address; lead while a
command runs, and end with its exit code; without a command, print the key and the value, and lead until a signal comes.
With --listen, print the leader's key and value, and again whenever they change.

It is a lock (see kvd lock --help) with a value. The command has
  KVD_ELECT_KEY   the leader's key, which exists as long as this process leads
  KVD_ELECT_REV   the revision that created it: later leaders have greater ones`,
		Example: `  kvd elect scheduler "$HOSTNAME" -- ./scheduler
  kvd elect scheduler --listen`,
		Args: atLeast(1, "the election's name, and a value or --listen"),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case listen && len(args) > 1:
				return usagef("kvd elect --listen takes the election's name only")
			case listen:
				return observe(cmd, client, args[0])
			case len(args) == 1:
				return usagef("kvd elect wants a value to be elected with, or --listen")
			}
			h := &holder{cmd: cmd, client: client, ttl: o.ttl, what: "the leadership", name: args[0], value: args[1], command: args[2:]}
			h.environment = h.electEnvironment
			return h.run()
		},
	}
	o.AddFlags(cmd.Flags())
	cmd.Flags().BoolVarP(&listen, "listen", "l", false, "show who leads")
	return cmd
}

func (h *holder) electEnvironment() []string {
	return []string{"KVD_ELECT_KEY=" + h.election.Key(), fmt.Sprintf("KVD_ELECT_REV=%d", h.election.Rev())}
}

// observe prints who leads, until it is interrupted. It goes on through failures of servers.
func observe(cmd *cobra.Command, client *clientOptions, name string) error {
	ctx := cmd.Context()
	p := client.printer(cmd)
	c, err := client.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	session, err := concurrency.NewSession(c, concurrency.WithLease(noLease))
	if err != nil {
		return err
	}
	session.Orphan()
	e := concurrency.NewElection(session, name)
	for seen := (leader{}); ; {
		for resp := range e.Observe(ctx) {
			if now := leaderOf(resp); now != seen {
				seen = now
				if err := p.get((*pb.RangeResponse)(resp), false); err != nil {
					return err
				}
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		// It does not say why it ended.
		if err := reachable(ctx, client, e); err != nil && !isUnavailable(err) {
			return err
		}
		select {
		case <-time.After(watchPause):
		case <-ctx.Done():
		}
	}
}

// noLease is for sessions that only read; there is no lease of that id.
const noLease clientv3.LeaseID = -1

// leader is a proclamation.
type leader struct {
	key      string
	revision int64
}

func leaderOf(resp *clientv3.GetResponse) leader {
	kv := resp.Kvs[0]
	return leader{string(kv.GetKey()), kv.GetModRevision()}
}

// reachable asks who leads, and does not mind if nobody does.
func reachable(ctx context.Context, client *clientOptions, e *concurrency.Election) error {
	ctx, cancel := context.WithTimeout(ctx, client.commandTimeout)
	defer cancel()
	if _, err := e.Leader(ctx); !errors.Is(err, concurrency.ErrElectionNoLeader) {
		return err
	}
	return nil
}
