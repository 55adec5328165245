package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// sameStatus compares code and message, which is what clients see.
func sameStatus(t *testing.T, got, want error) {
	t.Helper()
	g, w := status.Convert(got), status.Convert(want)
	if g.Code() != w.Code() || g.Message() != w.Message() {
		t.Fatalf("got %v %q, want %v %q", g.Code(), g.Message(), w.Code(), w.Message())
	}
}

func TestClientRoundTrip(t *testing.T) {
	n := startNode(t, nil)
	c, ctx := n.client(t), t.Context()

	put, err := c.Put(ctx, "k", "v1")
	if err != nil {
		t.Fatal(err)
	}
	want := &pb.ResponseHeader{ClusterId: 0xc1, MemberId: 0xa1, Revision: 2, RaftTerm: 7}
	if !proto.Equal((*pb.PutResponse)(put).Header, want) {
		t.Fatalf("header %v, want %v", put.Header, want)
	}
	if put, err = c.Put(ctx, "k", "v2", clientv3.WithPrevKV()); err != nil || string(put.PrevKv.Value) != "v1" {
		t.Fatalf("put: %v, %v", put, err)
	}
	get, err := c.Get(ctx, "k", clientv3.WithRev(2))
	if err != nil || string(get.Kvs[0].Value) != "v1" || get.Header.Revision != 3 {
		t.Fatalf("get at revision 2: %v, %v", get, err)
	}
	txn, err := c.Txn(ctx).If(clientv3.Compare(clientv3.Value("k"), "=", "v2")).
		Then(clientv3.OpPut("k", "v3"), clientv3.OpGet("k")).Commit()
	if err != nil || !txn.Succeeded || string(txn.Responses[1].GetResponseRange().Kvs[0].Value) != "v3" {
		t.Fatalf("txn: %v, %v", txn, err)
	}
	read, err := c.Txn(ctx).If(clientv3.Compare(clientv3.Version("k"), "=", 9)).Else(clientv3.OpGet("k")).Commit()
	if err != nil || read.Succeeded || read.Header.Revision != 4 || read.Header.RaftTerm != 7 {
		t.Fatalf("read-only txn: %v, %v", read, err)
	}
	del, err := c.Delete(ctx, "k", clientv3.WithPrefix())
	if err != nil || del.Deleted != 1 || del.Header.Revision != 5 {
		t.Fatalf("delete: %v, %v", del, err)
	}
	compact, err := c.Compact(ctx, 4, clientv3.WithCompactPhysical())
	if err != nil || compact.Header.Revision != 5 || compact.Header.MemberId != 0xa1 {
		t.Fatalf("compact: %v, %v", compact, err)
	}
	if _, err = c.Get(ctx, "k", clientv3.WithRev(3)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Fatalf("get below the compaction: %v", err)
	}
}

// Reads are never proposed.
func TestReadsAreNotReplicated(t *testing.T) {
	n := startNode(t, nil)
	n.replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) {
		t.Error("a read was proposed")
		return fsm.Result{}, errors.New("no")
	}
	c := n.client(t)
	if _, err := c.Get(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Txn(t.Context()).If(clientv3.Compare(clientv3.Version("k"), "=", 0)).Then(clientv3.OpGet("k")).Commit(); err != nil {
		t.Fatal(err)
	}
}

