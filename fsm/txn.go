package fsm

import (
	"bytes"
	"cmp"
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// branch is a transaction whose compares have been decided. All compares, those of nested transactions included,
// see the state before the transaction.
type branch struct {
	succeeded bool
	ops       []*pb.RequestOp
	nested    map[int]branch // by place in ops
}

func (v *view) decide(ctx context.Context, r *pb.TxnRequest) (branch, error) {
	b := branch{succeeded: true, ops: r.GetSuccess()}
	for _, c := range r.GetCompare() {
		ok, err := v.compare(ctx, c)
		if err != nil {
			return b, err
		}
		if !ok {
			b.succeeded, b.ops = false, r.GetFailure()
			break
		}
	}
	for i, op := range b.ops {
		t, ok := op.GetRequest().(*pb.RequestOp_RequestTxn)
		if !ok {
			continue
		}
		n, err := v.decide(ctx, t.RequestTxn)
		if err != nil {
			return b, err
		}
		if b.nested == nil {
			b.nested = map[int]branch{}
		}
		b.nested[i] = n
	}
	return b, nil
}

func (v *view) compare(ctx context.Context, c *pb.Compare) (bool, error) {
	hits, _, err := v.collect(ctx, mvcc.NewSpan(c.GetKey(), c.GetRangeEnd()), v.revision, 0, false)
	if err != nil {
		return false, err
	}
	if ComparesKeysOnly(c) {
		return Holds(c, keysOnly(hits)), nil
	}
	kvs, err := v.fetch(ctx, hits)
	return err == nil && Holds(c, kvs), err
}

// ComparesKeysOnly says whether a compare needs no more of its keys than a range of keys only has.
func ComparesKeysOnly(c *pb.Compare) bool {
	return c.GetTarget() != pb.Compare_VALUE && c.GetTarget() != pb.Compare_LEASE
}

// Holds says whether a compare holds where its range has the given keys: if it does for every one of them. Without any
// key, a value compares to nothing, and all else to zero.
func Holds(c *pb.Compare, kvs []*mvccpb.KeyValue) bool {
	if len(kvs) == 0 {
		return c.GetTarget() != pb.Compare_VALUE && holds(c, &mvccpb.KeyValue{})
	}
	for _, kv := range kvs {
		if !holds(c, kv) {
			return false
		}
	}
	return true
}

func holds(c *pb.Compare, kv *mvccpb.KeyValue) bool {
	var order int
	switch c.GetTarget() {
	case pb.Compare_VALUE:
		order = bytes.Compare(kv.Value, c.GetValue())
	case pb.Compare_CREATE:
		order = cmp.Compare(kv.CreateRevision, c.GetCreateRevision())
	case pb.Compare_MOD:
		order = cmp.Compare(kv.ModRevision, c.GetModRevision())
	case pb.Compare_VERSION:
		order = cmp.Compare(kv.Version, c.GetVersion())
	case pb.Compare_LEASE:
		order = cmp.Compare(kv.Lease, c.GetLease())
	}
	switch c.GetResult() {
	case pb.Compare_EQUAL:
		return order == 0
	case pb.Compare_NOT_EQUAL:
		return order != 0
	case pb.Compare_GREATER:
		return order > 0
	case pb.Compare_LESS:
		return order < 0
	}
	return true
}

// checkTxn returns the error of the first operation that cannot be done in the state before the transaction, so
// that a transaction that begins to change the state also ends.
func (v *view) checkTxn(b branch, checkPut func(putCommand) error) error {
	for i, op := range b.ops {
		var err error
		switch t := op.GetRequest().(type) {
		case *pb.RequestOp_RequestRange:
			err = v.checkRangeOp(t.RequestRange.GetRevision())
		case *pb.RequestOp_RequestPut:
			err = checkPut(putCommandOf(t.RequestPut))
		case *pb.RequestOp_RequestTxn:
			err = v.checkTxn(b.nested[i], checkPut)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkRangeOp judges the revision of a range inside a transaction. Unlike outside, a negative one is compacted.
func (v *view) checkRangeOp(rev int64) error {
	switch {
	case rev == 0:
		return nil
	case rev > v.newest:
		return ErrFutureRevision
	case rev < v.compacted:
		return ErrCompacted
	}
	return nil
}

// readOnly says whether a transaction has only ranges. One with nested transactions counts as writing, as in etcd.
func readOnly(r *pb.TxnRequest) bool {
	for _, ops := range [][]*pb.RequestOp{r.GetSuccess(), r.GetFailure()} {
		for _, op := range ops {
			if op.GetRequestRange() == nil {
				return false
			}
		}
	}
	return true
}

// transaction answers a read-only transaction.
func (v *view) transaction(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	b, err := v.decide(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := v.checkTxn(b, nil); err != nil {
		return nil, err
	}
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: v.newest}, Succeeded: b.succeeded}
	for _, op := range b.ops {
		answer, err := v.rangeKeys(ctx, op.GetRequestRange(), true)
		if err != nil {
			return nil, err
		}
		resp.Responses = append(resp.Responses, rangeOp(answer))
	}
	return resp, nil
}

func rangeOp(r *pb.RangeResponse) *pb.ResponseOp {
	return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: r}}
}
