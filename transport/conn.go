package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// lane orders what is queued on a connection. Each write takes all of laneControl, then one chunk of
// laneSmall and one fragment of laneBulk, so that nothing waits for more than those.
type lane uint8

const (
	laneControl lane = iota // heartbeats, votes, answers to raft messages, pings
	laneSmall               // messages that fit one frame
	laneBulk                // larger ones
)

const (
	controlBytes = 4 << 20 // more in laneControl means that the peer does not read
	spareBytes   = 1 << 20 // larger buffers are not kept for reuse
)

var errSilent = errors.New("nothing was heard from the peer")

// answer is what a request gets: the payload of the peer's answer, or why there is none.
type answer struct {
	payload []byte
	err     error
}

// pending is a request that waits for its answer. Whoever takes it out of conn.pending sends exactly one
// answer to it, or is the one who waits.
type pending struct {
	answer chan answer // capacity 1
	lane   lane
	seq    uint64
	timer  *time.Timer // of those that wait with a timeout; nil = none has
}

// chunk holds whole frames of laneSmall.
type chunk struct {
	buf []byte
	seq uint64 // of its last message
}

// bulk is a message that is written fragment by fragment.
type bulk struct {
	frame []byte // header and payload, as for one frame
	off   int    // of the payload not yet written, in frame
	kind  kind
	id    uint64
	group uint64 // raft group, 0 = none
	after uint64 // messages up to this one leave laneSmall first: some may be the group's. 0 = none
	seq   uint64
}

// conn is one connection and everything that waits for it: what is queued, and requests without an
// answer yet. A conn ends at its first error; the next one is another conn.
type conn struct {
	t       *Transport
	wire    *wire
	purpose purpose
	peer    Peer
	dialed  bool
	ctx     context.Context // of the handlers of its calls; ends with the connection
	cancel  context.CancelFunc
	lastID  atomic.Uint64
	wake    chan struct{} // capacity 1: there is something to write

	mu       sync.Mutex
	err      error // why it ended; nil = alive
	control  []byte
	small    []chunk
	spare    []byte // a used chunk's buffer
	bulk     []*bulk
	ordered  map[uint64]int // raft groups with messages in laneBulk
	queued   int            // bytes in small and bulk
	space    chan struct{}  // closed when queued falls below the bound; nil = nobody waits
	seq      uint64         // messages queued
	written  [3]uint64      // per lane, the last message that was handed to a write as a whole
	pending  map[uint64]*pending
	serving  map[uint64]context.CancelFunc // calls of the peer, by id
	pinged   bool
	lastPing time.Duration
}

func newConn(t *Transport, w *wire, h hello, dialed bool) *conn {
	c := &conn{t: t, wire: w, purpose: h.purpose, peer: h.from, dialed: dialed, wake: make(chan struct{}, 1),
		ordered: map[uint64]int{}, pending: map[uint64]*pending{}, serving: map[uint64]context.CancelFunc{}}
	c.ctx, c.cancel = context.WithCancel(t.ctx)
	return c
}

// fail ends the connection. Requests that had not been written become ErrUnreachable, the others
// ErrConnectionLost.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	written, orphans := c.written, c.pending
	c.pending = nil
	c.control, c.small, c.spare, c.bulk, c.queued = nil, nil, nil, nil, 0
	c.wakeSenders()
	c.mu.Unlock()
	c.cancel()
	_ = c.wire.Close()
	for _, p := range orphans {
		known := ErrConnectionLost
		if p.seq > written[p.lane] || c.t.faults.lostIsUnreachable {
			known = ErrUnreachable
		}
		p.answer <- answer{err: fmt.Errorf("%w: %s: %w", known, c.peer.Node, err)}
	}
	c.logEnd(err)
}

func (c *conn) logEnd(err error) {
	log := c.t.log.With("node", c.peer.Node, "remote", c.wire.RemoteAddr(), "dialed", c.dialed)
	switch {
	case errors.Is(err, errMalformed):
		c.t.metrics.dropped.WithLabelValues("malformed").Inc()
		log.Error("peer connection closed", "reason", err)
	case c.purpose == purposeAsk || errors.Is(err, ErrClosed):
		log.Debug("peer connection closed", "reason", err)
	default:
		log.Info("peer connection closed", "reason", err)
	}
}

// cause returns why the connection ended, nil while it has not.
func (c *conn) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// outgoing is one message on its way into the queue. frame comes from newFrame, with the payload
// appended; the queue owns it from then on.
type outgoing struct {
	lane  lane // laneSmall becomes laneBulk by size, or to keep a group's order
	kind  kind
	id    uint64
	group uint64 // of raft messages whose order matters, else 0
	frame []byte
	wait  <-chan struct{} // for room in the queue until this is closed; nil = fail at once
	most  time.Duration   // wait no longer than this; 0 = as long as it takes
}

