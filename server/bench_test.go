package server

import (
	"context"
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