func TestValidation(t *testing.T) {
	n := startNode(t, nil)
	kv := pb.NewKVClient(n.dial(t))
	ctx := t.Context()
	for range 3 { // revision 4
		if _, err := kv.Put(ctx, putData(t, "k", "v")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := kv.Compact(ctx, &pb.CompactionRequest{Revision: 3}); err != nil {
		t.Fatal(err)
	}
	k := []byte("k")
	get := func(r *pb.RangeRequest) func() error {
		return func() error { _, err := kv.Range(ctx, r); return err }
	}
	put := func(r *pb.PutRequest) func() error {
		return func() error { _, err := kv.Put(ctx, r); return err }
	}
	txn := func(r *pb.TxnRequest) func() error {
		return func() error { _, err := kv.Txn(ctx, r); return err }
	}
	readAt := func(rev int64) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: k, Revision: rev}}}
	}
	for name, test := range map[string]struct {
		call func() error
		want error
	}{
		"range without key":      {get(&pb.RangeRequest{}), rpctypes.ErrGRPCEmptyKey},
		"range sort order":       {get(&pb.RangeRequest{Key: k, SortOrder: 9}), rpctypes.ErrGRPCInvalidSortOption},
		"range sort target":      {get(&pb.RangeRequest{Key: k, SortTarget: -1}), rpctypes.ErrGRPCInvalidSortOption},
		"key before sort":        {get(&pb.RangeRequest{SortTarget: -1}), rpctypes.ErrGRPCEmptyKey},
		"range compacted":        {get(&pb.RangeRequest{Key: k, Revision: 2}), rpctypes.ErrGRPCCompacted},
		"range future":           {get(&pb.RangeRequest{Key: k, Revision: 5}), rpctypes.ErrGRPCFutureRev},
		"serializable compacted": {get(&pb.RangeRequest{Key: k, Revision: 2, Serializable: true}), rpctypes.ErrGRPCCompacted},
		"put without key":        {put(&pb.PutRequest{}), rpctypes.ErrGRPCEmptyKey},
		"put with value":         {put(&pb.PutRequest{Key: k, Value: k, IgnoreValue: true}), rpctypes.ErrGRPCValueProvided},
		"put with lease":         {put(&pb.PutRequest{Key: k, Lease: 1, IgnoreLease: true}), rpctypes.ErrGRPCLeaseProvided},
		"put unknown lease":      {put(&pb.PutRequest{Key: k, Lease: 1}), rpctypes.ErrGRPCLeaseNotFound},
		"put ignoring nothing":   {put(&pb.PutRequest{Key: []byte("none"), IgnoreValue: true}), rpctypes.ErrGRPCKeyNotFound},
		"delete without key":     {func() error { _, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{}); return err }, rpctypes.ErrGRPCEmptyKey},
		"txn duplicate":          {txn(&pb.TxnRequest{Success: list(opPut("a"), opPut("a"))}), rpctypes.ErrGRPCDuplicateKey},
		"txn too many":           {txn(&pb.TxnRequest{Success: repeated(129, opPut("a"))}), rpctypes.ErrGRPCTooManyOps},
		"txn read compacted":     {txn(&pb.TxnRequest{Success: list(readAt(2))}), rpctypes.ErrGRPCCompacted},
		"txn write compacted":    {txn(&pb.TxnRequest{Success: list(opPut("a"), readAt(2))}), rpctypes.ErrGRPCCompacted},
		"txn write future":       {txn(&pb.TxnRequest{Success: list(opPut("a"), readAt(9))}), rpctypes.ErrGRPCFutureRev},
		"compact again":          {func() error { _, err := kv.Compact(ctx, &pb.CompactionRequest{Revision: 3}); return err }, rpctypes.ErrGRPCCompacted},
		"compact future":         {func() error { _, err := kv.Compact(ctx, &pb.CompactionRequest{Revision: 99}); return err }, rpctypes.ErrGRPCFutureRev},
	} {
		t.Run(name, func(t *testing.T) { sameStatus(t, test.call(), test.want) })
	}
	if rev := n.replica.store.Revision(fsm.User); rev != 4 {
		t.Fatalf("refused requests moved the revision to %d", rev)
	}
}

func TestRequestSize(t *testing.T) {
	n := startNode(t, nil)
	kv := pb.NewKVClient(n.dial(t))
	limit := 3 << 19
	put := func(size int) error {
		_, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte("k"), Value: make([]byte, size)})
		return err
	}
	if err := put(limit - 32); err != nil {
		t.Fatalf("a request below the limit: %v", err)
	}
	sameStatus(t, put(limit), rpctypes.ErrGRPCRequestTooLarge)
	if err := put(limit + overheadBytes); status.Code(err) != codes.ResourceExhausted {
		t.Fatalf("a request that the codec refuses: %v", err)
	}
	if err := put(10); err != nil {
		t.Fatalf("after large requests: %v", err)
	}
}

// What the state machine cannot decode halts every replica, so nothing that a
// client can send may get there, however odd.
func TestOddRequestsAreDecodable(t *testing.T) {
	n := startNode(t, nil)
	kv := pb.NewKVClient(n.dial(t))
	groups := func(depth int) []byte {
		var b []byte
		for range depth {
			b = protowire.AppendTag(b, 1000, protowire.StartGroupType)
		}
		for range depth {
			b = protowire.AppendTag(b, 1000, protowire.EndGroupType)
		}
		return b
	}
	for _, depth := range []int{1, 100, 9_990, 9_998, 9_999, 10_000, 10_001, 10_010} {
		for name, unknown := range map[string][]byte{
			"groups": groups(depth),
			"field":  protowire.AppendVarint(protowire.AppendTag(nil, 1<<20, protowire.VarintType), uint64(depth)),
		} {
			put := &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}
			put.ProtoReflect().SetUnknown(unknown)
			_, err := kv.Put(t.Context(), put)
			t.Logf("put with unknown %s of depth %d: %v", name, depth, err)

			op := opPut("a")
			op.GetRequestPut().ProtoReflect().SetUnknown(unknown)
			_, err = kv.Txn(t.Context(), &pb.TxnRequest{Success: list(opTxn(list(op), nil))})
			t.Logf("txn with unknown %s of depth %d: %v", name, depth, err)
			if err := n.replica.store.Err(); err != nil {
				t.Fatalf("the state machine has halted: %v", err)
			}
		}
	}
}

