package fsm

import (
	"context"
	"math"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// TransactionPart says which part of a transaction to read for a watch.
type TransactionPart struct {
	Key, RangeEnd []byte // as in a range request
	Revision      int64  // of the transaction
	From          uint32 // the first change that is wanted, by its number in the transaction
	PrevKV        bool   // events come with the key as it was before
	MaxBytes      int    // of events, about; the first one is returned in any case
}

// ReadTransaction reads a part of what a watch is to see of a transaction. next is the change that the next part begins
// with, 0 if there is none. The parts are the same in all states of a group, which need not be asked for the next one in
// the same mode. Errors: a CompactedError if some of the transaction may be gone, ErrFutureRevision if it is not there
// yet, ErrWitness, ctx's.
func (s *Store) ReadTransaction(ctx context.Context, p TransactionPart) (events []*mvccpb.Event, next uint32, err error) {
	h, err := s.readPart(ctx, &p)
	if err != nil || !p.PrevKV {
		return h.events, h.sub, err
	}
	bytes := 0
	for i, e := range h.events {
		if i > 0 && bytes >= p.MaxBytes {
			return h.events[:i], h.subs[i], nil
		}
		if e.PrevKv, err = s.PrevKV(ctx, e.Kv.Key, e.Kv.ModRevision); err != nil {
			return nil, 0, err
		}
		if bytes += sizeOf(e); e.PrevKv != nil {
			bytes += len(e.PrevKv.Key) + len(e.PrevKv.Value)
		}
	}
	return h.events, h.sub, nil
}

// readPart looks at the transaction's rows from a view that it closes.
func (s *Store) readPart(ctx context.Context, p *TransactionPart) (*history, error) {
	h := &history{
		limits: s.hub.limits, span: mvcc.NewSpan(p.Key, p.RangeEnd), from: mvcc.Revision{Main: p.Revision, Sub: p.From},
		to: p.Revision, limit: math.MaxInt, whole: math.MaxInt, part: p.MaxBytes, isWide: true,
	}
	v, err := s.openView(ctx, User, 0)
	if err != nil {
		return h, err
	}
	defer v.close()
	switch {
	case p.Revision < v.compacted:
		return h, &CompactedError{v.compacted}
	case p.Revision > v.revision:
		return h, ErrFutureRevision
	}
	h.view = v
	return h, h.scan(ctx)
}
