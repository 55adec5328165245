package server

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"

	"kvd/fsm"
	"kvd/server/lessor"
	"kvd/shard"
)

// maxRenewals of one stream are under way at a time. Those that have arrived meanwhile are the next ones, together.
const maxRenewals = 512

// LeaseKeepAlive renews leases for as long as the client sends their ids. A lease that is not known is answered with a
// TTL of 0. As in etcd, any failure ends the stream, and so does the lack of a leader if the client wants one.
func (s *lease) LeaseKeepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	ctx := stream.Context()
	if wantsLeader(ctx) {
		led, cancel := s.router.whileLed(ctx)
		defer cancel()
		err := s.keepAlive(led, stream)
		if errors.Is(context.Cause(led), rpctypes.ErrGRPCNoLeader) {
			return rpctypes.ErrGRPCNoLeader
		}
		return err
	}
	return s.keepAlive(ctx, stream)
}

// whileLed lasts as long as ctx, and no longer than this node knows a leader, give or take leaderlessLimit; the cause is
// rpctypes.ErrGRPCNoLeader then.
func (r *router) whileLed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	watch := func() {
		ticker := time.NewTicker(leaderlessCheck)
		defer ticker.Stop()
		for leaderless := time.Duration(0); leaderless < leaderlessLimit; {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
			if leaderless += leaderlessCheck; r.hasLeader() {
				leaderless = 0
			}
		}
		cancel(rpctypes.ErrGRPCNoLeader)
	}
	if !r.spawn(watch) {
		cancel(rpctypes.ErrGRPCStopped)
	}
	return ctx, func() { cancel(nil) }
}

// keepAlive serves a stream until it ends, ctx does, or something fails.
func (s *lease) keepAlive(ctx context.Context, stream pb.Lease_LeaseKeepAliveServer) error {
	arrived := make(chan int64, maxRenewals)
	var failed error // set before arrived is closed
	receive := func() {
		defer close(arrived)
		for {
			r, err := stream.Recv()
			if err != nil {
				failed = err
				return
			}
			select {
			case arrived <- r.ID:
			case <-ctx.Done(): // of the stream, so also when this method has returned
				failed = ctx.Err()
				return
			}
		}
	}
	if !s.router.spawn(receive) {
		return rpctypes.ErrGRPCStopped
	}
	for {
		ids, err := nextRenewals(ctx, s.router.leaving, arrived)
		switch {
		case err != nil:
			return err
		case len(ids) == 0 && failed == io.EOF:
			return nil
		case len(ids) == 0:
			return failed
		}
		answers, err := s.router.leases.renew(ctx, ids)
		if err != nil {
			return err
		}
		for _, answer := range answers {
			s.router.fill(answer.Header)
			if err := stream.Send(answer); err != nil {
				return err
			}
		}
	}
}

// nextRenewals waits for the first and takes what has arrived with it; none if arrived is closed.
func nextRenewals(ctx context.Context, leaving <-chan struct{}, arrived <-chan int64) (ids []int64, err error) {
	select {
	case id, ok := <-arrived:
		if !ok {
			return nil, nil
		}
		ids = append(ids, id)
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	case <-leaving:
		return nil, rpctypes.ErrGRPCStopped
	}
	for len(ids) < maxRenewals {
		select {
		case id, ok := <-arrived:
			if !ok {
				return ids, nil
			}
			ids = append(ids, id)
		default:
			return ids, nil
		}
	}
	return ids, nil
}

// renew renews leases wherever they are at home. Errors are gRPC statuses.
func (l *leases) renew(ctx context.Context, ids []int64) ([]*pb.LeaseKeepAliveResponse, error) {
	byGroup := make(map[uint64][]int)
	for i, id := range ids {
		group, err := l.router.home(id)
		if err != nil {
			return nil, err
		}
		byGroup[group] = append(byGroup[group], i)
	}
	groups := make([]uint64, 0, len(byGroup))
	for group := range byGroup {
		groups = append(groups, group)
	}
	answers := make([]*pb.LeaseKeepAliveResponse, len(ids))
	err := inParallel(ctx, len(groups), groups, func(ctx context.Context, group uint64) error {
		of := make([]int64, 0, len(byGroup[group]))
		for _, i := range byGroup[group] {
			of = append(of, ids[i])
		}
		renewed, err := l.renewIn(ctx, group, of)
		if err != nil {
			return err
		}
		for n, i := range byGroup[group] {
			answers[i] = &pb.LeaseKeepAliveResponse{Header: &pb.ResponseHeader{Revision: renewed.revision}, ID: ids[i], TTL: renewed.ttls[n]}
		}
		return nil
	})
	return answers, err
}

