package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"kvd/fsm"
)

// watch is etcd's watch service: it answers clients as etcd does, message for message, and leaves it to a follower to
// find the events.
type watch struct {
	pb.UnsafeWatchServer
	router    *router
	follow    func(ctx context.Context, deliver func(watchDelivery) error) watchFeed
	recovered func(method string, p any) error // what becomes of a panic

	streams, watches, keyBytes atomic.Int64 // of all clients
}

var _ pb.WatchServer = (*watch)(nil)

// watchFeed is watches, or what stands in for it in tests.
type watchFeed interface {
	add(id int64, s watchSpec) (revision int64, err error)
	cancel(id int64)
	progress(ctx context.Context) (revision int64, err error)
	progressOf(id int64) (revision int64, ok bool)
	hasLeaders() bool
	close()
}

const (
	watchKeyBytes   = 256 << 20 // of the keys that are watched, on this node
	leaderlessLimit = 3 * time.Second
	leaderlessCheck = 500 * time.Millisecond
)

func newWatch(r *router, recovered func(string, any) error) *watch {
	s := &watch{router: r, recovered: recovered, follow: r.cfg.follow}
	if s.follow != nil {
		return s
	}
	s.follow = func(ctx context.Context, deliver func(watchDelivery) error) watchFeed {
		return r.newWatches(ctx, deliver)
	}
	return s
}

var (
	errTooManyStreams = kvdError(codes.ResourceExhausted, ReasonBusy, "this node serves as many watch streams as it may")
	// errStalled lets clients connect again and go on where they were.
	errStalled = kvdError(codes.Unavailable, ReasonStalled, "the client has not read its watches in time")
	errNoRoom  = kvdError(codes.Unavailable, ReasonBusy, "the answers under way take as much memory as they may for too long")
)

// Watch serves one stream until the client ends it, or does not read it, the node leaves or something fails: then the
// client goes on where it was, on another stream.
func (s *watch) Watch(stream pb.Watch_WatchServer) error {
	if s.streams.Add(1) > int64(s.router.cfg.MaxWatchStreams) {
		s.streams.Add(-1)
		return errTooManyStreams
	}
	s.router.metrics.watchStreams.Inc()
	defer func() {
		s.router.metrics.watchStreams.Dec()
		s.streams.Add(-1)
	}()
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	one := newWatchStream(s, stream)
	defer one.stall.Stop()
	one.feed = s.follow(ctx, func(d watchDelivery) error { return one.deliver(ctx, d) })
	err := rpctypes.ErrGRPCStopped
	if one.spawn(func() error { return one.receive(ctx) }) && one.spawn(func() error { return one.send(ctx) }) {
		err = s.wait(ctx, one)
	}
	cancel()
	one.close()
	return err
}

// wait returns why a stream has to end.
func (s *watch) wait(ctx context.Context, one *watchStream) error {
	interval := s.router.cfg.WatchProgressInterval
	interval += rand.N(interval/10 + 1) // streams that began together must not be told together
	due := time.NewTicker(interval)
	defer due.Stop()
	var checks <-chan time.Time
	if wantsLeader(ctx) {
		ticker := time.NewTicker(leaderlessCheck)
		defer ticker.Stop()
		checks = ticker.C
	}
	var leaderless time.Duration
	for {
		select {
		case err := <-one.ended:
			return endOf(ctx, err)
		case <-ctx.Done():
			return endOf(ctx, ctx.Err())
		case <-s.router.leaving:
			return rpctypes.ErrGRPCStopped
		case <-due.C:
			one.tell(ctx, false)
		case <-checks:
			if leaderless += leaderlessCheck; one.feed.hasLeaders() {
				leaderless = 0
			}
			if leaderless >= leaderlessLimit {
				return rpctypes.ErrGRPCNoLeader
			}
		}
	}
}

// wantsLeader reports whether a client does not want to listen where no leader is known. It is sent away later than one
// that comes then, because to connect again costs it more.
func wantsLeader(ctx context.Context) bool {
	v := metadata.ValueFromIncomingContext(ctx, rpctypes.MetadataRequireLeaderKey)
	return len(v) > 0 && v[0] == rpctypes.MetadataHasLeader
}

// endOf is what a client is told when its stream ends for a reason.
func endOf(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled), errors.Is(err, context.Canceled):
		return rpctypes.ErrGRPCWatchCanceled
	case errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	return refusal(err)
}

// take makes room for a watch, whose cost is that of its keys; the error says why not.
func (s *watch) take(cost int64) error {
	cfg := s.router.cfg
	if s.watches.Add(1) > int64(cfg.MaxWatches) {
		s.watches.Add(-1)
		return fmt.Errorf("kvd: this node serves as many watches as it may: %d", cfg.MaxWatches)
	}
	s.router.metrics.watches.Inc()
	if s.keyBytes.Add(cost) > watchKeyBytes {
		s.give(1, cost)
		return fmt.Errorf("kvd: the keys of the watches that this node serves take as much memory as they may: %d bytes", watchKeyBytes)
	}
	return nil
}

func (s *watch) give(watches, cost int64) {
	s.watches.Add(-watches)
	s.router.metrics.watches.Sub(float64(watches))
	s.keyBytes.Add(-cost)
}

// newest is a revision for answers that say nothing of what a watch has seen. known is one that the stream has seen.
func (s *watch) newest(ctx context.Context, known int64) int64 {
	r := s.router
	if r.sharded {
		if known > 0 {
			return known
		}
		soon, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		newest, err := r.cfg.Revisions.Latest(soon)
		if err != nil {
			return 0
		}
		return newest
	}
	replica := r.cfg.Replica(userGroup)
	if replica == nil {
		return known
	}
	state, release, err := replica.AcquireState(ctx, 0)
	if err != nil {
		return known
	}
	defer release()
	return max(known, state.Revision(fsm.User))
}
