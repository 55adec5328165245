package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/grpc/metadata"

	"kvd/fsm"
)

func TestKeepAliveThatWantsALeader(t *testing.T) {
	n := startNode(t, nil)
	c := pb.NewLeaseClient(n.dial(t))
	if _, err := c.LeaseGrant(t.Context(), &pb.LeaseGrantRequest{ID: 5, TTL: 100}); err != nil {
		t.Fatal(err)
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
	stream, err := c.LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: 5}); err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err != nil || r.TTL != 100 {
		t.Fatal(r, err)
	}
	n.replica.elect("", false)
	_, err = stream.Recv()
	sameStatus(t, err, rpctypes.ErrGRPCNoLeader)
}

// What etcd's lease service answers, in one group.
func TestLeaseAnswers(t *testing.T) {
	n := startNode(t, func(c *Config) { c.MinLeaseTTL = 2000 })
	c, raw, ctx := n.client(t), pb.NewLeaseClient(n.dial(t)), t.Context()

	chosen, err := c.Grant(ctx, 3000)
	if err != nil || chosen.ID <= 0 || chosen.TTL != 3000 || chosen.Revision != 1 || chosen.MemberId != 0xa1 || chosen.RaftTerm != 7 {
		t.Fatalf("grant: %v, %v", chosen, err)
	}
	short, err := raw.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 5, TTL: -1})
	if err != nil || short.ID != 5 || short.TTL != 2000 {
		t.Fatalf("grant: %v, %v", short, err)
	}
	for name, test := range map[string]struct {
		call func() error
		want error
	}{
		"grant again":     {func() error { _, err := raw.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 5, TTL: 1}); return err }, rpctypes.ErrGRPCLeaseExist},
		"grant too long":  {func() error { _, err := raw.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 5, TTL: 9e9 + 1}); return err }, rpctypes.ErrGRPCLeaseTTLTooLarge},
		"revoke unknown":  {func() error { _, err := raw.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 6}); return err }, rpctypes.ErrGRPCLeaseNotFound},
		"put unknown":     {func() error { _, err := c.Put(ctx, "k", "v", clientv3.WithLease(6)); return err }, rpctypes.ErrLeaseNotFound},
		"renew unknown":   {func() error { _, err := c.KeepAliveOnce(ctx, 6); return err }, rpctypes.ErrLeaseNotFound},
		"the longest one": {func() error { _, err := raw.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 7, TTL: 9e9}); return err }, nil},
	} {
		if err := test.call(); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, key := range []string{"b", "a"} {
		if _, err := c.Put(ctx, key, "v", clientv3.WithLease(chosen.ID)); err != nil {
			t.Fatal(err)
		}
	}
	left, err := c.TimeToLive(ctx, chosen.ID, clientv3.WithAttachedKeys())
	if err != nil || left.TTL > 3000 || left.TTL < 2000 || left.GrantedTTL != 3000 || fmt.Sprintf("%s", left.Keys) != "[a b]" || left.Revision != 3 {
		t.Fatalf("time to live: %v, %v", left, err)
	}
	if left, err := c.TimeToLive(ctx, 6); err != nil || left.TTL != -1 || left.GrantedTTL != 0 || left.ID != 6 || left.Revision != 3 {
		t.Fatalf("time to live of an unknown lease: %v, %v", left, err)
	}
	if all, err := c.Leases(ctx); err != nil || len(all.Leases) != 3 || all.Leases[0].ID != chosen.ID || all.Leases[1].ID != 5 || all.Leases[2].ID != 7 {
		t.Fatalf("leases: %v, %v", all, err)
	}
	if gone, err := c.Revoke(ctx, chosen.ID); err != nil || gone.Header.Revision != 4 {
		t.Fatalf("revoke: %v, %v", gone, err)
	}
	if gone, err := c.Revoke(ctx, 5); err != nil || gone.Header.Revision != 4 { // it has no keys
		t.Fatalf("revoke: %v, %v", gone, err)
	}
	if got, err := c.Get(ctx, "", clientv3.WithPrefix()); err != nil || got.Count != 0 {
		t.Fatalf("%v, %v", got, err)
	}
}

