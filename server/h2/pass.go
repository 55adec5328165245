package h2

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// pass is the way to the other server for the calls of one connection that are not served here. Towards that server it
// is a client with the connection's stream numbers. The windows of the streams are between the two ends; those of the
// two connections each have their own.
type pass struct {
	conn    *conn
	net     net.Conn
	in      *bufio.Reader
	framer  *http2.Framer
	running sync.WaitGroup

	encoder *hpack.Encoder // of the connection's reading goroutine
	block   bytes.Buffer

	mu      sync.Mutex
	changed sync.Cond
	queue   []segment
	queued  int   // bytes of the queue that are not data
	isStuck bool  // what the other server says waits for the client
	window  int64 // what the other server takes
	isOver  bool
}

// segment is some frames, or one of data.
type segment struct {
	frames []byte
	data   int // bytes of the window that it takes
}

// maxPassBytes besides data may wait to be written. Then the client's frames wait, too, except while the other server
// waits for what the client has yet to send. How much data waits is bounded by the connection's window, and in how many
// pieces by what each piece costs.
const (
	maxPassBytes = 1 << 20
	segmentBytes = 64
)

// startPass connects. It is called once.
func (c *conn) startPass() error {
	nc, err := c.server.cfg.Dial()
	if err != nil {
		return err
	}
	p := &pass{conn: c, net: nc, window: defaultWindow, in: bufio.NewReaderSize(nc, readBufferBytes)}
	p.framer = http2.NewFramer(io.Discard, p.in)
	p.changed.L = &p.mu
	p.framer.SetReuseFrames()
	p.encoder = hpack.NewEncoder(&p.block)
	c.mu.Lock()
	var settings []http2.Setting
	for id, value := range c.settings {
		if id != 0 && id != int(http2.SettingEnablePush) {
			settings = append(settings, http2.Setting{ID: http2.SettingID(id), Val: value})
		}
	}
	c.pass = p
	c.mu.Unlock()
	p.queue = []segment{{frames: appendSettings([]byte(http2.ClientPreface), settings...)}}
	p.running.Go(p.write)
	p.running.Go(p.read)
	return nil
}

// close ends the way; the connection has ended.
func (p *pass) close() {
	p.mu.Lock()
	p.isOver = true
	p.changed.Broadcast()
	p.mu.Unlock()
	_ = p.net.Close()
	p.running.Wait()
}

// send queues frames for the other server. It is for the connection's reading goroutine.
func (p *pass) send(appendTo func([]byte) []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.append(appendTo)
	return p.wait()
}

// reply is send for the goroutine that reads from the other server: it must not wait for it.
func (p *pass) reply(appendTo func([]byte) []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.append(appendTo)
	if p.isOver {
		return errEnd
	}
	return nil
}

// append needs the lock.
func (p *pass) append(appendTo func([]byte) []byte) {
	if len(p.queue) == 0 || p.queue[len(p.queue)-1].data > 0 {
		p.queue = append(p.queue, segment{})
	}
	last := &p.queue[len(p.queue)-1]
	p.queued -= len(last.frames)
	last.frames = appendTo(last.frames)
	p.queued += len(last.frames)
	p.changed.Broadcast()
}

// wait waits for room in the queue. It needs the lock.
func (p *pass) wait() error {
	for p.queued > maxPassBytes && !p.isOver {
		if p.isStuck {
			return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
		}
		p.changed.Wait()
	}
	if p.isOver {
		return errEnd
	}
	return nil
}

// stick says whether what the other server says waits for the client.
func (p *pass) stick(isStuck bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isStuck = isStuck
	p.changed.Broadcast()
}

