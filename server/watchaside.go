package server

import (
	"context"
	"errors"
	"math"
	"net"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// asides bounds the memory of all transactions that are too large to be kept,
// while they are read and sent: a stream that has one waits for its turn, holds
// what it needs, and gives it back when the client has taken it. Nobody waits
// while he holds something: whoever needs more than is there gives all back, and
// begins anew when there is enough. One that needs more than there is at all
// goes alone.
type asides struct {
	total    int64
	free     *semaphore.Weighted
	waiting  atomic.Int64
	patience time.Duration     // with a client, while others wait; and a second per crowdedBytes
	holds    func(bytes int64) // told of changes; for tests
}

// held is what one stream has of asides.
type held struct {
	of          *asides
	bytes, used int64
}

const (
	asideBytes   = 1 << 20 // of events that are read at a time, about
	growBytes    = 8 << 20
	crowdedBytes = 1 << 20 // that a client must take in a second while others wait
	crowdedPart  = 6       // of WatchTimeout: how long one need not take anything then
	crowdedLook  = 250 * time.Millisecond
	leastBuffer  = 4 << 10 // gRPC does not tell of the end of less
)

var errUnread = errors.New("server: the transaction has not been read in time")

var errTransaction = kvdError(codes.ResourceExhausted, ReasonBusy, "a transaction has more events for the watch than fit into an answer of 2 GiB: ask for fragments")

func (q *asides) init(c *Config) {
	q.total, q.free, q.patience = c.MaxWatchBytes, semaphore.NewWeighted(c.MaxWatchBytes), c.WatchTimeout/crowdedPart
}

func (q *asides) acquire(ctx context.Context, bytes int64) (*held, error) {
	h := &held{of: q, bytes: min(bytes, q.total), used: bytes}
	if !q.free.TryAcquire(h.bytes) {
		q.waiting.Add(1)
		defer q.waiting.Add(-1)
		if err := q.free.Acquire(ctx, h.bytes); err != nil {
			return nil, err
		}
	}
	h.changed(h.bytes)
	return h, nil
}

func (h *held) changed(bytes int64) {
	if h.of.holds != nil {
		h.of.holds(bytes)
	}
}

// grow reports whether there is room for more.
func (h *held) grow(bytes int) bool {
	h.used += int64(bytes)
	if h.used <= h.bytes || h.bytes == h.of.total {
		return true
	}
	more := min(max(h.used-h.bytes, growBytes), h.of.total-h.bytes)
	if !h.of.free.TryAcquire(more) {
		return false
	}
	h.bytes += more
	h.changed(more)
	return true
}

func (h *held) release() {
	h.changed(-h.bytes)
	h.of.free.Release(h.bytes)
}

// deliverAside has the sender read and send a transaction, and waits for that.
func (w *watchStream) deliverAside(ctx context.Context, one *watched, a *aside) error {
	within, cancel := a.within(ctx)
	defer cancel()
	done := make(chan struct{})
	err := w.hand(within, func() error {
		defer close(done)
		err := w.sendAside(within, one, a)
		if within.Err() != nil { // the watch has been cancelled, or the stream ends
			return ctx.Err()
		}
		return err
	})
	if err != nil {
		return ctx.Err()
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// What follows is the sender's.

func (w *watchStream) sendAside(ctx context.Context, one *watched, a *aside) error {
	if w.open[one.number] == nil {
		return nil
	}
	send := w.sendWhole
	if one.fragment {
		send = w.sendFragments
	}
	sent, err := send(ctx, one, a)
	a.compacted = compactedBy(err)
	// A watch that ends after a fragment is told so at once: until then, etcd's
	// client drops what it is told of other watches.
	switch {
	case a.compacted > 0:
		return w.compacted(one, a.compacted)
	case err != nil && sent > 0 && ctx.Err() != nil: // it has been cancelled
		return w.canceled(one, w.said)
	case err != nil:
		return streamEnd(err)
	}
	if sent > 0 {
		w.service.router.metrics.watchEvents.Add(float64(sent))
		one.told, one.toldOfChanges = max(one.told, a.revision), true
	}
	return nil
}

// compactedBy is the revision of a fsm.CompactedError, or 0.
func compactedBy(err error) int64 {
	var compacted *fsm.CompactedError
	if errors.As(err, &compacted) {
		return compacted.Revision
	}
	return 0
}

// firstHold is enough to read events, one more that is as large as it can be,
// and to encode them.
func (w *watchStream) firstHold() int64 {
	return 2 * (asideBytes + 2*int64(w.service.router.cfg.MaxRequestBytes))
}

// sendFragments holds no more than one part of a transaction at a time. Nothing
// else may come between: clients would forget it, or what they have of the
// transaction. With an error, sent is what the client has got.
func (w *watchStream) sendFragments(ctx context.Context, one *watched, a *aside) (sent int, err error) {
	for from, more := uint32(0), true; more; more = from > 0 {
		h, events, next, err := w.readFragment(ctx, a, from)
		if err != nil {
			return sent, err
		}
		from, events = next, one.wanted(events)
		if sent += len(events); sent == 0 || len(events) == 0 && next > 0 {
			h.release()
			continue
		}
		e := newEncodedAnswer(h)
		if err := e.add(&pb.WatchResponse{Header: w.headerOf(a.revision), WatchId: one.id, Events: events, Fragment: next > 0}); err != nil {
			h.release()
			return sent, err
		}
		if err := w.sayEncoded(e); err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// readFragment reads one part, and holds what it takes.
func (w *watchStream) readFragment(ctx context.Context, a *aside, from uint32) (h *held, events []*mvccpb.Event, next uint32, err error) {
	for {
		if h, err = w.service.router.asides.acquire(ctx, w.firstHold()); err != nil {
			return nil, nil, 0, err
		}
		if events, next, err = h.read(ctx, a, from); err == nil {
			return h, events, next, nil
		}
		h.release()
		if !errors.Is(err, errUnread) {
			return nil, nil, 0, err
		}
		if err := a.await(ctx); err != nil {
			return nil, nil, 0, err
		}
	}
}

// read reads for a while, longer each time: if nobody has the transaction who can
// be reached, others must not wait for what is held here. Then it says errUnread.
func (h *held) read(ctx context.Context, a *aside, from uint32) (events []*mvccpb.Event, next uint32, err error) {
	soon, cancel := context.WithTimeout(ctx, max(h.of.patience, time.Millisecond)<<min(a.unread, 10))
	defer cancel()
	events, next, err = a.read(soon, from, asideBytes)
	if err != nil && compactedBy(err) == 0 && soon.Err() != nil && ctx.Err() == nil {
		a.unread, a.unreadFrom = a.unread+1, from
		err = errUnread
	}
	return events, next, err
}

// await waits until what errUnread was said of can be read.
func (a *aside) await(ctx context.Context) error {
	_, _, err := a.read(ctx, a.unreadFrom, 1)
	return err
}

// sendWhole makes one answer of a transaction. It is encoded at once, because
// events take many times as much.
func (w *watchStream) sendWhole(ctx context.Context, one *watched, a *aside) (sent int, err error) {
	for need := w.firstHold(); ; {
		h, err := w.service.router.asides.acquire(ctx, need)
		if err != nil {
			return 0, err
		}
		e := newEncodedAnswer(h)
		sent, fits, err := w.encodeWhole(ctx, one, a, e)
		switch {
		case err == nil && !fits:
			need = 2 * h.used
		case err == nil && sent > 0:
			return sent, w.sayEncoded(e)
		}
		h.release()
		if errors.Is(err, errUnread) {
			err, fits = a.await(ctx), false
		}
		if err != nil || fits {
			return 0, err
		}
	}
}

// encodeWhole reports whether there was room for all.
func (w *watchStream) encodeWhole(ctx context.Context, one *watched, a *aside, e *encodedAnswer) (sent int, fits bool, err error) {
	e.held.used = w.firstHold()
	if err := e.add(&pb.WatchResponse{Header: w.headerOf(a.revision), WatchId: one.id}); err != nil {
		return 0, false, err
	}
	for from, more := uint32(0), true; more; more = from > 0 {
		var events []*mvccpb.Event
		if events, from, err = e.held.read(ctx, a, from); err != nil {
			return 0, false, err
		}
		before := e.bytes
		if events = one.wanted(events); len(events) == 0 {
			continue
		}
		sent += len(events)
		if err := e.add(&pb.WatchResponse{Events: events}); err != nil {
			return 0, false, err
		}
		switch {
		case e.bytes > math.MaxInt32:
			return 0, false, errTransaction
		case !e.held.grow(e.bytes - before):
			return 0, false, nil
		}
	}
	return sent, true, nil
}

// sayEncoded sends an answer and waits until gRPC has passed it on, or the
// stream ends. Who does not take it keeps what others may wait for, and has less
// time than usual if they do. What gRPC has, it keeps as long as the connection
// lasts, so that ends, too.
func (w *watchStream) sayEncoded(e *encodedAnswer) error {
	defer e.held.release()
	r := w.service.router
	w.stall.Reset(r.cfg.WatchTimeout)
	err := e.sendTo(w.stream)
	w.stall.Stop()
	if err != nil {
		return err
	}
	patience := r.cfg.WatchTimeout + time.Duration(e.bytes/stallBytesPerS)*time.Second
	crowded := r.asides.patience + time.Duration(e.bytes/crowdedBytes)*time.Second
	ticker := time.NewTicker(crowdedLook)
	defer ticker.Stop()
	for since := time.Now(); ; {
		select {
		case <-e.taken:
			return nil
		case <-w.stream.Context().Done():
			return w.stream.Context().Err()
		case <-ticker.C:
		}
		if waited := time.Since(since); waited > patience || waited > crowded && r.asides.waiting.Load() > 0 {
			r.metrics.watchesStalled.Inc()
			disconnect(w.stream.Context())
			return errStalled
		}
	}
}

// closable makes the connections of a listener known to disconnect.
type closable struct{ net.Listener }

func (l closable) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return closableConn{nc}, nil
}

type closableConn struct{ net.Conn }

func (c closableConn) RemoteAddr() net.Addr { return closableAddr{c.Conn.RemoteAddr(), c.Conn} }

// closableAddr is what gRPC says of the peer of a call.
type closableAddr struct {
	net.Addr
	conn net.Conn
}

// disconnect ends the connection that a call has come by.
func disconnect(ctx context.Context) {
	if p, ok := peer.FromContext(ctx); ok {
		if addr, ok := p.Addr.(closableAddr); ok {
			_ = addr.conn.Close()
		}
	}
}

// encodedAnswer is a message whose parts, one after the other, are its encoding.
// It stands in for the pool that their buffers would be given back to.
type encodedAnswer struct {
	held  *held
	parts []*[]byte
	bytes int
	left  atomic.Int64  // parts that gRPC has
	taken chan struct{} // closed when it has none any more
}

func newEncodedAnswer(h *held) *encodedAnswer {
	return &encodedAnswer{held: h, taken: make(chan struct{})}
}

// add appends the encoding of m: repeated fields of parts add up. What cannot be
// encoded ends the answer.
func (e *encodedAnswer) add(m *pb.WatchResponse) error {
	size := proto.Size(m)
	part, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(make([]byte, 0, max(size, leastBuffer)), m)
	if err != nil {
		return err
	}
	e.parts = append(e.parts, &part)
	e.bytes += len(part)
	return nil
}

// sendTo sends the answer. A stream inside the process takes messages.
func (e *encodedAnswer) sendTo(stream pb.Watch_WatchServer) error {
	if grpc.ServerTransportStreamFromContext(stream.Context()) != nil {
		return stream.SendMsg(e)
	}
	close(e.taken)
	m := &pb.WatchResponse{}
	for _, part := range e.parts {
		if err := (proto.UnmarshalOptions{Merge: true}).Unmarshal(*part, m); err != nil {
			return err
		}
	}
	return stream.Send(m)
}

// buffers are gRPC's from now on.
func (e *encodedAnswer) buffers() (all mem.BufferSlice) {
	e.left.Store(int64(len(e.parts)))
	for _, part := range e.parts {
		all = append(all, mem.NewBuffer(part, e))
	}
	e.parts = nil
	return all
}

// Put is told of each buffer that is gone.
func (e *encodedAnswer) Put(*[]byte) {
	if e.left.Add(-1) == 0 {
		close(e.taken)
	}
}

func (*encodedAnswer) Get(n int) *[]byte {
	b := make([]byte, n)
	return &b
}
