package server

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// BenchmarkRPC measures what a put and a get of one key cost over gRPC, the client's part included, where the replica
// answers at once; the floor is a service of grpc-go that does nothing. What both need of the processor is
// cpu-ns/op.
func BenchmarkRPC(b *testing.B) {
	replica := newFakeReplica(openStore(b), shard.Leader{Node: "n1", Self: true, Term: 1})
	put := &pb.PutRequest{Key: make([]byte, 16), Value: make([]byte, 256)}
	data, err := proto.Marshal(&pb.InternalRaftRequest{Put: put})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := replica.apply(fsm.Request{Data: data}); err != nil {
		b.Fatal(err)
	}
	replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) {
		return fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{Revision: 2}}}, nil
	}
	n := startNode(b, func(c *Config) { c.Replica = func(uint64) Replica { return replica } })
	floor := listen(b)
	server := grpc.NewServer()
	pb.RegisterKVServer(server, idleKV{})
	go func() { _ = server.Serve(floor) }()
	b.Cleanup(server.Stop)

	for _, at := range []struct{ name, address string }{{"floor", floor.Addr().String()}, {"kvd", n.address}} {
		kv := pb.NewKVClient((&node{address: at.address}).dial(b))
		b.Run("put/"+at.name, func(b *testing.B) {
			benchCalls(b, func() error { _, err := kv.Put(b.Context(), put); return err })
		})
		b.Run("get/"+at.name, func(b *testing.B) {
			get := &pb.RangeRequest{Key: put.Key}
			benchCalls(b, func() error { _, err := kv.Range(b.Context(), get); return err })
		})
	}
}

func benchCalls(b *testing.B, call func() error) {
	b.ReportAllocs()
	b.SetParallelism(50)
	before := processorTime(b)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if err := call(); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(processorTime(b)-before)/float64(b.N), "cpu-ns/op")
}

// processorTime is what this process has used.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// idleKV answers like a key-value service, without being one.
type idleKV struct{ pb.UnimplementedKVServer }

func (idleKV) Put(context.Context, *pb.PutRequest) (*pb.PutResponse, error) {
	return &pb.PutResponse{Header: &pb.ResponseHeader{ClusterId: 1 << 63, MemberId: 1 << 63, Revision: 1e6, RaftTerm: 2}}, nil
}

func (idleKV) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	return &pb.RangeResponse{
		Header: &pb.ResponseHeader{ClusterId: 1 << 63, MemberId: 1 << 63, Revision: 1e6, RaftTerm: 2}, Count: 1,
		Kvs: []*mvccpb.KeyValue{{Key: r.Key, Value: idleValue, CreateRevision: 1e6, ModRevision: 1e6, Version: 1}},
	}, nil
}

var idleValue = make([]byte, 256)

// BenchmarkPut measures what this package costs per put without gRPC; the replica answers at once.
func BenchmarkPut(b *testing.B) {
	replica := newFakeReplica(nil, shard.Leader{Node: "n1", Self: true, Term: 1})
	replica.onPropose = func(context.Context, fsm.Request) (fsm.Result, error) {
		return fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{Revision: 2}}}, nil
	}
	put := &pb.PutRequest{Key: make([]byte, 16), Value: make([]byte, 256)}
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

// BenchmarkWatchFanOut is what it costs to tell one client of a change that 10,000 of its watches see.
func BenchmarkWatchFanOut(b *testing.B) {
	const watches = 10_000
	w := startFakeWatches(b, nil, nil)
	c, f := w.open(b)
	for range watches {
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		c.next()
	}
	value := strings.Repeat("v", 256)
	b.ReportAllocs()
	b.ResetTimer()
	before := processorTime(b)
	var giving sync.WaitGroup
	giving.Go(func() {
		for i := range b.N {
			events := []*mvccpb.Event{putEvent("k", value, int64(11+i))}
			for id := range int64(watches) {
				if err := f.deliver(watchDelivery{id: id + 1, events: events}); err != nil {
					b.Error(err)
					return
				}
			}
		}
	})
	for range b.N * watches {
		c.next()
	}
	giving.Wait()
	b.ReportMetric(float64(processorTime(b)-before)/float64(b.N*watches), "cpu-ns/event")
}
