package server

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// Deletions answer as one store does, previous values included.
func TestDeletionsEqualThoseOfOneStore(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	g := &requests{Rand: seeded(t), w: w}
	one := newOneStore(w)
	for range 300 {
		for range 4 {
			w.put(pick(g.Rand, w.nodes...), string(g.key()), fmt.Sprint("v", g.IntN(9)))
		}
		r := &pb.DeleteRangeRequest{Key: g.key(), RangeEnd: g.rangeEnd(), PrevKv: g.IntN(2) == 0}
		before, err := one.store.Range(t.Context(), fsm.User, &pb.RangeRequest{Key: r.Key, RangeEnd: r.RangeEnd})
		if err != nil {
			t.Fatal(err)
		}
		got, err := w.anyKV(g.Rand).DeleteRange(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		want := &pb.DeleteRangeResponse{Header: got.Header, Deleted: before.Count}
		if r.PrevKv {
			want.PrevKvs = before.Kvs
		}
		if !proto.Equal(got, want) {
			t.Fatalf("%v: %v, want %v", r, got, want)
		}
		if left, err := w.anyKV(g.Rand).Range(t.Context(), &pb.RangeRequest{Key: r.Key, RangeEnd: r.RangeEnd, CountOnly: true}); err != nil || left.Count != 0 {
			t.Fatalf("%v: left %v, %v", r, left, err)
		}
	}
}

// What was done in some shards only must not look as if nothing had been.
func TestPartialDeletion(t *testing.T) {
	all := &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 5, 2, nil)
		w.put("n1", w.keyIn(2, "k"), "v")
		w.shards[5].elect("")
		_, err := w.kv("n1").DeleteRange(t.Context(), all)
		if status.Code(err) != codes.Unavailable || reasonOf(err) != ReasonPartial || !strings.Contains(err.Error(), "in 4 of 5 shards") {
			t.Fatal(err)
		}
		w.shards[5].elect(w.shards[5].order[0])
		if again, err := w.kv("n1").DeleteRange(t.Context(), all); err != nil || again.Deleted != 0 {
			t.Fatalf("%v, %v", again, err)
		}
		for _, group := range w.groups {
			w.shards[group].elect("")
		}
		_, err = w.kv("n1").DeleteRange(t.Context(), all)
		sameStatus(t, err, rpctypes.ErrGRPCTimeout)
	})
	w := newWorld(t, 3, 5, 2, nil)
	w.onCall = func(_, _, method string) (error, error) {
		if method == methodPropose {
			return nil, errors.New("connection lost")
		}
		return nil, nil
	}
	_, err := w.kv("n1").DeleteRange(t.Context(), all)
	if status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
}

// The previous values of all shards together may be too much, which must not
// keep any of them from being deleted.
func TestLargeDeletion(t *testing.T) {
	const valueBytes = 1 << 20
	w := newWorld(t, 3, 4, 2, func(c *Config) { c.MaxAnswerBytes = 2*valueBytes + valueBytes/2 })
	for _, group := range w.groups {
		w.put("n1", w.keyIn(group, "k"), strings.Repeat("v", valueBytes))
	}
	all := &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true}
	_, err := w.kv("n1").DeleteRange(t.Context(), all)
	if status.Code(err) != codes.ResourceExhausted || reasonOf(err) != ReasonAnswerDropped {
		t.Fatal(err)
	}
	left, err := w.kv("n2").Range(t.Context(), wholeRange)
	if err != nil || left.Count != 0 {
		t.Fatalf("%v, %v", left, err)
	}
}

