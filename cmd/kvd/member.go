package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func newMemberCommand(client *clientOptions) *cobra.Command {
	return newParentCommand("member", "Show and change the cluster's members", newMemberListCommand(client),
		newMemberRemoveCommand(client), newMemberReplaceCommand(client))
}

func newMemberListCommand(client *clientOptions) *cobra.Command {
	var consistency string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the cluster's members",
		Long: `List the cluster's members. The columns of simple output are
id, status, name, peer URLs, client URLs, is learner`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var opts []clientv3.OpOption
			switch consistency {
			case "l":
			case "s":
				opts = append(opts, clientv3.WithSerializable())
			default:
				return usagef("--consistency: %q is neither l (linearizable) nor s (serializable)", consistency)
			}
			var resp *clientv3.MemberListResponse
			err := client.call(cmd.Context(), func(ctx context.Context, c *clientv3.Client) (err error) {
				resp, err = c.MemberList(ctx, opts...)
				return err
			})
			if err != nil {
				return err
			}
			return client.printer(cmd).members(resp)
		},
	}
	cmd.Flags().StringVar(&consistency, "consistency", "l", "l: linearizable; s: serializable, what one node knows")
	return cmd
}

func (p *printer) members(r *clientv3.MemberListResponse) error {
	if p.format == formatJSON && !p.hex {
		return p.json(r)
	}
	if p.format == formatJSON {
		return p.json(newMembersHexJSON(r))
	}
	var rows [][]string
	for _, m := range r.Members {
		status := "started"
		if m.GetName() == "" {
			status = "unstarted"
		}
		rows = append(rows, []string{fmt.Sprintf("%x", m.GetID()), status, m.GetName(), strings.Join(m.GetPeerURLs(), ","),
			strings.Join(m.GetClientURLs(), ","), fmt.Sprint(m.GetIsLearner())})
	}
	if p.format == formatTable {
		p.table([]string{"ID", "STATUS", "NAME", "PEER ADDRS", "CLIENT ADDRS", "IS LEARNER"}, rows)
		return nil
	}
	for _, row := range rows {
		fmt.Fprintln(p.out, strings.Join(row, ", "))
	}
	return nil
}

// membersHexJSON is a member list whose ids are hexadecimal, as etcdctl writes it with --hex.
type membersHexJSON struct {
	Header  headerHexJSON   `json:"header"`
	Members []memberHexJSON `json:"members"`
}

type headerHexJSON struct {
	ClusterID string `json:"cluster_id"`
	MemberID  string `json:"member_id"`
	Revision  int64  `json:"revision,omitempty"`
	RaftTerm  uint64 `json:"raft_term,omitempty"`
}

type memberHexJSON struct {
	ID         string   `json:"ID"`
	Name       string   `json:"name,omitempty"`
	PeerURLs   []string `json:"peerURLs,omitempty"`
	ClientURLs []string `json:"clientURLs,omitempty"`
	IsLearner  bool     `json:"isLearner,omitempty"`
}

func newMembersHexJSON(r *clientv3.MemberListResponse) membersHexJSON {
	h := r.Header
	list := membersHexJSON{Header: headerHexJSON{
		fmt.Sprintf("%x", h.GetClusterId()), fmt.Sprintf("%x", h.GetMemberId()), h.GetRevision(), h.GetRaftTerm(),
	}}
	for _, m := range r.Members {
		list.Members = append(list.Members, memberHexJSON{
			fmt.Sprintf("%x", m.GetID()), m.GetName(), m.GetPeerURLs(), m.GetClientURLs(), m.GetIsLearner(),
		})
	}
	return list
}
