package server

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// requests makes random requests over few keys, some of which share a tag.
type requests struct {
	*rand.Rand
	w         *world
	compacted int64
}

func (g *requests) key() []byte {
	return []byte(pick(g.Rand, "a", "a/1", "a/2", "b", "b/1", "b/1/x", "c", "d", "{t}", "{t}a", "{t}b", "{t}b/1", "{u}a", "{u}b", "\x00", "\xff", "e"))
}

func (g *requests) rangeEnd() []byte {
	return pick(g.Rand, nil, nil, []byte{0}, g.key(), g.key(), []byte("{t~"), []byte("{t}~"), []byte("b0"))
}

func (g *requests) write() *pb.InternalRaftRequest {
	put := func(key []byte) *pb.PutRequest {
		return &pb.PutRequest{Key: key, Value: fmt.Append(nil, "v", g.IntN(4))}
	}
	switch g.IntN(10) {
	case 0:
		return &pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{Key: g.key(), RangeEnd: g.rangeEnd(), PrevKv: g.IntN(2) == 0}}
	case 1, 2:
		txn := &pb.TxnRequest{}
		for _, name := range []string{"", "a", "b"}[:1+g.IntN(3)] {
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put([]byte("{t}" + name))}})
		}
		return &pb.InternalRaftRequest{Txn: txn}
	case 3:
		if g.IntN(4) == 0 {
			low := max(g.compacted, 0)
			return &pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: low + g.Int64N(g.w.newest-low+1)}}
		}
	}
	return &pb.InternalRaftRequest{Put: put(g.key())}
}

func (g *requests) rangeRequest() *pb.RangeRequest {
	r := &pb.RangeRequest{Key: g.key(), RangeEnd: g.rangeEnd()}
	if g.IntN(3) == 0 {
		r = proto.CloneOf(wholeRange)
	}
	bound := func() int64 { return pick(g.Rand, 0, 0, 0, g.Int64N(g.w.newest+2)) }
	r.Revision = pick(g.Rand, 0, 0, -1, g.Int64N(g.w.newest+3))
	r.Limit = pick[int64](g.Rand, 0, 0, 1, 2, 3, 5, 100, -1, math.MaxInt64)
	if g.IntN(2) == 0 {
		r.SortOrder = pb.RangeRequest_SortOrder(g.IntN(3))
		r.SortTarget = pb.RangeRequest_SortTarget(g.IntN(5))
	}
	if g.IntN(4) == 0 {
		r.MinModRevision, r.MaxModRevision, r.MinCreateRevision, r.MaxCreateRevision = bound(), bound(), bound(), bound()
	}
	r.KeysOnly, r.CountOnly = g.IntN(5) == 0, g.IntN(8) == 0
	return r
}

// readTxn is a transaction that only reads.
func (g *requests) readTxn() *pb.TxnRequest {
	r := &pb.TxnRequest{}
	for range g.IntN(3) {
		c := &pb.Compare{
			Key: g.key(), RangeEnd: g.rangeEnd(),
			Result: pb.Compare_CompareResult(g.IntN(4)), Target: pb.Compare_CompareTarget(g.IntN(5)),
		}
		switch n := g.Int64N(g.w.newest + 1); c.Target {
		case pb.Compare_VALUE:
			c.TargetUnion = &pb.Compare_Value{Value: fmt.Append(nil, "v", g.IntN(4))}
		case pb.Compare_CREATE:
			c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: pick(g.Rand, 0, n)}
		case pb.Compare_MOD:
			c.TargetUnion = &pb.Compare_ModRevision{ModRevision: pick(g.Rand, 0, n)}
		case pb.Compare_VERSION:
			c.TargetUnion = &pb.Compare_Version{Version: g.Int64N(3)}
		}
		r.Compare = append(r.Compare, c)
	}
	for _, branch := range []*[]*pb.RequestOp{&r.Success, &r.Failure} {
		for range g.IntN(4) {
			read := g.rangeRequest()
			if read.Revision < 0 && g.compacted < 0 {
				read.Revision = 0 // before the first compaction, a single group answers that
			}
			*branch = append(*branch, readOp(read))
		}
	}
	return r
}

// do sends a write to a node.
func (w *world) do(ctx context.Context, kv pb.KVServer, r *pb.InternalRaftRequest) (resp proto.Message, err error) {
	switch {
	case r.Put != nil:
		return kv.Put(ctx, r.Put)
	case r.DeleteRange != nil:
		return kv.DeleteRange(ctx, r.DeleteRange)
	case r.Txn != nil:
		return kv.Txn(ctx, r.Txn)
	default:
		return kv.Compact(ctx, r.Compaction)
	}
}

