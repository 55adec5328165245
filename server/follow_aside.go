package server

import (
	"context"
	"encoding/binary"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// aside is a transaction with more events for a watch than its stream may keep.
// Nobody keeps it: when everything before it has been delivered, deliver reads
// it, a part after the other, as fast as the client takes it.
type aside struct {
	revision int64
	// within makes a context that ends with the watch, too.
	within func(context.Context) (context.Context, context.CancelFunc)
	// read returns the events from the from-th change on, about maxBytes, one at
	// least, and the change to go on with; 0 = there is none. It tries until ctx
	// ends, but for a fsm.CompactedError.
	read func(ctx context.Context, from uint32, maxBytes int) (events []*mvccpb.Event, next uint32, err error)

	// deliver's: how often reading has taken too long, and where the last time
	unread     int
	unreadFrom uint32

	compacted int64 // set by deliver: the transaction could not be read, because of that compaction
}

// setAside stops a part before the transaction at next. w.mu is held.
func (f *groupFollower) setAside(p *part) {
	p.aside = true
	f.stop(p)
}

// sendAside delivers what is aside in a part, and has the part go on after it.
// Like send it is called by whoever delivers the watch.
func (w *watches) sendAside(p *part) error {
	f := p.of
	w.mu.Lock()
	revision := p.next
	w.mu.Unlock()
	a := &aside{revision: revision, within: func(ctx context.Context) (context.Context, context.CancelFunc) { return w.within(ctx, f) }}
	a.read = func(ctx context.Context, from uint32, maxBytes int) ([]*mvccpb.Event, uint32, error) {
		return w.router.readTransaction(ctx, p.follower.group, &fsm.TransactionPart{
			Key: f.spec.key, RangeEnd: f.spec.end, Revision: revision, From: from, PrevKV: f.spec.prevKV, MaxBytes: maxBytes,
		})
	}
	if w.router.cfg.faults.asideLost {
		a.read = func(context.Context, uint32, int) ([]*mvccpb.Event, uint32, error) { return nil, 0, nil }
	}
	if err := w.send(f, watchDelivery{aside: a}); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if f.ended {
		return nil
	}
	p.aside = false
	if a.compacted > 0 {
		f.ends = &watchDelivery{compacted: a.compacted}
	} else {
		p.next = revision + 1
		p.follower.resume(p)
		w.release(f)
	}
	w.advanced()
	return nil
}

func (w *watches) within(ctx context.Context, f *followed) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	f.interrupt = cancel
	if f.ended {
		cancel()
	}
	return ctx, cancel
}

// resolvedAside is the part whose transaction that is aside comes next; nil if
// there is none, or something else may come before it. watches.mu is held.
func (f *followed) resolvedAside() *part {
	var first *part
	for _, p := range f.parts {
		if p.aside && (first == nil || p.next < first.next) {
			first = p
		}
	}
	if first == nil {
		return nil
	}
	for _, p := range f.parts {
		if p != first && p.taken() <= first.next || len(p.waiting) > 0 && p.waiting[0].Kv.ModRevision < first.next {
			return nil
		}
	}
	return first
}

// release notes that there may be nothing to deliver of a merged watch. w.mu is
// held.
func (w *watches) release(f *followed) {
	holds := f.ends != nil
	for _, p := range f.parts {
		holds = holds || p.aside || len(p.waiting) > 0
	}
	if !holds {
		delete(w.holding, f.number)
	}
}

// readTransaction reads a part of a transaction from a state that has it,
// wherever that is.
func (r *router) readTransaction(ctx context.Context, group uint64, p *fsm.TransactionPart) (events []*mvccpb.Event, next uint32, err error) {
	here := func(ctx context.Context, replica Replica) error {
		events, next, err = readTransactionHere(ctx, replica, p)
		return err
	}
	there := func(ctx context.Context, node string) error {
		events, next, err = r.readTransactionThere(ctx, node, group, p)
		return err
	}
	err = r.onState(ctx, group, "", here, there)
	return events, next, err
}

func readTransactionHere(ctx context.Context, replica Replica, p *fsm.TransactionPart) ([]*mvccpb.Event, uint32, error) {
	state, release, err := replica.AcquireState(ctx, 0)
	if err != nil {
		return nil, 0, elsewhere(err)
	}
	defer release()
	return state.ReadTransaction(ctx, *p)
}

