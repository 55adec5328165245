package server

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// members is etcd's cluster service. kvd changes its members by itself, as
// nodes join and leave, so that only the list is served.
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
	resp := &pb.MemberListResponse{Header: &pb.ResponseHeader{}}
	s.router.fill(resp.Header) // as in etcd, without a revision
	for _, m := range s.router.cfg.Cluster.Members() {
		resp.Members = append(resp.Members, &pb.Member{
			ID: m.ID, Name: m.Name, PeerURLs: m.PeerURLs, ClientURLs: m.ClientURLs, IsLearner: m.Learner,
		})
	}
	return resp, nil
}

var errMemberChange = unsupported("changing members through the etcd API is")

// MemberAdd is not supported.
func (s *members) MemberAdd(context.Context, *pb.MemberAddRequest) (*pb.MemberAddResponse, error) {
	return nil, errMemberChange
}

// MemberRemove is not supported.
func (s *members) MemberRemove(context.Context, *pb.MemberRemoveRequest) (*pb.MemberRemoveResponse, error) {
	return nil, errMemberChange
}

// MemberUpdate is not supported: nodes announce their addresses themselves.
func (s *members) MemberUpdate(context.Context, *pb.MemberUpdateRequest) (*pb.MemberUpdateResponse, error) {
	return nil, errMemberChange
}

// MemberPromote is not supported: learners are promoted when they have caught up.
func (s *members) MemberPromote(context.Context, *pb.MemberPromoteRequest) (*pb.MemberPromoteResponse, error) {
	return nil, errMemberChange
}
