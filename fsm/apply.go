package fsm

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm/mvcc"
)

// Apply applies the entry at index, which was logged in term, and returns a result for each of its requests. An
// entry at or below AppliedIndex has been applied and is skipped, with no results. An error means that the entry
// was not understood or the store has failed: the replica must halt, as every replica of this version does at the
// same entry. Apply waits while MaxLagBytes of what was applied are not on disk.
func (s *Store) Apply(index, term uint64, data []byte) ([]Result, error) {
	if err := s.Err(); err != nil {
		return nil, err
	}
	if index <= s.applied.load() {
		return nil, nil
	}
	e, err := decodeEntry(data)
	if err != nil {
		return nil, s.fail(fmt.Errorf("entry %d: %w", index, err))
	}
	if err := s.waitForFlusher(); err != nil {
		return nil, err
	}
	start := time.Now()
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.beginDigest(index, term)
	results, err := s.applyEntry(term, e)
	if err != nil {
		return nil, s.fail(fmt.Errorf("entry %d: %w", index, err))
	}
	s.commit(index, term, nil)
	s.metrics.applySeconds.Observe(time.Since(start).Seconds())
	s.metrics.requests.Add(float64(len(results)))
	return results, nil
}

// ApplyConfiguration applies a configuration entry: it is remembered with the state.
func (s *Store) ApplyConfiguration(index, term uint64, c raft.Configuration) error {
	if err := s.Err(); err != nil {
		return err
	}
	if index <= s.applied.load() {
		return nil
	}
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.beginDigest(index, term)
	c = c.Clone()
	_, _ = s.hasher.Write(appendConfiguration(nil, c))
	s.commit(index, term, &c)
	return nil
}

// waitForFlusher is the backpressure that bounds what a crash makes the log repeat, and the memory it is kept in.
func (s *Store) waitForFlusher() error {
	if s.pendingBytes.Load() <= s.config.MaxLagBytes {
		return nil
	}
	start := time.Now()
	defer func() { s.metrics.stallSeconds.Add(time.Since(start).Seconds()) }()
	for s.pendingBytes.Load() > s.config.MaxLagBytes {
		signal(s.flushNow)
		select {
		case <-s.drained:
		case <-s.failed:
			return s.failure
		case <-s.stop.Done():
			return ErrClosed
		}
	}
	return nil
}

func (s *Store) beginDigest(index, term uint64) {
	var b [24]byte
	binary.LittleEndian.PutUint64(b[0:], s.state.digest)
	binary.LittleEndian.PutUint64(b[8:], index)
	binary.LittleEndian.PutUint64(b[16:], term)
	s.hasher.Reset()
	_, _ = s.hasher.Write(b[:])
}

// commit ends an entry: from here on it may be flushed, and waiters see it.
func (s *Store) commit(index, term uint64, c *raft.Configuration) {
	s.mu.Lock()
	s.state.index, s.state.term, s.state.digest = index, term, s.hasher.Sum64()
	if c != nil {
		s.configuration, s.state.configurationIndex = *c, index
	}
	for i, sp := range s.spaces {
		s.state.spaces[i].revision = sp.revision
		s.state.spaces[i].compacted = sp.compacted
		s.state.spaces[i].keys = int64(sp.index.Live())
	}
	s.mu.Unlock()
	s.applied.advance(index)
	s.metrics.appliedIndex.Set(float64(index))
	if !s.isDirty {
		s.isDirty = true
		signal(s.dirty)
	}
	if s.activeBytes >= s.config.FlushBytes {
		signal(s.flushNow)
	}
}

func (s *Store) applyEntry(term uint64, e entry) ([]Result, error) {
	results := make([]Result, len(e.commands))
	if s.isStale(term, e) {
		for i, c := range e.commands {
			results[i].Err = ErrStaleFloor
			s.digestOutcome(c, ErrStaleFloor)
		}
		return results, nil
	}
	a := application{store: s, entry: e, results: results, puts: make([]putResponse, e.puts)}
	for i := 0; i < len(e.commands); {
		n, err := a.apply(i)
		if err != nil {
			return nil, fmt.Errorf("request %d: %w", i, err)
		}
		i += n
	}
	return results, nil
}

// isStale says whether the revisions reserved for an entry cannot be used: they were given to a leader that has
// been replaced, or are not above what the state has.
func (s *Store) isStale(term uint64, e entry) bool {
	if e.floor == 0 {
		return false
	}
	return e.term != term || slices.ContainsFunc(e.commands, func(c command) bool { return e.floor <= s.spaces[c.space].revision })
}

func (s *Store) digestOutcome(c command, err error) {
	_, _ = s.hasher.Write([]byte{byte(c.space), errorCode(err)})
}

// application is the work on one entry.
type application struct {
	store   *Store
	entry   entry
	results []Result
	puts    []putResponse // not used yet
	writer  writer
}

// begin makes the writer ready for the i-th command.
func (a *application) begin(i int) *writer {
	c := &a.entry.commands[i]
	a.writer = a.store.newWriter(c.space)
	if a.entry.floor != 0 {
		a.writer.next = a.entry.floor + int64(i)
	}
	if c.isPut {
		a.writer.response, a.puts = &a.puts[0], a.puts[1:]
	}
	return &a.writer
}

