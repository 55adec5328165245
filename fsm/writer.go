package fsm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// putResponse is allocated for all puts of an entry at once.
type putResponse struct {
	response pb.PutResponse
	header   pb.ResponseHeader
}

// writer applies one transaction. As a view it sees the state before the transaction until the first change, and
// from then on its own changes too. Readers see none of them before publish.
type writer struct {
	view
	index    uint64 // of the entry
	place    int    // in it
	term     uint64 // in which it was logged
	next     int64  // the revision of the transaction's changes
	reserved bool   // next was reserved for the transaction by a sequencer
	changes  uint32
	response *putResponse
	dropped  bool   // the answer has become too large
	removed  *lease // ends with the transaction
}

func (s *Store) newWriter(space Space) writer {
	sp := s.spaces[space] // only apply changes its revisions
	return writer{view: view{store: s, space: sp, revision: sp.revision, newest: sp.revision, compacted: sp.compacted}, next: sp.revision + 1}
}

// reserve makes rev the transaction's revision. Every change of this space below rev has been applied, so the state
// before the transaction is the one at rev-1, whichever revisions have been given to other groups.
func (w *writer) reserve(rev int64) { w.next, w.newest, w.reserved = rev, rev-1, true }

// keepUp makes the newest revision that of the answer, though nothing has changed: no later answer may have a
// smaller one.
func (w *writer) keepUp() {
	if !w.reserved || w.space.revision >= w.newest {
		return
	}
	w.store.mu.Lock()
	w.space.revision = w.newest
	w.store.mu.Unlock()
}

// applyBounded is apply for a command that may read more than it is allowed to.
func (w *writer) applyBounded(c command) (Result, error) {
	result, err := w.apply(c)
	switch {
	case errors.Is(err, errAllowance):
		return Result{Err: ErrReadsTooMuch}, nil
	case err == nil && w.dropped:
		return Result{Err: ErrAnswerDropped}, nil
	}
	return result, err
}

// goOn decides on an error of a read. A transaction that has changed something must go on when it has used up its
// allowance; only its answer is lost.
func (w *writer) goOn(err error) error {
	if w.changes > 0 && errors.Is(err, errAllowance) {
		w.dropped = true
		return nil
	}
	return err
}

// unmetered is for reads on which the change itself depends.
func (w *writer) unmetered() *view {
	v := w.view
	v.meter = nil
	return &v
}

// apply returns the result of a command, or an error if the state is not as it must be.
func (w *writer) apply(c command) (Result, error) {
	if c.isPut {
		return w.applyPut(c.put)
	}
	if c.lease != nil {
		return w.applyLease(*c.lease)
	}
	switch m := c.message.(type) {
	case nil:
		return Result{}, nil
	case *pb.DeleteRangeRequest:
		resp, err := w.deleteRange(m)
		if err != nil {
			return Result{}, err
		}
		w.publish()
		return Result{Response: resp}, nil
	case *pb.TxnRequest:
		return w.applyTxn(m)
	case *pb.CompactionRequest:
		return w.applyCompaction(m), nil
	case *pb.LeaseGrantRequest:
		return w.applyGrant(m), nil
	case *pb.LeaseRevokeRequest:
		return w.applyRevoke(m, c.decided), nil
	case *pb.LeaseCheckpointRequest:
		return w.applyCheckpoint(m, c.decided), nil
	}
	return Result{}, fmt.Errorf("%w: %T", ErrUnknownCommand, c.message)
}

func (w *writer) applyPut(p putCommand) (Result, error) {
	if err := w.checkPut(p); err != nil {
		return Result{Err: err}, nil
	}
	prev, err := w.previous(&p)
	if err != nil {
		return Result{}, err
	}
	w.store.mu.Lock()
	resp := w.plainPut(p)
	w.store.mu.Unlock()
	resp.PrevKv = prev
	return Result{Response: resp}, nil
}

// plainPut is a transaction of one put, published. It needs the lock.
func (w *writer) plainPut(p putCommand) *pb.PutResponse {
	w.put(p)
	w.space.revision = w.next
	w.response.header.Revision = w.next
	w.response.response.Header = &w.response.header
	return &w.response.response
}