// renewals is the answer to a batch: the revision was the home group's newest before any of the leases was renewed.
type renewals struct {
	revision int64
	ttls     []int64 // 0 = there is no such lease
}

func (l *leases) renewIn(ctx context.Context, group uint64, ids []int64) (out renewals, err error) {
	ctx, cancel := l.router.withDeadline(ctx)
	defer cancel()
	err = l.router.onLeader(ctx, group, func(ctx context.Context, replica Replica) (err error) {
		out, err = l.renewHere(ctx, group, replica, ids)
		return err
	}, func(ctx context.Context, node string) (err error) {
		out, err = l.renewThere(ctx, group, node, ids)
		return err
	})
	return out, err
}

// renewHere renews leases if this node is confirmed to lead their home now, after the request has come: whoever leads
// next begins to count after that.
func (l *leases) renewHere(ctx context.Context, group uint64, replica Replica, ids []int64) (renewals, error) {
	index, term, err := l.confirm(ctx, replica)
	if err != nil {
		return renewals{}, err
	}
	g, err := l.of(ctx, group, replica, term)
	if err != nil {
		return renewals{}, err
	}
	out := renewals{ttls: make([]int64, len(ids))}
	left := make([]int, len(ids))
	for i := range left {
		left[i] = i
	}
	for look := false; len(left) > 0; {
		p := &renewal{reign: g, ids: ids, out: &out, left: left}
		if err := p.try(ctx, index, look); err != nil {
			return renewals{}, err
		}
		if len(p.noted) > 0 {
			if err := g.clear(ctx, p.noted); err != nil {
				return renewals{}, err
			}
		} else if len(p.left) > 0 && look {
			if err := p.wait(ctx); err != nil {
				return renewals{}, err
			}
		}
		left, look = p.left, len(p.noted) == 0
	}
	l.router.metrics.leasesRenewed.Add(float64(len(ids)))
	return out, nil
}

func (l *leases) confirm(ctx context.Context, replica Replica) (index, term uint64, err error) {
	if l.router.cfg.faults.renewUnconfirmed {
		return 0, replica.Leader().Term, nil
	}
	return replica.Confirm(ctx)
}

// renewal is one try to renew what is left of a batch.
type renewal struct {
	reign  *reign
	ids    []int64
	out    *renewals
	left   []int // positions of ids: first all, then those that must be tried again
	noted  []mark
	notify <-chan struct{} // closed when the table has changed after the try
}

// mark is a lease with checkpoints that must be cleared.
type mark struct {
	id, incarnation int64
	mark            uint64
}

// try renews what can be at once. With look, notify is there for what dies.
func (p *renewal) try(ctx context.Context, index uint64, look bool) error {
	g := p.reign
	state, release, err := g.replica.AcquireState(ctx, index)
	if err != nil {
		return err
	}
	defer release()
	if look {
		p.notify = state.LeaseNotify()
	}
	if p.out.revision == 0 {
		p.out.revision = state.Revision(fsm.User)
	}
	var again []int
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, i := range p.left {
		info := g.sync(state, p.ids[i])
		renewed, n := g.lessor.Renew(p.ids[i])
		if renewed == lessor.Noted && g.router.cfg.faults.keepCheckpoints {
			renewed = lessor.Alive
		}
		switch renewed {
		case lessor.Alive:
			p.out.ttls[i] = info.TTL
		case lessor.Noted:
			p.noted = append(p.noted, mark{p.ids[i], info.Incarnation, n})
			again = append(again, i)
		case lessor.Dying:
			again = append(again, i)
		}
	}
	p.left = again
	return nil
}

// wait for the end of a lease whose time is over: whether it can still be renewed nobody knows before.
func (p *renewal) wait(ctx context.Context) error {
	select {
	case <-p.notify:
		return nil
	case <-p.reign.ctx.Done():
		return shard.ErrNotLeader
	case <-ctx.Done():
		return ctx.Err()
	}
}

