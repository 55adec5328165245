package server

import (
	"context"
	"errors"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/server/lessor"
)

// ending is a lease on its way out: its end is in the log, and its keys are being deleted, group by group.
type ending struct {
	done     chan struct{} // closed when all else is set
	revision int64         // of the last deletion
	err      error
}

// expire begins to revoke leases whose time is over, and goes on with those that were left half revoked.
func (g *reign) expire() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, due := range g.lessor.Due(cap(g.slots) - len(g.slots)) {
		g.slots <- struct{}{} // there is room: nobody else fills it
		revoke := func() {
			defer g.kick()
			defer func() { <-g.slots }()
			g.revoke(due)
		}
		if !g.task(revoke) {
			<-g.slots
			return
		}
	}
}

// revoke ends a lease that the lessor has given out.
func (g *reign) revoke(due lessor.Lease) {
	err := g.decide(due)
	switch {
	case err == nil:
		_, err = g.finish(g.ctx, due.ID, due.Incarnation)
	case errors.Is(err, fsm.ErrLeaseNotFound): // somebody else was first
		err = nil
	}
	if err == nil && !due.Ending {
		g.router.metrics.leasesExpired.Inc()
	}
	g.mu.Lock()
	g.lessor.Failed(due.ID, due.Incarnation) // unless the table does not have it any more
	g.mu.Unlock()
	if err != nil && g.ctx.Err() == nil {
		g.router.cfg.Logger.Debug("a lease could not be revoked, and will be again", "lease", due.ID, "group", g.group, "error", err)
	}
}

// decide puts the end of a lease into the log. From then on it is revoked, whoever leads. A lease that has keys in no
// other group is gone then.
func (g *reign) decide(due lessor.Lease) error {
	if due.Ending {
		return nil
	}
	if !g.router.sharded || !g.hasGuests(due.ID) {
		err := g.revokeAtOnce(due)
		if !g.router.sharded || !errors.Is(err, fsm.ErrLeaseStale) { // else it has got guests
			return err
		}
	}
	return g.propose(g.ctx, fsm.LeaseCommand{Kind: fsm.LeaseEnd, ID: due.ID, Incarnation: due.Incarnation, Term: g.guard()}.Request())
}

func (g *reign) hasGuests(id int64) bool {
	state, release, err := g.replica.AcquireState(g.ctx, 0)
	if err != nil {
		return true
	}
	defer release()
	info, _ := state.Lease(id)
	return len(info.Groups) > 0
}

func (g *reign) revokeAtOnce(due lessor.Lease) error {
	return g.proposeRaft(g.ctx, &pb.InternalRaftRequest{
		Header:      &pb.RequestHeader{ID: g.guard(), AuthRevision: uint64(due.Incarnation)},
		LeaseRevoke: &pb.LeaseRevokeRequest{ID: due.ID},
	})
}

// propose proposes on this node, in whatever term it leads.
func (g *reign) propose(ctx context.Context, request fsm.Request) error {
	result, err := g.replica.Propose(ctx, request)
	return errors.Join(err, result.Err)
}

func (g *reign) proposeRaft(ctx context.Context, request *pb.InternalRaftRequest) error {
	data, err := proto.Marshal(request)
	if err != nil {
		return err
	}
	return g.propose(ctx, fsm.Request{Space: fsm.User, Data: data})
}

// finish deletes what an ending lease has left, and the lease, and returns the revision of the last deletion. Others
// may do so at the same time: they wait for the first.
func (g *reign) finish(ctx context.Context, id, incarnation int64) (int64, error) {
	g.mu.Lock()
	e := g.endings[id]
	if e == nil {
		e = &ending{done: make(chan struct{})}
		run := func() {
			e.revision, e.err = g.deleteAll(id, incarnation)
			g.mu.Lock()
			delete(g.endings, id)
			g.mu.Unlock()
			close(e.done)
		}
		if !g.task(run) {
			g.mu.Unlock()
			return 0, errLeaderMoved
		}
		g.endings[id] = e
	}
	g.mu.Unlock()
	select {
	case <-e.done:
		return e.revision, e.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// deleteAll does what follows the end of a lease: its keys are deleted in each group that may have some, and then at
// home, where the lease is forgotten. Each step may be repeated.
func (g *reign) deleteAll(id, incarnation int64) (int64, error) {
	state, release, err := g.replica.AcquireState(g.ctx, 0)
	if err != nil {
		return 0, err
	}
	info, ok := state.Lease(id)
	newest := state.Revision(fsm.User)
	release()
	if !ok || info.Incarnation != incarnation || !info.Ending {
		return newest, nil
	}
	if len(info.Groups) > 0 {
		var last atomic.Int64
		err := inParallel(g.ctx, maxParallelWrites, info.Groups, func(ctx context.Context, group uint64) error {
			response, err := g.router.proposeLease(ctx, group, fsm.LeaseCommand{Kind: fsm.LeaseDrop, ID: id, Incarnation: incarnation})
			for at := revisionOf(response); ; {
				if old := last.Load(); old >= at || last.CompareAndSwap(old, at) {
					return err
				}
			}
		})
		if err != nil {
			return 0, err
		}
		newest = max(newest, last.Load())
	}
	result, err := g.replica.Propose(g.ctx, fsm.LeaseCommand{Kind: fsm.LeaseForget, ID: id, Incarnation: incarnation}.Request())
	if err != nil || result.Err != nil && !errors.Is(result.Err, fsm.ErrLeaseNotFound) {
		return 0, errors.Join(err, result.Err)
	}
	return max(newest, revisionOf(result.Response)), nil
}

// revisionOf is what the header of a response says; 0 without one.
func revisionOf(response proto.Message) int64 {
	if h, ok := response.(interface{ GetHeader() *pb.ResponseHeader }); ok {
		return h.GetHeader().GetRevision()
	}
	return 0
}

// proposeLease proposes one of kvd's own steps, wherever its group is led. Errors are gRPC statuses.
func (r *router) proposeLease(ctx context.Context, group uint64, c fsm.LeaseCommand) (proto.Message, error) {
	answer := func() proto.Message { return &pb.LeaseRevokeResponse{} }
	if c.Kind == fsm.LeaseRegister || c.Kind == fsm.LeaseEnd {
		answer = func() proto.Message { return &pb.LeaseTimeToLiveResponse{} }
	}
	return r.propose(ctx, &write{group: group, request: c.Request(), answer: answer})
}