func (w *writer) applyTxn(r *pb.TxnRequest) (Result, error) {
	ctx := context.Background()
	b, err := w.decide(ctx, r)
	if err != nil {
		return Result{}, err
	}
	if err := w.checkTxn(b, w.checkPut); err != nil {
		return Result{Err: err}, nil
	}
	resp, err := w.execute(ctx, b)
	if err != nil {
		return Result{}, err
	}
	resp.Header.Revision = w.newest
	w.publish()
	return Result{Response: resp}, nil
}

// execute runs the operations of a branch in order. The header of a nested transaction's response stays empty, as
// etcd leaves it.
func (w *writer) execute(ctx context.Context, b branch) (*pb.TxnResponse, error) {
	resp := &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: b.succeeded, Responses: make([]*pb.ResponseOp, len(b.ops))}
	for i, op := range b.ops {
		answer := &pb.ResponseOp{}
		switch t := op.GetRequest().(type) {
		case *pb.RequestOp_RequestRange:
			if w.dropped {
				break
			}
			r, err := w.rangeKeys(ctx, t.RequestRange, true)
			if err := w.goOn(err); err != nil {
				return nil, err
			}
			answer = rangeOp(r)
		case *pb.RequestOp_RequestPut:
			p := putCommandOf(t.RequestPut)
			prev, err := w.previous(&p)
			if err != nil {
				return nil, err
			}
			w.store.mu.Lock()
			w.put(p)
			w.store.mu.Unlock()
			answer.Response = &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{
				Header: &pb.ResponseHeader{Revision: w.newest}, PrevKv: prev,
			}}
		case *pb.RequestOp_RequestDeleteRange:
			d, err := w.deleteRange(t.RequestDeleteRange)
			if err != nil {
				return nil, err
			}
			answer.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: d}
		case *pb.RequestOp_RequestTxn:
			n, err := w.execute(ctx, b.nested[i])
			if err != nil {
				return nil, err
			}
			answer.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: n}
		}
		resp.Responses[i] = answer
	}
	return resp, nil
}

// applyCompaction raises the oldest revision that can be read. The rest is done in the background. A reserved
// revision is used up, although there is no change to give it to: the newest revision is then above the compacted
// one, and what was reserved before is stale.
func (w *writer) applyCompaction(r *pb.CompactionRequest) Result {
	switch {
	case r.Revision <= w.compacted:
		return Result{Err: ErrCompacted}
	case r.Revision > w.newest:
		return Result{Err: ErrFutureRevision}
	}
	s := w.store
	s.mu.Lock()
	w.space.compacted = r.Revision
	if w.reserved {
		w.newest, w.space.revision = w.next, w.next
	}
	s.mu.Unlock()
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(r.Revision))
	_, _ = s.hasher.Write(b[:])
	signal(s.compactNow)
	return Result{Response: &pb.CompactionResponse{Header: &pb.ResponseHeader{Revision: w.newest}}}
}

// checkPut says whether a put can be done in the state before the transaction.
func (w *writer) checkPut(p putCommand) error {
	if p.lease != 0 && w.lease(p.lease) == nil {
		return ErrLeaseNotFound
	}
	if p.ignoreValue || p.ignoreLease {
		if _, ok := w.lookup(p.key); !ok {
			return ErrKeyNotFound
		}
	}
	return nil
}

func (w *writer) lookup(key []byte) (mvcc.Stamp, bool) {
	w.store.mu.RLock()
	defer w.store.mu.RUnlock()
	return w.space.index.Get(mvcc.NewSpan(key, nil).Start, w.revision)
}

