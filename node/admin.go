package node

import (
	"context"
	"errors"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/placement"
	"kvd/server/kvdpb"
	"kvd/transport"
)

// administration is what the Admin service needs of the cluster. All but
// locate are answered by group 0's leader, wherever that is.
type administration interface {
	overview(ctx context.Context) (placement.Overview, error)
	leave(ctx context.Context, name string, force bool) error
	replaceMember(ctx context.Context, old, next string) error
	// locate finds the part of a key that is hashed, its shard and its group;
	// shard 0 and group 0 in a cluster without shards.
	locate(key []byte) (tag []byte, shard int, group uint64)
}

// admin implements kvdpb.AdminServer.
type admin struct {
	kvdpb.UnimplementedAdminServer
	cluster administration
}

func (a admin) Shards(ctx context.Context, r *kvdpb.ShardsRequest) (*kvdpb.ShardsResponse, error) {
	view, err := a.cluster.overview(ctx)
	if err != nil {
		return nil, adminError(err)
	}
	shards, err := chosen(view, r.GetShards())
	if err != nil {
		return nil, err
	}
	answer := &kvdpb.ShardsResponse{}
	if c := view.Config; c != nil {
		answer.Config = &kvdpb.ClusterConfig{
			Strategy: c.Strategy, Shards: int32(c.Shards), ReplicationFactor: int32(c.ReplicationFactor), Witnesses: c.Witnesses,
		}
	}
	for _, n := range view.Nodes {
		answer.Nodes = append(answer.Nodes, &kvdpb.Node{
			Name: n.Name, State: n.State, Weight: n.Weight, Shards: int32(n.Shards), Leaders: int32(n.Leaders), DiskFree: n.DiskFree, Waits: n.Waits,
		})
	}
	for _, s := range shards {
		answer.Shards = append(answer.Shards, shardMessage(s))
	}
	return answer, nil
}

// chosen are the shards of these numbers, all if there is none.
func chosen(view placement.Overview, numbers []int32) ([]placement.ShardOverview, error) {
	if len(numbers) == 0 {
		return view.Shards, nil
	}
	known := make(map[int32]placement.ShardOverview)
	for _, s := range view.Shards {
		known[int32(s.Number)] = s
	}
	var list []placement.ShardOverview
	for _, number := range numbers {
		s, ok := known[number]
		switch {
		case view.Config == nil:
			return nil, status.Error(codes.NotFound, "kvd: the cluster has no shards: every node holds every key")
		case !ok:
			return nil, status.Errorf(codes.NotFound, "kvd: there is no shard %d: they are 0 to %d", number, view.Config.Shards-1)
		}
		list = append(list, s)
	}
	return list, nil
}

func shardMessage(s placement.ShardOverview) *kvdpb.Shard {
	m := &kvdpb.Shard{Number: int32(s.Number), Leader: s.Leader, State: s.State, Tolerates: int32(s.Tolerates), Why: s.Why}
	for _, r := range s.Replicas {
		m.Replicas = append(m.Replicas, &kvdpb.Replica{
			Id: string(r.ID), Node: r.Node, Role: string(r.Role), State: r.State, Alive: r.Alive, Match: r.Match, Commit: r.Commit,
		})
	}
	for _, t := range s.Target {
		m.Target = append(m.Target, &kvdpb.TargetReplica{Node: t.Node, Role: string(t.Role)})
	}
	return m
}

func (a admin) Locate(_ context.Context, r *kvdpb.LocateRequest) (*kvdpb.LocateResponse, error) {
	tag, shard, group := a.cluster.locate(r.GetKey())
	return &kvdpb.LocateResponse{Tag: tag, Shard: int32(shard), Group: group}, nil
}

func (a admin) RemoveMember(ctx context.Context, r *kvdpb.RemoveMemberRequest) (*kvdpb.RemoveMemberResponse, error) {
	if r.GetName() == "" {
		return nil, status.Error(codes.InvalidArgument, "kvd: which member?")
	}
	if err := a.cluster.leave(ctx, r.GetName(), r.GetForce()); err != nil {
		return nil, adminError(err)
	}
	return &kvdpb.RemoveMemberResponse{}, nil
}

func (a admin) ReplaceMember(ctx context.Context, r *kvdpb.ReplaceMemberRequest) (*kvdpb.ReplaceMemberResponse, error) {
	if r.GetOld() == "" || r.GetNew() == "" || r.GetOld() == r.GetNew() {
		return nil, status.Error(codes.InvalidArgument, "kvd: replace one member by another one")
	}
	if err := a.cluster.replaceMember(ctx, r.GetOld(), r.GetNew()); err != nil {
		return nil, adminError(err)
	}
	return &kvdpb.ReplaceMemberResponse{}, nil
}

// newAdmin makes the service of the API beyond etcd's.
func newAdmin(cluster administration) kvdpb.AdminServer { return admin{cluster: cluster} }

// adminError is the status of an error of administration.
func adminError(err error) error {
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	if remote, ok := errors.AsType[*transport.RemoteError](err); ok && remote.Code != 0 {
		return status.Error(codes.Code(remote.Code), remote.Message)
	}
	code := codes.Unavailable // no leader now, a lost connection
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	case errors.Is(err, placement.ErrLast):
		return rpctypes.ErrGRPCMemberNotEnoughStarted
	case errors.Is(err, placement.ErrUnknownMember):
		code = codes.NotFound
	case errors.Is(err, placement.ErrTooFew), errors.Is(err, placement.ErrQuorum), errors.Is(err, placement.ErrMemberExists):
		code = codes.FailedPrecondition
	}
	return status.Error(code, "kvd: "+strings.TrimPrefix(err.Error(), "placement: "))
}

// remoteAdminError is what a handler on group 0's leader answers to another
// node, whose adminError finds the same status in it.
func remoteAdminError(err error) error {
	s := status.Convert(adminError(err))
	return &transport.RemoteError{Code: uint32(s.Code()), Message: s.Message()}
}
