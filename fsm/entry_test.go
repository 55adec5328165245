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
		"unknown space":   {edit(entryHeaderBytes, 3), ErrUnknownCommand},
		"garbage":         {requestOf([]byte{0xff, 0xff}), ErrMalformedEntry},
		"unknown command": {requestOf(marshal(&pb.InternalRaftRequest{AuthEnable: &pb.AuthEnableRequest{}})), ErrUnknownCommand},
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
	c := newCluster(1)
	for range 40 {
		f.Add(entryOf(f, grant(7, 1), leased("a", 7), c.leaseCommand(), c.leaseCommand()))
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

func entryAt(t testing.TB, floor int64, term uint64, messages ...proto.Message) []byte {
	t.Helper()
	var b EntryBuilder
	b.SetFloor(floor, term)
	for _, m := range messages {
		b.Add(request(t, m))
	}
	return b.Bytes()
}

// applyAt applies messages as the next entry, with reserved revisions.
func applyAt(t testing.TB, s *Store, floor int64, messages ...proto.Message) []Result {
	t.Helper()
	results, err := s.Apply(s.AppliedIndex()+1, 1, entryAt(t, floor, 1, messages...))
	if err != nil {
		t.Fatal(err)
	}
	return results
}

func rangeAt(key string, rev int64) *pb.TxnRequest {
	return &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{
		RequestRange: &pb.RangeRequest{Key: []byte(key), Revision: rev},
	}}}}
}

func TestReadsInAnEntryWithAFloorAreJudgedByTheirOwnRevision(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	applyAt(t, s, 10, put("a", "old"))
	results := applyAt(t, s, 100,
		rangeAt("a", 99),
		rangeAt("a", 100), // its own is 101, so that 100 has been
		rangeAt("a", 102),
		put("a", "new"), // 103
		rangeAt("a", 102),
		rangeAt("a", 103),
		rangeAt("a", 105),
		&pb.TxnRequest{Success: append([]*pb.RequestOp{putOp(put("a", "last"))}, rangeAt("a", 106).Success...)}, // 107
		rangeAt("a", 0),
	)
	want := []string{"old", "old", "", "", "old", "new", "new", "", "last"}
	header := []int64{99, 100, 0, 103, 103, 104, 105, 107, 107}
	for i, r := range results {
		if i == 2 {
			if !errors.Is(r.Err, ErrFutureRevision) {
				t.Errorf("request %d: %v", i, r)
			}
			continue
		}
		if r.Err != nil {
			t.Errorf("request %d: %v", i, r.Err)
			continue
		}
		if rev := r.Response.(interface{ GetHeader() *pb.ResponseHeader }).GetHeader().GetRevision(); rev != header[i] {
			t.Errorf("request %d: header has revision %d, want %d", i, rev, header[i])
		}
		if txn, ok := r.Response.(*pb.TxnResponse); ok && len(txn.Responses) == 1 {
			if kvs := txn.Responses[0].GetResponseRange().Kvs; len(kvs) != 1 || string(kvs[0].Value) != want[i] {
				t.Errorf("request %d: %v, want %q", i, kvs, want[i])
			}
		}
	}
	if kvs := results[7].Response.(*pb.TxnResponse).Responses[1].GetResponseRange().Kvs; string(kvs[0].Value) != "new" {
		t.Errorf("a transaction that reads below its own change sees %v", kvs)
	}
	if rev := s.Revision(User); rev != 107 {
		t.Errorf("revision %d: reads used up theirs", rev)
	}
}

func TestCompactionWithAFloorUsesItsRevision(t *testing.T) {
	config := testConfig(tempPath(t))
	s := open(t, config)
	applyAt(t, s, 10, put("a", "1"))
	results := applyAt(t, s, 50, &pb.CompactionRequest{Revision: 50}, &pb.CompactionRequest{Revision: 50}, &pb.CompactionRequest{Revision: 50})
	if !errors.Is(results[0].Err, ErrFutureRevision) || !errors.Is(results[2].Err, ErrCompacted) {
		t.Errorf("got %v", results)
	}
	if c, ok := results[1].Response.(*pb.CompactionResponse); !ok || c.Header.Revision != 51 {
		t.Errorf("got %v", results[1])
	}
	if s.Revision(User) != 51 || s.CompactRevision(User) != 50 {
		t.Errorf("revision %d, compacted %d", s.Revision(User), s.CompactRevision(User))
	}
	if get(t, s, "a") != "1" {
		t.Error("the newest revision cannot be read")
	}
	if r := applyAt(t, s, 51, put("a", "stale")); !errors.Is(r[0].Err, ErrStaleFloor) {
		t.Errorf("an entry of revisions from before the compaction: %v", r[0])
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, config)
	if s.Revision(User) != 51 || get(t, s, "a") != "1" {
		t.Errorf("reopened at revision %d", s.Revision(User))
	}
	if r := applyAt(t, s, 52, put("a", "2")); r[0].Err != nil || s.Revision(User) != 52 {
		t.Errorf("got %v", r)
	}
}

func TestCompactionWithoutAFloorUsesNoRevision(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	if r := apply(t, s, put("a", "1"), &pb.CompactionRequest{Revision: 2}); r[1].Err != nil || s.Revision(User) != 2 {
		t.Errorf("revision %d, %v", s.Revision(User), r[1])
	}
}

// What an answer gives as the newest revision, later answers may not go below,
// also when the request that was answered has changed nothing.
func TestAnswersInAnEntryWithAFloorNeverGoBack(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	applyAt(t, s, 10, &pb.PutRequest{Key: []byte("a"), Value: []byte("1")})
	refused := &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte("a"), Target: pb.Compare_VALUE, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_Value{Value: []byte("2")}}},
	}
	results := applyAt(t, s, 50, &pb.DeleteRangeRequest{Key: []byte("none")}, refused)
	if results[0].Err != nil || results[1].Err != nil {
		t.Fatal(results)
	}
	answered := results[1].Response.(*pb.TxnResponse).Header.Revision
	read, err := s.Range(t.Context(), User, &pb.RangeRequest{Key: []byte("a")})
	if err != nil || answered < 50 || read.Header.Revision < answered || s.Revision(User) < answered {
		t.Errorf("answered at %d, then read at %d, %v", answered, read.GetHeader().GetRevision(), err)
	}
}
