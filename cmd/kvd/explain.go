package main

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"kvd/placement"
)

func newExplainCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "explain <shard>",
		Short: "Say why a shard is where it is, what it waits for and what to do",
		Long: `Say why a shard is where it is, what it waits for and what to do about it.

Each line is a replica: a copy of the shard's data or a witness on a node. BEHIND is how many log entries it lacks, as
far as the leader has measured; WANTED says whether the ring places one there now. A line without a replica is one that
is wanted and has not been made yet.`,
		Example: `  kvd explain 17
  kvd explain $(kvd locate my-key -w json | jq .shard)`,
		Args: arguments(1, 1, "the number of a shard"),
		RunE: func(cmd *cobra.Command, args []string) error {
			number, err := strconv.ParseInt(args[0], 10, 32)
			if err != nil || number < 0 {
				return usagef("%q is not the number of a shard: kvd shards lists them, kvd locate finds the shard of a key", args[0])
			}
			view, err := client.overview(cmd.Context(), int32(number))
			if err != nil {
				return err
			}
			if len(view.Shards) != 1 || view.Config == nil {
				return fmt.Errorf("the server told about %d shards instead of one", len(view.Shards))
			}
			return client.printer(cmd).explain(view.Shards[0], *view.Config)
		},
	}
}

func (p *printer) explain(s placement.ShardOverview, config placement.ClusterConfig) error {
	if p.format == formatJSON {
		return p.json(s)
	}
	fmt.Fprintf(p.out, "shard %d of %d (group %d): %s", s.Number, config.Shards, placement.GroupOf(s.Number), s.State)
	if survives(s) != "-" {
		fmt.Fprintf(p.out, ", survives %s", plural(s.Tolerates, "more node failure"))
	}
	fmt.Fprint(p.out, "\n\n")
	p.grid([]string{"NODE", "REPLICA", "ROLE", "STATE", "ALIVE", "BEHIND", "WANTED"}, replicaRows(s))
	if len(s.Why) > 0 {
		fmt.Fprintln(p.out)
	}
	for _, sentence := range s.Why {
		fmt.Fprintln(p.out, "-", sentence)
	}
	return nil
}

// replicaRows has a row of each replica, and of each that is only wanted.
func replicaRows(s placement.ShardOverview) (rows [][]string) {
	for _, r := range s.Replicas {
		state, lacks := r.State, "-"
		if state == replicaVoter && r.Node == s.Leader && r.Role == placement.Data {
			state = "leader"
		}
		if entries, known := behind(r); known {
			lacks = fmt.Sprint(entries)
		}
		wanted := r.State != replicaLost && slices.Contains(s.Target, placement.TargetReplica{Node: r.Node, Role: r.Role})
		rows = append(rows, []string{r.Node, string(r.ID), string(r.Role), state, yesNo(r.Alive), lacks, yesNo(wanted)})
	}
	for _, t := range unmade(s) {
		rows = append(rows, []string{t.Node, "-", string(t.Role), "-", "-", "-", "yes"})
	}
	return rows
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
