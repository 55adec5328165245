package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kvd/placement"
)

// States of nodes, shards and replicas in an overview.
const (
	nodeLeaving = "leaving"

	stateOK       = "ok"
	stateNoLeader = "no leader"
	stateNoQuorum = "no quorum"

	replicaCreating = "creating"
	replicaLearner  = "learner"
	replicaVoter    = "voter"
	replicaRemoving = "removing"
	replicaLost     = "lost"
	replicaUnknown  = "unknown"
)

// noShards is what there is to say about the shards of a cluster that has none.
const noShards = "strategy full: there are no shards, every node holds every key (kvd status shows the nodes)"

func newShardsCommand(client *clientOptions) *cobra.Command {
	var notOK bool
	cmd := &cobra.Command{
		Use:   "shards",
		Short: "Show where all shards are and how they are (strategy consistent)",
		Long: `Show all shards: which nodes hold the data, which ones only vote (witnesses), and how many more nodes may fail
before a shard stops (SURVIVES). States of a shard:
  ok         everything is where it is wanted
  moving     a copy is on its way to another node; the shard serves meanwhile
  degraded   fewer live copies or witnesses than wanted
  no leader  an election is under way, or no node that could lead is reached
  no quorum  too many of its nodes are down: it stands still until they are back
What is said of a node: wanted (it is to get a copy), joining (its copy catches up and has no vote yet; it lacks as many
log entries as it is behind), leaving (its copy is to go), down, lost (its copy will not come back).

kvd locate KEY finds the shard of a key, kvd explain SHARD says why a shard is where it is.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			view, err := client.overview(cmd.Context())
			if err != nil {
				return err
			}
			return client.printer(cmd).shards(view, notOK)
		},
	}
	cmd.Flags().BoolVar(&notOK, "not-ok", false, "show only the shards that are not ok")
	return cmd
}

// shards prints all shards, or those that are not ok.
func (p *printer) shards(view placement.Overview, notOK bool) error {
	if view.Config == nil && p.format != formatJSON {
		fmt.Fprintln(p.out, noShards)
		return nil
	}
	whole := view
	if notOK {
		view.Shards = slices.DeleteFunc(slices.Clone(view.Shards), func(s placement.ShardOverview) bool { return s.State == stateOK })
	}
	if p.format == formatJSON {
		return p.json(view)
	}
	header := []string{"SHARD", "STATE", "LEADER", "DATA", "WITNESSES", "SURVIVES"}
	var rows [][]string
	for _, s := range view.Shards {
		rows = append(rows, []string{fmt.Sprint(s.Number), s.State, orDash(s.Leader), holders(s, placement.Data),
			holders(s, placement.Witness), survives(s)})
	}
	if p.format == formatTable {
		p.table(header, rows)
		return nil
	}
	if len(rows) > 0 {
		p.columns(append([][]string{header}, rows...))
		fmt.Fprintln(p.out)
	}
	fmt.Fprintln(p.out, summary(whole))
	return nil
}

// grid writes rows under a header: framed as a table, else aligned.
func (p *printer) grid(header []string, rows [][]string) {
	if p.format == formatTable {
		p.table(header, rows)
	} else {
		p.columns(append([][]string{header}, rows...))
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// survives is how many more node failures a shard survives; unknown without a leader.
func survives(s placement.ShardOverview) string {
	if s.State == stateNoLeader || s.State == stateNoQuorum {
		return "-"
	}
	return fmt.Sprint(s.Tolerates)
}

// holders names the nodes that have replicas of a role or are to get one, and says what is unusual about each.
func holders(s placement.ShardOverview, role placement.Role) string {
	var list []string
	for _, r := range s.Replicas {
		if r.Role != role {
			continue
		}
		if marks := unusual(r); len(marks) > 0 {
			list = append(list, r.Node+"("+strings.Join(marks, ",")+")")
		} else {
			list = append(list, r.Node)
		}
	}
	for _, t := range unmade(s) {
		if t.Role == role {
			list = append(list, t.Node+"(wanted)")
		}
	}
	return orDash(strings.Join(list, " "))
}

// unusual says what a replica is besides a live voter.
func unusual(r placement.ReplicaOverview) (marks []string) {
	switch r.State {
	case replicaVoter, replicaUnknown:
	case replicaCreating:
		return []string{"joining"}
	case replicaLearner:
		marks = []string{"joining"}
		if behind, known := behind(r); known && behind > 0 {
			marks = append(marks, fmt.Sprint(behind, " behind"))
		}
	case replicaRemoving:
		marks = []string{"leaving"}
	default:
		return []string{r.State}
	}
	if !r.Alive {
		marks = append(marks, "down")
	}
	return marks
}

// behind is how many log entries a replica lacks.
func behind(r placement.ReplicaOverview) (entries uint64, known bool) {
	return r.Commit - min(r.Match, r.Commit), r.Match > 0 && r.Commit > 0
}

// unmade are the replicas that are wanted and have not been made yet.
func unmade(s placement.ShardOverview) (missing []placement.TargetReplica) {
	for _, t := range s.Target {
		if !slices.ContainsFunc(s.Replicas, func(r placement.ReplicaOverview) bool {
			return r.Node == t.Node && r.Role == t.Role && r.State != replicaLost
		}) {
			missing = append(missing, t)
		}
	}
	return missing
}

// summary says in a line how the shards of a view are.
func summary(view placement.Overview) string {
	if len(view.Shards) == 0 {
		return "the shards have not been made yet"
	}
	count := make(map[string]int)
	var states []string
	least := -1
	for _, s := range view.Shards {
		if count[s.State]++; count[s.State] == 1 {
			states = append(states, s.State)
		}
		if survives(s) != "-" && (least < 0 || s.Tolerates < least) {
			least = s.Tolerates
		}
	}
	slices.SortFunc(states, func(a, b string) int { return count[b] - count[a] })
	for i, state := range states {
		states[i] = fmt.Sprint(count[state], " ", state)
	}
	text := fmt.Sprintf("%s with %s: %s", plural(len(view.Shards), "shard"), copies(view), strings.Join(states, ", "))
	if stopped := count[stateNoLeader] + count[stateNoQuorum]; stopped > 0 {
		return text + ". Keys of " + plural(stopped, "shard") + " cannot be read or written now"
	}
	if least == 0 {
		return text + ". One more node failure stops some of them"
	}
	return text + ". Each survives " + plural(least, "more node failure")
}

// copies says how many of each key there are at rest.
func copies(view placement.Overview) string {
	stay := 0
	for _, n := range view.Nodes {
		stay += b2i(n.State != nodeLeaving)
	}
	text, wanted := "", view.Config.ReplicationFactor
	if stay < wanted {
		text = fmt.Sprintf(" (%d are wanted: add nodes)", wanted)
	}
	if min(stay, wanted) == 1 {
		return "one copy of each key" + text
	}
	return fmt.Sprintf("%d copies of each key%s", min(stay, wanted), text)
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
