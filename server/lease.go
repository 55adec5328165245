package server

import (
	"cmp"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/fsm"
)

// maxLeaseTTL is etcd's, in seconds.
const maxLeaseTTL = 9_000_000_000

// lease is etcd's lease service.
type lease struct {
	pb.UnsafeLeaseServer
	router *router
}

var _ pb.LeaseServer = (*lease)(nil)

// home is the group that grants a lease and has its time.
func (r *router) home(id int64) (uint64, error) {
	if r.sharded {
		if len(r.cfg.Groups.All()) == 0 {
			return 0, notJoined()
		}
		return r.cfg.Groups.Lease(id), nil
	}
	if r.cfg.Replica(userGroup) == nil {
		return 0, notJoined()
	}
	return userGroup, nil
}

// LeaseGrant makes a lease, with an id of its own if the client has none.
func (s *lease) LeaseGrant(ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	if r.TTL > maxLeaseTTL {
		return nil, rpctypes.ErrGRPCLeaseTTLTooLarge
	}
	for {
		request := &pb.LeaseGrantRequest{ID: cmp.Or(r.ID, 1+rand.Int64N(math.MaxInt64)), TTL: max(r.TTL, s.router.cfg.MinLeaseTTL)}
		group, err := s.router.home(request.ID)
		if err != nil {
			return nil, err
		}
		resp, err := propose[pb.LeaseGrantResponse](ctx, s.router, group, &pb.InternalRaftRequest{LeaseGrant: request}, true)
		switch {
		case r.ID == 0 && errors.Is(err, rpctypes.ErrGRPCLeaseExist) && ctx.Err() == nil:
			continue
		case err != nil:
			return nil, err
		}
		s.router.fill(resp.Header)
		return resp, nil
	}
}

// LeaseRevoke ends a lease and deletes its keys.
func (s *lease) LeaseRevoke(ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	group, err := s.router.home(r.ID)
	if err != nil {
		return nil, err
	}
	revoke := s.revokeAlone
	if s.router.sharded {
		revoke = s.revokeSharded
	}
	resp, err := revoke(ctx, group, r)
	if err != nil {
		return nil, err
	}
	s.router.fill(resp.Header)
	return resp, nil
}

func (s *lease) revokeAlone(ctx context.Context, group uint64, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	return propose[pb.LeaseRevokeResponse](ctx, s.router, group, &pb.InternalRaftRequest{LeaseRevoke: &pb.LeaseRevokeRequest{ID: r.ID}}, false)
}

// revokeSharded puts the end of the lease into the log of its home, and lets the leader there do the rest. Should this
// node not see the end of it, the lease is revoked all the same.
func (s *lease) revokeSharded(ctx context.Context, group uint64, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	ctx, cancel := s.router.withDeadline(ctx)
	defer cancel()
	if _, err := s.router.proposeLease(ctx, group, fsm.LeaseCommand{Kind: fsm.LeaseEnd, ID: r.ID}); err != nil {
		return nil, err
	}
	resp := &pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{}}
	err := s.router.onLeader(ctx, group, func(ctx context.Context, replica Replica) (err error) {
		resp.Header.Revision, err = s.router.leases.finishHere(ctx, group, replica, r.ID)
		return err
	}, func(ctx context.Context, node string) (err error) {
		resp.Header.Revision, err = s.router.leases.finishThere(ctx, group, node, r.ID)
		return err
	})
	return resp, err
}

// finishHere returns when a lease that was ending is gone.
func (l *leases) finishHere(ctx context.Context, group uint64, replica Replica, id int64) (int64, error) {
	index, term, err := replica.Confirm(ctx)
	if err != nil {
		return 0, err
	}
	g, err := l.of(ctx, group, replica, term)
	if err != nil {
		return 0, err
	}
	state, release, err := replica.AcquireState(ctx, index)
	if err != nil {
		return 0, err
	}
	info, ok := state.Lease(id)
	newest := state.Revision(fsm.User)
	release()
	if !ok || !info.Ending {
		return newest, nil
	}
	return g.finish(ctx, id, info.Incarnation)
}

