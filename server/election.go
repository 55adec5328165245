package server

import (
	"context"

	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"google.golang.org/grpc"
)

// elections is etcd's election service: as with locks, whoever has the oldest
// key below a name leads, and the key's value is what the leader proclaims.
type elections struct {
	v3electionpb.ElectionServer // etcd's own
	*sessions
}

func newElections(s *sessions) *elections {
	return &elections{ElectionServer: v3election.NewElectionServer(s.client), sessions: s}
}

// Campaign waits until the caller leads. Unlike etcd's, it does not tell somebody
// who has waited for longer than the lease lasted that they lead.
func (s *elections) Campaign(ctx context.Context, r *v3electionpb.CampaignRequest) (*v3electionpb.CampaignResponse, error) {
	waiting, done := s.waiting(ctx)
	defer done()
	resp, err := s.ElectionServer.Campaign(waiting, r)
	if err != nil {
		return nil, s.ended(ctx, err)
	}
	key := resp.GetLeader()
	found, err := s.client.Get(waiting, string(key.GetKey()))
	switch {
	case err != nil:
		s.forget(string(key.GetKey()))
		return nil, s.ended(ctx, err)
	case len(found.Kvs) == 0 || found.Kvs[0].CreateRevision != key.GetRev():
		return nil, concurrency.ErrSessionExpired
	}
	return resp, nil
}

// Observe sends the leader's proclamations, and those of the next ones.
func (s *elections) Observe(r *v3electionpb.LeaderRequest, stream grpc.ServerStreamingServer[v3electionpb.LeaderResponse]) error {
	waiting, done := s.waiting(stream.Context())
	defer done()
	return s.ended(stream.Context(), s.ElectionServer.Observe(r, &endingStream{stream, waiting}))
}

// endingStream is a stream that ends before its client does.
type endingStream struct {
	grpc.ServerStreamingServer[v3electionpb.LeaderResponse]
	ctx context.Context
}

func (s *endingStream) Context() context.Context { return s.ctx }
