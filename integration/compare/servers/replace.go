package servers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Replace starts a node that has ended again with an empty directory, the way its server's manual says, and does not
// wait for it.
func (c *Cluster) Replace(ctx context.Context, node int) error {
	p := c.nodes[node]
	if err := os.RemoveAll(p.dir); err != nil {
		return err
	}
	if err := c.rejoin(ctx, c, node); err != nil {
		return fmt.Errorf("replace %s: %w", p.name, err)
	}
	return p.start()
}

// rejoinKVD: the node asks its peers.
func rejoinKVD(context.Context, *Cluster, int) error { return nil }

// rejoinTimeout bounds what etcd takes to accept both changes of its membership.
const rejoinTimeout = 30 * time.Second

// rejoinEtcd: the old member is removed, and a new one of the same name and addresses added.
func rejoinEtcd(ctx context.Context, c *Cluster, node int) error {
	ctx, cancel := context.WithTimeout(ctx, rejoinTimeout)
	defer cancel()
	p, other := c.nodes[node], c.nodes[(node+1)%len(c.nodes)]
	conn, err := Dial(other.endpoint)
	if err != nil {
		return err
	}
	defer conn.Close()
	cluster := pb.NewClusterClient(conn)
	members, err := cluster.MemberList(ctx, &pb.MemberListRequest{})
	if err != nil {
		return err
	}
	old := slices.IndexFunc(members.Members, func(m *pb.Member) bool { return m.Name == p.name })
	if old < 0 {
		return errors.New("is not a member")
	}
	// Both are refused for a while after a member has gone.
	if err := insist(ctx, func() error {
		_, err := cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: members.Members[old].ID})
		return err
	}); err != nil {
		return err
	}
	if err := insist(ctx, func() error {
		_, err := cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://" + p.peer}})
		return err
	}); err != nil {
		return err
	}
	if !strings.Contains(strings.Join(p.argv, " "), "--initial-cluster-state") {
		p.argv = append(p.argv, "--initial-cluster-state", "existing")
	}
	return nil
}

// insist tries again until it works or the context ends.
func insist(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}
