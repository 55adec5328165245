package linearizability

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
)

// Faults of a store with shards.
const (
	tornRange     fault = "reads each shard as it is"
	rangeTooSoon  fault = "reads across shards without waiting for what is in flight"
	pastTooSoon   fault = "reads at a revision of the past without waiting for what is in flight"
	oldMoment     fault = "reads across shards at a moment of the past"
	readTooSoon   fault = "reads a shard without waiting for a write that has its revision"
	oldFloor      fault = "numbers a write from what was reserved long ago"
	pageElsewhere fault = "reads every page at another moment"
	shardStale    fault = "answers a read of a shard from the past"
)

// version is a change of a key; a deletion if kv is nil.
type version struct {
	revision int64
	kv       *mvccpb.KeyValue
}

// fakeShard holds every version of its keys.
type fakeShard struct {
	revision int64
	keys     map[string][]version
	inFlight []int64 // revisions of writes that have been numbered and not yet carried out, ascending
}

// fakeShards is a store with a shard for each tag. A write takes a revision from the common counter, is on its way for a
// while, and is then carried out, in the order of revisions in its shard.
type fakeShards struct {
	fault fault

	mu      sync.Mutex
	random  *rand.Rand
	counter int64
	hoard   []int64 // revisions that nobody has used
	shards  map[string]*fakeShard
	planted int
}

func newFakeShards(seed uint64, f fault) *fakeShards {
	return &fakeShards{fault: f, random: rand.New(rand.NewPCG(seed, 2)), counter: 1, shards: make(map[string]*fakeShard)}
}

func (s *fakeShards) plant(f fault) bool {
	always := f == readTooSoon || f == pastTooSoon || f == rangeTooSoon // they need more to happen just then
	if s.fault != f || !always && s.random.IntN(3) != 0 {
		return false
	}
	s.planted++
	return true
}

// pause lets others work for a while; the mutex is held before and after.
func (s *fakeShards) pause() {
	d := time.Duration(s.random.IntN(1000)) * time.Microsecond
	if s.random.IntN(5) == 0 {
		d *= 10
	}
	s.mu.Unlock()
	time.Sleep(d)
	s.mu.Lock()
}

func (s *fakeShards) shard(key []byte) *fakeShard {
	tag, _, _ := strings.Cut(string(key), "}")
	if s.shards[tag] == nil {
		s.shards[tag] = &fakeShard{revision: 1, keys: make(map[string][]version)}
	}
	return s.shards[tag]
}

// settle waits until a shard has carried out every write up to a revision.
func (s *fakeShards) settle(sh *fakeShard, revision int64) {
	for len(sh.inFlight) > 0 && sh.inFlight[0] <= revision {
		s.mu.Unlock()
		time.Sleep(20 * time.Microsecond)
		s.mu.Lock()
	}
}

func (sh *fakeShard) at(key string, revision int64) *mvccpb.KeyValue {
	for _, v := range slices.Backward(sh.keys[key]) {
		if v.revision <= revision {
			return v.kv
		}
	}
	return nil
}

// change carries out a request that may change something, and sometimes loses the answer.
func (s *fakeShards) change(key []byte, do func(sh *fakeShard, revision int64) (changed bool)) (*pb.ResponseHeader, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pause()
	sh := s.shard(key)
	s.counter++
	revision := s.counter
	if s.random.IntN(5) == 0 { // as a crash between the reservation and the write does
		s.hoard = append(s.hoard, revision)
		s.counter++
		revision = s.counter
	}
	oldest := sh.revision
	if len(sh.inFlight) > 0 {
		oldest = sh.inFlight[len(sh.inFlight)-1]
	}
	if len(s.hoard) > 0 && s.hoard[len(s.hoard)-1] > oldest && s.plant(oldFloor) {
		revision = s.hoard[len(s.hoard)-1]
		s.hoard = s.hoard[:len(s.hoard)-1]
	}
	sh.inFlight = append(sh.inFlight, revision)
	s.pause()
	s.settle(sh, revision-1)
	changed := do(sh, revision)
	sh.inFlight = sh.inFlight[1:]
	if changed {
		sh.revision = revision
	}
	header := &pb.ResponseHeader{Revision: sh.revision}
	if s.random.IntN(40) == 0 {
		return nil, errors.New("lost answer")
	}
	s.pause()
	return header, nil
}

