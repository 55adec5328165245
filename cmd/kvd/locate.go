package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"kvd/placement"
	"kvd/server/kvdpb"
)

func newLocateCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "locate <key>",
		Short: "Find the shard of a key and the nodes that have it (strategy consistent)",
		Long: `Find the shard that a key belongs to, whether the key exists or not, and the nodes that have it.

The shard follows from the part of the key inside its first {...}, or from the whole key: {user42}/cart and
{user42}/name are in one shard, so that one transaction can change both.`,
		Args: arguments(1, 1, "a key"),
		RunE: func(cmd *cobra.Command, args []string) error {
			at := location{Key: []byte(args[0])}
			err := client.admin(cmd.Context(), func(ctx context.Context, c kvdpb.AdminClient) error {
				place, err := c.Locate(ctx, &kvdpb.LocateRequest{Key: at.Key})
				if err != nil || place.GetGroup() == 0 {
					return err
				}
				at.Tag, at.Shard, at.Group = place.GetTag(), int(place.GetShard()), place.GetGroup()
				view, err := askOverview(ctx, c, place.GetShard())
				if err != nil {
					return fmt.Errorf("the key is in shard %d, but where that is is not known now: %w", at.Shard, err)
				}
				if len(view.Shards) == 1 && view.Config != nil {
					at.Place, at.shards = &view.Shards[0], view.Config.Shards
				}
				return nil
			})
			if err != nil {
				return err
			}
			return client.printer(cmd).location(at)
		},
	}
}

// location is where a key is. Group 0 has all keys of a cluster without shards.
type location struct {
	Key   []byte                   `json:"key"`
	Tag   []byte                   `json:"tag"`
	Shard int                      `json:"shard"`
	Group uint64                   `json:"group"`
	Place *placement.ShardOverview `json:"place,omitempty"`

	shards int // of the cluster
}

func (p *printer) location(at location) error {
	if p.format == formatJSON {
		return p.json(at)
	}
	if at.Group == 0 || at.Place == nil {
		fmt.Fprintln(p.out, noShards)
		return nil
	}
	tag := p.bytes(at.Tag)
	if string(at.Tag) == string(at.Key) {
		tag = "the whole key"
	}
	rows := [][]string{
		{"key", p.bytes(at.Key)},
		{"hashed by", tag},
		{"shard", fmt.Sprintf("%d of %d (group %d)", at.Shard, at.shards, at.Group)},
		{"state", at.Place.State},
		{"leader", orDash(at.Place.Leader)},
		{"data", holders(*at.Place, placement.Data)},
		{"witnesses", holders(*at.Place, placement.Witness)},
	}
	if p.format == formatTable {
		p.table([]string{"", ""}, rows)
	} else {
		p.columns(rows)
	}
	return nil
}
