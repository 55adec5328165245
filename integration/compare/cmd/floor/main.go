// Command floor is the least that a KV server can do: it answers Put and Range over gRPC with messages of the size that
// a real server's have, and neither keeps nor looks up anything. What it takes is what gRPC takes.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
)

func main() {
	valueBytes := flag.Int("val-size", 256, "bytes of each value in an answer")
	flag.Parse()
	if err := serve(flag.Arg(0), *valueBytes); err != nil {
		fmt.Fprintln(os.Stderr, "floor:", err)
		os.Exit(1)
	}
}

func serve(address string, valueBytes int) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	pb.RegisterKVServer(server, &kv{value: make([]byte, valueBytes)})
	return server.Serve(listener)
}

// kv answers like a store in which every key is. Its numbers are as long as a real server's.
type kv struct {
	pb.UnimplementedKVServer
	value []byte
}

const revision = 100_000

func header() *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: 0xcdf818194e3a8c32, MemberId: 0x8e9e05c52164694d, Revision: revision, RaftTerm: 2}
}

func (s *kv) Put(context.Context, *pb.PutRequest) (*pb.PutResponse, error) {
	return &pb.PutResponse{Header: header()}, nil
}

func (s *kv) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	response := &pb.RangeResponse{Header: header(), Count: 1}
	if !r.CountOnly {
		response.Kvs = []*mvccpb.KeyValue{{Key: r.Key, CreateRevision: revision, ModRevision: revision, Version: 1, Value: s.value}}
	}
	return response, nil
}
