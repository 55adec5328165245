package server

import (
	"context"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/fsm"
)

// maxAttachments bounds the tries of one write, which goes on only as long as leases come and go under it.
const maxAttachments = 8

// mustAttach reports whether a write was refused for a lease that its group may only not know yet.
func (r *router) mustAttach(err error) bool {
	return r.sharded && errors.Is(err, rpctypes.ErrGRPCLeaseNotFound)
}

// attaching proposes a write again that a group of a sharded key space has refused because it does not know a lease: the
// lease's home is told that the group will have keys of it, and the group is told of the lease.
func attaching[A any](ctx context.Context, r *router, group uint64, leases []int64, propose func(context.Context) (A, error)) (resp A, err error) {
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	for range maxAttachments {
		attached, err := r.attach(ctx, group, leases)
		if err != nil {
			return resp, err
		}
		if !attached {
			break
		}
		if resp, err = propose(ctx); !r.mustAttach(err) {
			return resp, err
		}
	}
	return resp, rpctypes.ErrGRPCLeaseNotFound
}

// attach makes leases known to a group. It reports whether there were any that could be.
func (r *router) attach(ctx context.Context, group uint64, leases []int64) (attached bool, err error) {
	for _, id := range leases {
		home := r.cfg.Groups.Lease(id)
		if home == group {
			continue // it knows best
		}
		switch err := r.attachOne(ctx, home, group, id); {
		case err == nil:
			attached = true
		case !errors.Is(err, rpctypes.ErrGRPCLeaseNotFound):
			return false, err
		}
	}
	return attached, nil
}

// attachOne registers the group at the lease's home before it tells the group of the lease: so whoever ends the lease
// finds all groups that have keys of it.
func (r *router) attachOne(ctx context.Context, home, group uint64, id int64) error {
	for {
		registered := &pb.LeaseTimeToLiveResponse{}
		if !r.cfg.faults.attachUnregistered {
			resp, err := r.proposeLease(ctx, home, fsm.LeaseCommand{Kind: fsm.LeaseRegister, ID: id, Group: group})
			if err != nil {
				return err
			}
			registered = resp.(*pb.LeaseTimeToLiveResponse)
		} else {
			registered.TTL, registered.Header = 1<<62, &pb.ResponseHeader{Revision: 1 << 62}
		}
		_, err := r.proposeLease(ctx, group, fsm.LeaseCommand{
			Kind: fsm.LeaseAttach, ID: id, Incarnation: registered.TTL, Revision: registered.GetHeader().GetRevision(),
		})
		if !errors.Is(err, refusal(fsm.ErrLeaseStale)) || ctx.Err() != nil {
			return err
		}
	}
}

// leasesOfTxn are the leases that a transaction may attach keys to, each once.
func leasesOfTxn(t *pb.TxnRequest) []int64 {
	var ids []int64
	seen := make(map[int64]bool)
	var collect func(*pb.TxnRequest)
	collect = func(t *pb.TxnRequest) {
		for _, branch := range [][]*pb.RequestOp{t.GetSuccess(), t.GetFailure()} {
			for _, op := range branch {
				if id := op.GetRequestPut().GetLease(); id != 0 && !seen[id] {
					seen[id] = true
					ids = append(ids, id)
				}
				if nested := op.GetRequestTxn(); nested != nil {
					collect(nested)
				}
			}
		}
	}
	collect(t)
	return ids
}
