package fsm

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Filter keeps the keys that the revision filters of a range request let through. It changes kvs.
func Filter(kvs []*mvccpb.KeyValue, r *pb.RangeRequest) []*mvccpb.KeyValue { return filter(kvs, r) }

// Order sorts keys, which come in ascending order, as a range request wants them.
func Order(kvs []*mvccpb.KeyValue, r *pb.RangeRequest) { order(kvs, r) }

// FetchLimit is how many of the first keys of a range are enough to answer a request, and to know whether there are
// more; 0 or less is all of them.
func FetchLimit(r *pb.RangeRequest) int64 { return fetchLimit(r) }
