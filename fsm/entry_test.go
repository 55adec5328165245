package fsm

import (
	"bytes"
	"errors"
	"math"
	"path/filepath"
	"reflect"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

func TestEntryBuilder(t *testing.T) {
	var b EntryBuilder
	empty := b.SizeBytes()
	if got := b.Bytes(); len(got) != empty || b.Count() != 0 {
		t.Errorf("empty entry of %d bytes, announced %d, count %d", len(got), empty, b.Count())
	}
	b.Reset()
	b.SetFloor(9, 4)
	b.Add(request(t, put("a", "1")))
	b.Add(Request{Space: System, Data: request(t, &pb.DeleteRangeRequest{Key: []byte("x")}).Data})
	b.Add(Request{})
	data := b.Bytes()
	if b.Count() != 3 || b.SizeBytes() != len(data) {
		t.Errorf("count %d, %d bytes of %d", b.Count(), b.SizeBytes(), len(data))
	}
	kept := bytes.Clone(data)
	b.Reset()
	b.Add(request(t, put("other", "2")))
	b.Bytes()
	if !bytes.Equal(kept, data) {
		t.Error("Reset gave the bytes away")
	}
	e, err := decodeEntry(data)
	if err != nil {
		t.Fatal(err)
	}
	if e.floor != 9 || e.term != 4 || len(e.commands) != 3 || e.puts != 1 {
		t.Fatalf("decoded %+v", e)
	}
	c := e.commands
	if !c[0].isPut || string(c[0].put.key) != "a" || string(c[0].put.value) != "1" || c[0].space != User {
		t.Errorf("decoded %+v", c[0])
	}
	if d, ok := c[1].message.(*pb.DeleteRangeRequest); !ok || string(d.Key) != "x" || c[1].space != System {
		t.Errorf("decoded %+v", c[1])
	}
	if c[2].isPut || c[2].message != nil {
		t.Errorf("decoded %+v", c[2])
	}
}

func TestMalformedEntries(t *testing.T) {
	whole := entryOf(t, put("a", "1"), &pb.DeleteRangeRequest{Key: []byte("x")})
	edit := func(offset int, b ...byte) []byte {
		data := bytes.Clone(whole)
		copy(data[offset:], b)
		return data
	}
	requestOf := func(data []byte) []byte {
		var b EntryBuilder
		b.Add(Request{Data: data})
		return b.Bytes()
	}
	marshal := func(r *pb.InternalRaftRequest) []byte {
		data, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	cases := map[string]struct {
		data []byte
		want error
	}{
		"empty":           {nil, ErrMalformedEntry},
		"newer version":   {edit(0, 2), ErrUnknownCommand},
		"flags":           {edit(1, 1), ErrUnknownCommand},
		"negative floor":  {edit(9, 0x80), ErrMalformedEntry},
		"floor too high":  {edit(2, bytes.Repeat([]byte{0xff}, 7)...), nil},
		"many requests":   {edit(entryCountOffset, 0xff, 0xff, 0xff, 0xff), ErrMalformedEntry},
		"one more":        {edit(entryCountOffset, 3), ErrMalformedEntry},
		"one less":        {edit(entryCountOffset, 1), ErrMalformedEntry},
		"unknown space":   {edit(entryHeaderBytes, 2), ErrUnknownCommand},
		"garbage":         {requestOf([]byte{0xff, 0xff}), ErrMalformedEntry},
		"unknown command": {requestOf(marshal(&pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{TTL: 1}})), ErrUnknownCommand},
		"no command":      {requestOf(marshal(&pb.InternalRaftRequest{ID: 7})), ErrUnknownCommand},
		"two commands":    {requestOf(marshal(&pb.InternalRaftRequest{Put: put("a", ""), Compaction: &pb.CompactionRequest{}})), ErrUnknownCommand},
	}
	high := cases["floor too high"]
	high.data[9], high.want = math.MaxInt8, ErrMalformedEntry
	cases["floor too high"] = high
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			s := open(t, testConfig(tempPath(t)))
			apply(t, s, put("a", "before"))
			if _, err := s.Apply(2, 1, c.data); !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			select {
			case <-s.Failed():
			default:
				t.Error("the store goes on")
			}
			if _, err := s.Apply(3, 1, whole); !errors.Is(err, c.want) {
				t.Errorf("the next entry: %v", err)
			}
			if err := s.WaitApplied(t.Context(), 2); !errors.Is(err, c.want) {
				t.Errorf("waiting: %v", err)
			}
			if s.AppliedIndex() != 1 || s.Revision(User) != 2 || get(t, s, "a") != "before" {
				t.Error("it changed something")
			}
		})
	}
	for n := range whole {
		if _, err := decodeEntry(whole[:n]); !errors.Is(err, ErrMalformedEntry) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

// FuzzPlainPut checks that the fast decoder of puts agrees with protobuf on whatever it takes.
func FuzzPlainPut(f *testing.F) {
	for _, p := range []*pb.PutRequest{
		put("a", "1"), {}, {Key: []byte("k"), Lease: -1, PrevKv: true}, {Key: []byte("k"), IgnoreValue: true, IgnoreLease: true},
	} {
		f.Add(request(f, p).Data)
	}
	twice := append(protowire.AppendBytes([]byte{0x0a}, []byte("one")), protowire.AppendBytes([]byte{0x0a}, []byte("two"))...)
	f.Add(protowire.AppendBytes([]byte{0x22}, twice))
	f.Add([]byte{0x22, 0x02, 0x20, 0x02})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, ok := decodePlainPut(data)
		if !ok {
			return
		}
		var r pb.InternalRaftRequest
		if err := proto.Unmarshal(data, &r); err != nil {
			t.Fatalf("protobuf refuses what was taken: %v", err)
		}
		want := putCommandOf(r.Put)
		empty := func(p *putCommand) {
			p.key, p.value = append([]byte{}, p.key...), append([]byte{}, p.value...)
		}
		empty(&got)
		empty(&want)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, protobuf says %+v", got, want)
		}
	})
}