// submit queues a message and registers p, if not nil, for the answer. Its errors are definite.
func (c *conn) submit(m outgoing, p *pending) error {
	payload := len(m.frame) - headerBytes
	if payload > c.t.cfg.MaxMessageBytes {
		return fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, payload, c.t.cfg.MaxMessageBytes)
	}
	if payload <= fragmentBytes {
		putHeader(m.frame, m.kind, flagWhole, m.id)
	} else {
		m.lane = laneBulk
	}
	c.mu.Lock()
	if err := c.room(m); err != nil {
		c.mu.Unlock()
		return fmt.Errorf("%w: %s: %w", ErrUnreachable, c.peer.Node, err)
	}
	if m.group != 0 && c.ordered[m.group] > 0 {
		m.lane = laneBulk
	}
	c.seq++
	c.wire.traffic.framesOut.Inc()
	if p != nil {
		p.lane, p.seq = m.lane, c.seq
		c.pending[m.id] = p
	}
	kept := c.enqueue(m)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	if !kept {
		putFrame(m.frame)
	}
	return nil
}

// room waits until the queue takes another message. It is called with c.mu held, which it releases while
// it waits.
func (c *conn) room(m outgoing) error {
	var timer *time.Timer
	for {
		switch {
		case c.err != nil:
			return c.err
		case m.lane == laneControl:
			if len(c.control) < controlBytes {
				return nil
			}
			return errors.New("the queue of small messages is full")
		case c.queued < c.t.cfg.QueueBytes:
			return nil
		case m.wait == nil:
			c.t.metrics.dropped.WithLabelValues("queue_full").Inc()
			return errors.New("the send queue is full")
		}
		if c.space == nil {
			c.space = make(chan struct{})
		}
		space := c.space
		c.mu.Unlock()
		var late <-chan time.Time
		if m.most > 0 && timer == nil {
			timer = time.NewTimer(m.most)
			defer timer.Stop()
		}
		if timer != nil {
			late = timer.C
		}
		var err error
		select {
		case <-space:
		case <-m.wait:
			err = errors.New("the send queue is full")
		case <-late:
			err = errors.New("the send queue is full")
		}
		c.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// wakeSenders lets those who wait for room try again. It is called with c.mu held.
func (c *conn) wakeSenders() {
	if c.space != nil {
		close(c.space)
		c.space = nil
	}
}

// enqueue puts m into its lane. It reports whether the queue keeps the buffer. It is called with c.mu held.
func (c *conn) enqueue(m outgoing) (kept bool) {
	switch m.lane {
	case laneControl:
		c.control = append(c.control, m.frame...)
		c.written[laneControl] = c.seq // taken whole by the next write
	case laneSmall:
		c.queued += len(m.frame)
		n := len(c.small)
		if n == 0 || len(c.small[n-1].buf)+len(m.frame) > fragmentBytes {
			c.small = append(c.small, chunk{buf: c.spare[:0]})
			c.spare = nil
			n++
		}
		last := &c.small[n-1]
		last.buf, last.seq = append(last.buf, m.frame...), c.seq
	case laneBulk:
		c.queued += len(m.frame)
		b := &bulk{frame: m.frame, off: headerBytes, kind: m.kind, id: m.id, group: m.group, seq: c.seq}
		if n := len(c.small); n > 0 && m.group != 0 {
			b.after = c.small[n-1].seq
		}
		c.bulk = append(c.bulk, b)
		if m.group != 0 {
			c.ordered[m.group]++
		}
		return true
	}
	return false
}

// take moves the next batch from the queue to the end of out.
func (c *conn) take(out []byte) []byte {
	c.mu.Lock()
	out = append(out, c.control...)
	c.control = c.control[:0]
	if cap(c.control) > spareBytes {
		c.control = nil
	}
	if len(c.small) > 0 {
		first := c.small[0]
		c.small = slices.Delete(c.small, 0, 1)
		out = append(out, first.buf...)
		c.spare, c.written[laneSmall] = first.buf, first.seq
		c.queued -= len(first.buf)
	}
	var b *bulk
	var off int
	if len(c.bulk) > 0 && c.bulk[0].after <= c.written[laneSmall] {
		b, off = c.bulk[0], c.bulk[0].off
		b.off = min(off+fragmentBytes, len(b.frame))
		c.queued -= b.off - off
		if b.off == len(b.frame) {
			c.finishBulk(b)
		}
	}
	if c.queued < c.t.cfg.QueueBytes {
		c.wakeSenders()
	}
	c.mu.Unlock()
	if b != nil {
		out = b.appendFragment(out, off)
	}
	return out
}

// finishBulk takes the first message out of laneBulk. It is called with c.mu held.
func (c *conn) finishBulk(b *bulk) {
	c.bulk = slices.Delete(c.bulk, 0, 1)
	c.written[laneBulk] = b.seq
	c.queued -= headerBytes
	if b.group != 0 {
		if c.ordered[b.group]--; c.ordered[b.group] == 0 {
			delete(c.ordered, b.group)
		}
	}
}

// appendFragment appends the fragment that begins at off. It reads only what no longer changes.
func (b *bulk) appendFragment(out []byte, off int) []byte {
	end := min(off+fragmentBytes, len(b.frame))
	var flags uint8
	if off == headerBytes {
		flags |= flagFirst
	}
	if end == len(b.frame) {
		flags |= flagLast
	}
	return appendFragment(out, b.kind, flags, b.id, len(b.frame)-headerBytes, b.frame[off:end])
}

// writeLoop writes what is queued, and pings when nothing is heard, until the connection ends.
func (c *conn) writeLoop() {
	timer := time.NewTimer(c.t.cfg.PingAfter)
	defer timer.Stop()
	var out []byte
	for {
		select {
		case <-c.ctx.Done():
			c.fail(ErrClosed)
			return
		case <-timer.C:
			timer.Reset(c.keepAlive())
			continue
		case <-c.wake:
		}
		runtime.Gosched() // let senders that are ready to run join this write
		for {
			if out = c.take(out[:0]); len(out) == 0 {
				break
			}
			_ = c.wire.SetWriteDeadline(time.Now().Add(c.t.cfg.SilenceTimeout))
			if _, err := c.wire.Write(out); err != nil {
				c.fail(fmt.Errorf("write: %w", err))
				return
			}
			if c.wire.silence() >= c.t.cfg.PingAfter {
				c.keepAlive()
			}
		}
	}
}

// keepAlive pings a peer that is silent, and gives up one that stays so. It returns when to look again.
func (c *conn) keepAlive() time.Duration {
	cfg := &c.t.cfg
	silence := c.wire.silence()
	if silence < cfg.PingAfter {
		return cfg.PingAfter - silence
	}
	if silence >= cfg.SilenceTimeout {
		c.fail(fmt.Errorf("%w for %v", errSilent, silence.Round(time.Millisecond)))
		return cfg.SilenceTimeout
	}
	c.mu.Lock()
	now := time.Since(c.wire.origin)
	due := !c.pinged || now-c.lastPing >= cfg.PingAfter
	if due {
		c.pinged, c.lastPing = true, now
	}
	c.mu.Unlock()
	if due {
		_ = c.submit(outgoing{lane: laneControl, kind: kindPing, frame: newFrame()}, nil)
	}
	return min(cfg.PingAfter, cfg.SilenceTimeout-silence)
}

// readLoop handles what arrives until the connection ends.
func (c *conn) readLoop() {
	for {
		m, err := c.wire.frames.next()
		if err == nil {
			c.wire.traffic.framesIn.Add(float64(c.wire.frames.frames))
			c.wire.frames.frames = 0
			err = c.dispatch(m)
		}
		if err != nil {
			if err == io.EOF {
				err = errors.New("closed by the peer")
			}
			c.fail(err)
			return
		}
	}
}

// dispatch handles one message. It must not block. An error ends the connection.
func (c *conn) dispatch(m message) error {
	switch m.kind {
	case kindPing:
		return c.reply(kindPong, m.id, newFrame())
	case kindPong:
		return nil
	case kindRaftResponse, kindCallReply:
		c.answered(m)
		return nil
	case kindCall:
		return c.serveCall(m)
	case kindCancel:
		c.cancelCall(m.id)
		return nil
	case kindRaftRequest:
		if c.purpose == purposePeer {
			return c.serveRaft(m)
		}
	}
	return fmt.Errorf("%w: kind %d", errMalformed, m.kind)
}

// reply queues a small answer that must not block the reader. It fails, and so ends the connection, when
// the peer does not read its answers.
func (c *conn) reply(k kind, id uint64, frame []byte) error {
	return c.submit(outgoing{lane: laneControl, kind: k, id: id, frame: frame}, nil)
}

// answered hands an answer to its request.
func (c *conn) answered(m message) {
	c.mu.Lock()
	p := c.pending[m.id]
	delete(c.pending, m.id)
	c.mu.Unlock()
	if p == nil {
		c.t.metrics.dropped.WithLabelValues("late_answer").Inc()
		return
	}
	payload, err := parseOutcome(m.payload)
	p.answer <- answer{payload, err}
}

// abandon takes back a request. If it returns false the answer is about to arrive.
func (c *conn) abandon(id uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.pending[id]
	delete(c.pending, id)
	return ok
}

// Frame buffers are reused. The pools hold plain memory only, so transports may share them.
var framePool = sync.Pool{New: func() any { return new([]byte) }}

// newFrame returns a buffer with room for the header, to which the payload is appended.
func newFrame() []byte {
	b := *framePool.Get().(*[]byte)
	return append(b[:0], make([]byte, headerBytes)...)
}

func putFrame(b []byte) {
	if cap(b) <= spareBytes {
		framePool.Put(&b)
	}
}
