package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func newCompactionCommand(client *clientOptions) *cobra.Command {
	var physical bool
	cmd := &cobra.Command{
		Use:     "compact <revision>",
		Aliases: []string{"compaction"}, // etcdctl's name
		Short:   "Forget the history before a revision",
		Long: `Forget what keys held before a revision: reads at an older revision are refused from then on.
What every key holds now stays, of course.`,
		Args: arguments(1, 1, "a revision"),
		RunE: func(cmd *cobra.Command, args []string) error {
			revision, err := strconv.ParseInt(args[0], 10, 64)
			if err != nil || revision < 0 {
				return usagef("%q is not a revision: want a number such as the one kvd status shows", args[0])
			}
			p := client.printer(cmd)
			if err := p.noTable(cmd); err != nil {
				return err
			}
			var opts []clientv3.CompactOption
			if physical {
				opts = append(opts, clientv3.WithCompactPhysical())
			}
			var resp *clientv3.CompactResponse
			err = client.call(cmd.Context(), func(ctx context.Context, c *clientv3.Client) (err error) {
				resp, err = c.Compact(ctx, revision, opts...)
				return err
			})
			switch {
			case err != nil:
				return err
			case p.format == formatJSON:
				return p.json(resp)
			}
			fmt.Fprintln(p.out, "compacted revision", revision)
			return nil
		},
	}
	cmd.Flags().BoolVar(&physical, "physical", false, "wait until the old revisions are gone from the disk, too")
	return cmd
}
