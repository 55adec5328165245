package server

import (
	"bytes"
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"kvd/server/h2"
)

func (g *messages) int() int64 {
	return []int64{0, 0, 1, 127, 128, -1, g.Int64(), -g.Int64()}[g.IntN(8)]
}

func (g *messages) bytes() []byte {
	b := make([]byte, []int{0, 0, 1, 16, 127, 128, 300}[g.IntN(7)])
	for i := range b {
		b[i] = byte(g.Uint32())
	}
	return b
}

func (g *messages) kv() *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: g.bytes(), Value: g.bytes(), CreateRevision: g.int(), ModRevision: g.int(), Version: g.int(), Lease: g.int()}
}

func (g *messages) header() *pb.ResponseHeader {
	if g.IntN(5) == 0 {
		return nil
	}
	return &pb.ResponseHeader{ClusterId: uint64(g.int()), MemberId: uint64(g.int()), Revision: g.int(), RaftTerm: uint64(g.int())}
}

func (g *messages) bool() bool { return g.IntN(2) == 0 }

func (g *messages) put() *pb.PutRequest {
	return &pb.PutRequest{Key: g.bytes(), Value: g.bytes(), Lease: g.int(), PrevKv: g.bool(), IgnoreValue: g.bool(), IgnoreLease: g.bool()}
}

func (g *messages) get() *pb.RangeRequest {
	return &pb.RangeRequest{
		Key: g.bytes(), RangeEnd: g.bytes(), Limit: g.int(), Revision: g.int(),
		SortOrder: pb.RangeRequest_SortOrder(g.int()), SortTarget: pb.RangeRequest_SortTarget(g.int()),
		Serializable: g.bool(), KeysOnly: g.bool(), CountOnly: g.bool(),
		MinModRevision: g.int(), MaxModRevision: g.int(), MinCreateRevision: g.int(), MaxCreateRevision: g.int(),
	}
}

func (g *messages) watchResponse() *pb.WatchResponse {
	r := &pb.WatchResponse{
		Header: g.header(), WatchId: g.int(), Created: g.bool(), Canceled: g.bool(), CompactRevision: g.int(),
		CancelReason: []string{"", "why"}[g.IntN(2)], Fragment: g.bool(),
	}
	for range g.IntN(4) {
		e := &mvccpb.Event{Type: mvccpb.Event_EventType(g.IntN(2))}
		if g.bool() {
			e.Kv = g.kv()
		}
		if g.bool() {
			e.PrevKv = g.kv()
		}
		r.Events = append(r.Events, e)
	}
	return r
}

// messages are random.
type messages struct{ *rand.Rand }

