package server

import (
	"context"
	"runtime"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Answers that clients do not take must not add up.
func TestAnswersAreBounded(t *testing.T) {
	const valueBytes = 1 << 20
	n := startNode(t, func(c *Config) { c.MaxAnswerBytes = 3 * valueBytes })
	for _, key := range []string{"a", "b"} {
		if _, err := n.KV().Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: make([]byte, valueBytes)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.KV().Put(t.Context(), putData(t, "small", "v")); err != nil {
		t.Fatal(err)
	}
	all := &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("c")}
	answered := &n.router.answers.bytes
	conn := n.dial(t)
	kv := pb.NewKVClient(conn)
	whole, err := kv.Range(t.Context(), all)
	if err != nil {
		t.Fatal(err)
	}
	for answered.Load() != 0 {
		runtime.Gosched()
	}

	ctx, cancel := context.WithCancel(t.Context())
	slow := n.dial(t, grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	stream, err := slow.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/etcdserverpb.KV/Range")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.SendMsg(all); err != nil {
		t.Fatal(err)
	}
	for answered.Load() != int64(proto.Size(whole)) {
		runtime.Gosched() // until it is read, encoded, and not taken
	}
	txn := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: all}}}}
	_, err = kv.Range(t.Context(), all)
	_, txnErr := kv.Txn(t.Context(), txn)
	streamed, streamErr := kv.RangeStream(t.Context(), all)
	if streamErr == nil {
		_, streamErr = streamed.Recv()
	}
	for name, err := range map[string]error{"range": err, "transaction": txnErr, "stream": streamErr} {
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("small")}); err != nil {
		t.Fatalf("a small read is refused: %v", err)
	}
	cancel()
	for answered.Load() != 0 {
		runtime.Gosched()
	}
	if _, err := kv.Range(t.Context(), all); err != nil {
		t.Fatal(err)
	}
}
