package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/status"

	"kvd/placement"
	"kvd/server/kvdpb"
)

// How often a node that leaves is looked at, and at most talked about.
const (
	leavePoll = 200 * time.Millisecond
	leaveSay  = time.Second
)

func newMemberRemoveCommand(client *clientOptions) *cobra.Command {
	var force, noWait bool
	cmd := &cobra.Command{
		Use:   "remove <node>",
		Short: "Take a node out of the cluster, after what it holds has been copied to others",
		Long: `Take a node out of the cluster, given by its name or its member id, alive or dead. Its copies are made on other
nodes first, so that nothing is ever less safe than it was; the command says what it waits for. Ctrl-C ends the waiting,
not the leaving; the same command waits again.

It is refused while the nodes that are left are fewer than the replication factor, or too few to go on at all. --force
lifts the first of these.

When the node has left, its process ends by itself. To come back, it joins as a new node, with an empty directory and
--join.`,
		Args: arguments(1, 1, "the name or the id of a node"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return client.takeOut(cmd, args[0], noWait, func(ctx context.Context, c kvdpb.AdminClient, name string, _ []*pb.Member) error {
				_, err := c.RemoveMember(ctx, &kvdpb.RemoveMemberRequest{Name: name, Force: force})
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also if fewer nodes are left than the replication factor")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "only begin; kvd status shows the rest")
	return cmd
}

func newMemberReplaceCommand(client *clientOptions) *cobra.Command {
	var noWait bool
	cmd := &cobra.Command{
		Use:   "replace <old> <new>",
		Short: "Move all that one node holds to another one, and take it out",
		Long: `Move all that a node holds to another node of the cluster, and take the old one out, dead or alive. Start the new one
with --join first. Ctrl-C ends the waiting, not the replacing.`,
		Example: `  kvd start --name n4 --join 10.0.0.1:2380 ...    # on the new machine
  kvd member replace n3 n4`,
		Args: arguments(2, 2, "the node to take out and the one that takes its place"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return client.takeOut(cmd, args[0], noWait, func(ctx context.Context, c kvdpb.AdminClient, name string, members []*pb.Member) error {
				next, err := memberName(members, args[1])
				if err != nil {
					return err
				}
				_, err = c.ReplaceMember(ctx, &kvdpb.ReplaceMemberRequest{Old: name, New: next})
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "only begin; kvd status shows the rest")
	return cmd
}

// takeOut begins to take a node out with begin, and waits until it has left.
func (o *clientOptions) takeOut(cmd *cobra.Command, node string, noWait bool, begin func(context.Context, kvdpb.AdminClient, string, []*pb.Member) error) error {
	p, ctx := o.printer(cmd), cmd.Context()
	if err := p.noTable(cmd); err != nil {
		return err
	}
	members, err := o.members(ctx)
	if err != nil {
		return err
	}
	name, err := memberName(members, node)
	if err != nil {
		return err
	}
	err = o.admin(ctx, func(ctx context.Context, c kvdpb.AdminClient) error { return begin(ctx, c, name, members) })
	if err != nil {
		return err
	}
	if noWait {
		return p.left(name, "leaving", fmt.Sprintf("%s is leaving: kvd status shows how far it is", name))
	}
	start := time.Now()
	// The node itself stops answering when it has left.
	if err := o.awaitLeft(ctx, p, name, endpointsWithout(members, name, o.endpoints)); err != nil {
		return err
	}
	return p.left(name, "left", fmt.Sprintf("%s has left the cluster after %s: its process ends by itself, its directory can be deleted", name, short(time.Since(start))))
}

func (o *clientOptions) members(ctx context.Context) (members []*pb.Member, err error) {
	err = o.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
		resp, err := c.MemberList(ctx, clientv3.WithSerializable())
		if err != nil {
			return fmt.Errorf("ask for the members: %w", err)
		}
		members = resp.Members
		return nil
	})
	return members, err
}

// memberName finds a member by its name or by its id in hexadecimal.
func memberName(members []*pb.Member, nameOrID string) (string, error) {
	id, err := memberID(members, nameOrID)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(members, func(m *pb.Member) bool { return m.GetID() == id })
	return members[i].GetName(), nil
}

// endpointsWithout are the given endpoints and those of all members, but not those of one.
func endpointsWithout(members []*pb.Member, name string, given []string) []string {
	var own, all []string
	for _, m := range members {
		for _, url := range m.GetClientURLs() {
			if m.GetName() == name {
				own = append(own, hostPort(url))
			}
			all = append(all, strings.TrimPrefix(url, "http://"))
		}
	}
	all = slices.DeleteFunc(append(slices.Clone(given), all...), func(endpoint string) bool { return slices.Contains(own, hostPort(endpoint)) })
	slices.SortFunc(all, func(a, b string) int { return cmp.Compare(hostPort(a), hostPort(b)) })
	return slices.CompactFunc(all, func(a, b string) bool { return hostPort(a) == hostPort(b) })
}

// awaitLeft waits until the node is no member any more, and says what that waits for when it changes.
func (o *clientOptions) awaitLeft(ctx context.Context, p *printer, name string, endpoints []string) error {
	client := *o
	if len(endpoints) > 0 {
		client.endpoints = endpoints
	}
	said := ""
	var next time.Time // to say something
	for {
		view, err := client.overview(ctx)
		waits, here := "", true
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("%w: %s goes on leaving: the same command waits again", errInterrupted, name)
		case err == nil:
			waits, here = leaving(view, name)
		case isUnavailable(err):
			waits = "no answer now: " + status.Convert(err).Message()
		default:
			return err
		}
		if !here {
			return nil
		}
		if waits != said && p.format == formatSimple && !time.Now().Before(next) {
			fmt.Fprintln(p.out, waits)
			said, next = waits, time.Now().Add(leaveSay)
		}
		select {
		case <-time.After(leavePoll):
		case <-ctx.Done():
		}
	}
}

// leaving tells what the leaving of a node waits for; here is false if it has left.
func leaving(view placement.Overview, name string) (waits string, here bool) {
	for _, n := range view.Nodes {
		if n.Name == name {
			return cmp.Or(n.Waits, name+" is leaving"), true
		}
	}
	return "", false
}

// left prints what has become of a node.
func (p *printer) left(name, state, text string) error {
	if p.format == formatJSON {
		return p.json(struct {
			Member string `json:"member"`
			State  string `json:"state"`
		}{name, state})
	}
	fmt.Fprintln(p.out, text)
	return nil
}
