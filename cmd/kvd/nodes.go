package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// nodeStatus is what one node says about itself, or why it says nothing.
type nodeStatus struct {
	name     string // "" if no member list told
	endpoint string
	resp     *pb.StatusResponse
	err      error
}

// leads tells whether the node says that it is the leader.
func (n nodeStatus) leads() bool {
	return n.resp != nil && n.resp.GetLeader() != 0 && n.resp.GetLeader() == n.resp.GetHeader().GetMemberId()
}

// nodes asks the endpoints and then all members of the cluster that the endpoints do not belong to. They are sorted
// by name; endpoints that nobody knows come last. members is nil if no endpoint tells them.
func (o *clientOptions) nodes(ctx context.Context) (nodes []nodeStatus, members []*pb.Member) {
	ctx, cancel := context.WithTimeout(ctx, o.commandTimeout)
	defer cancel()
	nodes, lists := o.ask(ctx, o.endpoints)
	for _, list := range lists {
		if len(list) > len(members) {
			members = list
		}
	}
	var others []string
	answered := make(map[uint64]bool)
	for _, n := range nodes {
		answered[n.resp.GetHeader().GetMemberId()] = n.resp != nil
	}
	given := make(map[string]bool)
	for _, endpoint := range o.endpoints {
		given[hostPort(endpoint)] = true
	}
	for _, m := range members {
		if urls := m.GetClientURLs(); len(urls) > 0 && !answered[m.GetID()] && !given[hostPort(urls[0])] {
			others = append(others, strings.TrimPrefix(urls[0], "http://"))
		}
	}
	more, _ := o.ask(ctx, others)
	nodes = append(nodes, more...)
	for i := range nodes {
		nodes[i].name = nameOf(nodes[i], members)
	}
	slices.SortStableFunc(nodes, func(a, b nodeStatus) int {
		return cmp.Or(cmp.Compare(b2i(a.name == ""), b2i(b.name == "")), cmp.Compare(a.name, b.name))
	})
	return nodes, members
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func nameOf(n nodeStatus, members []*pb.Member) string {
	for _, m := range members {
		same := func(url string) bool { return hostPort(url) == hostPort(n.endpoint) }
		if n.resp != nil && m.GetID() == n.resp.GetHeader().GetMemberId() || n.resp == nil && slices.ContainsFunc(m.GetClientURLs(), same) {
			return m.GetName()
		}
	}
	return ""
}

// ask asks each endpoint, all at once, for its status and the members that it knows.
func (o *clientOptions) ask(ctx context.Context, endpoints []string) (nodes []nodeStatus, lists [][]*pb.Member) {
	nodes = make([]nodeStatus, len(endpoints))
	lists = make([][]*pb.Member, len(endpoints))
	var all sync.WaitGroup
	for i, endpoint := range endpoints {
		all.Go(func() {
			nodes[i].endpoint = endpoint
			client, err := o.connectOne(ctx, endpoint)
			if err != nil {
				nodes[i].err = err
				return
			}
			defer client.Close()
			resp, err := client.Status(ctx, endpoint)
			nodes[i].resp, nodes[i].err = (*pb.StatusResponse)(resp), err
			if known, err := client.MemberList(ctx, clientv3.WithSerializable()); err == nil {
				lists[i] = known.Members
			}
		})
	}
	all.Wait()
	return nodes, lists
}

// clusterEndpoints lists the client addresses of all members.
func (o *clientOptions) clusterEndpoints(ctx context.Context) (endpoints []string, err error) {
	err = o.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
		resp, err := c.MemberList(ctx, clientv3.WithSerializable())
		if err != nil {
			return fmt.Errorf("ask for the members: %w", err)
		}
		for _, m := range resp.Members {
			endpoints = append(endpoints, m.GetClientURLs()...)
		}
		return nil
	})
	return endpoints, err
}