// clear removes the checkpoints of leases from the table, behind whatever checkpoint is under way: their time has begun
// anew, and the next leader must not take it from them.
func (g *reign) clear(ctx context.Context, marks []mark) error {
	g.mu.Lock()
	pointing := g.pointing
	g.mu.Unlock()
	if pointing != nil {
		select {
		case <-pointing:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	request := &pb.LeaseCheckpointRequest{}
	for _, m := range marks {
		request.Checkpoints = append(request.Checkpoints, &pb.LeaseCheckpoint{ID: m.id})
	}
	if err := g.proposeRaft(ctx, &pb.InternalRaftRequest{LeaseCheckpoint: request}); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range marks {
		g.lessor.Cleared(m.id, m.incarnation, m.mark)
	}
	return nil
}

// checkpoint puts into the log what remains of leases that nobody has renewed for long, so that leaders who come and go
// do not keep them for ever.
func (g *reign) checkpoint() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.pointing != nil {
		return
	}
	points := g.lessor.Checkpoints(maxCheckpoints)
	if len(points) == 0 {
		return
	}
	// A lease that is granted anew meanwhile has a higher incarnation than all that are known.
	request, newest := &pb.LeaseCheckpointRequest{}, int64(0)
	for _, p := range points {
		request.Checkpoints = append(request.Checkpoints, &pb.LeaseCheckpoint{ID: p.Lease.ID, Remaining_TTL: p.Remaining})
		newest = max(newest, p.Lease.Incarnation)
	}
	done := make(chan struct{})
	g.pointing = done
	propose := func() {
		err := g.proposeRaft(g.ctx, &pb.InternalRaftRequest{
			Header: &pb.RequestHeader{ID: g.guard(), AuthRevision: uint64(newest)}, LeaseCheckpoint: request,
		})
		if err != nil && g.ctx.Err() == nil {
			g.router.cfg.Logger.Debug("checkpoint of leases failed", "group", g.group, "leases", len(points), "error", err)
		}
		g.mu.Lock()
		g.pointing = nil
		g.mu.Unlock()
		close(done)
		g.kick()
	}
	if !g.task(propose) {
		g.pointing = nil
		close(done)
	}
}

// look answers TimeToLive where the lease is at home: like a renewal it is of a moment after the request has come.
func (l *leases) look(ctx context.Context, group uint64, replica Replica, id int64, keys bool) (*pb.LeaseTimeToLiveResponse, error) {
	index, term, err := replica.Confirm(ctx)
	if err != nil {
		return nil, err
	}
	g, err := l.of(ctx, group, replica, term)
	if err != nil {
		return nil, err
	}
	state, release, err := replica.AcquireState(ctx, index)
	if err != nil {
		return nil, err
	}
	defer release()
	resp := &pb.LeaseTimeToLiveResponse{Header: &pb.ResponseHeader{Revision: state.Revision(fsm.User)}, ID: id, TTL: -1}
	g.mu.Lock()
	info := g.sync(state, id)
	left, alive := g.lessor.Left(id)
	g.mu.Unlock()
	if !alive {
		return resp, nil
	}
	resp.TTL, resp.GrantedTTL = int64(left/time.Second), info.TTL
	if keys {
		resp.Keys, err = l.allKeys(ctx, state, info)
	}
	return resp, err
}

// allKeys are those at home and those in the groups that may have some.
func (l *leases) allKeys(ctx context.Context, home *fsm.Store, info fsm.LeaseInfo) ([][]byte, error) {
	keys := home.LeaseKeys(info.ID, 0)
	if len(info.Groups) == 0 {
		return keys, nil
	}
	var mu sync.Mutex
	err := inParallel(ctx, maxParallelWrites, info.Groups, func(ctx context.Context, group uint64) error {
		guests, err := l.keysIn(ctx, group, info.ID)
		mu.Lock()
		defer mu.Unlock()
		keys = append(keys, guests...)
		return err
	})
	return keys, err
}

// keysIn are the keys of a lease in a group that is not its home.
func (l *leases) keysIn(ctx context.Context, group uint64, id int64) (keys [][]byte, err error) {
	err = l.router.onLeader(ctx, group, func(ctx context.Context, replica Replica) (err error) {
		keys, err = l.keysHere(ctx, replica, id)
		return err
	}, func(ctx context.Context, node string) (err error) {
		keys, err = l.keysThere(ctx, group, node, id)
		return err
	})
	return keys, err
}

func (l *leases) keysHere(ctx context.Context, replica Replica, id int64) ([][]byte, error) {
	state, release, err := l.pin(ctx, replica)
	if err != nil {
		return nil, err
	}
	defer release()
	return state.LeaseKeys(id, 0), nil
}

// pin pins the state of a group that this node leads, as it is now.
func (l *leases) pin(ctx context.Context, replica Replica) (*fsm.Store, func(), error) {
	index, err := replica.ReadIndex(ctx)
	if err != nil {
		return nil, nil, err
	}
	return replica.AcquireState(ctx, index)
}
