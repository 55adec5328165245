package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// errLeaseEnded: a lease is not there any more, or could not be renewed while it was.
var errLeaseEnded = errors.New("the lease expired or was revoked")

func newLeaseCommand(client *clientOptions) *cobra.Command {
	return newParentCommand("lease", "Grant, renew and revoke leases: keys put with one go when it ends", newLeaseGrantCommand(client),
		newLeaseRevokeCommand(client), newLeaseKeepAliveCommand(client), newLeaseTimeToLiveCommand(client), newLeaseListCommand(client))
}

func newLeaseGrantCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "grant <ttl>",
		Short: "Make a lease that lasts <ttl> seconds after it was last renewed",
		Long: `Make a lease that lasts <ttl> seconds after it was last renewed, and print its id. The server may give it longer.
It ends no earlier than that, and after an election starts afresh.`,
		Example: `  kvd lease grant 60
  kvd put --lease 694d81d2ab3f5c07 services/web/1 10.0.0.7:80`,
		Args: arguments(1, 1, "a time to live in seconds"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ttl, err := strconv.ParseInt(args[0], 10, 64)
			if err != nil || ttl < 1 {
				return usagef("%q is not a time to live: want a number of seconds", args[0])
			}
			return leaseCall(cmd, client, func(ctx context.Context, c *clientv3.Client) (*clientv3.LeaseGrantResponse, error) {
				return c.Grant(ctx, ttl)
			}, func(p *printer, r *clientv3.LeaseGrantResponse) {
				fmt.Fprintf(p.out, "lease %016x granted with TTL(%ds)\n", r.ID, r.TTL)
			})
		},
	}
}

func newLeaseRevokeCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke <lease>",
		Short: "End a lease now, and delete its keys",
		Args:  arguments(1, 1, "a lease"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := leaseArgument(args)
			if err != nil {
				return err
			}
			return leaseCall(cmd, client, func(ctx context.Context, c *clientv3.Client) (*clientv3.LeaseRevokeResponse, error) {
				return c.Revoke(ctx, id)
			}, func(p *printer, _ *clientv3.LeaseRevokeResponse) { fmt.Fprintf(p.out, "lease %016x revoked\n", id) })
		},
	}
}

func newLeaseKeepAliveCommand(client *clientOptions) *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "keep-alive <lease>",
		Short: "Renew a lease again and again, until it is revoked or this command is interrupted",
		Args:  arguments(1, 1, "a lease"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := leaseArgument(args)
			if err != nil {
				return err
			}
			if !once {
				return keepAlive(cmd, client, id)
			}
			return leaseCall(cmd, client, func(ctx context.Context, c *clientv3.Client) (*clientv3.LeaseKeepAliveResponse, error) {
				return c.KeepAliveOnce(ctx, id)
			}, printRenewed)
		},
	}
	cmd.Flags().BoolVar(&once, "once", false, "renew it once")
	return cmd
}

func printRenewed(p *printer, r *clientv3.LeaseKeepAliveResponse) {
	fmt.Fprintf(p.out, "lease %016x keepalived with TTL(%d)\n", r.ID, r.TTL)
}

// keepAlive renews a lease for as long as it lasts, and through failures of the servers that are shorter.
func keepAlive(cmd *cobra.Command, client *clientOptions, id clientv3.LeaseID) error {
	p := client.printer(cmd)
	if err := p.noTable(cmd); err != nil {
		return err
	}
	c, err := client.connect(cmd.Context())
	if err != nil {
		return err
	}
	defer c.Close()
	steadyLeases(c, client.commandTimeout)
	renewed, err := c.KeepAlive(cmd.Context(), id)
	if err != nil {
		return err
	}
	for r := range renewed {
		if err := printLease(p, r, printRenewed); err != nil {
			return err
		}
	}
	if cmd.Context().Err() != nil {
		return errInterrupted
	}
	return fmt.Errorf("%w: %016x", errLeaseEnded, id)
}

func newLeaseTimeToLiveCommand(client *clientOptions) *cobra.Command {
	var keys bool
	cmd := &cobra.Command{
		Use:   "timetolive <lease>",
		Short: "Show how long a lease lasts, and how much of that is left",
		Args:  arguments(1, 1, "a lease"),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := leaseArgument(args)
			if err != nil {
				return err
			}
			var opts []clientv3.LeaseOption
			if keys {
				opts = append(opts, clientv3.WithAttachedKeys())
			}
			return leaseCall(cmd, client, func(ctx context.Context, c *clientv3.Client) (*clientv3.LeaseTimeToLiveResponse, error) {
				return c.TimeToLive(ctx, id, opts...)
			}, func(p *printer, r *clientv3.LeaseTimeToLiveResponse) { p.timeToLive(r, keys) })
		},
	}
	cmd.Flags().BoolVar(&keys, "keys", false, "show its keys, too")
	return cmd
}

func newLeaseListCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the ids of all leases",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return leaseCall(cmd, client, func(ctx context.Context, c *clientv3.Client) (*clientv3.LeaseLeasesResponse, error) {
				return c.Leases(ctx)
			}, func(p *printer, r *clientv3.LeaseLeasesResponse) {
				fmt.Fprintf(p.out, "found %d leases\n", len(r.Leases))
				for _, lease := range r.Leases {
					fmt.Fprintf(p.out, "%016x\n", lease.ID)
				}
			})
		},
	}
}

// leaseCall makes one request, and prints its answer.
func leaseCall[R any](cmd *cobra.Command, client *clientOptions, request func(context.Context, *clientv3.Client) (R, error), simple func(*printer, R)) error {
	p := client.printer(cmd)
	if err := p.noTable(cmd); err != nil {
		return err
	}
	var resp R
	err := client.call(cmd.Context(), func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = request(ctx, c)
		return err
	})
	if err != nil {
		return err
	}
	return printLease(p, resp, simple)
}

func printLease[R any](p *printer, resp R, simple func(*printer, R)) error {
	if p.format == formatJSON {
		return p.json(resp)
	}
	simple(p, resp)
	return nil
}

func (p *printer) timeToLive(r *clientv3.LeaseTimeToLiveResponse, withKeys bool) {
	if r.GrantedTTL == 0 && r.TTL == -1 {
		fmt.Fprintf(p.out, "lease %016x already expired\n", r.ID)
		return
	}
	fmt.Fprintf(p.out, "lease %016x granted with TTL(%ds), remaining(%ds)", r.ID, r.GrantedTTL, r.TTL)
	if withKeys {
		keys := make([]string, len(r.Keys))
		for i, key := range r.Keys {
			keys[i] = p.bytes(key)
		}
		fmt.Fprintf(p.out, ", attached keys(%v)", keys)
	}
	fmt.Fprintln(p.out)
}

// leaseArgument is the lease that a command is about.
func leaseArgument(args []string) (clientv3.LeaseID, error) {
	id, err := parseLease(args[0])
	if err != nil {
		return 0, &usageError{err}
	}
	return id, nil
}
