package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"kvd/fsm"
	"kvd/shard"
)

// asIs sends and receives messages as bytes.
type asIs struct{}

func (asIs) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (asIs) Unmarshal(b []byte, v any) error { *v.(*[]byte) = bytes.Clone(b); return nil }
func (asIs) Name() string                    { return "" }

// pathCall is what both servers are asked.
type pathCall struct {
	name, method string
	request      []byte
	headers      []string
	outcome      error // of the log; nil = the request is applied
	dead         bool  // there is no leader
}

// Clients are answered the same, by whichever server: byte by byte, with the same errors, details, headers and trailers,
// and the same is counted.
func TestBothServersAnswerTheSame(t *testing.T) {
	nodes := make(map[bool]*node)
	for _, onlyGo := range []bool{false, true} {
		nodes[onlyGo] = startNode(t, func(c *Config) { c.OnlyGRPCGo, c.MaxRequestBytes, c.MaxTxnOps = onlyGo, 100<<10, 4 })
	}
	conns := map[bool]*grpc.ClientConn{false: nodes[false].dial(t), true: nodes[true].dial(t)}
	for _, call := range pathCalls(t) {
		t.Run(call.name, func(t *testing.T) {
			var want string
			for _, onlyGo := range []bool{true, false} {
				got := nodes[onlyGo].ask(t, conns[onlyGo], call)
				if onlyGo {
					want = got
				} else if got != want {
					t.Errorf("kvd's server:\n%s\ngrpc-go's:\n%s", got, want)
				}
			}
		})
	}
	if got, want := nodes[false].handled(t), nodes[true].handled(t); got != want {
		t.Errorf("kvd's server counts:\n%s\ngrpc-go's:\n%s", got, want)
	}
}

