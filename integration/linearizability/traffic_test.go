package linearizability

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// fault is something a store does wrong, now and then.
type fault string

const (
	none         fault = ""
	staleRead    fault = "answers a read from the past"
	oldRevision  fault = "answers a read from the past under the present revision"
	lostWrite    fault = "acknowledges a write that it drops"
	wrongSwap    fault = "swaps without looking"
	twice        fault = "carries a write out twice"
	torn         fault = "carries out half of a transaction"
	tornSnapshot fault = "answers a transaction of reads from two moments"
	revisionBack fault = "gives a revision a second time"
	lostDelete   fault = "says that it deleted, and does not"
)

// fakeStore is an etcd store of few keys in one struct, with delays, lost answers and a planted fault.
type fakeStore struct {
	fault fault

	mu       sync.Mutex
	random   *rand.Rand
	revision int64
	data     map[string]*mvccpb.KeyValue
	past     map[string]*mvccpb.KeyValue // data as it was some time ago
	pastRev  int64
	planted  int
}

func newFakeStore(seed uint64, f fault) *fakeStore {
	return &fakeStore{fault: f, random: rand.New(rand.NewPCG(seed, 1)), revision: 1, pastRev: 1,
		data: make(map[string]*mvccpb.KeyValue), past: make(map[string]*mvccpb.KeyValue)}
}

// do carries a request out at a random moment between call and answer; some answers are lost, and some lost
// requests are carried out much later.
func (s *fakeStore) do(ctx context.Context, request *pb.TxnRequest) (*pb.TxnResponse, error) {
	s.mu.Lock()
	before, after := s.delay(), s.delay()
	lost, refused, late := s.random.IntN(40) == 0, s.random.IntN(60) == 0, s.random.IntN(2) == 0
	s.mu.Unlock()
	time.Sleep(before)
	if refused {
		return nil, fmt.Errorf("busy: %w", ErrNotSent)
	}
	if lost && late {
		time.AfterFunc(before*7, func() { s.apply(request) })
		return nil, errors.New("lost request")
	}
	resp := s.apply(request)
	time.Sleep(after)
	if lost {
		return nil, errors.New("lost answer")
	}
	return resp, ctx.Err()
}

func (s *fakeStore) delay() time.Duration {
	return time.Duration(s.random.IntN(1000)) * time.Microsecond
}

// plant reports whether the fault strikes now.
func (s *fakeStore) plant(f fault) bool {
	if s.fault != f || s.random.IntN(10) != 0 {
		return false
	}
	s.planted++
	return true
}

func (s *fakeStore) apply(request *pb.TxnRequest) *pb.TxnResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.random.IntN(20) == 0 {
		s.pastRev, s.past = s.revision, make(map[string]*mvccpb.KeyValue)
		for key, kv := range s.data {
			s.past[key] = kv
		}
	}
	resp := &pb.TxnResponse{Succeeded: true}
	for _, c := range request.Compare {
		kv := s.data[string(c.Key)]
		held := kv != nil && string(kv.Value) == string(c.GetValue())
		if c.Target == pb.Compare_CREATE {
			held = kv == nil
		}
		resp.Succeeded = held || s.plant(wrongSwap)
	}
	branch := request.Success
	if !resp.Succeeded {
		branch = request.Failure
	}
	revision := s.revision + 1
	if s.plant(revisionBack) {
		revision = s.revision
	}
	changed := false
	for i, op := range branch {
		if i == 1 && op.GetRequestPut() != nil && s.plant(torn) {
			break
		}
		resp.Responses = append(resp.Responses, s.one(op, revision, &changed))
	}
	if changed {
		s.revision = revision
	}
	resp.Header = &pb.ResponseHeader{Revision: s.revision}
	if len(resp.Responses) == 1 && !changed && resp.Responses[0].GetResponseRange() != nil && len(request.Compare) == 0 && s.plant(staleRead) {
		resp.Header.Revision = s.pastRev
		resp.Responses[0].GetResponseRange().Kvs = kvs(s.past[string(request.Success[0].GetRequestRange().Key)])
	}
	return resp
}

func kvs(kv *mvccpb.KeyValue) []*mvccpb.KeyValue {
	if kv == nil {
		return nil
	}
	return []*mvccpb.KeyValue{kv}
}

