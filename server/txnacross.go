package server

import (
	"bytes"
	"context"
	"errors"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/fsm"
)

// txnAcross executes a transaction whose keys are not all in one group, or
// refuses it.
func (s *kv) txnAcross(ctx context.Context, t *pb.TxnRequest, refused error) (*pb.TxnResponse, error) {
	if reasonOf(refused) != ReasonCrossShard {
		return nil, refused
	}
	if isReadOnly(t) {
		return s.readTxnAcross(ctx, t)
	}
	if split, ok := s.router.span(t); ok {
		return s.txnSpanning(ctx, split)
	}
	return nil, refused
}

// readTxnAcross answers a transaction that only reads, all of it at one cut:
// also if it asks for serializable reads, since a cut is the only moment that
// several groups have in common.
func (s *kv) readTxnAcross(ctx context.Context, t *pb.TxnRequest) (*pb.TxnResponse, error) {
	for {
		c, err := s.router.cuts.take(ctx)
		if err != nil {
			return nil, err
		}
		resp, err := s.txnIn(ctx, c, t)
		switch {
		case err == nil:
			return resp, nil
		case !errors.Is(err, fsm.ErrCompacted) || ctx.Err() != nil:
			return nil, refusal(err)
		}
		s.router.metrics.retries.Inc() // as in rangeSharded
	}
}

// txnIn answers a transaction that only reads, at a cut.
func (s *kv) txnIn(ctx context.Context, c *cut, t *pb.TxnRequest) (*pb.TxnResponse, error) {
	meter := &sharedMeter{meter: s.router.answers.meter()}
	defer meter.meter.release()
	resp, ops := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: c.revision}, Succeeded: true}, t.Success
	for _, compare := range t.Compare {
		holds, err := s.holdsIn(ctx, c, compare)
		if err != nil {
			return nil, err
		}
		if !holds {
			resp.Succeeded, ops = false, t.Failure
			break
		}
	}
	for _, op := range ops {
		answer, err := s.rangeIn(ctx, c, op.GetRequestRange(), meter)
		if err != nil {
			return nil, err
		}
		resp.Responses = append(resp.Responses, rangeResponseOp(answer))
	}
	return resp, nil
}

func rangeResponseOp(r *pb.RangeResponse) *pb.ResponseOp {
	return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: r}}
}

// holdsIn evaluates a compare at a cut.
func (s *kv) holdsIn(ctx context.Context, c *cut, compare *pb.Compare) (bool, error) {
	meter := &sharedMeter{meter: s.router.answers.meter()}
	defer meter.meter.release()
	resp, err := s.rangeIn(ctx, c, &pb.RangeRequest{Key: compare.Key, RangeEnd: compare.RangeEnd, KeysOnly: fsm.ComparesKeysOnly(compare)}, meter)
	return err == nil && fsm.Holds(compare, resp.Kvs), err
}

// rangeIn answers a range of a transaction at a cut. That what is read at the
// cut's own revision has been compacted, and fsm.ErrCompacted comes back, is
// not the client's fault.
func (s *kv) rangeIn(ctx context.Context, c *cut, r *pb.RangeRequest, meter *sharedMeter) (*pb.RangeResponse, error) {
	if r.Revision < 0 { // other than outside of transactions, as in etcd
		return nil, refusal(fsm.ErrCompacted)
	}
	sources, err := s.router.sourcesIn(c, r)
	if err != nil {
		return nil, err
	}
	resp, err := rangeOf(ctx, r, sources, meter)
	switch {
	case err == nil:
		resp.Header.Revision = c.revision
	case r.Revision > 0:
		err = refusal(err)
	}
	return resp, err
}

// spanning is a transaction of one group that also reads keys of others, as
// the locks of etcd's clients do. Its group executes it without these reads, at
// a revision that nothing else in the key space has; they are read at that
// revision afterwards, when all groups are complete up to it. So the whole is
// what one store would have answered at that point in the order of revisions,
// and nobody sees a part of it.
type spanning struct {
	group uint64
	inner *pb.TxnRequest // with a cheap read in place of each that is left out
	left  map[bool]map[int]*pb.RangeRequest
}

