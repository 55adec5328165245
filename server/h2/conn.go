package h2

import (
	"bufio"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	readBufferBytes = 16 << 10
	keptOutBytes    = 32 << 10  // of a buffer that was written
	maxOutBytes     = 256 << 10 // wait to be written; then answers wait, and requests are not read
	receiveWindow   = 1 << 20   // of a connection
	headerTable     = 4096
	maxHeaderFrames = 32 // of one request
)

// conn is one client's connection. One goroutine reads; whoever has something to write does so, unless another one does
// already.
type conn struct {
	server *Server
	net    net.Conn
	in     *bufio.Reader
	framer *http2.Framer
	decode *hpack.Decoder
	pass   *pass // nil until it is needed

	// Of the reading goroutine.
	fields    []hpack.HeaderField // of the request whose headers arrive
	fieldSize int

	mu         sync.Mutex
	changed    sync.Cond // there is more room, or less to do: for the goroutines that read
	line       list.List // of *Call, whose answers wait for the connection's window or for room
	err        error     // why the connection has ended
	calls      map[uint32]*Call
	running    int // handlers, those of calls that were reset included
	lastID     uint32
	out, spare []byte
	isFlushing bool
	writing    time.Duration // since when; 0 = nothing is being written
	window     int           // what the client may send
	returned   int           // what has been taken of it, and the client does not know yet
	sendWindow int64
	initial    int64 // window of what is sent for a new call
	maxFrame   int
	settings   [7]uint32 // of the client, by number
	isSmall    bool      // the client's table for headers is smaller than usual

	draining time.Duration // since when; 0 = not at all
	isLast   bool          // no new calls are taken
	isAcked  bool          // the other server has acknowledged the first settings

	lastRead time.Duration
	asked    bool // the client was asked whether it is alive, and has not sent anything since
	lastPing time.Duration
	strikes  int
	pingable bool // something was sent since the last ping
}

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{
		server: s, net: nc, calls: make(map[uint32]*Call), window: receiveWindow,
		sendWindow: defaultWindow, initial: defaultWindow, maxFrame: minFrameSize,
		lastRead: s.now(), lastPing: -2 * s.cfg.IdleTimeout,
	}
	c.changed.L = &c.mu
	c.in = bufio.NewReaderSize(nc, readBufferBytes)
	c.framer = http2.NewFramer(io.Discard, c.in)
	c.framer.SetReuseFrames()
	c.framer.SetMaxReadFrameSize(minFrameSize)
	c.decode = hpack.NewDecoder(headerTable, c.field)
	c.decode.SetMaxStringLength(s.cfg.MaxHeaderBytes)
	c.settings = [7]uint32{
		http2.SettingHeaderTableSize: headerTable, http2.SettingInitialWindowSize: defaultWindow,
		http2.SettingMaxFrameSize: minFrameSize, http2.SettingMaxConcurrentStreams: 1<<32 - 1, http2.SettingMaxHeaderListSize: 1<<32 - 1,
	}
	return c
}

// serve reads until the connection ends.
func (c *conn) serve() {
	err := c.handshake()
	for err == nil {
		err = c.next()
	}
	var broken http2.ConnectionError
	if errors.As(err, &broken) {
		c.goAway(http2.ErrCode(broken), "")
		err = errEnd
	} else if errors.Is(err, http2.ErrFrameTooLarge) {
		c.goAway(http2.ErrCodeFrameSize, "")
		err = errEnd
	}
	if errors.Is(err, errEnd) {
		c.leave()
	}
	c.end(err)
	c.mu.Lock()
	left := c.calls
	c.calls = nil
	for _, call := range left {
		call.forget()
	}
	c.mu.Unlock()
	for _, call := range left {
		call.finish()
	}
	if c.pass != nil {
		c.pass.close()
	}
}

// errEnd: the connection ends in good order.
var errEnd = errors.New("h2: connection ended")

// end closes the connection; the first reason stays. The reading goroutine does the rest.
func (c *conn) end(err error) {
	c.finish(err)
	_ = c.net.Close()
}

