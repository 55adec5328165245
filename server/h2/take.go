package h2

import (
	"errors"
	"slices"
	"time"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What the client may do wrong is answered as RFC 9113 says: the connection ends, or the stream.

func (c *conn) takeSettings(f *http2.SettingsFrame) error {
	if f.HasDuplicates() {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.mu.Lock()
	err := f.ForeachSetting(c.setting)
	passes := c.pass != nil
	if err == nil && !passes {
		c.out = appendSettingsAck(c.out)
	}
	c.flush()
	if err == nil && passes { // the other server has the table for headers: it says when it has changed
		return c.pass.send(func(b []byte) []byte {
			var all []http2.Setting
			_ = f.ForeachSetting(func(s http2.Setting) error { all = append(all, s); return nil })
			return appendSettings(b, all...)
		})
	}
	return err
}

// setting needs the lock.
func (c *conn) setting(s http2.Setting) error {
	if err := s.Valid(); err != nil {
		return err
	}
	if int(s.ID) < len(c.settings) {
		c.settings[s.ID] = s.Val
	}
	switch s.ID {
	case http2.SettingHeaderTableSize:
		c.isSmall = c.isSmall || s.Val < headerTable
	case http2.SettingMaxFrameSize:
		c.maxFrame = int(min(s.Val, keptOutBytes))
	case http2.SettingInitialWindowSize:
		more := int64(s.Val) - c.initial
		c.initial = int64(s.Val)
		for _, call := range c.calls {
			if call.sendWindow += more; call.sendWindow > maxWindow {
				return http2.ConnectionError(http2.ErrCodeFlowControl)
			}
			if more > 0 && call.sendWindow > 0 {
				call.changed.Signal()
			}
		}
	}
	return nil
}

const mostStrikes = 2

// takePing answers. Clients that ping too often are sent away, by the rules of grpc-go.
func (c *conn) takePing(f *http2.PingFrame) error {
	if f.IsAck() {
		if f.Data == drainPing {
			c.drained()
		}
		return nil
	}
	now := c.server.now()
	c.mu.Lock()
	least := c.server.cfg.PingInterval
	if len(c.calls) == 0 {
		least = c.server.cfg.IdleTimeout
	}
	switch {
	case c.pingable:
		c.pingable, c.strikes = false, 0
	case now-c.lastPing < least:
		c.strikes++
	}
	c.lastPing = now
	tooMany := c.strikes > mostStrikes
	c.out = appendPing(c.out, true, f.Data)
	c.flush()
	if tooMany {
		c.goAway(http2.ErrCodeEnhanceYourCalm, "too_many_pings")
		return errEnd
	}
	return nil
}

func (c *conn) takeWindow(f *http2.WindowUpdateFrame) error {
	c.mu.Lock()
	if f.StreamID == 0 {
		c.sendWindow += int64(f.Increment)
		tooMuch := c.sendWindow > maxWindow
		c.changed.Broadcast()
		c.advance()
		c.mu.Unlock()
		if tooMuch {
			return http2.ConnectionError(http2.ErrCodeFlowControl)
		}
		return nil
	}
	call := c.calls[f.StreamID]
	tooMuch := false
	if call != nil && !call.passed {
		call.sendWindow += int64(f.Increment)
		tooMuch = call.sendWindow > maxWindow
		call.changed.Signal()
	}
	c.mu.Unlock()
	switch {
	case tooMuch:
		c.reset(f.StreamID, http2.ErrCodeFlowControl)
	case call != nil && call.passed:
		return c.pass.send(func(b []byte) []byte { return appendWindowUpdate(b, f.StreamID, f.Increment) })
	}
	return nil
}

// takeReset takes calls back. The C library of gRPC sends this for calls that it has not begun, too: RFC 9113 calls that
// an error, but grpc-go lets it pass.
func (c *conn) takeReset(f *http2.RSTStreamFrame) error {
	c.mu.Lock()
	call := c.calls[f.StreamID]
	if call != nil {
		c.over(call)
	}
	c.changed.Broadcast()
	c.flush()
	switch {
	case call == nil:
	case call.passed:
		return c.pass.send(func(b []byte) []byte { return appendReset(b, f.StreamID, f.ErrCode) })
	default:
		call.finish()
	}
	return nil
}

// isIdle reports whether a stream has not begun. It needs the lock.
func (c *conn) isIdle(id uint32) bool { return id > c.lastID && !c.isLast }

// reset ends a stream from this side.
func (c *conn) reset(id uint32, code http2.ErrCode) {
	c.mu.Lock()
	call := c.calls[id]
	if call != nil {
		c.over(call)
	}
	c.out = appendReset(c.out, id, code)
	c.changed.Broadcast()
	c.flush()
	if call != nil {
		call.finish()
		if call.passed {
			_ = c.pass.send(func(b []byte) []byte { return appendReset(b, id, code) })
		}
	}
}

func (c *conn) takeData(f *http2.DataFrame) error {
	if err := c.received(int(f.Length)); err != nil {
		return err
	}
	c.mu.Lock()
	call := c.calls[f.StreamID]
	isIdle := c.isIdle(f.StreamID)
	c.mu.Unlock()
	switch {
	case isIdle:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case call != nil && call.passed:
		c.passCredit(f.StreamID, -len(f.Data()))
		return c.pass.data(f)
	}
	c.credit(int(f.Length))
	switch {
	case call == nil: // answered or reset, perhaps before the client knew
		return nil
	case call.isSent:
		c.reset(f.StreamID, http2.ErrCodeStreamClosed)
		return nil
	}
	call.isSent = f.StreamEnded()
	if call.window -= int64(f.Length); call.window < 0 {
		c.reset(f.StreamID, http2.ErrCodeFlowControl)
		return nil
	}
	call.receive(f.Data(), f.StreamEnded())
	return nil
}

// received counts what has come of the client's window.
func (c *conn) received(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.window -= n; c.window < 0 {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	return nil
}

// credit lets the client send more, once it is a part of its window.
func (c *conn) credit(n int) {
	c.mu.Lock()
	if c.returned += n; c.returned >= receiveWindow/4 {
		c.out = appendWindowUpdate(c.out, 0, uint32(c.returned))
		c.window, c.returned = c.window+c.returned, 0
	}
	c.flush()
}

// field gathers the headers of a request.
func (c *conn) field(f hpack.HeaderField) {
	c.fieldSize += int(f.Size())
	if c.fieldSize <= c.server.cfg.MaxHeaderBytes {
		c.fields = append(c.fields, f)
	}
}

// takeHeaders begins a call.
func (c *conn) takeHeaders(f *http2.HeadersFrame) error {
	c.fields, c.fieldSize = c.fields[:0], 0
	id, end := f.StreamID, f.StreamEnded()
	block, isLast := f.HeaderBlockFragment(), f.HeadersEnded()
	for n := 0; ; n++ {
		switch _, err := c.decode.Write(block); {
		case errors.Is(err, hpack.ErrStringLength):
			return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
		case err != nil:
			return http2.ConnectionError(http2.ErrCodeCompression)
		}
		if c.fieldSize > c.server.cfg.MaxHeaderBytes || n == maxHeaderFrames {
			return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
		}
		if isLast {
			break
		}
		next, err := c.framer.ReadFrame()
		if err != nil {
			return err
		}
		more, ok := next.(*http2.ContinuationFrame) // the framer has seen that it is of this stream
		if !ok {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		block, isLast = more.HeaderBlockFragment(), more.HeadersEnded()
	}
	if err := c.decode.Close(); err != nil {
		return http2.ConnectionError(http2.ErrCodeCompression)
	}
	return c.call(id, end)
}

// call begins a call whose headers are in fields, or ends its request with them.
func (c *conn) call(id uint32, end bool) error {
	if id%2 == 0 {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	begun := &Call{conn: c, id: id, since: c.server.now(), window: defaultWindow}
	begun.changed.L = &c.mu
	isUsual := !end && begun.isUsual(c.fields)
	c.mu.Lock()
	call, isLast := c.calls[id], c.isLast
	tooMany := max(len(c.calls), c.running) >= int(c.server.cfg.MaxConcurrentStreams) // reset ones run on for a while
	isNew := id > c.lastID
	begun.passed = c.isSmall || !isUsual
	if isNew && !isLast {
		c.lastID = id
		if !tooMany { // at once: a connection that has no calls may end now
			begun.begin(c.initial)
		}
	}
	c.mu.Unlock()
	switch {
	case call != nil && call.passed:
		return c.pass.headers(id, end, c.fields)
	case call != nil: // no client of gRPC sends trailers
		c.reset(id, http2.ErrCodeProtocol)
		return nil
	case !isNew:
		return http2.ConnectionError(http2.ErrCodeStreamClosed)
	case isLast || tooMany:
		c.reset(id, http2.ErrCodeRefusedStream)
		return nil
	case !begun.passed:
		return nil
	}
	if c.pass == nil {
		if err := c.startPass(); err != nil {
			return err
		}
	}
	return c.pass.headers(id, end, c.fields)
}

// isUsual reports whether a call is one that is served here, and takes what is needed of its headers.
func (c *Call) isUsual(fields []hpack.HeaderField) bool {
	isPost, isGRPC, timeout := false, false, ""
	s := c.conn.server
	if !isOrdered(fields) {
		return false
	}
	for i := range fields {
		f := &fields[i]
		switch f.Name {
		case ":scheme", ":authority":
		case ":method":
			isPost = f.Value == "POST"
		case ":path":
			c.handler = s.cfg.Methods[f.Value]
			if c.handler == nil {
				return false
			}
		case "content-type":
			isGRPC = f.Value == "application/grpc" || f.Value == "application/grpc+proto"
		case "grpc-encoding":
			if f.Value != "identity" {
				return false
			}
		case "grpc-timeout":
			timeout = f.Value
		case "connection", "host", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "content-length":
			return false // unusual
		case "te":
			if f.Value != "trailers" {
				return false
			}
		case s.cfg.Keep[0]:
			if c.kept[0] == "" {
				c.kept[0] = f.Value
			}
		case s.cfg.Keep[1]:
			if c.kept[1] == "" {
				c.kept[1] = f.Value
			}
		default:
			if !isName(f.Name) || !httpguts.ValidHeaderFieldValue(f.Value) {
				return false
			}
		}
	}
	if !isPost || !isGRPC || c.handler == nil {
		return false
	}
	if timeout != "" {
		d, ok := parseTimeout(timeout)
		if !ok || d <= 0 {
			return false
		}
		c.patience = min(d, 100*365*24*time.Hour)
	}
	return true
}

// isOrdered reports whether each of the four headers of a request that begin with a colon is there, once, before all others.
func isOrdered(fields []hpack.HeaderField) bool {
	seen := [4]bool{}
	for i := range fields {
		n := slices.Index(pseudo[:], fields[i].Name)
		if (i < len(pseudo)) != (n >= 0) || n >= 0 && seen[n] {
			return false
		}
		if n >= 0 {
			seen[n] = true
		}
	}
	return len(fields) >= len(pseudo)
}

var pseudo = [4]string{":method", ":scheme", ":path", ":authority"}

// isName reports whether a header's name is as HTTP/2 wants it; others are left to the other server to judge.
func isName(name string) bool {
	for i := range len(name) {
		if b := name[i]; b <= ' ' || b >= 'A' && b <= 'Z' || b >= 0x7f || b == ':' {
			return false
		}
	}
	return name != ""
}
