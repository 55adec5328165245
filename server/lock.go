package server

import (
	"context"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
)

// sessions are what the services for locks and elections have in common: etcd's
// own client library, which talks to this node through memory, and an end to
// their waiting.
type sessions struct {
	client *clientv3.Client // set before anything is served

	ctx  context.Context // ends when nothing may wait any more
	stop context.CancelFunc
}

func newSessions() *sessions {
	s := &sessions{client: clientv3.NewCtxClient(context.Background())}
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

// connect must come before the services are called. conn leads to this node.
func (s *sessions) connect(conn *grpc.ClientConn) {
	s.client.KV = clientv3.NewKVFromKVClient(pb.NewKVClient(conn), s.client)
	s.client.Watcher = clientv3.NewWatchFromWatchClient(pb.NewWatchClient(conn), s.client)
	s.client.Lease = orphans{clientv3.NewLeaseFromLeaseClient(pb.NewLeaseClient(conn), s.client, time.Second)}
}

// close ends what still runs for callers that have gone.
func (s *sessions) close() {
	s.stop()
	_ = s.client.Close()
}

// orphans are leases of sessions that nobody here keeps alive: that is up to the
// callers, for as long as they want to hold what they have got.
type orphans struct{ clientv3.Lease }

func (orphans) KeepAlive(context.Context, clientv3.LeaseID) (<-chan *clientv3.LeaseKeepAliveResponse, error) {
	none := make(chan *clientv3.LeaseKeepAliveResponse)
	close(none)
	return none, nil
}

// waiting is the context of a call that may wait for long: it also ends when the
// server closes.
func (s *sessions) waiting(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// ended is the answer for an error of a call that has waited. As in etcd, errors
// of the client library are passed on with their text alone.
func (s *sessions) ended(ctx context.Context, err error) error {
	if err != nil && ctx.Err() == nil && s.ctx.Err() != nil {
		return rpctypes.ErrGRPCStopped
	}
	return err
}

// forget deletes the key of somebody who waits no longer. Where that fails, the
// key goes with its lease.
func (s *sessions) forget(key string) { _, _ = s.client.Delete(s.client.Ctx(), key) }

// locks is etcd's lock service: a lock is held by the oldest of the keys below
// its name, each of which is bound to its owner's lease.
type locks struct {
	v3lockpb.LockServer // etcd's own
	*sessions
}

func newLocks(s *sessions) *locks {
	return &locks{LockServer: v3lock.NewLockServer(s.client), sessions: s}
}

// Lock waits until the caller has the lock.
func (s *locks) Lock(ctx context.Context, r *v3lockpb.LockRequest) (*v3lockpb.LockResponse, error) {
	waiting, done := s.waiting(ctx)
	defer done()
	resp, err := s.LockServer.Lock(waiting, r)
	return resp, s.ended(ctx, err)
}
