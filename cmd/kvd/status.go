package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func newStatusCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show all nodes: who leads, how far each one is, how it is",
		Long: `Show all nodes of the cluster that --endpoints belong to, and those of --endpoints that are not reached.
It asks every node for its own view and needs no quorum.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			nodes, _ := client.nodes(cmd.Context())
			if err := client.printer(cmd).status(nodes); err != nil {
				return err
			}
			return judge(nodes)
		},
	}
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
	Endpoint string             `json:"Endpoint"`
	Name     string             `json:"Name,omitempty"`
	Status   *pb.StatusResponse `json:"Status,omitempty"`
	Error    string             `json:"Error,omitempty"`
}

func (p *printer) status(nodes []nodeStatus) error {
	if p.format == formatJSON {
		list := make([]statusJSON, len(nodes))
		for i, n := range nodes {
			list[i] = statusJSON{Endpoint: n.endpoint, Name: n.name, Status: n.resp}
			if n.err != nil {
				list[i].Error = describe(nil, n.err)
			}
		}
		return p.json(list)
	}
	header := []string{"NODE", "ENDPOINT", "ID", "ROLE", "TERM", "REVISION", "INDEX", "APPLIED", "DB SIZE", "HEALTH"}
	var rows [][]string
	for _, n := range nodes {
		health, _ := n.health()
		row := []string{n.name, n.endpoint, "-", n.role(), "-", "-", "-", "-", "-", health}
		if n.name == "" {
			row[0] = "-"
		}
		if r := n.resp; r != nil {
			row[2] = fmt.Sprintf("%x", r.GetHeader().GetMemberId())
			for i, number := range []uint64{r.GetRaftTerm(), uint64(r.GetHeader().GetRevision()), r.GetRaftIndex(), r.GetRaftAppliedIndex()} {
				row[4+i] = fmt.Sprint(number)
			}
			row[8] = size(r.GetDbSize())
		}
		rows = append(rows, row)
	}
	if p.format == formatTable {
		p.table(header, rows)
	} else {
		p.columns(append([][]string{header}, rows...))
	}
	return nil
}
