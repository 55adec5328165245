package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/placement"
	"kvd/server/kvdpb"
)

func newStatusCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show all nodes: who leads, how far each one is, how it is",
		Long: `Show all nodes of the cluster that --endpoints belong to, and those of --endpoints that are not reached.
It asks every node for its own view and needs no quorum.

With --strategy consistent, ROLE is the node's in group 0, which keeps the cluster map; its leader says how the nodes
are (STATE: alive, suspect, down or leaving), how many shards each one holds (SHARDS) and leads (LEADS).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			nodes, _ := client.nodes(cmd.Context())
			sharded := client.sharded(cmd.Context(), nodes)
			if err := client.printer(cmd).status(nodes, sharded); err != nil {
				return err
			}
			return cmp.Or(judge(nodes), sharded.judge())
		},
	}
}

// shardedStatus is what there is to know of a cluster with shards.
type shardedStatus struct {
	view placement.Overview
	err  error // why nothing is known
}

// overviewPatience is how long status waits for a leader of group 0: nodes are shown without one, too.
const overviewPatience = 2 * time.Second

// sharded asks the nodes that answer for the shards; nil if the cluster has none, or no node can tell.
func (o *clientOptions) sharded(ctx context.Context, nodes []nodeStatus) *shardedStatus {
	client := *o
	client.endpoints = nil
	for _, n := range nodes {
		if n.err == nil {
			client.endpoints = append(client.endpoints, n.endpoint)
		}
	}
	if len(client.endpoints) == 0 {
		return nil
	}
	var s shardedStatus
	has := false
	err := client.admin(ctx, func(ctx context.Context, c kvdpb.AdminClient) error {
		at, err := c.Locate(ctx, &kvdpb.LocateRequest{})
		if err != nil || at.GetGroup() == 0 { // a server without shards need not know the question
			return err
		}
		has = true
		ctx, cancel := context.WithTimeout(ctx, overviewPatience)
		defer cancel()
		s.view, s.err = askOverview(ctx, c)
		return nil
	})
	if err != nil || !has {
		return nil
	}
	return &s
}

// judge is an errUnhealthy if a shard does not serve.
func (s *shardedStatus) judge() error {
	if s == nil || s.err != nil {
		return nil // without a leader of group 0 every node is unhealthy already
	}
	var bad []string
	for _, shard := range s.view.Shards {
		if shard.State == stateNoLeader || shard.State == stateNoQuorum {
			bad = append(bad, fmt.Sprint(shard.Number))
		}
	}
	if len(bad) == 0 {
		return nil
	}
	const most = 5
	named := strings.Join(bad[:min(most, len(bad))], ", ")
	if len(bad) > most {
		named += ", ..."
	}
	return fmt.Errorf("%w: %d of %d shards (%s) do not serve: kvd explain %s says why", errUnhealthy, len(bad), len(s.view.Shards), named, bad[0])
}

// node is what is known of a node; a zero one if nothing is.
func (s *shardedStatus) node(name string) placement.NodeOverview {
	for _, n := range s.view.Nodes {
		if n.Name == name {
			return n
		}
	}
	return placement.NodeOverview{}
}

// lines say how the shards are and what nodes that leave wait for.
func (s *shardedStatus) lines() (lines []string) {
	if s.err != nil {
		return []string{"where the shards are is not known now: " + describe(nil, s.err)}
	}
	if s.view.Config != nil {
		lines = append(lines, summary(s.view)+".")
	}
	for _, n := range s.view.Nodes {
		if n.Waits != "" {
			lines = append(lines, n.Waits+".")
		}
	}
	return lines
}

// health says in a word or a sentence how a node is; ok is true if it serves.
func (n nodeStatus) health() (text string, ok bool) {
	switch {
	case n.err != nil:
		return describe(nil, n.err), false
	case len(n.resp.GetErrors()) > 0:
		return strings.Join(n.resp.GetErrors(), ", "), false
	case n.resp.GetLeader() == 0:
		return "no leader", false
	}
	return "ok", true
}

func (n nodeStatus) role() string {
	switch {
	case n.resp == nil:
		return "-"
	case n.leads():
		return "leader"
	case n.resp.GetIsLearner():
		return "learner"
	}
	return "follower"
}

// judge is an errUnhealthy if a node does not serve, and an errUnreachable if none does.
func judge(nodes []nodeStatus) error {
	var bad []string
	silent := 0
	for _, n := range nodes {
		if _, ok := n.health(); ok {
			continue
		}
		bad = append(bad, strings.TrimSpace(n.name+" "+n.endpoint))
		if n.resp == nil {
			silent++
		}
	}
	switch {
	case len(nodes) == silent:
		return unreachable(bad)
	case len(bad) > 0:
		return fmt.Errorf("%w: %d of %d nodes (%s): if they run, their logs say why", errUnhealthy, len(bad), len(nodes), strings.Join(bad, ", "))
	}
	return nil
}

type statusJSON struct {
	Endpoint string                  `json:"Endpoint"`
	Name     string                  `json:"Name,omitempty"`
	Status   *pb.StatusResponse      `json:"Status,omitempty"`
	Node     *placement.NodeOverview `json:"Node,omitempty"` // with shards only
	Error    string                  `json:"Error,omitempty"`
}

// status prints the nodes; sharded is nil if the cluster has no shards.
func (p *printer) status(nodes []nodeStatus, sharded *shardedStatus) error {
	switch {
	case p.format == formatJSON:
		return p.json(statusList(nodes, sharded))
	case sharded != nil:
		p.shardedStatus(nodes, sharded)
		return nil
	}
	var rows [][]string
	for _, n := range nodes {
		health, _ := n.health()
		row := []string{orDash(n.name), n.endpoint, "-", n.role(), "-", "-", "-", "-", "-", health}
		if r := n.resp; r != nil {
			row[2] = fmt.Sprintf("%x", r.GetHeader().GetMemberId())
			for i, number := range []uint64{r.GetRaftTerm(), uint64(r.GetHeader().GetRevision()), r.GetRaftIndex(), r.GetRaftAppliedIndex()} {
				row[4+i] = fmt.Sprint(number)
			}
			row[8] = size(r.GetDbSize())
		}
		rows = append(rows, row)
	}
	p.grid([]string{"NODE", "ENDPOINT", "ID", "ROLE", "TERM", "REVISION", "INDEX", "APPLIED", "DB SIZE", "HEALTH"}, rows)
	return nil
}

func statusList(nodes []nodeStatus, sharded *shardedStatus) []statusJSON {
	list := make([]statusJSON, len(nodes))
	for i, n := range nodes {
		list[i] = statusJSON{Endpoint: n.endpoint, Name: n.name, Status: n.resp}
		if n.err != nil {
			list[i].Error = describe(nil, n.err)
		}
		if sharded != nil {
			if known := sharded.node(n.name); known.Name != "" {
				list[i].Node = &known
			}
		}
	}
	return list
}

func (p *printer) shardedStatus(nodes []nodeStatus, sharded *shardedStatus) {
	var rows [][]string
	for _, n := range nodes {
		health, _ := n.health()
		row := []string{orDash(n.name), n.endpoint, n.role(), "-", "-", "-", "-", "-", "-", "-", health}
		if known := sharded.node(n.name); known.Name != "" {
			copy(row[3:], []string{known.State, fmt.Sprint(known.Shards), fmt.Sprint(known.Leaders), fmt.Sprint(known.Weight)})
			if known.DiskFree > 0 {
				row[9] = size(int64(known.DiskFree))
			}
		}
		if r := n.resp; r != nil {
			row[7], row[8] = fmt.Sprint(r.GetHeader().GetRevision()), size(r.GetDbSize())
		}
		rows = append(rows, row)
	}
	p.grid([]string{"NODE", "ENDPOINT", "ROLE", "STATE", "SHARDS", "LEADS", "WEIGHT", "REVISION", "DB SIZE", "DISK FREE", "HEALTH"}, rows)
	fmt.Fprintln(p.out)
	for _, line := range sharded.lines() {
		fmt.Fprintln(p.out, line)
	}
}