// Whatever is asked for, a sharded key space answers as one store would that
// has all keys.
func TestAnswersEqualThoseOfOneStore(t *testing.T) {
	for _, size := range []struct{ nodes, shards, replicas int }{{1, 1, 1}, {3, 5, 2}, {5, 16, 2}} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			w := newWorld(t, size.nodes, size.shards, size.replicas, nil)
			g := &requests{Rand: seeded(t), w: w, compacted: -1}
			if err := compareWithOneStore(t, w, g, 1500); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// compareWithOneStore writes and reads at random, and stops at the first answer
// that one store would not give.
func compareWithOneStore(t *testing.T, w *world, g *requests, steps int) error {
	one := newOneStore(w)
	for range steps {
		for _, s := range w.servers { // small pages, so that few keys have many
			s.router.sizes = pageSizes{firstKeys: 1 + g.Int64N(3), pageBytes: 200 + g.IntN(500), wholeBytes: pick(g.Rand, 300, 1000, 1<<20), mergeBytes: 1000}
		}
		kv := w.anyKV(g.Rand)
		if g.IntN(3) == 0 {
			r := g.write()
			_, err := w.do(t.Context(), kv, r)
			switch wrong := one.store.CompactRevision(fsm.User) >= r.Compaction.GetRevision() && r.Compaction != nil; {
			case err == nil && r.Compaction != nil:
				g.compacted = r.Compaction.Revision
			case err != nil && !wrong:
				return fmt.Errorf("%v: %w", r, err)
			}
			continue
		}
		if g.IntN(3) == 0 {
			if err := compareTxn(t.Context(), w, one, kv, g.readTxn()); err != nil {
				return err
			}
			continue
		}
		r := g.rangeRequest()
		want, wantErr := one.store.RangeAt(t.Context(), fsm.User, r, w.newest)
		got, err := kv.Range(t.Context(), proto.CloneOf(r))
		if err := compareAnswers(t.Context(), w, one, r, got, want, err, wantErr); err != nil {
			return fmt.Errorf("%v: %w\ngot  %v, %v\nwant %v, %v", r, err, got, err, want, wantErr)
		}
	}
	return nil
}

// compareTxn has a node and one store answer a transaction that only reads.
func compareTxn(ctx context.Context, w *world, one *oneStore, kv pb.KVServer, r *pb.TxnRequest) error {
	_, _, apart := w.servers["n1"].router.groupOfTxn(r)
	for _, s := range w.servers {
		if apart == nil {
			s.router.sizes.wholeBytes = 1 << 20 // the answer is one message
		}
	}
	want, wantErr := one.store.ReadTxnAt(ctx, fsm.User, r, w.newest)
	got, err := kv.Txn(ctx, proto.CloneOf(r))
	wrong := func(err2 error) error {
		return fmt.Errorf("%v: %w\ngot  %v, %v\nwant %v, %v", r, err2, got, err, want, wantErr)
	}
	if wantErr != nil || err != nil {
		if wantErr == nil || err == nil || err.Error() != refusal(wantErr).Error() {
			return wrong(errors.New("other error"))
		}
		return nil
	}
	if got.Succeeded != want.Succeeded || len(got.Responses) != len(want.Responses) {
		return wrong(errors.New("other branch"))
	}
	if apart != nil && got.Header.Revision != w.newest {
		return wrong(errors.New("not at the newest revision"))
	}
	ops := r.Success
	if !got.Succeeded {
		ops = r.Failure
	}
	for i, op := range ops {
		got, want := got.Responses[i].GetResponseRange(), want.Responses[i].GetResponseRange()
		if err := compareAnswers(ctx, w, one, op.GetRequestRange(), got, want, nil, nil); err != nil {
			return wrong(fmt.Errorf("operation %d: %w", i, err))
		}
	}
	return nil
}

func compareAnswers(ctx context.Context, w *world, one *oneStore, r *pb.RangeRequest, got, want *pb.RangeResponse, err, wantErr error) error {
	if wantErr != nil {
		if err == nil || err.Error() != refusal(wantErr).Error() {
			return errors.New("other error")
		}
		return nil
	}
	if err != nil {
		return err
	}
	if _, single, _ := w.servers["n1"].router.groupOfRange(r.Key, r.RangeEnd); !single && got.Header.Revision != w.newest {
		return fmt.Errorf("header at %d, the newest revision is %d", got.Header.Revision, w.newest)
	}
	if got.Count != want.Count || got.More != want.More || len(got.Kvs) != len(want.Kvs) {
		return errors.New("other count, number of keys, or more")
	}
	if r.SortTarget == pb.RangeRequest_KEY || r.Limit <= 0 {
		if !slices.EqualFunc(got.Kvs, want.Kvs, func(a, b *mvccpb.KeyValue) bool { return proto.Equal(a, b) }) {
			return errors.New("other keys, or in another order")
		}
		return nil
	}
	return compareSorted(ctx, w, one, r, got, want)
}

// compareSorted lets keys that sort alike stand in for each other.
func compareSorted(ctx context.Context, w *world, one *oneStore, r *pb.RangeRequest, got, want *pb.RangeResponse) error {
	all := proto.CloneOf(r)
	all.Limit = 0
	everything, err := one.store.RangeAt(ctx, fsm.User, all, w.newest)
	if err != nil {
		return err
	}
	valued := proto.CloneOf(all)
	valued.KeysOnly = false
	values, err := one.store.RangeAt(ctx, fsm.User, valued, w.newest)
	if err != nil {
		return err
	}
	value := func(kv *mvccpb.KeyValue) []byte {
		for _, v := range values.Kvs {
			if bytes.Equal(v.Key, kv.Key) {
				return v.Value
			}
		}
		return nil
	}
	seen := make(map[string]bool)
	for i, kv := range got.Kvs {
		if seen[string(kv.Key)] || !slices.ContainsFunc(everything.Kvs, func(o *mvccpb.KeyValue) bool { return proto.Equal(o, kv) }) {
			return fmt.Errorf("%v twice, or wrong", kv)
		}
		seen[string(kv.Key)] = true
		other := want.Kvs[i]
		alike := map[pb.RangeRequest_SortTarget]int{
			pb.RangeRequest_VERSION: cmp.Compare(kv.Version, other.Version),
			pb.RangeRequest_CREATE:  cmp.Compare(kv.CreateRevision, other.CreateRevision),
			pb.RangeRequest_MOD:     cmp.Compare(kv.ModRevision, other.ModRevision),
			pb.RangeRequest_VALUE:   bytes.Compare(value(kv), value(other)),
		}
		if alike[r.SortTarget] != 0 {
			return fmt.Errorf("%v in the place of %v", kv, other)
		}
	}
	return nil
}

// Keys that sort alike have no order of their own, but that of one store where
// they are of one shard: on nodes with and without it, and in ranges of all.
func TestKeysOfOneShardThatSortAlike(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	one := newOneStore(w)
	const keys = 40 // more than an insertion sort sorts
	for i := range keys {
		w.put("n1", fmt.Sprintf("{t}%02d", i), fmt.Sprint(i%3))
	}
	for _, r := range []*pb.RangeRequest{
		{Key: []byte("{t}"), RangeEnd: []byte("{t~")},
		{Key: []byte{0}, RangeEnd: []byte{0}},
	} {
		r.SortOrder, r.SortTarget = pb.RangeRequest_DESCEND, pb.RangeRequest_VALUE
		for _, r.Limit = range []int64{0, 5, keys - 1, keys, keys + 1} {
			want, err := one.store.RangeAt(t.Context(), fsm.User, r, w.newest)
			if err != nil {
				t.Fatal(err)
			}
			for node := range w.servers {
				got, err := w.kv(node).Range(t.Context(), proto.CloneOf(r))
				if err != nil {
					t.Fatal(err)
				}
				if !slices.EqualFunc(got.Kvs, want.Kvs, func(a, b *mvccpb.KeyValue) bool { return proto.Equal(a, b) }) || got.More != want.More {
					t.Errorf("%s: %v\ngot  %v\nwant %v", node, r, got, want)
				}
			}
		}
	}
}

// Each planted fault must be what the comparison sees.
func TestComparisonSeesFaults(t *testing.T) {
	for name, plant := range map[string]func(*faults){
		"a group is missed":      func(f *faults) { f.missShard = true },
		"gates are skipped":      func(f *faults) { f.skipGates = true },
		"limits are the shards'": func(f *faults) { f.limitPerShard = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 3, 5, 2, func(c *Config) { plant(&c.faults) })
			g := &requests{Rand: seeded(t), w: w, compacted: -1}
			if compareWithOneStore(t, w, g, 3000) == nil {
				t.Fatal("the fault does not show")
			}
		})
	}
}