// finish ends what waits for the connection; the first reason stays.
func (c *conn) finish(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	calls := make([]*Call, 0, len(c.calls))
	for _, call := range c.calls {
		call.changed.Signal()
		calls = append(calls, call)
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	for _, call := range calls {
		call.cancel(context.Canceled)
	}
}

// lingerTimeout is for the client to end its side, after this one has.
const lingerTimeout = time.Second

// goodbye ends this side of the connection after what was written, and the reading goroutine soon. The client may be
// sending still: if the connection were closed with that unread, the system would make it lose the last answers.
func (c *conn) goodbye() {
	c.mu.Lock()
	for c.isFlushing && c.err == nil {
		c.changed.Wait()
	}
	c.mu.Unlock()
	c.finish(errEnd)
	_ = c.net.SetReadDeadline(time.Now().Add(lingerTimeout))
	if half, ok := c.net.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
		_ = c.net.Close()
	}
}

// leave is goodbye, for the reading goroutine.
func (c *conn) leave() {
	c.goodbye()
	_, _ = io.Copy(io.Discard, c.net)
}

func (c *conn) handshake() error {
	if err := c.net.SetDeadline(time.Now().Add(c.server.cfg.HandshakeTimeout)); err != nil {
		return err
	}
	if t, ok := c.net.(*tls.Conn); ok {
		if err := t.Handshake(); err != nil {
			return err
		}
		if t.ConnectionState().NegotiatedProtocol != http2.NextProtoTLS {
			return errEnd
		}
	}
	c.send(func(b []byte) []byte {
		b = appendSettings(b,
			http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: c.server.cfg.MaxConcurrentStreams},
			http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: uint32(c.server.cfg.MaxHeaderBytes)})
		return appendWindowUpdate(b, 0, receiveWindow-defaultWindow)
	})
	var preface [len(http2.ClientPreface)]byte
	if _, err := io.ReadFull(c.in, preface[:]); err != nil {
		return err
	}
	if string(preface[:]) != http2.ClientPreface {
		return errEnd
	}
	f, err := c.framer.ReadFrame()
	if err != nil {
		return err
	}
	settings, ok := f.(*http2.SettingsFrame)
	if !ok || settings.IsAck() {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if err := c.takeSettings(settings); err != nil {
		return err
	}
	return c.net.SetDeadline(time.Time{})
}

