package transport

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	maxMethodBytes  = 255
	maxAskBytes     = 1 << 20        // longest Ask that a node accepts: it may come from anybody
	maxCallDuration = 24 * time.Hour // bound of the deadline that a peer may ask for
)

// Call sends a request to a node and returns its answer. Both nodes must be in the same cluster. It fails
// fast if the node cannot be reached; a ctx without deadline waits for the handler as long as the
// connection lives.
//
// ErrUnreachable, ErrBusy, ErrNoHandler and ErrTooLarge are definite: no handler saw the request. After
// ErrConnectionLost, a ctx error that is not also ErrUnreachable, or a *RemoteError, the handler may have
// run or may still be running.
func (t *Transport) Call(ctx context.Context, node, method string, payload []byte) ([]byte, error) {
	start := time.Now()
	t.metrics.inFlight.Inc()
	defer func() {
		t.metrics.inFlight.Dec()
		t.metrics.latency.Observe(time.Since(start).Seconds())
	}()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnreachable, node, err)
	}
	c, err := t.link(node).get(ctx)
	if err != nil {
		return nil, err
	}
	return c.call(ctx, method, payload)
}

// Ask sends a request to whoever listens at addr, over a connection of its own. The two nodes may be in
// different clusters or in none. A payload may have almost 1 MiB. Errors are those of Call. Without a
// deadline in ctx it takes at most Config.AskTimeout.
func (t *Transport) Ask(ctx context.Context, addr, method string, payload []byte) ([]byte, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, t.cfg.AskTimeout)
		defer cancel()
	}
	if n := len(payload); n > maxAskBytes-maxMethodBytes-32 {
		return nil, fmt.Errorf("%w: %d bytes to ask", ErrTooLarge, n)
	}
	if err := t.ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, ErrClosed)
	}
	w, peer, err := t.dial(ctx, addr, "", purposeAsk)
	if err != nil {
		return nil, err
	}
	c := newConn(t, w, hello{purpose: purposeAsk, from: peer}, true)
	if !t.attach(c) {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, ErrClosed)
	}
	defer t.detach(c)
	defer c.fail(ErrClosed)
	if !t.spawn(c.readLoop) {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, ErrClosed)
	}
	return c.call(ctx, method, payload)
}

// call sends a request over c and waits for its answer.
func (c *conn) call(ctx context.Context, method string, payload []byte) ([]byte, error) {
	if len(method) == 0 || len(method) > maxMethodBytes {
		return nil, fmt.Errorf("%w: method name of %d bytes", ErrTooLarge, len(method))
	}
	var timeout time.Duration
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(time.Until(deadline), 1)
	}
	frame := appendUint(appendString(newFrame(), method), uint64(timeout))
	frame = append(frame, payload...)
	p := c.t.pending.Get().(*pending)
	id := c.lastID.Add(1)
	defer c.t.pending.Put(p)
	if err := c.submit(outgoing{lane: laneSmall, kind: kindCall, id: id, frame: frame}, p); err != nil {
		return nil, err
	}
	var a answer
	select {
	case a = <-p.answer:
	case <-ctx.Done():
		if c.abandon(id) {
			a.err = ctx.Err()
			// In the request's own lane, so that it cannot overtake the request.
			_ = c.submit(outgoing{lane: p.lane, kind: kindCancel, id: id, frame: newFrame()}, nil)
		} else {
			a = <-p.answer
		}
	}
	return a.payload, a.err
}

// serveCall starts the handler of an incoming call.
func (c *conn) serveCall(m message) error {
	d := decoder{b: m.payload}
	method, timeout := d.bytes(), time.Duration(d.uint())
	if d.bad || c.dialed {
		return fmt.Errorf("%w: call", errMalformed)
	}
	h := c.t.handler(c.purpose, method)
	if h == nil {
		return c.reply(kindCallReply, m.id, appendError(newFrame(), ErrNoHandler))
	}
	size := len(m.payload)
	if !c.t.startHandler(size) {
		c.t.metrics.dropped.WithLabelValues("busy").Inc()
		return c.reply(kindCallReply, m.id, appendError(newFrame(), ErrBusy))
	}
	if timeout <= 0 || timeout > maxCallDuration {
		timeout = maxCallDuration
	}
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	if !c.keepCancel(m.id, cancel) {
		cancel()
		c.t.endHandler(size)
		return fmt.Errorf("%w: two calls with one id", errMalformed)
	}
	if !c.t.spawn(func() {
		defer c.t.endHandler(size)
		c.handle(ctx, h, m.id, d.b)
	}) {
		c.cancelCall(m.id)
		c.t.endHandler(size)
		return ErrClosed
	}
	return nil
}

// startHandler reports whether one more handler may run, with a payload of so many bytes.
func (t *Transport) startHandler(size int) bool {
	running, bytes := t.running.Add(1), t.payload.Add(int64(size))
	if running <= int64(t.cfg.MaxConcurrentCalls) && bytes <= int64(t.cfg.MaxCallBytes) {
		return true
	}
	t.endHandler(size)
	return false
}

func (t *Transport) endHandler(size int) {
	t.running.Add(-1)
	t.payload.Add(-int64(size))
}

// handle runs the handler of a call and sends the answer.
func (c *conn) handle(ctx context.Context, h Handler, id uint64, payload []byte) {
	result, err := h(ctx, c.peer, payload)
	frame := newFrame()
	if err == nil && len(result) >= c.t.cfg.MaxMessageBytes {
		err = fmt.Errorf("%w: the answer has %d bytes", ErrTooLarge, len(result))
	}
	if err != nil {
		frame = appendFailure(frame, err)
	} else {
		frame = append(append(frame, byte(statusOK)), result...)
	}
	c.cancelCall(id)
	// Waiting for room here is bounded: the connection ends if the peer does not read.
	_ = c.submit(outgoing{lane: laneSmall, kind: kindCallReply, id: id, frame: frame, wait: c.ctx.Done()}, nil)
}

// appendFailure appends a handler's own error: whatever it is, it does not count as definite.
func appendFailure(frame []byte, err error) []byte {
	var remote *RemoteError
	if !errors.As(err, &remote) {
		remote = &RemoteError{Message: err.Error()}
	}
	return appendError(frame, remote)
}

// keepCancel remembers how to cancel one of the peer's calls.
func (c *conn) keepCancel(id uint64, cancel context.CancelFunc) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.serving[id] != nil {
		return false
	}
	c.serving[id] = cancel
	return true
}

// cancelCall ends the context of one of the peer's calls.
func (c *conn) cancelCall(id uint64) {
	c.mu.Lock()
	cancel := c.serving[id]
	delete(c.serving, id)
	c.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}
