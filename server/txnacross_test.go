package server

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

var (
	lockRange = &pb.RangeRequest{Key: []byte("lock/"), RangeEnd: []byte("lock0"), SortTarget: pb.RangeRequest_CREATE, SortOrder: pb.RangeRequest_ASCEND}
	readOp    = func(r *pb.RangeRequest) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
	}
	putOp = func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key)}}}
	}
	deleteOp = func(key, end string) *pb.RequestOp {
		r := &pb.DeleteRangeRequest{Key: []byte(key)}
		if end != "" {
			r.RangeEnd = []byte(end)
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}
	}
)

// enter is what Mutex of etcd's client does: put a key if it is not there, and
// read all keys below the name.
func enter(key string) *pb.TxnRequest {
	return &pb.TxnRequest{
		Compare: []*pb.Compare{{Target: pb.Compare_CREATE, Key: []byte(key), TargetUnion: &pb.Compare_CreateRevision{}}},
		Success: []*pb.RequestOp{putOp(key), readOp(lockRange)},
		Failure: []*pb.RequestOp{readOp(&pb.RangeRequest{Key: []byte(key)}), readOp(lockRange)},
	}
}

// lockKeys has many clients enter and leave, and says how many answers were not
// what the keys were at the answer's revision.
func lockKeys(t *testing.T, plant func(*faults)) (wrong int) {
	w := newWorld(t, 3, 5, 2, func(c *Config) { plant(&c.faults) })
	seed := seeded(t).Uint64()
	type answer struct {
		at   int64
		keys []string
	}
	var (
		mu      sync.Mutex
		entered = make(map[int64]string) // by revision
		left    = make(map[int64]string)
		answers []answer
		clients sync.WaitGroup
	)
	for i := range 8 {
		clients.Go(func() {
			g := rand.New(rand.NewPCG(seed, uint64(i)))
			key := fmt.Sprint("lock/", i)
			for range 60 {
				if g.IntN(3) == 0 {
					resp, err := w.anyKV(g).DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(key)})
					if err != nil {
						t.Error(err)
						return
					}
					if mu.Lock(); resp.Deleted > 0 {
						left[resp.Header.Revision] = key
					}
					mu.Unlock()
					continue
				}
				resp, err := w.anyKV(g).Txn(t.Context(), enter(key))
				if err != nil {
					t.Error(err)
					return
				}
				a := answer{at: resp.Header.Revision}
				for _, kv := range resp.Responses[1].GetResponseRange().Kvs {
					a.keys = append(a.keys, string(kv.Key))
				}
				mu.Lock()
				if answers = append(answers, a); resp.Succeeded {
					entered[a.at] = key
				} else if own := resp.Responses[0].GetResponseRange().Kvs; len(own) != 1 || string(own[0].Key) != key {
					t.Errorf("its own key, which is there, reads as %v", own)
				}
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	revisions := slices.Sorted(maps.Keys(entered))
	for _, a := range answers {
		there := make(map[string]int64)
		for _, at := range revisions {
			if at <= a.at {
				there[entered[at]] = at
			}
		}
		for at, key := range left {
			if at <= a.at && at > there[key] {
				delete(there, key)
			}
		}
		want := slices.SortedFunc(maps.Keys(there), func(x, y string) int { return int(there[x] - there[y]) })
		if !slices.Equal(a.keys, want) {
			wrong++
		}
	}
	return wrong
}

func TestTransactionsThatReadOtherShards(t *testing.T) {
	if n := lockKeys(t, func(*faults) {}); n > 0 {
		t.Errorf("%d answers are not what was there at their revision", n)
	}
	for name, plant := range map[string]func(*faults){
		"reads at a later revision": func(f *faults) { f.readAfterTxn = true },
		"gates are skipped":         func(f *faults) { f.skipGates = true },
	} {
		shows := false
		for try := 0; try < 20 && !shows; try++ {
			shows = lockKeys(t, plant) > 0
		}
		if !shows {
			t.Errorf("fault %q does not show", name)
		}
	}
}

func TestWhichTransactionsMayReadOtherShards(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	here, there := w.keyIn(w.groups[0], "k"), w.keyIn(w.groups[1], "k")
	w.put("n1", there, "1")
	compare := func(key string) *pb.Compare {
		return &pb.Compare{Target: pb.Compare_CREATE, Key: []byte(key), TargetUnion: &pb.Compare_CreateRevision{}}
	}
	all := readOp(wholeRange)
	other := readOp(&pb.RangeRequest{Key: []byte(there)})
	for name, test := range map[string]struct {
		txn  *pb.TxnRequest
		keys int // that its last operation reads; -1: it is refused
	}{
		"a key elsewhere":           {&pb.TxnRequest{Success: []*pb.RequestOp{putOp(here), other}}, 1},
		"a key elsewhere, first":    {&pb.TxnRequest{Success: []*pb.RequestOp{other, putOp(here), other}}, 1},
		"all keys after its write":  {&pb.TxnRequest{Success: []*pb.RequestOp{putOp(here), all}}, 2},
		"all keys after its delete": {&pb.TxnRequest{Success: []*pb.RequestOp{deleteOp(here, ""), all}}, 1},
		"it only compares":          {&pb.TxnRequest{Compare: []*pb.Compare{compare(here)}, Success: []*pb.RequestOp{all}, Failure: []*pb.RequestOp{all}}, 1},
		"all keys before its write": {&pb.TxnRequest{Success: []*pb.RequestOp{all, putOp(here)}}, -1},
		"at a revision":             {&pb.TxnRequest{Success: []*pb.RequestOp{putOp(here), readOp(&pb.RangeRequest{Key: []byte(there), Revision: 1})}}, -1},
		"it writes elsewhere":       {&pb.TxnRequest{Success: []*pb.RequestOp{putOp(here), putOp(there)}}, -1},
		"it compares elsewhere":     {&pb.TxnRequest{Compare: []*pb.Compare{compare(there)}, Success: []*pb.RequestOp{putOp(here)}}, -1},
		"it deletes everywhere":     {&pb.TxnRequest{Success: []*pb.RequestOp{putOp(here), deleteOp("z", "\x00")}}, -1},
		"a nested one reads there":  {&pb.TxnRequest{Success: []*pb.RequestOp{putOp(here), {Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: []*pb.RequestOp{other}}}}}}, -1},
	} {
		if _, err := w.kv("n1").DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(here)}); err != nil {
			t.Fatal(err)
		}
		request := proto.CloneOf(test.txn)
		resp, err := w.kv("n2").Txn(t.Context(), test.txn)
		if !proto.Equal(request, test.txn) {
			t.Errorf("%s: the request has been changed", name)
		}
		if test.keys < 0 {
			if status.Code(err) != codes.InvalidArgument || reasonOf(err) != ReasonCrossShard {
				t.Errorf("%s: not refused: %v, %v", name, resp, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		last := resp.Responses[len(resp.Responses)-1].GetResponseRange()
		if len(last.GetKvs()) != test.keys || last.Header.Revision != resp.Header.Revision {
			t.Errorf("%s: %v", name, resp)
		}
	}
}
