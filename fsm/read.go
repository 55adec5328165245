package fsm

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Reads whose names end with At are for a state whose revisions are handed out elsewhere, to many groups: current is
// the newest revision of all of them. The newest revision is then the larger one of current and the state's own: it
// is what responses carry, and nothing up to there is a future revision. Whether the state has all of its changes up
// to current, and will get no others, is for the caller to have seen to. A current of 0 leaves the state's own.

// Range answers a range request at its revision, or at the newest. Errors: ErrCompacted, ErrFutureRevision, ctx's.
func (s *Store) Range(ctx context.Context, space Space, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	return s.RangeAt(ctx, space, r, 0)
}

// RangeAt is Range where current has been handed out.
func (s *Store) RangeAt(ctx context.Context, space Space, r *pb.RangeRequest, current int64) (*pb.RangeResponse, error) {
	return s.read(ctx, space, r, current, true)
}

// RangePage is Range, except that Count need not go beyond what the limit lets through, which spares looking at
// all of a large range for each page of it.
func (s *Store) RangePage(ctx context.Context, space Space, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	return s.RangePageAt(ctx, space, r, 0)
}

// RangePageAt is RangePage where current has been handed out.
func (s *Store) RangePageAt(ctx context.Context, space Space, r *pb.RangeRequest, current int64) (*pb.RangeResponse, error) {
	return s.read(ctx, space, r, current, false)
}

func (s *Store) read(ctx context.Context, space Space, r *pb.RangeRequest, current int64, count bool) (*pb.RangeResponse, error) {
	v, err := s.openView(ctx, space, current)
	if err != nil {
		return nil, err
	}
	defer v.close()
	return v.rangeKeys(ctx, r, count)
}

// ReadTxn answers a transaction that only reads, all of it at one revision. Errors: as Range, and ErrNotReadOnly.
func (s *Store) ReadTxn(ctx context.Context, space Space, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	return s.ReadTxnAt(ctx, space, r, 0)
}

// ReadTxnAt is ReadTxn where current has been handed out. Ranges and compares without a revision see the state's
// newest, which may be above current.
func (s *Store) ReadTxnAt(ctx context.Context, space Space, r *pb.TxnRequest, current int64) (*pb.TxnResponse, error) {
	if !readOnly(r) {
		return nil, ErrNotReadOnly
	}
	v, err := s.openView(ctx, space, current)
	if err != nil {
		return nil, err
	}
	defer v.close()
	return v.transaction(ctx, r)
}
