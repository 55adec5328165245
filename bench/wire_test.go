package bench

import (
	"bytes"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
)

// What is encoded by hand is what etcd's generated code reads.
func TestRequestsAreEtcds(t *testing.T) {
	key, end, value := []byte("key"), []byte("kez"), bytes.Repeat([]byte{0xff, 0}, 300)
	get := &pb.RangeRequest{Key: key}
	for name, c := range map[string]struct {
		encoded []byte
		want    proto.Message
	}{
		"put":          {appendPut(nil, key, value), &pb.PutRequest{Key: key, Value: value}},
		"empty put":    {appendPut(nil, key, nil), &pb.PutRequest{Key: key, Value: []byte{}}},
		"get":          {appendRange(nil, key, nil, 0, false), get},
		"serializable": {appendRange(nil, key, nil, 0, true), &pb.RangeRequest{Key: key, Serializable: true}},
		"range":        {appendRange(nil, key, end, 300, false), &pb.RangeRequest{Key: key, RangeEnd: end, Limit: 300}},
		"txn": {appendCompareAndPut(nil, key, value, 1<<40), &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: key, Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: 1 << 40}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: value}}}},
			Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: get}}},
		}},
		"watch": {appendWatch(nil, key, end), &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{
			CreateRequest: &pb.WatchCreateRequest{Key: key, RangeEnd: end}}}},
	} {
		got := c.want.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(c.encoded, got); err != nil || !proto.Equal(got, c.want) {
			t.Errorf("%s: %v: %s, want %s", name, err, prototext.Format(got), prototext.Format(c.want))
		}
	}
}

func TestAnswersAreRead(t *testing.T) {
	header := &pb.ResponseHeader{ClusterId: 1 << 63, MemberId: 2, Revision: 77, RaftTerm: 3}
	kv := func(mod int64) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Key: []byte("k"), CreateRevision: 1, ModRevision: mod, Version: 2, Value: make([]byte, 200), Lease: 9}
	}
	put := &pb.PutResponse{Header: header}
	found := &pb.RangeResponse{Header: header, Kvs: []*mvccpb.KeyValue{kv(5), kv(6)}, More: true, Count: 9}
	for name, c := range map[string]struct {
		answer proto.Message
		read   func(*call, []byte) error
		want   call
	}{
		"put":       {put, readPut, call{revision: 77, keys: 1}},
		"range":     {found, readRange, call{revision: 77, keys: 2, modRevision: 6}},
		"no keys":   {&pb.RangeResponse{Header: header}, readRange, call{revision: 77}},
		"succeeded": {&pb.TxnResponse{Header: header, Succeeded: true}, readTxn, call{revision: 77, keys: 1, modRevision: 77, succeeded: true}},
		"failed": {&pb.TxnResponse{Header: header, Responses: []*pb.ResponseOp{{Response: &pb.ResponseOp_ResponseRange{ResponseRange: found}}}},
			readTxn, call{revision: 77, keys: 1, modRevision: 6}},
	} {
		encoded, err := proto.Marshal(c.answer)
		if err != nil {
			t.Fatal(err)
		}
		got := call{read: c.read, revision: 1, keys: 1, modRevision: 1, succeeded: true} // of the answer before
		if err := got.decode(encoded); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.revision != c.want.revision || got.keys != c.want.keys || got.modRevision != c.want.modRevision || got.succeeded != c.want.succeeded {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
		for n := range encoded { // damaged ones are errors, or something else, but no panic
			damaged := bytes.Clone(encoded)
			damaged[n] ^= 0x55
			(&call{read: c.read}).decode(damaged)
			(&call{read: c.read}).decode(encoded[:n])
		}
	}
	if (&call{read: readPut}).decode([]byte{0x0a, 0x7f}) == nil {
		t.Error("half an answer is read")
	}
}