// data queues a part of a request, without its padding. The client may send as much again when it has been written.
func (p *pass) data(f *http2.DataFrame) error {
	data := f.Data()
	var flags http2.Flags
	if f.StreamEnded() {
		flags = http2.FlagDataEndStream
	}
	if padding := int(f.Length) - len(data); padding > 0 { // the other server does not see it
		p.conn.creditPadding(f.StreamID, padding)
	}
	frame := appendFrameHeader(make([]byte, 0, frameHeaderBytes+len(data)), len(data), http2.FrameData, flags, f.StreamID)
	if len(data) == 0 {
		return p.send(func(b []byte) []byte { return append(b, frame...) })
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue = append(p.queue, segment{frames: append(frame, data...), data: len(data)})
	p.queued += segmentBytes
	p.changed.Broadcast()
	return p.wait()
}

// write is a goroutine.
func (p *pass) write() {
	for {
		b, data := p.take()
		if b == nil {
			return
		}
		if _, err := p.net.Write(b); err != nil {
			p.fail(err)
			return
		}
		if data > 0 {
			p.conn.credit(data)
		}
	}
}

// take waits for the next frames to write; nil when there will be none. data is how many bytes of them are of requests.
func (p *pass) take() (b []byte, data int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.queue) == 0 || int64(p.queue[0].data) > p.window {
		if p.isOver {
			return nil, 0
		}
		p.changed.Wait()
	}
	if p.isOver {
		return nil, 0
	}
	n := 0
	for ; n < len(p.queue) && len(b) < keptOutBytes && int64(p.queue[n].data) <= p.window; n++ {
		s := p.queue[n]
		p.window -= int64(s.data)
		data += s.data
		if s.data == 0 {
			p.queued -= len(s.frames)
		} else {
			p.queued -= segmentBytes
		}
		if b == nil {
			b = s.frames
		} else {
			b = append(b, s.frames...)
		}
	}
	p.queue = slices.Delete(p.queue, 0, n)
	p.changed.Broadcast()
	return b, data
}

// fail ends the connection: the other server has.
func (p *pass) fail(err error) {
	p.mu.Lock()
	p.isOver = true
	p.changed.Broadcast()
	p.mu.Unlock()
	p.conn.end(err)
}

// headers sends a request's headers, or trailers.
func (p *pass) headers(id uint32, end bool, fields []hpack.HeaderField) error {
	p.block.Reset()
	for _, f := range fields {
		if err := p.encoder.WriteField(f); err != nil {
			return err
		}
	}
	return p.send(func(b []byte) []byte { return appendHeaders(b, id, end, p.block.Bytes(), minFrameSize) })
}

// read passes on what the other server says: all that it has said at once in one write.
func (p *pass) read() {
	for {
		f, err := p.framer.ReadFrame()
		if err == nil {
			err = p.frame(f)
		}
		if err != nil {
			p.fail(err)
			return
		}
		p.conn.mu.Lock()
		if p.in.Buffered() == 0 || len(p.conn.out) >= keptOutBytes/2 {
			p.conn.flush()
		} else {
			p.conn.mu.Unlock()
		}
	}
}

var errOther = errors.New("h2: the other server has ended the connection")

func (p *pass) frame(f http2.Frame) error {
	c := p.conn
	switch f := f.(type) {
	case *http2.DataFrame:
		if err := c.passData(f); err != nil {
			return err
		}
		if n := uint32(len(f.Data())); n > 0 {
			return p.reply(func(b []byte) []byte { return appendWindowUpdate(b, 0, n) })
		}
	case *http2.HeadersFrame:
		block, isLast := f.HeaderBlockFragment(), f.HeadersEnded()
		id, end := f.StreamID, f.StreamEnded()
		for block = bytes.Clone(block); !isLast; {
			next, err := p.framer.ReadFrame()
			if err != nil {
				return err
			}
			more, ok := next.(*http2.ContinuationFrame)
			if !ok {
				return errOther
			}
			block, isLast = append(block, more.HeaderBlockFragment()...), more.HeadersEnded()
		}
		c.passOn(id, end, func(b []byte) []byte { return appendHeaders(b, id, end, block, minFrameSize) })
	case *http2.RSTStreamFrame:
		c.passOn(f.StreamID, true, func(b []byte) []byte { return appendReset(b, f.StreamID, f.ErrCode) })
	case *http2.WindowUpdateFrame:
		if f.StreamID != 0 {
			if !c.passCredit(f.StreamID, int(f.Increment)) {
				reset := func(b []byte) []byte { return appendReset(b, f.StreamID, http2.ErrCodeEnhanceYourCalm) }
				c.passOn(f.StreamID, true, reset)
				return p.reply(reset)
			}
			c.passOn(f.StreamID, false, func(b []byte) []byte { return appendWindowUpdate(b, f.StreamID, f.Increment) })
			return nil
		}
		p.mu.Lock()
		p.window += int64(f.Increment)
		p.changed.Broadcast()
		p.mu.Unlock()
	case *http2.SettingsFrame:
		if !f.IsAck() {
			return p.reply(appendSettingsAck)
		}
		c.passAck()
	case *http2.PingFrame:
		if !f.IsAck() {
			return p.reply(func(b []byte) []byte { return appendPing(b, true, f.Data) })
		}
	case *http2.GoAwayFrame:
		return errOther
	}
	return nil
}