func encoded(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What is encoded by hand is what proto.Marshal makes of it, byte by byte.
func TestEncoding(t *testing.T) {
	g := &messages{seeded(t)}
	for range 20_000 {
		put := &pb.PutResponse{Header: g.header()}
		if g.bool() {
			put.PrevKv = g.kv()
		}
		if got, want := appendPutResponse([]byte("x"), put)[1:], encoded(t, put); !bytes.Equal(got, want) {
			t.Fatalf("%v: %x, want %x", put, got, want)
		}
		get := &pb.RangeResponse{Header: g.header(), More: g.bool(), Count: g.int()}
		for range g.IntN(4) {
			get.Kvs = append(get.Kvs, g.kv())
		}
		if got, want := appendRangeResponse([]byte("x"), get)[1:], encoded(t, get); !bytes.Equal(got, want) {
			t.Fatalf("%v: %x, want %x", get, got, want)
		}
		events := g.watchResponse()
		if got, want := appendWatchResponse([]byte("x"), events)[1:], encoded(t, events); !bytes.Equal(got, want) || len(got) != sizeWatchResponse(events) {
			t.Fatalf("%v: %x of %d bytes, want %x", events, got, sizeWatchResponse(events), want)
		}
		request := g.put()
		want := encoded(t, &pb.InternalRaftRequest{Put: request})
		if got := wrapPut(append(make([]byte, h2.FrameBytes), encoded(t, request)...)); !bytes.Equal(got, want) {
			t.Fatalf("%v: %x, want %x", request, got, want)
		}
	}
}

// What is decoded by hand is what proto.Unmarshal makes of it; whatever has anything unknown is declined.
func TestDecoding(t *testing.T) {
	g := &messages{seeded(t)}
	for range 20_000 {
		for _, m := range []proto.Message{g.put(), g.get(), &pb.PutResponse{Header: g.header()}} {
			b := encoded(t, m)
			if response, ok := m.(*pb.PutResponse); !ok || response.Header != nil {
				if !checkDecoding(t, b) {
					t.Fatalf("%v is declined", m)
				}
			}
			if g.bool() {
				b = protowire.AppendVarint(protowire.AppendTag(b, 99, protowire.VarintType), 1)
			} else if len(b) > 0 {
				b[g.IntN(len(b))] = byte(g.Uint32())
			}
			checkDecoding(t, b)
		}
	}
}

// checkDecoding decodes b as everything, and reports whether anything was taken.
func checkDecoding(t *testing.T, b []byte) (taken bool) {
	t.Helper()
	check := func(ok bool, got, want proto.Message) {
		t.Helper()
		if !ok {
			return
		}
		taken = true
		if err := proto.Unmarshal(b, want); err != nil || !proto.Equal(got, want) {
			t.Fatalf("%x: %v, want %v, %v", b, got, want, err)
		}
	}
	put, get, response := &pb.PutRequest{}, &pb.RangeRequest{}, &pb.PutResponse{Header: &pb.ResponseHeader{}}
	check(decodePut(b, put), put, &pb.PutRequest{})
	check(decodeRange(b, get), get, &pb.RangeRequest{})
	check(decodeHeaderOnly(b, response.Header), response, &pb.PutResponse{})
	return taken
}

func FuzzDecoding(f *testing.F) {
	g := &messages{rand.New(rand.NewPCG(1, 1))}
	for range 20 {
		f.Add(encoded(f, g.put()))
		f.Add(encoded(f, g.get()))
	}
	f.Fuzz(func(t *testing.T, b []byte) { checkDecoding(t, b) })
}

// A forwarded put is taken by the quick check exactly if the general one takes it.
func TestForwardedPuts(t *testing.T) {
	g := &messages{seeded(t)}
	for range 20_000 {
		r := g.put()
		b := encoded(t, &pb.InternalRaftRequest{Put: r})
		want := checkPut(r)
		if got := checkForwarded(b); (got != nil) != (want != nil) {
			t.Fatalf("%v: %v, want %v", r, got, want)
		}
	}
}

// TestAnswersOfLaterVersions: what an event of another node has besides is passed on.
func TestAnswersOfLaterVersions(t *testing.T) {
	c := newCodec(&answers{max: 1})
	for _, r := range []*pb.WatchResponse{
		{WatchId: 1, Events: []*mvccpb.Event{{}, {Kv: &mvccpb.KeyValue{Key: []byte("k")}, PrevKv: &mvccpb.KeyValue{Key: []byte("k")}}}},
		{WatchId: 2},
	} {
		unknown := protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1)
		messages := []proto.Message{r}
		for _, e := range r.Events {
			messages = append(messages, e)
			if e.Kv != nil {
				messages = append(messages, e.Kv, e.PrevKv)
			}
		}
		for _, m := range append([]proto.Message{nil}, messages...) {
			if m != nil {
				m.ProtoReflect().SetUnknown(unknown)
			}
			got, err := c.Marshal(r)
			if want := encoded(t, r); err != nil || !bytes.Equal(got.Materialize(), want) {
				t.Errorf("%v: %x, %v; want %x", r, got.Materialize(), err, want)
			}
			if m != nil {
				m.ProtoReflect().SetUnknown(nil)
			}
		}
	}
}

// BenchmarkEventAnswers encodes what each watcher of a key is told of a put.
func BenchmarkEventAnswers(b *testing.B) {
	answer := &pb.WatchResponse{
		Header: &pb.ResponseHeader{ClusterId: 1 << 60, MemberId: 1 << 61, Revision: 1 << 20, RaftTerm: 2}, WatchId: 77,
		Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: make([]byte, 16), Value: make([]byte, 256), CreateRevision: 2, ModRevision: 1 << 20, Version: 300}}},
	}
	c := newCodec(&answers{max: 1})
	b.ReportAllocs()
	for b.Loop() {
		encoded, err := c.Marshal(answer)
		if err != nil {
			b.Fatal(err)
		}
		encoded.Free()
	}
}