// A stream may send many ids at once, and is answered in their order.
func TestKeepAliveStreams(t *testing.T) {
	n := startNode(t, nil)
	c, ctx := n.client(t), t.Context()
	stream, err := pb.NewLeaseClient(n.dial(t)).LeaseKeepAlive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const leases = 2 * maxRenewals
	for id := range leases {
		if _, err := n.Lease().LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: int64(id + 1), TTL: int64(6000 + id)}); err != nil {
			t.Fatal(err)
		}
	}
	var sending sync.WaitGroup
	sending.Go(func() {
		for id := range leases + 1 {
			if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
				t.Error(err)
			}
		}
		_ = stream.CloseSend()
	})
	for id := range leases + 1 {
		want := int64(6000 + id - 1)
		if id == 0 {
			want = 0 // there is no such lease
		}
		if got, err := stream.Recv(); err != nil || got.ID != int64(id) || got.TTL != want || got.Header.Revision != 1 || got.Header.ClusterId == 0 {
			t.Fatalf("lease %d: %v, %v", id, got, err)
		}
	}
	sending.Wait()
	session, err := concurrency.NewSession(c, concurrency.WithTTL(600))
	if err != nil {
		t.Fatal(err)
	}
	mutex := concurrency.NewMutex(session, "lock")
	if err := mutex.Lock(ctx); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(mutex.Unlock(ctx), session.Close()); err != nil {
		t.Fatal(err)
	}
}

// Streams do not hold up the end of a server.
func TestKeepAliveStreamsEndWithTheServer(t *testing.T) {
	n := startNode(t, func(c *Config) { c.DrainTimeout = time.Hour })
	stream, err := pb.NewLeaseClient(n.dial(t)).LeaseKeepAlive(t.Context())
	if err == nil {
		err = stream.Send(&pb.LeaseKeepAliveRequest{ID: 1})
	}
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, rpctypes.ErrGRPCStopped) {
		t.Fatal(err)
	}
}

// lease is the service of one of the nodes.
func (w *world) lease(node string) pb.LeaseServer { return w.servers[node].Lease() }

func (w *world) anyLease(g *rand.Rand) pb.LeaseServer { return w.lease(pick(g, w.nodes...)) }

func (w *world) grant(id, ttl int64) {
	w.t.Helper()
	if _, err := w.lease("n1").LeaseGrant(w.t.Context(), &pb.LeaseGrantRequest{ID: id, TTL: ttl}); err != nil {
		w.t.Fatal(err)
	}
}

// homeOf is the group of a lease.
func (w *world) homeOf(id int64) *fakeShard { return w.shards[w.Lease(id)] }

// left are the keys with leases that no home has, by key.
func (w *world) left() map[string]int64 {
	w.t.Helper()
	keys := make(map[string]int64)
	for _, s := range w.shards {
		state := s.newest(w.t)
		found, err := state.Range(context.Background(), fsm.User, wholeRange)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, kv := range found.Kvs {
			if kv.Lease == 0 {
				continue
			}
			if info, ok := w.homeOf(kv.Lease).newest(w.t).Lease(kv.Lease); !ok || info.Ending {
				keys[string(kv.Key)] = kv.Lease
			}
		}
	}
	return keys
}

// newest is a state that has everything.
func (s *fakeShard) newest(t testing.TB) *fsm.Store {
	s.mu.Lock()
	r, index := s.replicas[s.order[0]], uint64(len(s.log))
	s.mu.Unlock()
	state, release, err := r.AcquireState(context.Background(), index)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	return state
}