// next reads one frame.
func (c *conn) next() error {
	f, err := c.framer.ReadFrame()
	if stream := (http2.StreamError{}); errors.As(err, &stream) {
		c.reset(stream.StreamID, stream.Code)
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.waitForRoom(); err != nil {
		return err
	}
	switch f := f.(type) {
	case *http2.DataFrame:
		return c.takeData(f)
	case *http2.HeadersFrame:
		return c.takeHeaders(f)
	case *http2.WindowUpdateFrame:
		return c.takeWindow(f)
	case *http2.RSTStreamFrame:
		return c.takeReset(f)
	case *http2.SettingsFrame:
		if f.IsAck() {
			return nil
		}
		return c.takeSettings(f)
	case *http2.PingFrame:
		return c.takePing(f)
	case *http2.PushPromiseFrame, *http2.ContinuationFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil // priorities, GOAWAY: the client will end; and what later versions may have
}

// waitForRoom holds a client up that sends requests and does not take the answers.
func (c *conn) waitForRoom() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastRead, c.asked = c.server.now(), false
	for len(c.out) >= maxOutBytes && c.isFlushing && c.err == nil {
		c.changed.Wait()
	}
	return c.err
}

// send writes a frame of no call.
func (c *conn) send(appendTo func([]byte) []byte) {
	c.mu.Lock()
	c.out = appendTo(c.out)
	c.flush()
}

// flush writes what there is to be written, unless that is being done. It needs the lock and releases it.
func (c *conn) flush() {
	if c.isFlushing || c.err != nil || len(c.out) == 0 && !c.isDone() {
		c.mu.Unlock()
		return
	}
	c.isFlushing = true
	if c.running > 1 { // others may have something for the same write
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	for len(c.out) > 0 && c.err == nil {
		b := c.out
		c.out, c.spare = c.spare[:0], nil
		c.writing = c.server.now()
		c.advance()
		c.mu.Unlock()
		_, err := c.net.Write(b)
		c.mu.Lock()
		c.writing = 0
		if cap(b) <= keptOutBytes {
			c.spare = b
		}
		if err != nil && c.err == nil {
			c.err = err
			_ = c.net.Close()
		}
		c.changed.Broadcast()
	}
	c.isFlushing = false
	c.changed.Broadcast()
	isDone := c.isDone() && c.err == nil
	c.mu.Unlock()
	if isDone {
		c.goodbye()
	}
}

// isDone reports whether the last call has ended. It needs the lock.
func (c *conn) isDone() bool { return c.isLast && len(c.calls) == 0 }

// advance lets the first answer in the line go on, if it can. It needs the lock. An answer that stops going on lets the
// next one: so one frame of the client's wakes no more of them than can use it.
func (c *conn) advance() {
	if first := c.line.Front(); first != nil && c.sendWindow > 0 && len(c.out) < maxOutBytes {
		call := c.line.Remove(first).(*Call)
		call.place = nil
		call.changed.Signal()
	}
}

// goAway says goodbye, in one write that does not wait for long.
func (c *conn) goAway(code http2.ErrCode, text string) {
	_ = c.net.SetWriteDeadline(time.Now().Add(time.Second))
	c.send(func(b []byte) []byte { return appendGoAway(b, c.lastID, code, text) })
}

// lastNumber is the highest that a stream may have.
const lastNumber = 1<<31 - 1

var drainPing = [8]byte{'d', 'r', 'a', 'i', 'n', 'e', 'd', '?'}

// drain asks the client to make no new calls here, and ends the connection after the last one.
func (c *conn) drain() {
	c.mu.Lock()
	if c.draining == 0 {
		c.draining = max(c.server.now(), 1)
		c.out = appendPing(appendGoAway(c.out, lastNumber, http2.ErrCodeNo, ""), false, drainPing)
	}
	c.flush()
}

// drained takes no new calls: those that the client sent before it knew have arrived.
func (c *conn) drained() {
	c.mu.Lock()
	if !c.isLast {
		c.isLast = true
		c.out = appendGoAway(c.out, c.lastID, http2.ErrCodeNo, "")
	}
	c.flush()
}

const (
	drainTimeout = time.Second      // for the client to answer
	stallTimeout = 60 * time.Second // for the client to take what is being written
)

// sweep ends what takes too long.
func (c *conn) sweep(now, receiveTimeout time.Duration) {
	cfg := &c.server.cfg
	var expired, slow []*Call
	var stuck []uint32
	c.mu.Lock()
	for _, call := range c.calls {
		at := call.deadline.Load()
		switch {
		case call.passed && call.grants > 0 && now-call.since >= receiveTimeout:
			stuck = append(stuck, call.id)
		case call.passed:
		case at != 0 && int64(now) >= at:
			expired = append(expired, call)
		case !call.running && now-call.since >= receiveTimeout:
			call.since = now + time.Hour // told once
			slow = append(slow, call)
		}
	}
	isStuck := c.writing != 0 && now-c.writing > stallTimeout || c.asked && now-c.lastRead > cfg.IdleTimeout+cfg.AnswerTimeout
	ask := !c.asked && now-c.lastRead > cfg.IdleTimeout
	c.asked = c.asked || ask
	isDrained := c.draining != 0 && !c.isLast && now-c.draining > drainTimeout
	c.mu.Unlock()
	for _, call := range expired {
		call.cancel(context.DeadlineExceeded)
	}
	switch {
	case isStuck:
		c.end(errEnd)
	case ask || isDrained || len(slow) > 0 || len(stuck) > 0:
		c.server.calls.Go(func() { c.endSlow(slow, stuck, ask, isDrained) }) // what writes may have to wait
	}
}

func (c *conn) endSlow(slow []*Call, stuck []uint32, ask, isDrained bool) {
	for _, call := range slow {
		c.server.cfg.Slow()
		call.refuse(errSlow)
	}
	for _, id := range stuck {
		c.server.cfg.Slow()
		c.reset(id, http2.ErrCodeCancel)
	}
	if ask {
		c.send(func(b []byte) []byte { return appendPing(b, false, [8]byte{}) })
	}
	if isDrained {
		c.drained()
	}
}

// errSlow is for requests that do not arrive.
var errSlow = status.Error(codes.Canceled, "grpc: the request has not arrived in time")
