package fsm

import (
	"errors"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func TestReadsAtRevisionsOfOtherGroups(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	applyAt(t, s, 10, put("a", "1"))
	applyAt(t, s, 20, put("a", "2"))
	ctx := t.Context()
	for _, c := range []struct {
		rev, current, header int64
		value                string
		err                  error
	}{
		{rev: 15, current: 30, header: 30, value: "1"},
		{rev: 25, current: 30, header: 30, value: "2"},
		{rev: 30, current: 30, header: 30, value: "2"},
		{rev: 31, current: 30, err: ErrFutureRevision},
		{rev: 0, current: 30, header: 30, value: "2"},
		{rev: 20, current: 15, header: 20, value: "2"}, // the state is ahead of what the caller knows
		{rev: 21, current: 15, err: ErrFutureRevision},
		{rev: 0, current: 15, header: 20, value: "2"},
		{rev: 21, current: 0, err: ErrFutureRevision},
	} {
		r := &pb.RangeRequest{Key: []byte("a"), Revision: c.rev}
		check := func(what string, header *pb.ResponseHeader, answer *pb.RangeResponse, err error) {
			t.Helper()
			if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Errorf("%s at %d of %d: %v, want %v", what, c.rev, c.current, err, c.err)
			} else if err == nil && (header.Revision != c.header || len(answer.Kvs) != 1 || string(answer.Kvs[0].Value) != c.value) {
				t.Errorf("%s at %d of %d: %v, %v, want %q at %d", what, c.rev, c.current, header, answer, c.value, c.header)
			}
		}
		resp, err := s.RangeAt(ctx, User, r, c.current)
		check("range", resp.GetHeader(), resp, err)
		resp, err = s.RangePageAt(ctx, User, r, c.current)
		check("page", resp.GetHeader(), resp, err)
		txn, err := s.ReadTxnAt(ctx, User, rangeAt("a", c.rev), c.current)
		if err != nil {
			check("transaction", nil, nil, err)
		} else {
			check("transaction", txn.Header, txn.Responses[0].GetResponseRange(), err)
		}
		_, _, hashed, err := s.HashKVAt(ctx, c.rev, c.current)
		if !errors.Is(err, c.err) || err == nil && c.rev != 0 && hashed != c.rev {
			t.Errorf("hash at %d of %d: at %d, %v", c.rev, c.current, hashed, err)
		}
	}
	same, _, _, err := s.HashKVAt(ctx, 30, 30)
	if own, _, _, err2 := s.HashKV(ctx, 20); same != own || err != nil || err2 != nil {
		t.Errorf("hashes %x at 30 and %x at 20 differ, %v, %v", same, own, err, err2)
	}
	applyAt(t, s, 40, &pb.CompactionRequest{Revision: 35})
	if _, err := s.RangeAt(ctx, User, &pb.RangeRequest{Key: []byte("a"), Revision: 30}, 30); !errors.Is(err, ErrCompacted) {
		t.Errorf("below the compaction: %v", err)
	}
}

// A view does not change while it is open, also below a current revision that it was told of.
func TestViewAtACurrentRevisionStays(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	applyAt(t, s, 10, put("a", "1"))
	v, err := s.openView(t.Context(), User, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer v.close()
	applyAt(t, s, 20, put("a", "2"))
	for _, rev := range []int64{0, 50} {
		resp, err := v.rangeKeys(t.Context(), &pb.RangeRequest{Key: []byte("a"), Revision: rev}, true)
		if err != nil || string(resp.Kvs[0].Value) != "1" || resp.Header.Revision != 100 {
			t.Errorf("at %d: %v, %v", rev, resp, err)
		}
	}
}