func TestCompactionOfAllShards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 5, 2, nil)
		for i := range 30 {
			w.put("n1", fmt.Sprint("k", i%10), fmt.Sprint(i))
		}
		compact := func(revision int64, physical bool) error {
			_, err := w.kv("n2").Compact(t.Context(), &pb.CompactionRequest{Revision: revision, Physical: physical})
			return err
		}
		readAt := func(revision int64) error {
			return second(w.kv("n3").Range(t.Context(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: revision}))
		}
		sameStatus(t, compact(w.newest+1, false), rpctypes.ErrGRPCFutureRev)
		// One shard cannot: the others have been compacted, and are again.
		w.shards[3].elect("")
		if err := compact(20, false); status.Code(err) != codes.Unavailable || reasonOf(err) != ReasonPartial {
			t.Fatal(err)
		}
		w.shards[3].elect(w.shards[3].order[1])
		if err := compact(20, true); err != nil {
			t.Fatal(err)
		}
		sameStatus(t, compact(20, false), rpctypes.ErrGRPCCompacted)
		sameStatus(t, readAt(19), rpctypes.ErrGRPCCompacted)
		if err := readAt(20); err != nil {
			t.Fatal(err)
		}
		for _, group := range w.groups {
			for _, node := range w.shards[group].order {
				// Physically is here, at once; elsewhere it is logical, or still to come.
				if got := w.shards[group].replicas[node].store.CompactRevision(fsm.User); got != 20 && node == "n2" {
					t.Errorf("group %d on %s is compacted at %d", group, node, got)
				}
			}
		}
		sameStatus(t, compact(w.newest+5, false), rpctypes.ErrGRPCFutureRev)
	})
}

// chunks collects a stream.
type chunks struct {
	grpc.ServerStream
	ctx     context.Context
	all     []*pb.RangeResponse
	between func()
}

func (c *chunks) Context() context.Context { return c.ctx }

func (c *chunks) Send(m *pb.RangeStreamResponse) error {
	c.all = append(c.all, proto.CloneOf(m.RangeResponse))
	if c.between != nil {
		c.between()
	}
	return nil
}

// A streamed range is what the range is, cut up.
func TestStreamsEqualRanges(t *testing.T) {
	w := newWorld(t, 3, 5, 2, func(c *Config) { c.MaxRequestBytes = 1 << 10; c.MaxPendingBytes = 1 << 20 })
	g := &requests{Rand: seeded(t), w: w}
	value := strings.Repeat("v", 50)
	for range 300 {
		w.put("n1", string(g.key())+fmt.Sprint(g.IntN(10)), value)
	}
	most := 0
	for range 300 {
		for _, s := range w.servers {
			s.router.sizes = pageSizes{firstKeys: 1 + g.Int64N(5), pageBytes: 500 + g.IntN(1000), wholeBytes: 1 << 20, mergeBytes: 10_000}
		}
		r := g.rangeRequest()
		r.SortOrder, r.SortTarget = pick(g.Rand, pb.RangeRequest_NONE, pb.RangeRequest_ASCEND), pb.RangeRequest_KEY
		r.MinModRevision, r.MaxModRevision, r.MinCreateRevision, r.MaxCreateRevision = 0, 0, 0, 0
		kv := w.servers[pick(g.Rand, w.nodes...)].kv
		want, wantErr := kv.Range(t.Context(), r)
		c := &chunks{ctx: t.Context(), between: func() { w.put("n2", string(g.key())+"0", "late") }}
		if r.Revision <= 0 {
			r.Revision = want.GetHeader().GetRevision() // with the writes in between
			if _, one, _ := kv.router.groupOfRange(r.Key, r.RangeEnd); !one {
				r.Revision = 0
			}
		}
		err := kv.RangeStream(r, c)
		if wantErr != nil {
			sameStatus(t, err, wantErr)
			continue
		}
		if err != nil {
			t.Fatalf("%v: %v", r, err)
		}
		got := &pb.RangeResponse{}
		for i, chunk := range c.all {
			if (chunk.Header != nil) != (i == len(c.all)-1) {
				t.Fatalf("%v: chunk %d of %d has the header %v", r, i, len(c.all), chunk.Header)
			}
			proto.Merge(got, chunk)
		}
		most = max(most, len(c.all))
		if got.Header.Revision < want.Header.Revision {
			t.Fatalf("%v: header %v, before %v", r, got.Header, want.Header)
		}
		got.Header, want.Header = nil, nil
		if !proto.Equal(got, want) {
			t.Fatalf("%v:\n%v\nwant\n%v", r, got, want)
		}
	}
	if most < 5 {
		t.Fatalf("no stream had more than %d chunks", most)
	}
}