func TestALeaseHasKeysInAllShards(t *testing.T) {
	w := newWorld(t, 4, 5, 2, nil)
	ctx := t.Context()
	w.grant(7, 6000)
	var keys []string
	for i, group := range w.groups {
		key := w.keyIn(group, "k")
		keys = append(keys, key)
		if _, err := w.kv(w.nodes[i%4]).Put(ctx, &pb.PutRequest{Key: []byte(key), Lease: 7}); err != nil {
			t.Fatal(err)
		}
		txn := &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Version{Version: 0}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("{" + key + "}"), Lease: 7}}}},
			Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("{" + key + "}"), Lease: 99}}}}, // no such lease
		}
		keys = append(keys, "{"+key+"}")
		if resp, err := w.kv(w.nodes[(i+1)%4]).Txn(ctx, txn); err != nil || !resp.Succeeded {
			t.Fatal(resp, err)
		}
	}
	slices.Sort(keys)
	for _, node := range w.nodes {
		resp, err := w.lease(node).LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: 7, Keys: true})
		if err != nil || resp.TTL < 5000 || resp.GrantedTTL != 6000 {
			t.Fatal(resp, err)
		}
		var got []string
		for _, key := range resp.Keys {
			got = append(got, string(key))
		}
		if slices.Sort(got); !slices.Equal(got, keys) {
			t.Fatalf("%s: %q instead of %q", node, got, keys)
		}
		if all, err := w.lease(node).LeaseLeases(ctx, &pb.LeaseLeasesRequest{}); err != nil || len(all.Leases) != 1 || all.Leases[0].ID != 7 {
			t.Fatal(all, err)
		}
	}
	if _, err := w.kv("n2").Put(ctx, &pb.PutRequest{Key: []byte("x"), Lease: 8}); !errors.Is(err, rpctypes.ErrGRPCLeaseNotFound) {
		t.Fatal(err)
	}
	resp, err := w.lease("n3").LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 7})
	if err != nil || resp.Header.Revision == 0 {
		t.Fatal(resp, err)
	}
	if got, err := w.kv("n4").Range(ctx, wholeRange); err != nil || len(got.Kvs) != 0 || got.Header.Revision < resp.Header.Revision {
		t.Fatal(got, err)
	}
	if _, err := w.lease("n1").LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 7}); !errors.Is(err, rpctypes.ErrGRPCLeaseNotFound) {
		t.Fatal(err)
	}
	if _, err := w.kv("n2").Put(ctx, &pb.PutRequest{Key: []byte(keys[0]), Lease: 7}); !errors.Is(err, rpctypes.ErrGRPCLeaseNotFound) {
		t.Fatal(err)
	}
	if n := w.callsOf(methodLeaseFinish); n != 0 && n > 3 {
		t.Errorf("%d calls to finish a revocation", n)
	}
}

// racePuts has puts of a lease race with its revocation, and with the next lease of the same id, and says which keys
// outlived their lease.
func racePuts(t *testing.T, plant func(*faults)) map[string]int64 {
	g := seeded(t)
	w := newWorld(t, 3, 5, 2, func(c *Config) { plant(&c.faults) })
	ctx := t.Context()
	for round := range int64(30) {
		id := 1 + round%3
		w.grant(id, 600)
		var racing sync.WaitGroup
		for i := range 6 {
			kv, key := w.anyKV(g), fmt.Sprintf("%d/%d", round, i)
			racing.Go(func() {
				if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Lease: id}); err != nil && !errors.Is(err, rpctypes.ErrGRPCLeaseNotFound) {
					t.Error(err)
				}
			})
		}
		revoking := w.anyLease(g)
		racing.Go(func() {
			if _, err := revoking.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id}); err != nil {
				t.Error(err)
			}
		})
		racing.Wait()
	}
	return w.left()
}

func TestAPutThatRacesWithARevokeLeavesNothing(t *testing.T) {
	if left := racePuts(t, func(*faults) {}); len(left) > 0 {
		t.Fatalf("keys without their leases: %v", left)
	}
}

func TestAnAttachmentWithoutRegistrationIsSeen(t *testing.T) {
	for range 20 {
		if left := racePuts(t, func(f *faults) { f.attachUnregistered = true }); len(left) > 0 {
			return
		}
	}
	t.Fatal("the fault does not show")
}