// LeaseTimeToLive says how much of its time a lease has, and -1 if there is no such lease.
func (s *lease) LeaseTimeToLive(ctx context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	group, err := s.router.home(r.ID)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.router.withDeadline(ctx)
	defer cancel()
	var resp *pb.LeaseTimeToLiveResponse
	err = s.router.onLeader(ctx, group, func(ctx context.Context, replica Replica) (err error) {
		resp, err = s.router.leases.look(ctx, group, replica, r.ID, r.Keys)
		return err
	}, func(ctx context.Context, node string) (err error) {
		resp, err = s.router.leases.lookThere(ctx, group, node, r.ID, r.Keys)
		return err
	})
	if err != nil {
		return nil, refusal(err)
	}
	s.router.fill(resp.Header)
	return resp, nil
}

// LeaseLeases lists all leases, unlike in etcd linearizably: in the order in which they were granted (etcd: in which
// they expire), or, with shards, of their ids.
func (s *lease) LeaseLeases(ctx context.Context, _ *pb.LeaseLeasesRequest) (*pb.LeaseLeasesResponse, error) {
	list := s.listAlone
	if s.router.sharded {
		list = s.listSharded
	}
	resp, err := list(ctx)
	if err != nil {
		return nil, err
	}
	s.router.fill(resp.Header)
	return resp, nil
}

func (s *lease) listAlone(ctx context.Context) (*pb.LeaseLeasesResponse, error) {
	state, release, err := s.router.acquire(ctx, userGroup, false)
	if err != nil {
		return nil, err
	}
	defer release()
	return leasesOf(state), nil
}

func (s *lease) listSharded(ctx context.Context) (*pb.LeaseLeasesResponse, error) {
	homes := s.router.cfg.Groups.All()
	if len(homes) == 0 {
		return nil, notJoined()
	}
	ctx, cancel := s.router.withDeadline(ctx)
	defer cancel()
	var mu sync.Mutex
	all := &pb.LeaseLeasesResponse{Header: &pb.ResponseHeader{}}
	err := inParallel(ctx, maxMerges, homes, func(ctx context.Context, group uint64) error {
		some, err := s.router.leases.listIn(ctx, group)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		all.Header.Revision = max(all.Header.Revision, some.Header.Revision)
		all.Leases = append(all.Leases, some.Leases...)
		return nil
	})
	slices.SortFunc(all.Leases, func(a, b *pb.LeaseStatus) int { return cmp.Compare(a.ID, b.ID) })
	return all, err
}

func (l *leases) listIn(ctx context.Context, group uint64) (some *pb.LeaseLeasesResponse, err error) {
	err = l.router.onLeader(ctx, group, func(ctx context.Context, replica Replica) (err error) {
		some, err = l.listHere(ctx, replica)
		return err
	}, func(ctx context.Context, node string) (err error) {
		some, err = l.listThere(ctx, group, node)
		return err
	})
	return some, err
}

func (l *leases) listHere(ctx context.Context, replica Replica) (*pb.LeaseLeasesResponse, error) {
	state, release, err := l.pin(ctx, replica)
	if err != nil {
		return nil, err
	}
	defer release()
	return leasesOf(state), nil
}

// leasesOf are the leases that are at home in a state, in the order in which they were granted. One that is ending is
// none any more.
func leasesOf(state *fsm.Store) *pb.LeaseLeasesResponse {
	resp := &pb.LeaseLeasesResponse{Header: &pb.ResponseHeader{Revision: state.Revision(fsm.User)}}
	infos := state.Leases()
	slices.SortFunc(infos, func(a, b fsm.LeaseInfo) int {
		return cmp.Or(cmp.Compare(a.Incarnation, b.Incarnation), cmp.Compare(a.ID, b.ID))
	})
	for _, info := range infos {
		if info.Home && !info.Ending {
			resp.Leases = append(resp.Leases, &pb.LeaseStatus{ID: info.ID})
		}
	}
	return resp
}