// span splits a transaction whose keys are in several groups. It declines, and
// leaves it to the caller to say why, unless all compares and writes are in one
// group; what is read elsewhere must be read at the transaction's own revision,
// and not before a write that changes what the read finds.
func (r *router) span(t *pb.TxnRequest) (*spanning, bool) {
	anchor, ok := r.anchor(t)
	if !ok {
		return nil, false
	}
	group, one, err := r.groupOfRange(anchor, nil)
	if err != nil || !one {
		return nil, false
	}
	s := &spanning{group: group, left: make(map[bool]map[int]*pb.RangeRequest)}
	s.inner = &pb.TxnRequest{Compare: t.Compare}
	if s.inner.Success, ok = s.leaveOut(r, true, t.Success, anchor); !ok {
		return nil, false
	}
	if s.inner.Failure, ok = s.leaveOut(r, false, t.Failure, anchor); !ok {
		return nil, false
	}
	in, none, err := r.groupOfTxn(s.inner)
	return s, err == nil && !none && in == group
}

// anchor is a key of the group that executes the transaction: one that is
// compared or written.
func (r *router) anchor(t *pb.TxnRequest) ([]byte, bool) {
	if len(t.Compare) > 0 {
		return t.Compare[0].Key, true
	}
	for _, op := range slices.Concat(t.Success, t.Failure) {
		if key, _ := written(op); key != nil {
			return key, true
		}
	}
	return nil, false
}

// written is what an operation changes; nil for reads and nested transactions.
func written(op *pb.RequestOp) (key, end []byte) {
	switch op := op.GetRequest().(type) {
	case *pb.RequestOp_RequestPut:
		return op.RequestPut.Key, nil
	case *pb.RequestOp_RequestDeleteRange:
		return op.RequestDeleteRange.Key, op.RequestDeleteRange.RangeEnd
	}
	return nil, nil
}

// leaveOut puts a read of the anchor, that counts only, in the place of each
// read of other groups.
func (s *spanning) leaveOut(r *router, branch bool, ops []*pb.RequestOp, anchor []byte) ([]*pb.RequestOp, bool) {
	out := slices.Clone(ops)
	for i, op := range ops {
		read := op.GetRequestRange()
		if read == nil {
			continue
		}
		group, one, err := r.groupOfRange(read.Key, read.RangeEnd)
		switch {
		case err != nil:
			return nil, false
		case one && group == s.group:
			continue
		case read.Revision != 0 || slices.ContainsFunc(ops[i+1:], func(op *pb.RequestOp) bool { return changes(op, read) }):
			return nil, false
		}
		if s.left[branch] == nil {
			s.left[branch] = make(map[int]*pb.RangeRequest)
		}
		s.left[branch][i] = read
		out[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: anchor, CountOnly: true}}}
	}
	return out, true
}

// changes reports whether an operation may write keys of a range.
func changes(op *pb.RequestOp, read *pb.RangeRequest) bool {
	if op.GetRequestTxn() != nil {
		return true
	}
	key, end := written(op)
	return key != nil && overlap(key, end, read.Key, read.RangeEnd)
}

// overlap reports whether two ranges may have a key in common.
func overlap(a, aEnd, b, bEnd []byte) bool {
	before := func(key, end, other []byte) bool { // the range ends before other
		if len(end) == 0 {
			return bytes.Compare(key, other) < 0
		}
		return !(len(end) == 1 && end[0] == 0) && bytes.Compare(end, other) <= 0
	}
	return !before(a, aEnd, b) && !before(b, bEnd, a)
}

// txnSpanning executes a transaction and then its reads of other groups.
func (s *kv) txnSpanning(ctx context.Context, t *spanning) (*pb.TxnResponse, error) {
	ctx, cancel := s.router.withDeadline(ctx)
	defer cancel()
	// Through the log, even if it writes nothing: that is what gives it a
	// revision of its own.
	resp, err := s.writeTxn(ctx, t.group, t.inner)
	if err != nil {
		return nil, err
	}
	left := t.left[resp.Succeeded]
	if len(left) == 0 {
		return resp, nil
	}
	c, err := s.router.cuts.take(ctx)
	if err != nil {
		return nil, executed(err)
	}
	meter := &sharedMeter{meter: s.router.answers.meter()}
	defer meter.meter.release()
	for i, read := range left {
		at := sameKeys(read)
		at.Revision = resp.Header.Revision
		if s.router.cfg.faults.readAfterTxn {
			at.Revision = 0
		}
		answer, err := s.rangeIn(ctx, c, at, meter)
		if err != nil {
			return nil, executed(refusal(err))
		}
		answer.Header.Revision = resp.Header.Revision
		resp.Responses[i] = rangeResponseOp(answer)
	}
	return resp, nil
}

// executed is what a client is told whose transaction has been executed, but
// not answered.
func executed(err error) error {
	if reasonOf(err) == ReasonTooMuchRead || errors.Is(err, rpctypes.ErrGRPCCompacted) {
		return refusal(fsm.ErrAnswerDropped)
	}
	return rpctypes.ErrGRPCTimeoutDueToLeaderFail
}
