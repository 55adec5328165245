package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// inBothStrategies runs a test against one node that has all keys, and against
// three nodes that share them.
func inBothStrategies(t *testing.T, test func(t *testing.T, servers []*Server)) {
	t.Run("full", func(t *testing.T) { test(t, []*Server{startNode(t, nil).Server}) })
	t.Run("consistent", func(t *testing.T) {
		w := newWorld(t, 3, 4, 2, nil)
		w.replicate()
		var servers []*Server
		for _, node := range w.nodes {
			servers = append(servers, w.servers[node])
		}
		test(t, servers)
	})
}

// replicate lets all replicas apply what is written, soon.
func (w *world) replicate() {
	written, stop, done := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	w.onWritten = func(uint64, int64, []byte) { signalOnce(written) }
	go func() {
		defer close(done)
		for {
			select {
			case <-written:
			case <-stop:
				return
			}
			for _, s := range w.shards {
				s.applyAll(w.t)
			}
		}
	}()
	w.t.Cleanup(func() { // before the servers close
		close(stop)
		<-done
	})
}

func (s *fakeShard) applyAll(t testing.TB) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.replicas {
		for r.applied < len(s.log) {
			if _, err := r.applyNext(); err != nil {
				t.Error(err)
				return
			}
		}
	}
}

// way is how a client gets to a server.
func way(servers []*Server, i int) *grpc.ClientConn { return servers[i%len(servers)].gateway.conn }

func grantLease(t *testing.T, servers []*Server, id int64) {
	t.Helper()
	if _, err := servers[0].Lease().LeaseGrant(t.Context(), &pb.LeaseGrantRequest{ID: id, TTL: 6000}); err != nil {
		t.Fatal(err)
	}
}

func keysOf(t *testing.T, servers []*Server) (keys []string) {
	t.Helper()
	all, err := servers[0].KV().Range(t.Context(), wholeRange)
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range all.Kvs {
		keys = append(keys, string(kv.Key))
	}
	return keys
}

// Nobody has a lock while somebody else has it, and who gets it later has the
// greater token.
func TestLocksExclude(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, servers []*Server) {
		for i, name := range []string{"lock", "{tag}lock"} {
			if why := lockInTurn(t, servers, name, int64(100*(i+1))); why != "" {
				t.Errorf("lock %s: %s", name, why)
			}
		}
		if keys := keysOf(t, servers); len(keys) != 0 {
			t.Errorf("left: %q", keys)
		}
	})
}

// The test above notices locks that ignore who came before.
func TestLocksThatDoNotExclude(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, servers []*Server) {
		for _, s := range servers {
			s.sessions.client.KV = blind{s.sessions.client.KV}
		}
		for try := range int64(100) { // clients may happen to come one after the other
			if why := lockInTurn(t, servers, "lock", 100*(try+1)); why != "" {
				t.Log(why)
				return
			}
		}
		t.Error("the fault does not show")
	})
}

// blind does not find keys that others have made before.
type blind struct{ clientv3.KV }

func (b blind) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if op := clientv3.OpGet(key, opts...); op.MaxCreateRev() > 0 {
		return &clientv3.GetResponse{Header: &pb.ResponseHeader{}}, nil
	}
	return b.KV.Get(ctx, key, opts...)
}

// lockInTurn has clients, with leases from one on, take a lock again and again.
// It returns what was wrong first; nothing if each was alone, with a greater
// token than those before.
func lockInTurn(t *testing.T, servers []*Server, name string, lease int64) string {
	var (
		clients        sync.WaitGroup
		holders, token atomic.Int64
	)
	wrong := make(chan string, 1)
	fail := func(format string, args ...any) {
		select {
		case wrong <- fmt.Sprintf(format, args...):
		default:
		}
	}
	for i := range 5 {
		request := &v3lockpb.LockRequest{Name: []byte(name), Lease: lease + int64(i)}
		grantLease(t, servers, request.Lease)
		clients.Go(func() {
			for range 4 {
				locked, err := v3lockpb.NewLockClient(way(servers, i)).Lock(t.Context(), request)
				if err != nil {
					fail("%v", err)
					return
				}
				if n := holders.Add(1); n != 1 {
					fail("%d clients have it", n)
				}
				key, err := servers[0].KV().Range(t.Context(), &pb.RangeRequest{Key: locked.Key})
				last := token.Load()
				if err != nil || len(key.Kvs) != 1 || key.Kvs[0].CreateRevision <= last || locked.Header.Revision < key.Kvs[0].CreateRevision {
					fail("the holder after token %d has %v, %v", last, key, err)
				} else {
					token.Store(key.Kvs[0].CreateRevision)
				}
				holders.Add(-1)
				if _, err := v3lockpb.NewLockClient(way(servers, i+1)).Unlock(t.Context(), &v3lockpb.UnlockRequest{Key: locked.Key}); err != nil {
					fail("%v", err)
				}
			}
		})
	}
	clients.Wait()
	select {
	case why := <-wrong:
		return why
	default:
		return ""
	}
}

