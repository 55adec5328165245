package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func newMoveLeaderCommand(client *clientOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "move-leader <node>",
		Short: "Hand the leadership to another node",
		Long:  `Hand the leadership to another node, given by its name or its member id (hexadecimal), as kvd status shows them.`,
		Args:  arguments(1, 1, "the name or the id of the next leader"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := client.printer(cmd)
			if err := p.noTable(cmd); err != nil {
				return err
			}
			nodes, members := client.nodes(cmd.Context())
			if members == nil {
				return judge(nodes)
			}
			target, err := memberID(members, args[0])
			if err != nil {
				return err
			}
			leader, err := theLeader(nodes)
			if err != nil {
				return err
			}
			resp, err := client.moveLeader(cmd.Context(), leader.endpoint, target)
			switch {
			case err != nil:
				return err
			case p.format == formatJSON:
				return p.json(resp)
			}
			fmt.Fprintf(p.out, "Leadership transferred from %x to %x\n", leader.resp.GetLeader(), target)
			return nil
		},
	}
}

func (o *clientOptions) moveLeader(ctx context.Context, leader string, target uint64) (*clientv3.MoveLeaderResponse, error) {
	c, err := o.connect(ctx, leader)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, o.commandTimeout)
	defer cancel()
	return c.MoveLeader(ctx, target)
}

// memberID finds a member by its name or by its id in hexadecimal.
func memberID(members []*pb.Member, nameOrID string) (uint64, error) {
	var known []string
	for _, m := range members {
		if m.GetName() == nameOrID || fmt.Sprintf("%x", m.GetID()) == nameOrID {
			return m.GetID(), nil
		}
		known = append(known, fmt.Sprintf("%s (%x)", m.GetName(), m.GetID()))
	}
	return 0, usagef("%q is no member: the members are %s", nameOrID, strings.Join(known, ", "))
}

// theLeader is the leader of the highest term among nodes.
func theLeader(nodes []nodeStatus) (leader nodeStatus, err error) {
	for _, n := range nodes {
		if n.leads() && n.resp.GetRaftTerm() >= leader.resp.GetRaftTerm() {
			leader = n
		}
	}
	if leader.resp == nil {
		return leader, fmt.Errorf("%w: no node that can be reached is the leader: kvd status shows them", errUnhealthy)
	}
	return leader, nil
}