// apply applies the i-th command, or a run of plain puts that begins with it, and returns how many that were.
func (a *application) apply(i int) (n int, err error) {
	c := &a.entry.commands[i]
	if !c.isPlainPut() {
		a.results[i], err = a.begin(i).apply(*c)
		a.store.digestOutcome(*c, a.results[i].Err)
		return 1, err
	}
	// One hold of the lock for many puts: each Lock may have to wait for a reader's step.
	a.store.mu.Lock()
	for ; i+n < len(a.results) && n < scanBudget; n++ {
		c := &a.entry.commands[i+n]
		if !c.isPlainPut() {
			break
		}
		w := a.begin(i + n)
		if a.results[i+n].Err = w.checkPut(c.put); a.results[i+n].Err == nil {
			a.results[i+n].Response = w.plainPut(c.put)
		}
		a.store.digestOutcome(*c, a.results[i+n].Err)
	}
	a.store.mu.Unlock()
	return n, nil
}

// isPlainPut says whether a command is a put that needs to know nothing of the key.
func (c *command) isPlainPut() bool {
	return c.isPut && !c.put.prevKV && !c.put.ignoreValue && !c.put.ignoreLease
}

// putResponse is allocated for all puts of an entry at once.
type putResponse struct {
	response pb.PutResponse
	header   pb.ResponseHeader
}

// writer applies one transaction. As a view it sees the state before the transaction until the first change, and
// from then on its own changes too. Readers see none of them before publish.
type writer struct {
	view
	next     int64 // the revision of the transaction's changes
	changes  uint32
	response *putResponse
}

func (s *Store) newWriter(space Space) writer {
	sp := s.spaces[space] // only apply changes its revisions
	return writer{view: view{store: s, space: sp, revision: sp.revision, compacted: sp.compacted}, next: sp.revision + 1}
}

// apply returns the result of a command, or an error if the state is not as it must be.
func (w *writer) apply(c command) (Result, error) {
	if c.isPut {
		return w.applyPut(c.put)
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
	resp.Header.Revision = w.revision
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
			r, err := w.rangeKeys(ctx, t.RequestRange, true)
			if err != nil {
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
				Header: &pb.ResponseHeader{Revision: w.revision}, PrevKv: prev,
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

// applyCompaction raises the oldest revision that can be read. The rest is done in the background.
func (w *writer) applyCompaction(r *pb.CompactionRequest) Result {
	switch {
	case r.Revision <= w.compacted:
		return Result{Err: ErrCompacted}
	case r.Revision > w.revision:
		return Result{Err: ErrFutureRevision}
	}
	s := w.store
	s.mu.Lock()
	w.space.compacted = r.Revision
	s.mu.Unlock()
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(r.Revision))
	_, _ = s.hasher.Write(b[:])
	signal(s.compactNow)
	return Result{Response: &pb.CompactionResponse{Header: &pb.ResponseHeader{Revision: w.revision}}}
}

// checkPut says whether a put can be done in the state before the transaction.
func (w *writer) checkPut(p putCommand) error {
	if p.lease != 0 {
		if _, ok := w.store.leases[p.lease]; !ok {
			return ErrLeaseNotFound
		}
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
	kvs, err := w.fetch(ctx, hits)
	if err != nil {
		return nil, err
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
	return kvs[0], nil
}

// change returns the revision of the next change and makes the writer see it.
func (w *writer) change() mvcc.Revision {
	r := mvcc.Revision{Main: w.next, Sub: w.changes}
	w.changes++
	w.revision = w.next
	return r
}

// put records a put. It needs the lock.
func (w *writer) put(p putCommand) {
	s, sp, r := w.store, w.space, w.change()
	stamp := sp.index.Put(p.key, r)
	row := mvcc.AppendRow(s.arena.Take(mvcc.RowBytes(p.key, p.value, stamp, p.lease)), p.key, p.value, stamp, p.lease)
	sp.active = append(sp.active, mvcc.Row{Revision: r, Data: row})
	s.recorded(r, false, row)
}

// deleteRange deletes what the writer sees of a range. Many keys are deleted in steps, between which readers run.
func (w *writer) deleteRange(r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	ctx := context.Background()
	hits, total, err := w.collect(ctx, mvcc.NewSpan(r.GetKey(), r.GetRangeEnd()), w.revision, 0, true)
	if err != nil {
		return nil, err
	}
	resp := &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{}, Deleted: total}
	if r.GetPrevKv() {
		if resp.PrevKvs, err = w.fetch(ctx, hits); err != nil {
			return nil, err
		}
	}
	for len(hits) > 0 {
		n := min(len(hits), scanBudget)
		w.delete(hits[:n])
		hits = hits[n:]
	}
	resp.Header.Revision = w.revision
	return resp, nil
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
	}
}

// recorded accounts for a new row.
func (s *Store) recorded(r mvcc.Revision, tombstone bool, row []byte) {
	var key [mvcc.KeyBytes]byte
	_, _ = s.hasher.Write(r.AppendKey(key[:0], tombstone))
	_, _ = s.hasher.Write(row)
	n := int64(len(row)) + rowOverheadBytes
	s.activeBytes += n
	s.pendingBytes.Add(n)
}

// rowOverheadBytes is what a row costs in memory until it is flushed, beside its data.
const rowOverheadBytes = 48

// publish shows the transaction to readers.
func (w *writer) publish() {
	if w.changes == 0 {
		return
	}
	w.store.mu.Lock()
	w.space.revision = w.next
	w.store.mu.Unlock()
}
