package leases

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/integration/linearizability"
	"kvd/integration/watches"
	"kvd/ring"
)

// fault is something a store does wrong with leases.
type fault string

const (
	none        fault = ""
	early       fault = "ends leases when half their time is over"
	notRenewed  fault = "acknowledges renewals that it drops"
	oneKeyEarly fault = "deletes one key before the lease ends"
	revokeLeft  fault = "leaves a key when a lease is revoked"
	putAfter    fault = "takes puts with leases that have ended"
	immortal    fault = "never ends a lease"
	slow        fault = "ends leases long after their time"
	twoSteps    fault = "deletes the keys at two revisions"
	detachLost  fault = "deletes keys that had been taken from the lease"
	comesBack   fault = "renews leases that have ended"
)

type fakeLease struct {
	ttl     time.Duration
	expires time.Time
	keys    []string
	ended   bool
}

// fakeStore has leases, and delays and lost answers.
type fakeStore struct {
	linearizability.Service
	fault fault

	mu        sync.Mutex
	random    *rand.Rand
	revision  int64
	keys      map[string]int64 // the lease of each
	leases    map[int64]*fakeLease
	deletions []watches.Deletion
}

func newFakeStore(seed uint64, f fault) *fakeStore {
	return &fakeStore{fault: f, random: rand.New(rand.NewPCG(seed, 3)), revision: 1, keys: make(map[string]int64), leases: make(map[int64]*fakeLease)}
}

// expire ends leases until ctx is done.
func (s *fakeStore) expire(ctx context.Context) {
	for pause(ctx, 100*time.Millisecond) {
		s.mu.Lock()
		for id, l := range s.leases {
			over := time.Since(l.expires)
			switch s.fault {
			case early:
				over += l.ttl / 2
			case immortal:
				over -= time.Hour
			case slow:
				over -= 10 * time.Second
			case oneKeyEarly:
				if len(l.keys) > 0 && over > -l.ttl/2 {
					s.remove(l.keys[0])
					l.keys = l.keys[1:]
				}
			}
			if over > 0 && !l.ended {
				s.end(id, "")
			}
		}
		s.mu.Unlock()
	}
}

func (s *fakeStore) remove(key string) {
	if _, ok := s.keys[key]; ok {
		delete(s.keys, key)
		s.deletions = append(s.deletions, watches.Deletion{Key: key, Revision: s.revision + 1, Time: time.Now()})
	}
}

// end ends a lease and leaves one key.
func (s *fakeStore) end(id int64, leave string) {
	l := s.leases[id]
	l.ended = true
	for _, key := range l.keys {
		if held := s.keys[key]; key != leave && (held == id || s.fault == detachLost) {
			s.remove(key)
		}
		if s.fault == twoSteps {
			s.revision++
		}
	}
	s.revision++
}

// do carries a request out between two delays; some answers are lost.
func do[A any](s *fakeStore, request func() (A, error)) (A, error) {
	s.mu.Lock()
	before, after, lost := time.Duration(s.random.IntN(20))*time.Millisecond, time.Duration(s.random.IntN(20))*time.Millisecond, s.random.IntN(40) == 0
	s.mu.Unlock()
	time.Sleep(before)
	s.mu.Lock()
	answer, err := request()
	s.mu.Unlock()
	time.Sleep(after)
	if lost {
		return answer, errors.New("lost answer")
	}
	return answer, err
}

func (s *fakeStore) LeaseGrant(_ context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	return do(s, func() (*pb.LeaseGrantResponse, error) {
		id, ttl := s.random.Int64(), time.Duration(r.TTL)*time.Second
		s.leases[id] = &fakeLease{ttl: ttl, expires: time.Now().Add(ttl)}
		return &pb.LeaseGrantResponse{ID: id, TTL: r.TTL}, nil
	})
}

// there returns a lease that has not ended; nil if it has.
func (s *fakeStore) there(id int64) *fakeLease {
	if l := s.leases[id]; l != nil && !l.ended {
		return l
	}
	return nil
}

func (s *fakeStore) KeepAlive(_ context.Context, id int64) (*pb.LeaseKeepAliveResponse, error) {
	return do(s, func() (*pb.LeaseKeepAliveResponse, error) {
		l := s.there(id)
		if l == nil && s.fault == comesBack && s.leases[id] != nil {
			l = s.leases[id]
			l.ended = false
		}
		if l == nil {
			return &pb.LeaseKeepAliveResponse{ID: id}, nil
		}
		if s.fault != notRenewed {
			l.expires = time.Now().Add(l.ttl)
		}
		return &pb.LeaseKeepAliveResponse{ID: id, TTL: int64(l.ttl / time.Second)}, nil
	})
}

func (s *fakeStore) LeaseTimeToLive(_ context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	return do(s, func() (*pb.LeaseTimeToLiveResponse, error) {
		l := s.there(r.ID)
		if l == nil {
			return &pb.LeaseTimeToLiveResponse{ID: r.ID, TTL: -1}, nil
		}
		return &pb.LeaseTimeToLiveResponse{ID: r.ID, TTL: int64(time.Until(l.expires) / time.Second), GrantedTTL: int64(l.ttl / time.Second)}, nil
	})
}

func (s *fakeStore) LeaseRevoke(_ context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	return do(s, func() (*pb.LeaseRevokeResponse, error) {
		l := s.there(r.ID)
		if l == nil {
			return nil, rpctypes.ErrGRPCLeaseNotFound
		}
		leave := ""
		if s.fault == revokeLeft && len(l.keys) > 0 {
			leave = l.keys[0]
		}
		s.end(r.ID, leave)
		return &pb.LeaseRevokeResponse{}, nil
	})
}