// previous completes a put from the key's present value, and returns that value if the put asks for it. A key that
// an earlier operation of the same transaction deleted, which servers refuse, has an empty value and no lease.
func (w *writer) previous(p *putCommand) (*mvccpb.KeyValue, error) {
	if !p.prevKV && !p.ignoreValue && !p.ignoreLease {
		return nil, nil
	}
	ctx := context.Background()
	hits, _, err := w.collect(ctx, mvcc.NewSpan(p.key, nil), w.revision, 0, false)
	if err != nil || len(hits) == 0 {
		return nil, err
	}
	v := &w.view
	if p.ignoreValue || p.ignoreLease {
		v = w.unmetered()
	}
	kvs, err := v.fetch(ctx, hits)
	if err != nil {
		return nil, w.goOn(err)
	}
	if p.ignoreValue {
		p.value = kvs[0].Value
	}
	if p.ignoreLease {
		p.lease = kvs[0].Lease
	}
	if !p.prevKV {
		return nil, nil
	}
	if v.meter == nil {
		if err := w.take(kvBytes + len(kvs[0].Key) + len(kvs[0].Value)); err != nil {
			return nil, w.goOn(err)
		}
	}
	return kvs[0], nil
}

// change returns the revision of the next change and makes the writer see it.
func (w *writer) change() mvcc.Revision {
	r := mvcc.Revision{Main: w.next, Sub: w.changes}
	w.changes++
	w.revision, w.newest = w.next, w.next
	return r
}

// put records a put. It needs the lock.
func (w *writer) put(p putCommand) {
	s, sp, r := w.store, w.space, w.change()
	stamp := sp.index.Put(p.key, r)
	row := mvcc.AppendRow(s.arena.Take(mvcc.RowBytes(p.key, p.value, stamp, p.lease)), p.key, p.value, stamp, p.lease)
	sp.active = append(sp.active, mvcc.Row{Revision: r, Data: row})
	s.recorded(r, false, row)
	if sp.id == User && (p.lease != 0 || len(s.leases.attached) > 0) && (stamp.Version == 1 || !s.config.faults.attachmentLost) {
		s.leases.attach(p.key, p.lease)
	}
}

// deleteRange deletes what the writer sees of a range. Many keys are deleted in steps, between which readers run.
func (w *writer) deleteRange(r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	ctx := context.Background()
	hits, total, err := w.unmetered().collect(ctx, mvcc.NewSpan(r.GetKey(), r.GetRangeEnd()), w.revision, 0, true)
	if err != nil {
		return nil, err
	}
	resp := &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{}, Deleted: total}
	if r.GetPrevKv() {
		resp.PrevKvs, err = w.fetch(ctx, hits)
		if err := w.goOn(err); err != nil {
			return nil, err
		}
	}
	w.deleteAll(hits)
	resp.Header.Revision = w.newest
	return resp, nil
}

// deleteAll deletes keys that exist in steps.
func (w *writer) deleteAll(hits []hit) {
	for len(hits) > 0 {
		n := min(len(hits), scanBudget)
		w.delete(hits[:n])
		hits = hits[n:]
	}
}

func (w *writer) delete(hits []hit) {
	s, sp := w.store, w.space
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range hits {
		r := w.change()
		sp.index.Delete(h.key, r)
		row := mvcc.AppendTombstone(s.arena.Take(mvcc.TombstoneBytes(h.key)), h.key)
		sp.active = append(sp.active, mvcc.Row{Revision: r, Tombstone: true, Data: row})
		s.recorded(r, true, row)
		if sp.id == User {
			s.leases.detach(h.key)
		}
	}
}

// recorded accounts for a new row.
func (s *Store) recorded(r mvcc.Revision, tombstone bool, row []byte) {
	var key [mvcc.KeyBytes]byte
	_, _ = s.hasher.Write(r.AppendKey(key[:0], tombstone))
	_, _ = s.hasher.Write(row)
	s.addPending(len(row))
}

// addPending accounts for something that the next flush has to write.
func (s *Store) addPending(bytes int) {
	n := int64(bytes) + rowOverheadBytes
	s.activeBytes += n
	s.pendingBytes.Add(n)
}

// rowOverheadBytes is what a row costs in memory until it is flushed, beside its data.
const rowOverheadBytes = 48

// publish shows the transaction to readers.
func (w *writer) publish() {
	if w.changes == 0 && w.removed == nil {
		return
	}
	w.store.mu.Lock()
	if w.changes > 0 {
		w.space.revision = w.next
	}
	if w.removed != nil {
		w.store.removeLease(w.removed)
	}
	w.store.mu.Unlock()
}
