package local

import (
	"context"
	"fmt"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/server/kvdpb"
)

// Shards asks where the shards are.
func (c *Cluster) Shards(ctx context.Context) (view *kvdpb.ShardsResponse, err error) {
	err = c.With(func(client *clientv3.Client) error {
		view, err = kvdpb.NewAdminClient(client.ActiveConnection()).Shards(ctx, &kvdpb.ShardsRequest{})
		return err
	})
	return view, err
}

// Probes finds a key under prefix for each of the shards.
func (c *Cluster) Probes(ctx context.Context, prefix string, shards int) (keys []string, err error) {
	keys = make([]string, shards)
	return keys, c.With(func(client *clientv3.Client) error {
		admin := kvdpb.NewAdminClient(client.ActiveConnection())
		for i, found := 0, 0; found < shards; i++ {
			key := fmt.Sprintf("%s%03d", prefix, i)
			at, err := admin.Locate(ctx, &kvdpb.LocateRequest{Key: []byte(key)})
			if err != nil {
				return err
			}
			if shard := int(at.GetShard()); shard >= shards {
				return fmt.Errorf("key %s is in shard %d of %d", key, shard, shards)
			} else if keys[shard] == "" {
				keys[shard] = key
				found++
			}
		}
		return nil
	})
}

// AllOK is an error unless there are shards and all are where they are wanted.
func AllOK(view *kvdpb.ShardsResponse) error {
	all, rest := len(view.GetShards()), 0
	for _, s := range view.GetShards() {
		if s.GetState() == "ok" {
			rest++
		}
	}
	if all == 0 || rest < all {
		return fmt.Errorf("%d of %d shards are ok", rest, all)
	}
	return nil
}

// DataNodes are the nodes that live and have the data of a shard and a vote, in order.
func DataNodes(s *kvdpb.Shard) (nodes []string) {
	for _, r := range s.GetReplicas() {
		if r.GetRole() == "data" && r.GetState() == "voter" && r.GetAlive() {
			nodes = append(nodes, r.GetNode())
		}
	}
	slices.Sort(nodes)
	return nodes
}

// Homes are the DataNodes of each shard.
func Homes(view *kvdpb.ShardsResponse) map[int32][]string {
	homes := make(map[int32][]string)
	for _, s := range view.GetShards() {
		homes[s.GetNumber()] = DataNodes(s)
	}
	return homes
}

// Away counts the shards whose DataNodes are not those of homes.
func Away(view *kvdpb.ShardsResponse, homes map[int32][]string) int {
	away := len(homes)
	for _, s := range view.GetShards() {
		if at, ok := homes[s.GetNumber()]; ok && slices.Equal(DataNodes(s), at) {
			away--
		}
	}
	return away
}
