package fsm

import (
	"bytes"
	"cmp"
	"context"
	"math"
	"slices"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// rangeKeys answers a range request as etcd does, which gives some combinations of options surprising answers that
// clients may depend on: Count ignores the revision filters; a sort target without a sort order sorts only what the
// limit let through; keys without values carry no lease.
func (v *view) rangeKeys(ctx context.Context, r *pb.RangeRequest, count bool) (*pb.RangeResponse, error) {
	rev, err := v.check(r.Revision)
	if err != nil {
		return nil, err
	}
	limit := fetchLimit(r)
	if r.CountOnly {
		limit, count = countOnly, true
	}
	hits, total, err := v.collect(ctx, mvcc.NewSpan(r.Key, r.RangeEnd), rev, limit, count)
	if err != nil {
		return nil, err
	}
	var kvs []*mvccpb.KeyValue
	if r.KeysOnly && r.SortTarget != pb.RangeRequest_VALUE {
		if err := v.take(len(hits) * kvBytes); err != nil {
			return nil, err
		}
		kvs = keysOnly(hits)
	} else if kvs, err = v.fetch(ctx, hits); err != nil {
		return nil, err
	}
	kvs = filter(kvs, r)
	order(kvs, r)
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: v.newest}, Count: total}
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs, resp.More = kvs[:r.Limit], true
	}
	if r.KeysOnly {
		for _, kv := range kvs {
			kv.Value = nil
		}
	}
	resp.Kvs = kvs
	return resp, nil
}

// fetchLimit is how many keys must be fetched to fill the request's limit and know whether there are more; 0 or
// less is all.
func fetchLimit(r *pb.RangeRequest) int64 {
	filtered := r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0
	switch {
	case !byKey(r.SortTarget, r.SortOrder) || filtered || r.Limit < 0:
		return 0
	case r.Limit == 0 || r.Limit == math.MaxInt64:
		return r.Limit
	}
	return r.Limit + 1
}

// byKey says whether the order asked for is the one in which keys are found anyway.
func byKey(target pb.RangeRequest_SortTarget, order pb.RangeRequest_SortOrder) bool {
	return order == pb.RangeRequest_NONE || target == pb.RangeRequest_KEY && order == pb.RangeRequest_ASCEND
}

func keysOnly(hits []hit) []*mvccpb.KeyValue {
	kvs, all := make([]*mvccpb.KeyValue, len(hits)), make([]mvccpb.KeyValue, len(hits))
	var arena mvcc.Arena
	for i, h := range hits {
		kv := &all[i]
		kv.Key = append(arena.Take(len(h.key)), h.key...)
		kv.CreateRevision, kv.ModRevision, kv.Version = h.stamp.Created, h.stamp.Main, h.stamp.Version
		kvs[i] = kv
	}
	return kvs
}

func filter(kvs []*mvccpb.KeyValue, r *pb.RangeRequest) []*mvccpb.KeyValue {
	outside := func(value, least, most int64) bool {
		return least != 0 && value < least || most != 0 && value > most
	}
	return slices.DeleteFunc(kvs, func(kv *mvccpb.KeyValue) bool {
		return outside(kv.ModRevision, r.MinModRevision, r.MaxModRevision) ||
			outside(kv.CreateRevision, r.MinCreateRevision, r.MaxCreateRevision)
	})
}

// order sorts with sort.Sort, as etcd does: it is not stable, but deterministic, so equal elements come out in the
// order in which they do there.
func order(kvs []*mvccpb.KeyValue, r *pb.RangeRequest) {
	o := r.SortOrder
	if r.SortTarget != pb.RangeRequest_KEY && o == pb.RangeRequest_NONE {
		o = pb.RangeRequest_ASCEND
	}
	compare := comparison(r.SortTarget)
	if byKey(r.SortTarget, o) || compare == nil {
		return
	}
	switch o {
	case pb.RangeRequest_ASCEND:
		sort.Sort(sorter{kvs, compare})
	case pb.RangeRequest_DESCEND:
		sort.Sort(sort.Reverse(sorter{kvs, compare}))
	}
}

type sorter struct {
	kvs     []*mvccpb.KeyValue
	compare func(a, b *mvccpb.KeyValue) int
}

func (s sorter) Len() int           { return len(s.kvs) }
func (s sorter) Swap(i, j int)      { s.kvs[i], s.kvs[j] = s.kvs[j], s.kvs[i] }
func (s sorter) Less(i, j int) bool { return s.compare(s.kvs[i], s.kvs[j]) < 0 }

func comparison(target pb.RangeRequest_SortTarget) func(a, b *mvccpb.KeyValue) int {
	switch target {
	case pb.RangeRequest_KEY:
		return func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) }
	case pb.RangeRequest_VERSION:
		return func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.Version, b.Version) }
	case pb.RangeRequest_CREATE:
		return func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.CreateRevision, b.CreateRevision) }
	case pb.RangeRequest_MOD:
		return func(a, b *mvccpb.KeyValue) int { return cmp.Compare(a.ModRevision, b.ModRevision) }
	case pb.RangeRequest_VALUE:
		return func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Value, b.Value) }
	}
	return nil
}
