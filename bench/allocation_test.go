package bench

import (
	"math/rand/v2"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// What this package itself does for a request makes no garbage, but for the slice header that gRPC wants boxed.
func TestRequestsMakeNoGarbage(t *testing.T) {
	answer, err := proto.Marshal(&pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 9}, Kvs: []*mvccpb.KeyValue{{Key: []byte("k"), Value: make([]byte, 256)}}})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{}.withDefaults()
	r := &run{o: o, base: time.Now(), keys: keyspace{o.Prefix, defaultDigits}, values: newValues(o.ValueBytes, 1)}
	c := &client{run: r, rng: rand.New(rand.NewPCG(1, 2)), keys: newScrambled(1000), parent: t.Context()}
	shard := newRecorder([]string{"put"}, 1, time.Hour).shards[0]
	for name, f := range map[string]func(){
		"put": func() {
			c.key = r.keys.append(c.key[:0], c.keys.next(c.rng))
			c.call.request = appendPut(c.call.request[:0], c.key, r.values.pick(c.rng))
		},
		"txn": func() {
			c.key = r.keys.append(c.key[:0], c.keys.next(c.rng))
			c.call.request = appendCompareAndPut(c.call.request[:0], c.key, r.values.pick(c.rng), 7)
		},
		"answer": func() {
			if c.call.read = readRange; c.call.decode(answer) != nil || c.call.keys != 1 {
				t.Error("the answer is not read")
			}
		},
		"record": func() { shard.record(0, 5, 1000, outcome{keys: 1}) },
		"watch":  func() { c.begin(); c.done() },
	} {
		f() // buffers grow once
		if n := testing.AllocsPerRun(1000, f); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	if n := testing.AllocsPerRun(1000, func() { c.call.encoded() }); n > 1 {
		t.Errorf("encoded: %v allocations", n)
	}
	c.release()
}
