package fsm

import (
	"errors"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

func putOp(p *pb.PutRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: p}}
}

// greedy reads everything more often than one entry may.
func greedy(first ...*pb.RequestOp) *pb.TxnRequest {
	all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	for range entryReadBytes/(3<<20) + 2 {
		first = append(first, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: all}})
	}
	return &pb.TxnRequest{Success: first}
}

// A transaction is applied by every replica, and again at each start: what it
// reads is bounded, by the same on a replica whose rows are in the file.
func TestTransactionsReadABoundedAmount(t *testing.T) {
	inMemory, inFile := open(t, testConfig(tempPath(t))), open(t, testConfig(tempPath(t)))
	stores := []*Store{inMemory, inFile}
	value := strings.Repeat("x", 1<<20)
	mebibytes := []proto.Message{put("a", value), put("b", value), put("c", value), put("d", value)}
	withPrevious := put("a", "new")
	withPrevious.PrevKv = true
	late := greedy(putOp(put("late", "")))
	late.Success = append(late.Success, putOp(withPrevious), putOp(put("last", "")))
	for _, s := range stores {
		apply(t, s, mebibytes...)
		if s == inFile {
			if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
				t.Fatal(err)
			}
		}
		before := s.Revision(User)
		compare := &pb.TxnRequest{}
		for range entryReadBytes/(3<<20) + 2 {
			compare.Compare = append(compare.Compare, &pb.Compare{
				Key: []byte{0}, RangeEnd: []byte{0}, Target: pb.Compare_VALUE, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Value{},
			})
		}
		for name, txn := range map[string]*pb.TxnRequest{"ranges": greedy(), "compares": compare} {
			if r := apply(t, s, txn)[0]; !errors.Is(r.Err, ErrReadsTooMuch) || s.Revision(User) != before {
				t.Fatalf("%s: %v, revision %d after %d", name, r.Err, s.Revision(User), before)
			}
		}
		// The others in the same entry get their own.
		results := apply(t, s, late, put("e", "next"), &pb.TxnRequest{Success: []*pb.RequestOp{putOp(put("f", "next"))}})
		if r := results[0]; !errors.Is(r.Err, ErrAnswerDropped) || r.Response != nil {
			t.Fatalf("%v", r)
		}
		if results[1].Err != nil || results[2].Err != nil || results[2].Response == nil {
			t.Fatalf("%v", results[1:])
		}
		if got := s.Revision(User); got != before+3 {
			t.Fatalf("revision %d, want %d", got, before+3)
		}
		if get(t, s, "a") != "new" {
			t.Fatal("the transaction was not executed to its end")
		}
		// What the change depends on is read in any case.
		keep := put("b", "")
		keep.IgnoreValue, keep.PrevKv = true, true
		again := greedy(putOp(put("again", "")))
		again.Success = append(again.Success, putOp(keep))
		if r := apply(t, s, again)[0]; !errors.Is(r.Err, ErrAnswerDropped) || get(t, s, "b") != value {
			t.Fatalf("%v, value of %d bytes", r.Err, len(get(t, s, "b")))
		}
	}
	_, one := inMemory.Digest()
	_, other := inFile.Digest()
	if one != other {
		t.Fatal("replicas differ")
	}
}

func TestMeterBoundsReads(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, put("a", strings.Repeat("x", 1000)), put("b", strings.Repeat("x", 1000)))
	all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	for name, test := range map[string]struct {
		bytes int
		want  error
	}{"enough": {1 << 20, nil}, "too little": {1500, errAllowance}} {
		ctx := WithMeter(t.Context(), &allowance{bytes: test.bytes})
		if _, err := s.Range(ctx, User, all); !errors.Is(err, test.want) {
			t.Fatalf("%s: %v", name, err)
		}
		txn := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: all}}}}
		if _, err := s.ReadTxn(WithMeter(t.Context(), &allowance{bytes: test.bytes}), User, txn); !errors.Is(err, test.want) {
			t.Fatalf("%s: %v", name, err)
		}
	}
}
