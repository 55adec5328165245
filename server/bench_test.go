package server

import (
	"context"
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/fsm"
	"kvd/shard"
)

// BenchmarkPut measures what this package costs per put; the replica answers at
// once.
func BenchmarkPut(b *testing.B) {
	replica := newFakeReplica(nil, shard.Leader{Node: "n1", Self: true, Term: 1})
	replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) {
		return fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{Revision: 2}}}, nil
	}
	put := &pb.PutRequest{Key: make([]byte, 16), Value: make([]byte, 256)}

	b.Run("direct", func(b *testing.B) {
		s, err := New(testConfig(replica, &fakePeers{}))
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.KV().Put(b.Context(), put); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("gRPC", func(b *testing.B) {
		n := startNode(b, func(c *Config) { c.Replica = func(uint64) Replica { return replica } })
		kv := pb.NewKVClient(n.dial(b))
		b.ReportAllocs()
		b.SetParallelism(50)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				if _, err := kv.Put(b.Context(), put); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// BenchmarkRangeOverShards measures what this package costs per range over 64
// shards of 5 nodes with 3 replicas; the network and raft cost nothing.
func BenchmarkRangeOverShards(b *testing.B) {
	w := newWorld(b, 5, 64, 3, nil)
	for i := range 10_000 {
		w.put("n1", fmt.Sprintf("k%05d", i), "some value")
	}
	for name, r := range map[string]*pb.RangeRequest{
		"ten keys":   {Key: []byte("k05"), RangeEnd: []byte("k06"), Limit: 10},
		"all keys":   {Key: []byte("k"), RangeEnd: []byte("l")},
		"count":      {Key: []byte("k"), RangeEnd: []byte("l"), CountOnly: true},
		"newest key": {Key: []byte("k"), RangeEnd: []byte("l"), SortTarget: pb.RangeRequest_MOD, SortOrder: pb.RangeRequest_DESCEND, Limit: 1},
		"one key":    {Key: []byte("k05000")},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := w.kv("n1").Range(b.Context(), r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