func (sh *fakeShard) write(key, value []byte, revision int64) (before *mvccpb.KeyValue) {
	before = sh.at(string(key), revision)
	next := &mvccpb.KeyValue{Key: key, Value: value, CreateRevision: revision, ModRevision: revision, Version: 1}
	if before != nil {
		next.CreateRevision, next.Version = before.CreateRevision, before.Version+1
	}
	sh.keys[string(key)] = append(sh.keys[string(key)], version{revision, next})
	return before
}

func (s *fakeShards) Put(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	var before *mvccpb.KeyValue
	header, err := s.change(r.Key, func(sh *fakeShard, revision int64) bool { before = sh.write(r.Key, r.Value, revision); return true })
	return &pb.PutResponse{Header: header, PrevKv: before}, err
}

func (s *fakeShards) DeleteRange(_ context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	var before *mvccpb.KeyValue
	header, err := s.change(r.Key, func(sh *fakeShard, revision int64) bool {
		if before = sh.at(string(r.Key), revision); before != nil {
			sh.keys[string(r.Key)] = append(sh.keys[string(r.Key)], version{revision, nil})
		}
		return before != nil
	})
	return &pb.DeleteRangeResponse{Header: header, Deleted: int64(len(kvs(before))), PrevKvs: kvs(before)}, err
}

func (s *fakeShards) Txn(_ context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	resp := &pb.TxnResponse{Succeeded: true}
	key := r.Success[0].GetRequestPut().Key
	var err error
	resp.Header, err = s.change(key, func(sh *fakeShard, revision int64) bool {
		for _, c := range r.Compare {
			kv := sh.at(string(c.Key), revision)
			resp.Succeeded = kv != nil && string(kv.Value) == string(c.GetValue()) || kv == nil && c.Target == pb.Compare_CREATE
		}
		if !resp.Succeeded {
			resp.Responses = []*pb.ResponseOp{{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: kvs(sh.at(string(key), revision))}}}}
			return false
		}
		for _, op := range r.Success {
			if sh != s.shard(op.GetRequestPut().Key) {
				panic("a transaction over two shards")
			}
			sh.write(op.GetRequestPut().Key, op.GetRequestPut().Value, revision)
			resp.Responses = append(resp.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}})
		}
		return true
	})
	return resp, err
}

func (s *fakeShards) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pause()
	defer s.pause()
	if len(r.RangeEnd) == 0 {
		return s.readOne(r), nil
	}
	moment := r.Revision
	past := moment > 0
	if !past {
		moment = s.counter
		if s.plant(oldMoment) {
			moment = max(1, moment-5)
		}
	}
	if past && s.plant(pageElsewhere) {
		moment = s.counter
	}
	found := make(map[string]*mvccpb.KeyValue)
	for _, tag := range slices.Sorted(s.tags()) {
		s.pause()
		sh := s.shards[tag]
		if past && !s.plant(pastTooSoon) || !past && !s.plant(rangeTooSoon) {
			s.settle(sh, moment)
		}
		at := moment
		if s.plant(tornRange) {
			at = sh.revision
		}
		for key := range sh.keys {
			if kv := sh.at(key, at); kv != nil && key >= string(r.Key) && key < string(r.RangeEnd) {
				found[key] = kv
			}
		}
	}
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: moment}, Count: int64(len(found))}
	for _, kv := range found {
		resp.Kvs = append(resp.Kvs, kv)
	}
	slices.SortFunc(resp.Kvs, func(a, b *mvccpb.KeyValue) int { return strings.Compare(string(a.Key), string(b.Key)) })
	if r.Limit > 0 && int64(len(resp.Kvs)) > r.Limit {
		resp.Kvs, resp.More = resp.Kvs[:r.Limit], true
	}
	return resp, nil
}

func (s *fakeShards) tags() func(func(string) bool) {
	return func(yield func(string) bool) {
		for tag := range s.shards {
			if !yield(tag) {
				return
			}
		}
	}
}

// readOne reads a key as its shard has it once it has carried out what was numbered before.
func (s *fakeShards) readOne(r *pb.RangeRequest) *pb.RangeResponse {
	sh := s.shard(r.Key)
	if !r.Serializable && !s.plant(readTooSoon) {
		s.settle(sh, s.counter)
	}
	revision := sh.revision
	if s.plant(shardStale) {
		revision = max(1, revision-10)
	}
	return &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: revision}, Kvs: kvs(sh.at(string(r.Key), revision))}
}