func TestCommonPutsTakeTheFastPath(t *testing.T) {
	for _, p := range []*pb.PutRequest{put("a", "1"), {Key: []byte("k"), Value: make([]byte, 1000), Lease: 7, PrevKv: true}} {
		if _, ok := decodePlainPut(request(t, p).Data); !ok {
			t.Errorf("%v goes the slow way", p)
		}
	}
}

// FuzzApply gives any bytes to two stores: they must not panic, agree on the outcome, and survive reopening.
func FuzzApply(f *testing.F) {
	g := newGenerator(1)
	for range 40 {
		f.Add(entryOf(f, put("a", "1"), g.command(), g.command()))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var stores [2]*Store
		for i := range stores {
			config := testConfig(filepath.Join(t.TempDir(), "state.db"))
			if i == 1 {
				config.FlushBytes = 1
			}
			stores[i] = open(t, config)
		}
		for index := uint64(1); index <= 2; index++ {
			a, errA := stores[0].Apply(index, 1, data)
			b, errB := stores[1].Apply(index, 1, data)
			if (errA == nil) != (errB == nil) || len(a) != len(b) {
				t.Fatalf("%v, %v and %v, %v", a, errA, b, errB)
			}
			for i := range a {
				if !sameResult(a[i], b[i]) {
					t.Fatalf("%v and %v", a[i], b[i])
				}
			}
		}
		_, digest := stores[0].Digest()
		if _, other := stores[1].Digest(); digest != other {
			t.Fatal("digests differ")
		}
		if err := stores[1].Close(); err != nil {
			t.Fatal(err)
		}
		again, err := Open(stores[1].config)
		if err != nil {
			t.Fatal(err)
		}
		if _, other := again.Digest(); digest != other {
			t.Error("digest differs after reopening")
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestFloor(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, put("a", "0"))
	entry := func(floor int64, term uint64) []byte {
		var b EntryBuilder
		b.SetFloor(floor, term)
		b.Add(request(t, put("a", "1")))
		b.Add(request(t, &pb.DeleteRangeRequest{Key: []byte("nothing")}))
		b.Add(request(t, put("b", "2")))
		return b.Bytes()
	}
	results, err := s.Apply(2, 5, entry(100, 5))
	if err != nil {
		t.Fatal(err)
	}
	if rev := results[0].Response.(*pb.PutResponse).Header.Revision; rev != 100 {
		t.Errorf("the first put has revision %d", rev)
	}
	if rev := results[2].Response.(*pb.PutResponse).Header.Revision; rev != 102 || s.Revision(User) != 102 {
		t.Errorf("the second put has revision %d", rev)
	}
	for _, data := range [][]byte{entry(102, 5), entry(200, 4)} {
		results, err := s.Apply(s.AppliedIndex()+1, 5, data)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if !errors.Is(r.Err, ErrStaleFloor) {
				t.Errorf("got %v", r)
			}
		}
	}
	if s.Revision(User) != 102 {
		t.Errorf("revision %d", s.Revision(User))
	}
	if _, err := s.Apply(s.AppliedIndex()+1, 5, entry(103, 5)); err != nil || s.Revision(User) != 105 {
		t.Errorf("revision %d, %v", s.Revision(User), err)
	}
}