// passAck tells the client that its settings have arrived everywhere. The first ones were acknowledged before.
func (c *conn) passAck() {
	c.mu.Lock()
	if c.isAcked {
		c.out = appendSettingsAck(c.out)
	}
	c.isAcked = true
	c.flush()
}

// passOn takes a frame of a call that is served elsewhere to be written. The block of a header always goes out, because the client's
// table needs it.
func (c *conn) passOn(id uint32, end bool, appendTo func([]byte) []byte) {
	c.mu.Lock()
	for len(c.out) >= maxOutBytes && c.err == nil {
		if !c.isFlushing {
			c.flush()
			c.mu.Lock()
			continue
		}
		c.changed.Wait()
	}
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.out = appendTo(c.out)
	c.pingable = true
	if call := c.calls[id]; end && call != nil {
		c.over(call)
	}
	c.mu.Unlock()
}

// passCredit counts what the client may send for a call that is served elsewhere; n less than 0 has come. What is more
// than the usual window is for a large message, and counts as receiving like those that are served here. It returns false
// if too many bytes would.
func (c *conn) passCredit(id uint32, n int) bool {
	s := c.server
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.calls[id]
	if call == nil {
		return true
	}
	call.credit += n
	more := max(call.credit-defaultWindow, 0) - call.grants
	if more == 0 {
		return true
	}
	if s.receiving.Add(int64(more)) > s.cfg.MaxReceivingBytes && more > 0 {
		s.receiving.Add(-int64(more))
		return false
	}
	if call.grants == 0 {
		call.since = s.now()
	}
	call.grants += more
	return true
}

// waitStuck waits for the client. It needs the lock.
func (c *conn) waitStuck() {
	if c.sendWindow > 0 {
		c.changed.Wait()
		return
	}
	c.mu.Unlock()
	c.pass.stick(true)
	c.mu.Lock()
	if c.sendWindow <= 0 && c.err == nil {
		c.changed.Wait()
	}
	c.mu.Unlock()
	c.pass.stick(false)
	c.mu.Lock()
}

// creditPadding gives back what a frame had besides data, to its connection and its stream.
func (c *conn) creditPadding(id uint32, n int) {
	c.mu.Lock()
	c.out = appendWindowUpdate(c.out, id, uint32(n))
	c.mu.Unlock()
	c.credit(n)
}

// passData is passOn for data: it takes of the connection's window.
func (c *conn) passData(f *http2.DataFrame) error {
	data := f.Data()
	for first := true; first || len(data) > 0; first = false {
		c.mu.Lock()
		for c.err == nil && (len(c.out) >= maxOutBytes || len(data) > 0 && c.sendWindow <= 0) {
			if len(c.out) > 0 && !c.isFlushing {
				c.flush()
				c.mu.Lock()
				continue
			}
			c.waitStuck()
		}
		n := int(min(int64(len(data)), int64(c.maxFrame), max(c.sendWindow, 0)))
		call := c.calls[f.StreamID]
		if c.err != nil || call == nil { // reset: the client does not count it
			c.mu.Unlock()
			return nil
		}
		var flags http2.Flags
		if n == len(data) && f.StreamEnded() {
			flags = http2.FlagDataEndStream
			c.over(call)
		}
		c.out = append(appendFrameHeader(c.out, n, http2.FrameData, flags, f.StreamID), data[:n]...)
		c.sendWindow -= int64(n)
		c.pingable = true
		data = data[n:]
		c.mu.Unlock()
	}
	return nil
}
