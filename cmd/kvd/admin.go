package main

import (
	"context"

	"github.com/hashicorp/raft"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"kvd/placement"
	"kvd/server/kvdpb"
)

// maxOverviewBytes bounds the answer about thousands of shards.
const maxOverviewBytes = 64 << 20

func adminOf(c *clientv3.Client) kvdpb.AdminClient { return kvdpb.NewAdminClient(c.ActiveConnection()) }

// admin runs one request of kvd's own API within --command-timeout.
func (o *clientOptions) admin(ctx context.Context, request func(context.Context, kvdpb.AdminClient) error) error {
	return o.call(ctx, func(ctx context.Context, c *clientv3.Client) error { return request(ctx, adminOf(c)) })
}

// overview asks where these shards are, all if none is named.
func (o *clientOptions) overview(ctx context.Context, shards ...int32) (view placement.Overview, err error) {
	err = o.admin(ctx, func(ctx context.Context, c kvdpb.AdminClient) (err error) {
		view, err = askOverview(ctx, c, shards...)
		return err
	})
	return view, err
}

func askOverview(ctx context.Context, c kvdpb.AdminClient, shards ...int32) (placement.Overview, error) {
	answer, err := c.Shards(ctx, &kvdpb.ShardsRequest{Shards: shards}, grpc.MaxCallRecvMsgSize(maxOverviewBytes))
	if err != nil {
		return placement.Overview{}, err
	}
	return overviewOf(answer), nil
}

// overviewOf is the answer in the form in which it is printed. Its lists are never nil: JSON has [] then.
func overviewOf(m *kvdpb.ShardsResponse) placement.Overview {
	view := placement.Overview{Nodes: []placement.NodeOverview{}, Shards: []placement.ShardOverview{}}
	if c := m.GetConfig(); c != nil {
		view.Config = &placement.ClusterConfig{
			Strategy: c.GetStrategy(), Shards: int(c.GetShards()), ReplicationFactor: int(c.GetReplicationFactor()), Witnesses: c.GetWitnesses(),
		}
	}
	for _, n := range m.GetNodes() {
		view.Nodes = append(view.Nodes, placement.NodeOverview{
			Name: n.GetName(), State: n.GetState(), Weight: n.GetWeight(), Shards: int(n.GetShards()), Leaders: int(n.GetLeaders()),
			DiskFree: n.GetDiskFree(), Waits: n.GetWaits(),
		})
	}
	for _, s := range m.GetShards() {
		view.Shards = append(view.Shards, shardOf(s))
	}
	return view
}

func shardOf(m *kvdpb.Shard) placement.ShardOverview {
	s := placement.ShardOverview{
		Number: int(m.GetNumber()), Leader: m.GetLeader(), State: m.GetState(), Tolerates: int(m.GetTolerates()),
		Replicas: []placement.ReplicaOverview{}, Target: []placement.TargetReplica{}, Why: append([]string{}, m.GetWhy()...),
	}
	for _, r := range m.GetReplicas() {
		s.Replicas = append(s.Replicas, placement.ReplicaOverview{
			ID: raft.ServerID(r.GetId()), Node: r.GetNode(), Role: placement.Role(r.GetRole()), State: r.GetState(),
			Alive: r.GetAlive(), Match: r.GetMatch(), Commit: r.GetCommit(),
		})
	}
	for _, t := range m.GetTarget() {
		s.Target = append(s.Target, placement.TargetReplica{Node: t.GetNode(), Role: placement.Role(t.GetRole())})
	}
	return s
}
