package h2

import (
	"container/list"
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Call is one call, and the context of its handler: it ends with the call, when the client gives up or its time is over.
// It has no values.
type Call struct {
	conn    *conn
	id      uint32
	passed  bool // served elsewhere
	handler Handler
	kept    [2]string

	// Of the reading goroutine, until the handler runs.
	frame  []byte // FrameBytes and the message, as far as they have arrived
	window int64  // of what the client may send
	isSent bool   // all of it has come
	since  time.Duration

	// Under the connection's lock.
	sendWindow int64
	grants     int  // how many bytes of the request count as receiving
	credit     int  // of a call that is served elsewhere: what the client may send
	arrived    bool // or it is not waited for any more
	isOver     bool // answered or reset
	running    bool
	changed    sync.Cond     // its answer may go on, or need not any more
	place      *list.Element // in the connection's line

	deadline atomic.Int64  // when the sweeper ends it, in nanoseconds of the server's time; 0 = never
	patience time.Duration // of the client; 0 = it has set no limit
	timer    *time.Timer
	due      time.Time // of the timer

	mu     sync.Mutex
	limits int
	done   chan struct{} // nil until it is asked for
	err    error
	afters map[*func()]struct{}
}

// Kept is the first value of the i-th header of Config.Keep; empty if the client has sent none.
func (c *Call) Kept(i int) string { return c.kept[i] }

// Limit ends the call after a time, about, unless its client has limited it: then it returns false. Otherwise Unlimit
// must follow. Of several at a time the first limit holds, until all of them are undone.
func (c *Call) Limit(d time.Duration) bool {
	if c.timer != nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.limits++; c.limits == 1 {
		c.deadline.Store(int64(c.conn.server.now() + d))
	}
	return true
}

// Unlimit undoes one Limit.
func (c *Call) Unlimit() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.limits--; c.limits == 0 {
		c.deadline.Store(0)
	}
}

// Deadline implements context.Context.
func (c *Call) Deadline() (time.Time, bool) {
	if c.timer != nil {
		return c.due, true
	}
	if at := c.deadline.Load(); at != 0 {
		return c.conn.server.start.Add(time.Duration(at)), true
	}
	return time.Time{}, false
}

// Done implements context.Context.
func (c *Call) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.err != nil {
			close(c.done)
		}
	}
	return c.done
}

// Err implements context.Context.
func (c *Call) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Value implements context.Context.
func (c *Call) Value(any) any { return nil }

// AfterFunc is what context.WithCancel and its like look for, to do without a goroutine for each child.
func (c *Call) AfterFunc(f func()) (stop func() bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		go f()
		return func() bool { return false }
	}
	if c.afters == nil {
		c.afters = make(map[*func()]struct{})
	}
	key := &f
	c.afters[key] = struct{}{}
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		_, waiting := c.afters[key]
		delete(c.afters, key)
		return waiting
	}
}

// cancel ends the context; the first reason stays.
func (c *Call) cancel(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	if c.done != nil {
		close(c.done)
	}
	afters := c.afters
	c.afters = nil
	c.mu.Unlock()
	for f := range afters {
		go (*f)()
	}
}

// begin makes the call one of its connection's, whose lock it needs.
func (c *Call) begin(window int64) {
	c.sendWindow = window
	c.conn.calls[c.id] = c
	if c.passed {
		c.credit = defaultWindow
		return
	}
	c.conn.server.arriving.Add(1)
	if c.patience > 0 {
		c.due = time.Now().Add(c.patience)
		c.timer = time.AfterFunc(c.patience, func() { c.cancel(context.DeadlineExceeded) })
	}
}

// finish lets go of what the context holds.
func (c *Call) finish() {
	if c.timer != nil {
		c.timer.Stop()
	}
	c.cancel(context.Canceled)
}

// receive takes what has arrived of the request.
func (c *Call) receive(data []byte, end bool) {
	s := c.conn.server
	if len(c.frame) == 0 && end {
		c.frame = append(make([]byte, 0, len(data)), data...)
	} else {
		c.frame = append(c.frame, data...)
	}
	if len(c.frame) >= FrameBytes {
		size := int(binary.BigEndian.Uint32(c.frame[1:]))
		switch {
		case c.frame[0] != 0:
			c.refuse(status.Error(codes.Internal, "grpc: compressed flag set with identity or empty encoding"))
			return
		case size > s.cfg.MaxMessageBytes:
			c.refuse(status.Errorf(codes.ResourceExhausted, "grpc: received message larger than max (%d vs. %d)", size, s.cfg.MaxMessageBytes))
			return
		case len(c.frame) > FrameBytes+size, end && len(c.frame) < FrameBytes+size:
			c.refuse(status.Error(codes.Internal, "grpc: the request is not one message"))
			return
		}
		if missing := int64(FrameBytes + size - len(c.frame)); missing > c.window && !c.grant(int(missing-c.window)) {
			c.refuse(status.Error(codes.ResourceExhausted, "grpc: too many large requests at once"))
			return
		}
	}
	if !end {
		return
	}
	if len(c.frame) < FrameBytes {
		c.refuse(status.Error(codes.Internal, "grpc: the request is not one message"))
		return
	}
	c.conn.begin(c)
}