// handled says how many calls have ended how. Only kvd's server counts those that it could not decode.
func (n *node) handled(t *testing.T) string {
	t.Helper()
	families, err := n.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, f := range families {
		for _, m := range f.Metric {
			if line := fmt.Sprint(f.GetName(), m.Label); strings.HasPrefix(line, "grpc_server_handled_total") && !strings.Contains(line, "Internal") && m.Counter.GetValue() > 0 {
				lines = append(lines, fmt.Sprint(line, m.Counter.GetValue()))
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// ask makes a call and describes everything that comes back.
func (n *node) ask(t *testing.T, conn *grpc.ClientConn, call pathCall) string {
	t.Helper()
	n.replica.onPropose = nil
	if call.outcome != nil {
		n.replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) {
			var refused *refusedError
			if errors.As(call.outcome, &refused) {
				return fsm.Result{Err: refused.error}, nil
			}
			return fsm.Result{}, call.outcome
		}
	}
	if call.dead {
		leader := n.replica.Leader()
		n.replica.elect("", false)
		defer func() {
			n.replica.mu.Lock()
			defer n.replica.mu.Unlock()
			n.replica.leader = leader
		}()
	}
	var header, trailer metadata.MD
	var reply []byte
	ctx := metadata.AppendToOutgoingContext(t.Context(), call.headers...)
	err := conn.Invoke(ctx, call.method, &call.request, &reply, grpc.ForceCodec(asIs{}), grpc.Header(&header), grpc.Trailer(&trailer))
	return fmt.Sprintf("reply %x\nstatus %v\nheader %v\ntrailer %v", reply, status.Convert(err).Proto(), header, trailer)
}

// refusedError is the state machine's.
type refusedError struct{ error }

func pathCalls(t *testing.T) []pathCall {
	put := func(key, value string) []byte { return encoded(t, putData(t, key, value)) }
	get := func(r *pb.RangeRequest) []byte { return encoded(t, r) }
	txn := func(ops ...*pb.RequestOp) []byte { return encoded(t, &pb.TxnRequest{Success: ops}) }
	opPut := func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putData(t, key, "v")}}
	}
	opGet := func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}
	}
	const putM, getM, delM, txnM = pb.KV_Put_FullMethodName, pb.KV_Range_FullMethodName, pb.KV_DeleteRange_FullMethodName, pb.KV_Txn_FullMethodName
	all := []byte("k")
	calls := []pathCall{
		{name: "put", method: putM, request: put("k", "v")},
		{name: "put again", method: putM, request: encoded(t, &pb.PutRequest{Key: all, Value: []byte("w"), PrevKv: true})},
		{name: "put with its fields in another order and twice", method: putM, request: []byte{0x12, 1, 'x', 0x0a, 1, 'z', 0x20, 5, 0x12, 2, 'y', 'y', 0x0a, 1, 'k'}},
		{name: "put with long integers", method: putM, request: []byte{0x0a, 0x81, 0x80, 0x00, 'k', 0x92, 0x00, 1, 'v', 0xa0, 0x80, 0x00, 0x82, 0x00}},
		{name: "put with an unknown field", method: putM, request: append(put("k", "v"), 0xf8, 0x06, 1)},
		{name: "put with a field of another kind", method: putM, request: append(put("k", "v"), 0x08, 7, 0x1a, 1, 'x')},
		{name: "put of the largest", method: putM, request: put("big", strings.Repeat("x", 100<<10-20))},
		{name: "put of too much", method: putM, request: put("big", strings.Repeat("x", 100<<10))},
		{name: "put of far too much", method: putM, request: put("big", strings.Repeat("x", 2<<20))},
		{name: "put nothing", method: putM},
		{name: "put garbage", method: putM, request: []byte{0xff}},
		{name: "put half", method: putM, request: put("k", "v")[:4]},
		{name: "put a field of number 0", method: putM, request: []byte{0x02, 1, 'k'}},
		{name: "put with value and ignore_value", method: putM, request: encoded(t, &pb.PutRequest{Key: all, Value: all, IgnoreValue: true})},
		{name: "put with lease and ignore_lease", method: putM, request: encoded(t, &pb.PutRequest{Key: all, Lease: 3, IgnoreLease: true})},
		{name: "put with a lease", method: putM, request: encoded(t, &pb.PutRequest{Key: all, Lease: -3})},
		{name: "put ignoring the value of no key", method: putM, request: encoded(t, &pb.PutRequest{Key: []byte("none"), IgnoreValue: true})},
		{name: "get", method: getM, request: get(&pb.RangeRequest{Key: all})},
		{name: "get all", method: getM, request: get(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Limit: 1})},
		{name: "get a count", method: getM, request: get(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})},
		{name: "get keys", method: getM, request: get(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, KeysOnly: true, Serializable: true, SortOrder: pb.RangeRequest_DESCEND})},
		{name: "get none", method: getM, request: get(&pb.RangeRequest{Key: []byte("none")})},
		{name: "get nothing", method: getM},
		{name: "get garbage", method: getM, request: []byte{1, 2, 3}},
		{name: "get with an unknown field", method: getM, request: append(get(&pb.RangeRequest{Key: all}), 0xf8, 0x06, 1)},
		{name: "get the future", method: getM, request: get(&pb.RangeRequest{Key: all, Revision: 999})},
		{name: "get sorted by what", method: getM, request: get(&pb.RangeRequest{Key: all, SortTarget: 99})},
		{name: "get in a negative order", method: getM, request: get(&pb.RangeRequest{Key: all, SortOrder: -1})},
		{name: "delete", method: delM, request: encoded(t, &pb.DeleteRangeRequest{Key: all, PrevKv: true})},
		{name: "delete nothing", method: delM},
		{name: "delete garbage", method: delM, request: []byte{0xff}},
		{name: "transaction", method: txnM, request: txn(opPut("a"), opGet("a"))},
		{name: "transaction that reads", method: txnM, request: txn(opGet("a"))},
		{name: "empty transaction", method: txnM},
		{name: "transaction of garbage", method: txnM, request: []byte{0xff}},
		{name: "transaction that puts twice", method: txnM, request: txn(opPut("a"), opPut("a"))},
		{name: "transaction of too much", method: txnM, request: txn(opGet("a"), opGet("a"), opGet("a"), opGet("a"), opGet("a"))},
		{name: "transaction with an empty operation", method: txnM, request: txn(&pb.RequestOp{})},
		{name: "a version that is not text", method: getM, request: get(&pb.RangeRequest{Key: all}), headers: []string{rpctypes.MetadataClientAPIVersionKey, "3.x"}},
		{name: "large headers", method: getM, request: get(&pb.RangeRequest{Key: all}), headers: []string{"x", strings.Repeat("y", 20<<10), "b-bin", "\x00\xff"}},
		{name: "compaction", method: pb.KV_Compact_FullMethodName, request: encoded(t, &pb.CompactionRequest{Revision: 4})},
		{name: "get what is compacted", method: getM, request: get(&pb.RangeRequest{Key: all, Revision: 2})},
		{name: "no such method", method: "/etcdserverpb.KV/Nothing"},
		{name: "no leader, which is required", method: putM, request: put("k", "v"), dead: true, headers: []string{rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader}},
	}
	for i, err := range []error{
		shard.ErrUnknownOutcome, shard.ErrOverloaded, shard.ErrTooLarge, shard.ErrClosed, errNoSpace, errors.New("100% näh\n\x01"),
		context.Canceled, fmt.Errorf("later: %w", context.DeadlineExceeded),
	} {
		calls = append(calls, pathCall{name: fmt.Sprintf("outcome %d", i), method: putM, request: put("k", "v"), outcome: err})
	}
	for _, known := range refusals {
		for _, method := range []string{putM, txnM} {
			request := put("k", "v")
			if method == txnM {
				request = txn(opPut("k"))
			}
			calls = append(calls, pathCall{name: fmt.Sprintf("refusal %d of %s", known.kind, method), method: method, request: request, outcome: &refusedError{known.err}})
		}
	}
	return calls
}