func TestRangeStream(t *testing.T) {
	n := startNode(t, func(c *Config) { c.MaxRequestBytes = 8 << 10; c.MaxPendingBytes = 1 << 20 })
	kv := pb.NewKVClient(n.dial(t))
	const keys = 200
	for i := range keys {
		if _, err := kv.Put(t.Context(), putData(t, fmt.Sprintf("k%03d", i), strings.Repeat("v", 100))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range keys / 2 { // orders by key and by anything else differ
		if _, err := kv.Put(t.Context(), putData(t, fmt.Sprintf("k%03d", i*7%keys), fmt.Sprintf("%0100d", 1000-i))); err != nil {
			t.Fatal(err)
		}
	}
	stream := func(r *pb.RangeRequest, between func()) (chunks int, all *pb.RangeResponse, err error) {
		s, err := kv.RangeStream(t.Context(), r)
		if err != nil {
			return 0, nil, err
		}
		all = &pb.RangeResponse{}
		for {
			m, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return chunks, all, nil
			}
			if err != nil {
				return chunks, all, err
			}
			if chunks++; chunks == 1 {
				between()
			}
			proto.Merge(all, m.RangeResponse)
		}
	}
	for name, r := range map[string]*pb.RangeRequest{
		"all":          {Key: []byte("k"), RangeEnd: []byte("l")},
		"limit":        {Key: []byte("k"), RangeEnd: []byte("l"), Limit: 25},
		"small limit":  {Key: []byte("k"), RangeEnd: []byte("l"), Limit: 3},
		"exact limit":  {Key: []byte("k"), RangeEnd: []byte("l"), Limit: keys},
		"old revision": {Key: []byte("k"), RangeEnd: []byte("l"), Revision: 50},
		"keys only":    {Key: []byte("k"), RangeEnd: []byte("l"), KeysOnly: true},
		"count only":   {Key: []byte("k"), RangeEnd: []byte("l"), CountOnly: true},
		"one key":      {Key: []byte("k007")},
		"no key":       {Key: []byte("x")},
		"serializable": {Key: []byte("k"), RangeEnd: []byte("l"), Serializable: true},
		"by key":       {Key: []byte("k"), RangeEnd: []byte("l"), SortOrder: pb.RangeRequest_ASCEND, Limit: 30},
	} {
		t.Run(name, func(t *testing.T) {
			want, err := kv.Range(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			chunks, got, err := stream(r, func() {
				// Later writes must not show.
				if _, err := kv.Put(t.Context(), putData(t, "k199x", "late")); err != nil {
					t.Error(err)
				}
				if _, err := kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte("k199x")}); err != nil {
					t.Error(err)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(got, want) {
				t.Fatalf("stream: %d keys, count %d, more %v, header %v\nrange: %d keys, count %d, more %v, header %v",
					len(got.Kvs), got.Count, got.More, got.Header, len(want.Kvs), want.Count, want.More, want.Header)
			}
			if name == "all" && chunks < 3 {
				t.Fatalf("everything came in %d chunks", chunks)
			}
		})
	}
	// Without an order the target means nothing to a stream, which goes by key.
	byKey, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")})
	if err != nil {
		t.Fatal(err)
	}
	for target, name := range pb.RangeRequest_SortTarget_name {
		r := &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l"), SortTarget: pb.RangeRequest_SortTarget(target)}
		if _, got, err := stream(r, func() {}); err != nil || !proto.Equal(got, byKey) {
			t.Errorf("sort target %s: %d keys of %d, %v", name, len(got.Kvs), len(byKey.Kvs), err)
		}
	}
	_, _, err = stream(&pb.RangeRequest{Key: []byte("k"), SortOrder: pb.RangeRequest_DESCEND}, nil)
	sameStatus(t, err, status.Error(codes.Unimplemented, "RangeStream does not support custom sort orders"))
	_, _, err = stream(&pb.RangeRequest{Key: []byte("k"), MinModRevision: 1}, nil)
	sameStatus(t, err, status.Error(codes.Unimplemented, "RangeStream does not support revision filters"))
	_, _, err = stream(&pb.RangeRequest{}, nil)
	sameStatus(t, err, rpctypes.ErrGRPCEmptyKey)
	_, _, err = stream(&pb.RangeRequest{Key: []byte("k"), Revision: 1 << 40}, nil)
	sameStatus(t, err, rpctypes.ErrGRPCFutureRev)
}