func (s *fakeStore) Put(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	return do(s, func() (*pb.PutResponse, error) {
		if r.Lease != 0 {
			l := s.there(r.Lease)
			if l == nil && s.fault != putAfter {
				return nil, rpctypes.ErrGRPCLeaseNotFound
			}
			if l != nil {
				l.keys = append(l.keys, string(r.Key))
			}
		}
		s.keys[string(r.Key)] = r.Lease
		s.revision++
		return &pb.PutResponse{}, nil
	})
}

func (s *fakeStore) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	return do(s, func() (*pb.RangeResponse, error) {
		answer := &pb.RangeResponse{}
		for key, lease := range s.keys {
			if key == string(r.Key) || len(r.RangeEnd) > 0 {
				answer.Kvs = append(answer.Kvs, &mvccpb.KeyValue{Key: []byte(key), Lease: lease})
			}
		}
		return answer, nil
	})
}

// hold runs a minute of virtual time over a store with a planted fault, and returns the verdict.
func hold(t *testing.T, seed uint64, f fault) (s Summary, verdict error) {
	synctest.Test(t, func(t *testing.T) {
		store := newFakeStore(seed, f)
		ctx, cancel := context.WithCancel(t.Context())
		var group sync.WaitGroup
		group.Go(func() { store.expire(ctx) })
		log := NewLog()
		traffic := Traffic{Services: []Service{store, store}, Clients: 4, Seed: seed, TTL: 2, Log: log}
		busy, end := context.WithTimeout(ctx, time.Minute)
		traffic.Run(busy)
		end()
		finish, end := context.WithTimeout(ctx, 20*time.Second)
		left := traffic.Finish(finish)
		end()
		cancel()
		group.Wait()
		log.Tell(store.deletions)
		s = Summarize(log.Ops())
		verdict = errors.Join(left, Check(log.Ops(), Config{Bound: 2 * time.Second}))
	})
	return s, verdict
}

func TestRightLeasesPass(t *testing.T) {
	for range 5 {
		seed := rand.Uint64()
		summary, err := hold(t, seed, none)
		if err = errors.Join(err, summary.Vacuous()); err != nil {
			t.Fatalf("seed %d: %v: %+v", seed, err, summary)
		}
	}
}

func TestPlantedFaultsAreCaught(t *testing.T) {
	for _, f := range []fault{early, notRenewed, oneKeyEarly, revokeLeft, putAfter, immortal, slow, twoSteps, detachLost, comesBack} {
		t.Run(string(f), func(t *testing.T) {
			seed := rand.Uint64()
			summary, err := hold(t, seed, f)
			if !errors.Is(err, linearizability.ErrViolation) {
				t.Fatalf("seed %d: %v: %+v", seed, err, summary)
			}
			line, _, _ := strings.Cut(err.Error(), "\n")
			t.Log(line)
		})
	}
}

// While something is broken a lease may live on, and that only.
func TestOutlivingIsFineWhileSomethingIsBroken(t *testing.T) {
	second := time.Second
	ops := []Op{
		{Kind: Grant, Lease: 1, TTL: 2 * second, Answered: second},
		{Kind: Attach, Lease: 1, Key: "k", Sent: second, Answered: second},
		{Kind: Look, Lease: 1, Key: "k", Sent: 20 * second, Answered: 20 * second},
	}
	for _, c := range []struct {
		broken []Span
		late   bool
	}{{nil, true}, {[]Span{{0, 12 * second}}, true}, {[]Span{{0, 14 * second}}, false}, {[]Span{{19 * second, 30 * second}}, false}} {
		if err := Check(slices.Clone(ops), Config{Broken: c.broken}); (err != nil) != c.late {
			t.Errorf("broken %v: %v", c.broken, err)
		}
	}
}

// Shards learn of the end of a lease one after the other: until then they take puts with it, and not afterwards.
func TestShardsLearnOfAnEndOneAfterTheOther(t *testing.T) {
	const shards, id = 8, 1
	home := ring.ShardOfLease(id, shards)
	var here, there, elsewhere string // keys of the home and of two other shards
	for i := 0; here == "" || there == "" || elsewhere == ""; i++ {
		key := fmt.Sprint("k", i)
		switch shard := ring.ShardOf([]byte(key), shards); {
		case shard == home:
			here = key
		case there == "" || ring.ShardOf([]byte(there), shards) == shard:
			there = key
		default:
			elsewhere = key
		}
	}
	at := func(second int, kind Kind, key string, outcome Outcome) Op {
		when := time.Duration(second) * time.Second
		op := Op{Kind: kind, Lease: id, Key: key, Outcome: outcome, Sent: when, Answered: when + time.Millisecond}
		if kind == Grant || kind == Renew && outcome == Done {
			op.TTL = time.Second
		}
		return op
	}
	homeEnded, thereEnded := at(5, Renew, "", Missing), at(5, Gone, there, Done)
	for _, c := range []struct {
		end, op Op
		isWrong bool
	}{
		{homeEnded, at(6, Attach, there, Done), false},
		{homeEnded, at(6, Attach, here, Done), true},
		{homeEnded, at(6, Renew, "", Done), true},
		{thereEnded, at(6, Attach, elsewhere, Done), false},
		{thereEnded, at(6, Attach, there, Done), true},
		{thereEnded, at(6, Attach, here, Done), true},
		{thereEnded, at(6, Renew, "", Done), true},
	} {
		ops := []Op{at(1, Grant, "", Done), c.end, c.op}
		if err := Check(ops, Config{Shards: shards}); (err != nil) != c.isWrong {
			t.Errorf("%v, then %v: %v", c.end, c.op, err)
		}
		if err := Check(ops, Config{}); err == nil {
			t.Errorf("in one store: %v, then %v", c.end, c.op)
		}
	}
}