// shardedTraffic runs some seconds of virtual time against a store of shards with a planted fault.
func shardedTraffic(t *testing.T, seed uint64, f fault) ([]Op, int) {
	var h History
	store := newFakeShards(seed, f)
	synctest.Test(t, func(t *testing.T) {
		services := make([]Service, 8)
		for i := range services {
			services[i] = store
		}
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
		defer cancel()
		keys := []string{"{a}1", "{a}2", "{b}1", "{b}2", "{c}1", "{c}2"}
		Traffic{Services: services, Keys: keys, Seed: seed, Sharded: true, Think: 2 * time.Millisecond}.Run(ctx, &h)
	})
	return h.Ops(), store.planted
}

func TestTrafficOnRightShards(t *testing.T) {
	for range 5 {
		seed := rand.Uint64()
		ops, _ := shardedTraffic(t, seed, none)
		if err := Check(ops, Config{Dir: t.TempDir(), OneOrder: true, Sharded: true}); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		summary := Summarize(ops, nil)
		if err := errors.Join(summary.Vacuous(), summary.VacuousSnapshots()); err != nil || summary.Unknown == 0 {
			t.Fatalf("seed %d: %v: %+v", seed, err, summary)
		}
	}
}

func TestPlantedFaultsOfShardsAreCaught(t *testing.T) {
	for _, f := range []fault{tornRange, rangeTooSoon, pastTooSoon, oldMoment, readTooSoon, oldFloor, pageElsewhere, shardStale} {
		t.Run(string(f), func(t *testing.T) {
			seed := rand.Uint64()
			ops, planted := shardedTraffic(t, seed, f)
			err := Check(ops, Config{Dir: t.TempDir(), OneOrder: true, Sharded: true})
			if !errors.Is(err, ErrViolation) || planted == 0 {
				t.Fatalf("seed %d: %d planted, %d operations: %v", seed, planted, len(ops), err)
			}
		})
	}
}

// A history of shards that could not have shown anything is no proof.
func TestVacuousSnapshots(t *testing.T) {
	windows := []Window{{Fault: "kill", From: 10, To: 20}}
	snapshot := func(client int, call, ret, revision int64) []Op {
		var ops []Op
		for _, key := range []string{"{a}1", "{b}1"} {
			ops = append(ops, Op{Client: client, Txn: call, Call: call, Return: ret,
				Input: Input{Kind: Get, Key: key, Snapshot: true}, Output: Output{Revision: revision}})
		}
		return ops
	}
	write := func(key string, call, ret, revision int64) Op {
		return Op{Client: int(call), Txn: call, Call: call, Return: ret, Input: Input{Kind: Put, Key: key, Value: fmt.Sprint(call)}, Output: Output{Revision: revision}}
	}
	past := Op{Client: 50, Txn: 50, Call: 50, Return: 51, Input: Input{Kind: Stale, Key: "{a}1", Past: true}, Output: Output{Revision: 1}}
	inside, outside := snapshot(1, 12, 15, 2), snapshot(2, 30, 35, 2)
	changes := []Op{write("{a}1", 11, 14, 3), write("{b}1", 13, 16, 4)}
	for name, test := range map[string]struct {
		ops     []Op
		vacuous bool
	}{
		"all there is":             {ops: slices.Concat(changes, inside, []Op{past})},
		"no snapshot":              {ops: slices.Concat(changes, []Op{past}), vacuous: true},
		"nothing else went on":     {ops: slices.Concat(inside, []Op{past}), vacuous: true},
		"one key changed":          {ops: slices.Concat(changes[:1], inside, []Op{past}), vacuous: true},
		"none while it was broken": {ops: slices.Concat(changes, outside, []Op{past}), vacuous: true},
		"no read of the past":      {ops: slices.Concat(changes, inside), vacuous: true},
	} {
		slices.SortStableFunc(test.ops, func(a, b Op) int { return int(a.Call - b.Call) })
		if err := Summarize(test.ops, windows).VacuousSnapshots(); errors.Is(err, ErrVacuous) != test.vacuous {
			t.Errorf("%s: %v", name, err)
		}
	}
}