// The request for a part of a transaction and its answer, beside what forward.go says:
//
//	read:   version 1, group 8, timeout 4 (ms), from 4, most 4 | a watch as in a question, from the transaction's revision
//	answer: version 1, code 1 | next 4, WatchResponse: events, or compact_revision
const (
	methodWatchRead = "watch.read"

	readHeader     = 21
	readReplyBytes = 4
)

func (r *router) readTransactionThere(ctx context.Context, node string, group uint64, p *fsm.TransactionPart) ([]*mvccpb.Event, uint32, error) {
	payload := []byte{protocolVersion}
	payload = binary.BigEndian.AppendUint64(payload, group)
	payload = binary.BigEndian.AppendUint32(payload, timeoutMillis(ctx))
	payload = binary.BigEndian.AppendUint32(payload, p.From)
	payload = binary.BigEndian.AppendUint32(payload, uint32(p.MaxBytes))
	w := asked{key: p.Key, end: p.RangeEnd, from: p.Revision, prevKV: p.PrevKV}
	c, body, err := r.call(ctx, node, methodWatchRead, w.encode(payload))
	switch {
	case err != nil:
		return nil, 0, err
	case c == codeRefused:
		return nil, 0, decodeRefusal(body)
	case c != codeOK:
		return nil, 0, c.err()
	}
	return w.decodePart(body, p.From)
}

// decodePart holds an answer against what was asked.
func (w *asked) decodePart(body []byte, from uint32) ([]*mvccpb.Event, uint32, error) {
	var m pb.WatchResponse
	if len(body) < readReplyBytes || proto.Unmarshal(body[readReplyBytes:], &m) != nil {
		return nil, 0, errBadAnswer
	}
	if m.CompactRevision > 0 {
		return nil, 0, &fsm.CompactedError{Revision: m.CompactRevision}
	}
	next := binary.BigEndian.Uint32(body)
	if next > 0 && (next <= from || len(m.Events) == 0) {
		return nil, 0, errBadAnswer
	}
	for _, e := range m.Events {
		if e.GetKv() == nil || e.Kv.ModRevision != w.from || !w.has(e.Kv.Key) {
			return nil, 0, fmt.Errorf("%w: an event that was not asked for", errBadAnswer)
		}
	}
	return m.Events, next, nil
}

func decodePartRequest(payload []byte) (group uint64, ms uint32, p *fsm.TransactionPart, err error) {
	if len(payload) < readHeader || payload[0] != protocolVersion {
		return 0, 0, nil, errMalformed
	}
	w, rest, ok := decodeAsked(payload[readHeader:])
	if !ok || len(rest) > 0 {
		return 0, 0, nil, errMalformed
	}
	p = &fsm.TransactionPart{
		Key: w.key, RangeEnd: w.end, Revision: w.from, PrevKV: w.prevKV,
		From: binary.BigEndian.Uint32(payload[13:]), MaxBytes: int(min(binary.BigEndian.Uint32(payload[17:]), wholeBytes)),
	}
	return binary.BigEndian.Uint64(payload[1:]), binary.BigEndian.Uint32(payload[9:]), p, nil
}

// handleWatchRead answers from this node's replica. It waits for no room: who
// asks has some, and would keep it from others meanwhile.
func (r *router) handleWatchRead(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	group, ms, p, err := decodePartRequest(payload)
	if err != nil {
		return answer(codeMalformed), nil
	}
	replica := r.ofKeys(group)
	if replica == nil {
		return r.decline(group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMost(ctx, ms)
	defer cancel()
	meter := r.answers.meter()
	defer meter.release()
	if meter.Take(p.MaxBytes) != nil {
		return answer(codeOverloaded), nil // not a refusal: who asks tries again
	}
	events, next, err := readTransactionHere(ctx, replica, p)
	message := &pb.WatchResponse{Events: events}
	if message.CompactRevision = compactedBy(err); err != nil && message.CompactRevision == 0 {
		return r.declineRead(group, replica, err), nil
	}
	reply, err := proto.MarshalOptions{}.MarshalAppend(binary.BigEndian.AppendUint32(answer(codeOK), next), message)
	if err != nil {
		return answer(codeUnknown), nil
	}
	return reply, nil
}