// grant lets the client send n more bytes, unless too many are on their way.
func (c *Call) grant(n int) bool {
	s := c.conn.server
	if s.receiving.Add(int64(n)) > s.cfg.MaxReceivingBytes {
		s.receiving.Add(-int64(n))
		return false
	}
	c.window += int64(n)
	c.conn.mu.Lock()
	if c.arrived { // given up meanwhile
		s.receiving.Add(-int64(n))
	} else {
		c.grants += n
		c.conn.out = appendWindowUpdate(c.conn.out, c.id, uint32(n))
	}
	c.conn.flush()
	return true
}

// forget ends the accounting of a request that is arriving. It needs the lock.
func (c *Call) forget() {
	if c.arrived {
		return
	}
	c.arrived = true
	if !c.passed {
		c.conn.server.arriving.Add(-1)
	}
	if c.grants > 0 {
		c.conn.server.receiving.Add(-int64(c.grants))
	}
}

// refuse answers a request that is not served.
func (c *Call) refuse(err error) {
	c.conn.fail(c, err, true)
	c.finish()
}

// maxScratchBytes of an answer's buffer are kept for the next one.
const maxScratchBytes = 64 << 10

// serve runs the handler and answers. It returns a buffer for the next call.
func (c *Call) serve(scratch []byte) []byte {
	frame := c.frame
	c.frame = nil
	answer, release, err := c.handler(c, frame, append(scratch[:0], 0, 0, 0, 0, 0))
	if err == nil {
		binary.BigEndian.PutUint32(answer[1:], uint32(len(answer)-FrameBytes))
		c.conn.answer(c, answer)
	} else {
		c.conn.fail(c, err, false)
	}
	if release != nil {
		release()
	}
	c.finish()
	c.conn.ended(c)
	if cap(answer) > cap(scratch) && cap(answer) <= maxScratchBytes {
		scratch = answer[:0]
	}
	return scratch
}

// ended counts a handler that has returned.
func (c *conn) ended(call *Call) {
	c.mu.Lock()
	c.running--
	c.mu.Unlock()
}

// begin runs the handler of a request that has arrived.
func (c *conn) begin(call *Call) {
	c.mu.Lock()
	call.forget()
	if call.isOver || c.err != nil {
		c.mu.Unlock()
		return
	}
	call.running = true
	c.running++
	c.mu.Unlock()
	c.server.run(call)
}

// answer writes a good answer: as much at a time as the client takes.
func (c *conn) answer(call *Call, frame []byte) {
	c.mu.Lock()
	isStalled, begun := false, false
	size := int64(len(frame) + stalledBytes)
	for len(frame) > 0 {
		n := int(min(int64(len(frame)), int64(c.maxFrame), call.sendWindow, c.sendWindow))
		switch {
		case call.isOver || c.err != nil:
			frame = nil
			continue
		case n > 0 && len(c.out) < maxOutBytes:
		case len(c.out) > 0 && !c.isFlushing:
			c.flush()
			c.mu.Lock()
			continue
		case !isStalled && c.server.stalled.Add(size) > c.server.cfg.MaxStalledBytes:
			c.server.stalled.Add(-size)
			c.mu.Unlock()
			c.giveUp(call, begun)
			return
		default:
			isStalled = true
			c.wait(call)
			continue
		}
		c.leaveLine(call)
		if !begun {
			c.out = appendHeaders(c.out, call.id, false, headerBlock, minFrameSize)
			begun = true
		}
		c.out = append(appendFrameHeader(c.out, n, http2.FrameData, 0, call.id), frame[:n]...)
		call.sendWindow -= int64(n)
		c.sendWindow -= int64(n)
		c.pingable = true
		if frame = frame[n:]; len(frame) == 0 {
			c.out = appendHeaders(c.out, call.id, true, trailerBlock, minFrameSize)
			c.over(call)
		}
	}
	if isStalled {
		c.server.stalled.Add(-size)
	}
	c.advance()
	c.flush()
}

// stalledBytes are what an answer that waits costs besides its own bytes.
const stalledBytes = 8 << 10

// wait waits until the answer may go on: for its own window, or in the line for what all answers share. It needs the lock.
func (c *conn) wait(call *Call) {
	if call.sendWindow <= 0 {
		c.leaveLine(call)
		c.advance()
	} else if call.place == nil {
		call.place = c.line.PushBack(call)
	}
	call.changed.Wait()
	c.server.woken.Add(1)
}

// leaveLine needs the lock.
func (c *conn) leaveLine(call *Call) {
	if call.place != nil {
		c.line.Remove(call.place)
		call.place = nil
	}
}

// giveUp ends a call whose answer would wait, while too many do.
func (c *conn) giveUp(call *Call, begun bool) {
	if begun {
		c.reset(call.id, http2.ErrCodeEnhanceYourCalm)
		return
	}
	c.fail(call, c.server.cfg.Stalled, false)
}

// fail answers with an error. If the client may still be sending, it is told to stop.
func (c *conn) fail(call *Call, err error, stop bool) {
	block := statusBlock(append(make([]byte, 0, 128), headerBlock...), err)
	c.mu.Lock()
	if !call.isOver && c.err == nil {
		c.out = appendHeaders(c.out, call.id, true, block, minFrameSize)
		if stop {
			c.out = appendReset(c.out, call.id, http2.ErrCodeNo)
		}
		c.over(call)
	}
	c.flush()
}

// over removes a call that needs no more frames. It needs the lock.
func (c *conn) over(call *Call) {
	call.forget()
	call.isOver, c.pingable = true, true
	c.leaveLine(call)
	call.changed.Signal()
	delete(c.calls, call.id)
}