// A revocation that its leader has begun is brought to its end by the next one.
func TestTheNextLeaderGoesOnWithARevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 4, 4, 2, nil)
		w.grant(7, 60)
		home := w.homeOf(7)
		guest := w.shards[home.group%4+1]
		key := w.keyIn(guest.group, "k")
		if _, err := w.kv("n1").Put(t.Context(), &pb.PutRequest{Key: []byte(key), Lease: 7}); err != nil {
			t.Fatal(err)
		}
		guest.elect("") // so that its keys cannot be deleted
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := w.lease("n1").LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 7}); err == nil {
			t.Fatal("revoked, where nothing can be deleted")
		}
		if resp, err := w.lease("n1").LeaseTimeToLive(t.Context(), &pb.LeaseTimeToLiveRequest{ID: 7}); err != nil || resp.TTL != -1 {
			t.Fatal(resp, err)
		}
		home.elect(home.order[1])
		guest.elect(guest.order[1])
		time.Sleep(5 * time.Second)
		if left := w.left(); len(left) != 0 {
			t.Fatal(left)
		}
		if _, ok := home.newest(t).Lease(7); ok {
			t.Fatal("the lease is still there")
		}
	})
}

// promise is what a client knows of a lease: until then it lives.
type promise struct {
	mu    sync.Mutex
	until time.Time
	ended bool // it was seen to be gone
}

// liveLeases renews leases from all nodes while leaders come and go, and fails when one ends early, or not at all. It
// returns what went wrong.
func liveLeases(t *testing.T, g *rand.Rand, w *world, disturb func(g *rand.Rand)) (tooEarly int64, late int) {
	const leases, ttl = 12, 10
	promises := make([]*promise, leases)
	ctx := t.Context()
	var early atomic.Int64
	for i := range promises {
		promises[i] = &promise{until: time.Now().Add(ttl * time.Second)}
		w.grant(int64(i+1), ttl)
	}
	stop := time.Now().Add(4 * time.Minute)
	var running sync.WaitGroup
	for i, p := range promises {
		id, g := int64(i+1), rand.New(rand.NewPCG(g.Uint64(), 0))
		running.Go(func() { // its holder, who stops at some time
			quit := time.Now().Add(time.Duration(g.Int64N(int64(200 * time.Second))))
			for time.Now().Before(quit) {
				time.Sleep(time.Duration(g.Int64N(int64(9 * time.Second))))
				sent := time.Now()
				answers, err := w.servers[pick(g, w.nodes...)].router.leases.renew(ctx, []int64{id})
				if err != nil {
					continue
				}
				p.mu.Lock()
				switch {
				case answers[0].TTL > 0:
					p.until = sent.Add(ttl * time.Second)
				case time.Now().Before(p.until):
					early.Add(1)
				}
				p.ended = p.ended || answers[0].TTL == 0
				p.mu.Unlock()
			}
		})
	}
	running.Go(func() { // somebody who looks
		for time.Now().Before(stop) {
			time.Sleep(300 * time.Millisecond)
			for i, p := range promises {
				p.mu.Lock()
				if _, ok := w.homeOf(int64(i + 1)).newest(t).Lease(int64(i + 1)); !ok && !p.ended {
					if p.ended = true; time.Now().Before(p.until) {
						early.Add(1)
					}
				}
				p.mu.Unlock()
			}
		}
	})
	for time.Now().Before(stop.Add(-25 * time.Second)) {
		time.Sleep(time.Duration(g.Int64N(int64(12 * time.Second))))
		disturb(g)
	}
	running.Wait()
	for i := range promises {
		if _, ok := w.homeOf(int64(i + 1)).newest(t).Lease(int64(i + 1)); ok {
			late++
		}
	}
	return early.Load(), late
}

// electors changes leaders, and sometimes leaves one behind that does not know.
func electors(w *world) func(*rand.Rand) {
	return func(g *rand.Rand) {
		s := w.shards[pick(g, w.groups...)]
		s.mu.Lock()
		old, term := s.leader, s.term
		for _, r := range s.replicas {
			r.stale = 0
		}
		if g.IntN(2) == 0 {
			s.replicas[old].stale = term
		}
		s.mu.Unlock()
		s.elect(pick(g, s.order...))
	}
}