// waitFor returns once so many keys are there.
func waitForKeys(t *testing.T, servers []*Server, n int) {
	t.Helper()
	for len(keysOf(t, servers)) != n {
		if t.Context().Err() != nil {
			t.Fatal("the test has ended")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestWaitingForALockEnds(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, servers []*Server) {
		lock := func(ctx context.Context, server *Server, lease int64) error {
			_, err := v3lockpb.NewLockClient(server.gateway.conn).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("lock"), Lease: lease})
			return err
		}
		for id := range int64(4) {
			grantLease(t, servers, id+1)
		}
		if err := lock(t.Context(), servers[0], 1); err != nil {
			t.Fatal(err)
		}
		waiting := func(ctx context.Context, lease int64) <-chan error {
			ended := make(chan error, 1)
			over := make(chan struct{})
			go func() {
				defer close(over)
				ended <- lock(ctx, servers[len(servers)-1], lease)
			}()
			for len(keysOf(t, servers)) != 2 {
				select {
				case <-over:
					t.Fatalf("with lease %d it does not wait: %v", lease, <-ended)
				case <-time.After(time.Millisecond):
				}
			}
			return ended
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := waiting(ctx, 2)
		cancel()
		if err := <-ended; status.Code(err) != codes.Canceled {
			t.Errorf("cancelled: %v", err)
		}
		// The key of who waits no longer goes at the latest with the lease.
		if _, err := servers[0].Lease().LeaseRevoke(t.Context(), &pb.LeaseRevokeRequest{ID: 2}); err != nil {
			t.Fatal(err)
		}
		waitForKeys(t, servers, 1)

		ended = waiting(t.Context(), 3)
		if _, err := servers[0].Lease().LeaseRevoke(t.Context(), &pb.LeaseRevokeRequest{ID: 3}); err != nil {
			t.Fatal(err)
		}
		if _, err := servers[0].KV().DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte("lock/1")}); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err == nil || status.Convert(err).Message() != concurrency.ErrSessionExpired.Error() {
			t.Errorf("a lock for a lease that is over: %v", err)
		}

		if err := lock(t.Context(), servers[0], 1); err != nil {
			t.Fatal(err)
		}
		ended = waiting(t.Context(), 4)
		servers[len(servers)-1].sessions.stop() // as Close does
		if err := <-ended; !errors.Is(err, rpctypes.ErrGRPCStopped) {
			t.Errorf("the server ended: %v", err)
		}
	})
}

func TestElections(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, servers []*Server) {
		ctx := t.Context()
		name := []byte("election")
		at := func(i int) v3electionpb.ElectionClient { return v3electionpb.NewElectionClient(way(servers, i)) }
		observed, err := at(2).Observe(ctx, &v3electionpb.LeaderRequest{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		leads := func(want string) {
			t.Helper()
			if l, err := observed.Recv(); err != nil || string(l.Kv.Value) != want {
				t.Fatalf("observed %v, %v; want %s", l, err, want)
			}
			if l, err := at(1).Leader(ctx, &v3electionpb.LeaderRequest{Name: name}); err != nil || string(l.Kv.Value) != want {
				t.Fatalf("the leader is %v, %v; want %s", l, err, want)
			}
		}
		if _, err := at(0).Leader(ctx, &v3electionpb.LeaderRequest{Name: name}); status.Convert(err).Message() != concurrency.ErrElectionNoLeader.Error() {
			t.Errorf("a leader before the election: %v", err)
		}
		for id := range int64(3) {
			grantLease(t, servers, id+1)
		}
		first, err := at(0).Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: 1, Value: []byte("a")})
		if err != nil || first.Leader.Rev == 0 || first.Leader.Lease != 1 {
			t.Fatal(first, err)
		}
		leads("a")
		if _, err := at(1).Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: first.Leader, Value: []byte("b")}); err != nil {
			t.Fatal(err)
		}
		leads("b")

		// Of the two that wait, one has lost its lease by the time.
		type outcome struct {
			resp *v3electionpb.CampaignResponse
			err  error
		}
		campaign := func(lease int64) <-chan outcome {
			ended := make(chan outcome, 1)
			go func() {
				resp, err := at(int(lease)).Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: lease, Value: fmt.Appendf(nil, "lease %d", lease)})
				ended <- outcome{resp, err}
			}()
			waitForKeys(t, servers, int(lease))
			return ended
		}
		second, third := campaign(2), campaign(3)
		if _, err := servers[0].Lease().LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 2}); err != nil {
			t.Fatal(err)
		}
		if _, err := at(2).Resign(ctx, &v3electionpb.ResignRequest{Leader: first.Leader}); err != nil {
			t.Fatal(err)
		}
		if o := <-second; o.err == nil || status.Convert(o.err).Message() != concurrency.ErrSessionExpired.Error() {
			t.Errorf("a leader without a lease: %v, %v", o.resp, o.err)
		}
		if o := <-third; o.err != nil {
			t.Fatal(o.err)
		}
		leads("lease 3")
		if _, err := at(0).Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: first.Leader, Value: []byte("late")}); status.Convert(err).Message() != concurrency.ErrElectionNotLeader.Error() {
			t.Errorf("proclaimed by who leads no longer: %v", err)
		}
		if _, err := at(0).Resign(ctx, &v3electionpb.ResignRequest{}); status.Code(err) != codes.Unknown {
			t.Errorf("nobody resigns: %v", err)
		}
		servers[2%len(servers)].sessions.stop()
		if _, err := observed.Recv(); !errors.Is(err, rpctypes.ErrGRPCStopped) {
			t.Errorf("observed from a server that has ended: %v", err)
		}
	})
}
