package server

import (
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// members is etcd's cluster service. kvd adds members by itself, when nodes
// join, so that they can only be listed and removed.
type members struct {
	pb.UnsafeClusterServer
	router *router
}

var _ pb.ClusterServer = (*members)(nil)

func newMembers(r *router) *members { return &members{router: r} }

// MemberList lists the members that this node knows. If linearizable, it
// knows at least what was known when the request came in.
func (s *members) MemberList(ctx context.Context, r *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	if r.Linearizable {
		_, release, err := s.router.acquire(ctx, userGroup, false)
		if err != nil {
			return nil, err
		}
		release()
	}
	resp := &pb.MemberListResponse{Header: &pb.ResponseHeader{}, Members: s.list()}
	s.router.fill(resp.Header) // as in etcd, without a revision
	return resp, nil
}

func (s *members) list() []*pb.Member {
	var list []*pb.Member
	for _, m := range s.router.cfg.Cluster.Members() {
		list = append(list, &pb.Member{
			ID: m.ID, Name: m.Name, PeerURLs: m.PeerURLs, ClientURLs: m.ClientURLs, IsLearner: m.Learner,
		})
	}
	return list
}

var errMemberChange = unsupported("changing members through the etcd API is")

// MemberAdd is not supported.
func (s *members) MemberAdd(context.Context, *pb.MemberAddRequest) (*pb.MemberAddResponse, error) {
	return nil, errMemberChange
}

// MemberRemove begins to take a node out of the cluster: its replicas are
// rebuilt on other nodes first, and it is listed until that is done. The answer
// waits a moment for that, because etcd lists who is left. As in etcd, it is
// refused where too few nodes would be left.
func (s *members) MemberRemove(ctx context.Context, r *pb.MemberRemoveRequest) (*pb.MemberRemoveResponse, error) {
	if s.router.cfg.Members == nil {
		return nil, errMemberChange
	}
	member, ok := s.router.memberByID(r.ID)
	if !ok {
		return nil, rpctypes.ErrGRPCMemberNotFound
	}
	ctx, cancel := s.router.withDeadline(ctx)
	defer cancel()
	if err := s.router.cfg.Members.Leave(ctx, member.Name, false); err != nil {
		return nil, leaveStatus(err)
	}
	s.awaitLeft(ctx, r.ID)
	resp := &pb.MemberRemoveResponse{Header: &pb.ResponseHeader{}, Members: s.list()}
	s.router.fill(resp.Header)
	return resp, nil
}

// awaitLeft returns when a member is not listed any more, or has not left in time.
func (s *members) awaitLeft(ctx context.Context, id uint64) {
	ctx, cancel := context.WithTimeout(ctx, s.router.cfg.LeaveWait)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, listed := s.router.memberByID(id); !listed {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func leaveStatus(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return kvdError(codes.FailedPrecondition, ReasonMembership, err.Error())
}

// MemberUpdate is not supported: nodes announce their addresses themselves.
func (s *members) MemberUpdate(context.Context, *pb.MemberUpdateRequest) (*pb.MemberUpdateResponse, error) {
	return nil, errMemberChange
}

// MemberPromote is not supported: learners are promoted when they have caught up.
func (s *members) MemberPromote(context.Context, *pb.MemberPromoteRequest) (*pb.MemberPromoteResponse, error) {
	return nil, errMemberChange
}