func TestLeasesAliveAndDead(t *testing.T) {
	for name, test := range map[string]struct {
		plant func(*faults)
		early bool
	}{
		"as built":                 {func(*faults) {}, false},
		"reigns kept":              {func(f *faults) { f.KeepReigns = true }, true},
		"renewed by whoever leads": {func(f *faults) { f.renewUnconfirmed = true }, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := seeded(t)
				for range 100 {
					w := newWorld(t, 3, 3, 2, func(c *Config) { test.plant(&c.faults) })
					early, late := liveLeases(t, g, w, electors(w))
					switch {
					case test.early && early > 0:
						return
					case test.early:
						continue
					case early > 0 || late > 0:
						t.Errorf("%d leases ended early, %d never", early, late)
					}
					return
				}
				t.Error("the fault does not show")
			})
		})
	}
}

// Checkpoints end leases though leaders come and go faster than any of them ends, and do not end a lease that was
// renewed.
func TestCheckpointsOutliveLeaders(t *testing.T) {
	for name, test := range map[string]struct {
		plant   func(*faults)
		renewed bool
		alive   bool
	}{
		"nobody renews":             {func(*faults) {}, false, false},
		"renewed after a point":     {func(*faults) {}, true, true},
		"renewed but not the point": {func(f *faults) { f.keepCheckpoints = true }, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, 2, 1, 2, func(c *Config) { c.LeaseCheckpointInterval = 10 * time.Second; test.plant(&c.faults) })
				w.grant(7, 60)
				s := w.homeOf(7)
				for round := range 5 { // 75 s
					time.Sleep(15 * time.Second)
					if test.renewed && round == 3 {
						answers, err := w.servers["n2"].router.leases.renew(t.Context(), []int64{7})
						if err != nil || answers[0].TTL != 60 {
							t.Fatal(answers, err)
						}
					}
					s.elect(w.nodes[(round+1)%2])
				}
				if info, ok := s.newest(t).Lease(7); !ok || info.Remaining == 0 && !test.renewed {
					t.Fatal("there was no checkpoint, or the lease ended early", info, ok)
				}
				time.Sleep(40 * time.Second)
				if _, ok := s.newest(t).Lease(7); ok != test.alive {
					t.Fatalf("after 115 s, the lease is there: %t", ok)
				}
				time.Sleep(40 * time.Second)
				if _, ok := s.newest(t).Lease(7); ok {
					t.Fatal("the lease never ends")
				}
			})
		})
	}
}

// An expiry that was decided is not carried out on the next lease of the same id, nor in another term.
func TestAnExpiryIsForOneLeaseInOneTerm(t *testing.T) {
	w := newWorld(t, 2, 1, 2, nil)
	w.grant(7, 6000)
	s := w.homeOf(7)
	info, _ := s.newest(t).Lease(7)
	lead := s.replicas[s.leader]
	g, err := w.servers[s.leader].router.leases.of(t.Context(), s.group, lead, 1)
	if err != nil {
		t.Fatal(err)
	}
	old := leaseOf(info)
	if _, err := w.lease("n2").LeaseRevoke(t.Context(), &pb.LeaseRevokeRequest{ID: 7}); err != nil {
		t.Fatal(err)
	}
	w.grant(7, 6000)
	if err := g.decide(old); !errors.Is(err, fsm.ErrLeaseNotFound) {
		t.Fatal("the next lease of the same id ends with the last one:", err)
	}
	info, _ = s.newest(t).Lease(7)
	s.elect("n2")
	s.elect("n1")
	if err := g.decide(leaseOf(info)); !errors.Is(err, fsm.ErrLeaseStale) && g.ctx.Err() == nil {
		t.Fatal("a lease was ended in another term:", err)
	}
	if info, ok := s.newest(t).Lease(7); !ok || info.Ending {
		t.Fatal("the lease has ended")
	}
}