func (s *fakeStore) one(op *pb.RequestOp, revision int64, changed *bool) *pb.ResponseOp {
	switch r := op.Request.(type) {
	case *pb.RequestOp_RequestPut:
		prev := s.data[string(r.RequestPut.Key)]
		*changed = true
		if s.plant(lostWrite) {
			return &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{PrevKv: prev}}}
		}
		next := &mvccpb.KeyValue{Key: r.RequestPut.Key, Value: r.RequestPut.Value, CreateRevision: revision, ModRevision: revision, Version: 1}
		if prev != nil {
			next.CreateRevision, next.Version = prev.CreateRevision, prev.Version+1
		}
		if s.plant(twice) {
			next.Version++
		}
		s.data[string(next.Key)] = next
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{PrevKv: prev}}}
	case *pb.RequestOp_RequestDeleteRange:
		prev := kvs(s.data[string(r.RequestDeleteRange.Key)])
		*changed = *changed || len(prev) > 0
		if !s.plant(lostDelete) {
			delete(s.data, string(r.RequestDeleteRange.Key))
		}
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{
			ResponseDeleteRange: &pb.DeleteRangeResponse{Deleted: int64(len(prev)), PrevKvs: prev}}}
	default:
		key := op.GetRequestRange().Key
		now := kvs(s.data[string(key)])
		if s.plant(oldRevision) || s.plant(tornSnapshot) {
			now = kvs(s.past[string(key)])
		}
		return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: now}}}
	}
}

func (s *fakeStore) single(ctx context.Context, op *pb.RequestOp) (*pb.ResponseHeader, *pb.ResponseOp, error) {
	resp, err := s.do(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{op}})
	if err != nil {
		return nil, nil, err
	}
	return resp.Header, resp.Responses[0], nil
}

func (s *fakeStore) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	header, op, err := s.single(ctx, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
	if err != nil {
		return nil, err
	}
	return &pb.RangeResponse{Header: header, Kvs: op.GetResponseRange().Kvs}, nil
}

func (s *fakeStore) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	header, op, err := s.single(ctx, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}})
	if err != nil {
		return nil, err
	}
	return &pb.PutResponse{Header: header, PrevKv: op.GetResponsePut().PrevKv}, nil
}

func (s *fakeStore) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	header, op, err := s.single(ctx, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}})
	if err != nil {
		return nil, err
	}
	out := op.GetResponseDeleteRange()
	return &pb.DeleteRangeResponse{Header: header, Deleted: out.Deleted, PrevKvs: out.PrevKvs}, nil
}

func (s *fakeStore) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	return s.do(ctx, r)
}

// traffic runs some seconds of virtual time against a store with a planted fault.
func traffic(t *testing.T, seed uint64, f fault) ([]Op, int) {
	var h History
	store := newFakeStore(seed, f)
	synctest.Test(t, func(t *testing.T) {
		services := make([]Service, 6)
		for i := range services {
			services[i] = store
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		Traffic{Services: services, Keys: []string{"a", "b", "c"}, Seed: seed}.Run(ctx, &h)
		time.Sleep(time.Minute) // for the late ones
	})
	return h.Ops(), store.planted
}

func TestTrafficOnARightStore(t *testing.T) {
	for range 5 {
		seed := rand.Uint64()
		ops, _ := traffic(t, seed, none)
		if err := Check(ops, Config{Dir: t.TempDir(), OneOrder: true}); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		summary := Summarize(ops, nil)
		if err := summary.Vacuous(); err != nil || summary.Unknown == 0 {
			t.Fatalf("seed %d: %v: %+v", seed, err, summary)
		}
	}
}

func TestPlantedFaultsAreCaught(t *testing.T) {
	for _, f := range []fault{staleRead, oldRevision, lostWrite, wrongSwap, twice, torn, tornSnapshot, revisionBack, lostDelete} {
		t.Run(string(f), func(t *testing.T) {
			seed := rand.Uint64()
			ops, planted := traffic(t, seed, f)
			err := Check(ops, Config{Dir: t.TempDir(), OneOrder: true})
			if !errors.Is(err, ErrViolation) || planted == 0 {
				t.Fatalf("seed %d: %d planted, %d operations: %v", seed, planted, len(ops), err)
			}
		})
	}
}

// The search alone, without the order by revisions, must do for a store of several shards.
func TestSearchAloneCatches(t *testing.T) {
	for _, f := range []fault{staleRead, oldRevision, lostWrite, wrongSwap, twice, lostDelete} {
		t.Run(string(f), func(t *testing.T) {
			seed := rand.Uint64()
			ops, planted := traffic(t, seed, f)
			if err := Check(ops, Config{Dir: t.TempDir()}); !errors.Is(err, ErrViolation) {
				t.Fatalf("seed %d: %d planted, %d operations: %v", seed, planted, len(ops), err)
			}
		})
	}
}
