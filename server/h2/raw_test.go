package h2

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/protobuf/proto"
)

// raw is a client that may do anything.
type raw struct {
	*http2.Framer
	t     testing.TB
	conn  net.Conn
	block bytes.Buffer
	enc   *hpack.Encoder
}

func (r *rig) raw(t testing.TB, settings ...http2.Setting) *raw {
	t.Helper()
	c, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	w := &raw{Framer: http2.NewFramer(c, c), t: t, conn: c}
	w.AllowIllegalWrites = true
	w.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	w.enc = hpack.NewEncoder(&w.block)
	w.bytes([]byte(http2.ClientPreface))
	w.do(w.WriteSettings(settings...))
	return w
}

// do ignores errors of writing: the server may have ended the connection, which reading will tell.
func (w *raw) do(error) {}

func (w *raw) bytes(b []byte) { _, err := w.conn.Write(b); w.do(err) }

func (w *raw) fields(headers ...string) []byte {
	w.block.Reset()
	for i := 0; i < len(headers); i += 2 {
		if err := w.enc.WriteField(hpack.HeaderField{Name: headers[i], Value: headers[i+1]}); err != nil {
			w.t.Fatal(err)
		}
	}
	return bytes.Clone(w.block.Bytes())
}

var usual = []string{":method", "POST", ":scheme", "http", ":path", testpb.TestService_UnaryCall_FullMethodName,
	":authority", "x", "content-type", "application/grpc", "te", "trailers"}

func (w *raw) headers(id uint32, more ...string) {
	w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: w.fields(append(usual[:len(usual):len(usual)], more...)...)}))
}

// message is a request with n bytes, as it is on the wire.
func message(n int) []byte {
	b, err := proto.Marshal(&testpb.SimpleRequest{Payload: &testpb.Payload{Body: make([]byte, n)}})
	if err != nil {
		panic(err)
	}
	return append([]byte{0, byte(len(b) >> 24), byte(len(b) >> 16), byte(len(b) >> 8), byte(len(b))}, b...)
}

// outcome reads until stream id or the connection ends, and says how: "ok", "status N", "reset CODE", "goaway CODE" or
// "closed". Answers' data is counted.
func (w *raw) outcome(id uint32) (how string, data int) {
	for {
		f, err := w.ReadFrame()
		if err != nil {
			if how == "" {
				how = "closed"
			}
			return how, data
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if f.StreamID != id || !f.StreamEnded() {
				continue
			}
			for _, h := range f.RegularFields() {
				if h.Name == "grpc-status" && h.Value != "0" {
					return "status " + h.Value, data
				}
			}
			return "ok", data
		case *http2.DataFrame:
			if f.StreamID == id {
				data += len(f.Data())
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				return "reset " + f.ErrCode.String(), data
			}
		case *http2.GoAwayFrame:
			how = "goaway " + f.ErrCode.String()
		}
	}
}

// Whatever a client does wrong ends its connection or its call, as RFC 9113 says, and nothing else.
func TestWrongClients(t *testing.T) {
	r := newRig(t, echo, func(c *Config) { c.MaxHeaderBytes = 4 << 10; c.MaxMessageBytes = 1 << 20 })
	for name, test := range map[string]struct {
		do   func(*raw)
		want string
	}{
		"a good call":  {func(w *raw) { w.headers(1); w.do(w.WriteData(1, true, message(10))) }, "ok"},
		"padding":      {func(w *raw) { w.headers(1); w.do(w.WriteDataPadded(1, true, message(10), make([]byte, 200))) }, "ok"},
		"small pieces": {func(w *raw) { w.headers(1); w.pieces(1, message(10)) }, "ok"},
		"headers in pieces": {func(w *raw) {
			b := w.fields(usual...)
			w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:3]}))
			w.do(w.WriteContinuation(1, false, b[3:9]))
			w.do(w.WriteContinuation(1, true, b[9:]))
			w.do(w.WriteData(1, true, message(10)))
		}, "ok"},
		"an unknown frame": {func(w *raw) {
			w.do(w.WriteRawFrame(77, 3, 9, []byte("?")))
			w.headers(1)
			w.do(w.WriteData(1, true, message(10)))
		}, "ok"},
		"a compressed message": {func(w *raw) {
			w.headers(1)
			b := message(10)
			b[0] = 1
			w.do(w.WriteData(1, true, b))
		}, "status 13"},
		"no message":           {func(w *raw) { w.headers(1); w.do(w.WriteData(1, true, nil)) }, "status 13"},
		"half a message":       {func(w *raw) { w.headers(1); w.do(w.WriteData(1, true, message(10)[:9])) }, "status 13"},
		"half a prefix":        {func(w *raw) { w.headers(1); w.do(w.WriteData(1, true, []byte{0, 0})) }, "status 13"},
		"two messages":         {func(w *raw) { w.headers(1); w.do(w.WriteData(1, true, append(message(10), message(10)...))) }, "status 13"},
		"not a message":        {func(w *raw) { w.headers(1); w.do(w.WriteData(1, true, []byte{0, 0, 0, 0, 1, 0xff})) }, "status 2"},
		"a huge message":       {func(w *raw) { w.headers(1); w.do(w.WriteData(1, false, []byte{0, 0xff, 0xff, 0xff, 0xff})) }, "status 8"},
		"more than it may":     {func(w *raw) { w.headers(1); w.flood(1, 1<<16, message(60 << 10)[:5]) }, "reset FLOW_CONTROL_ERROR"},
		"another method":       {func(w *raw) { w.call(1, ":path", "/no/such") }, "status 12"},
		"no POST":              {func(w *raw) { w.call(1, ":method", "GET") }, "status 13"},
		"not gRPC":             {func(w *raw) { w.call(1, "content-type", "text/plain") }, "status 3"},
		"a strange timeout":    {func(w *raw) { w.call(1, "grpc-timeout", "soon") }, "status 13"},
		"data of no stream":    {func(w *raw) { w.do(w.WriteData(0, true, nil)) }, "goaway PROTOCOL_ERROR"},
		"data of a later call": {func(w *raw) { w.do(w.WriteData(5, true, nil)) }, "goaway PROTOCOL_ERROR"},
		"reset of a later call": {func(w *raw) { // the C library of gRPC does that
			w.do(w.WriteRSTStream(1, http2.ErrCodeCancel))
			w.do(w.WriteWindowUpdate(1, 1))
			w.headers(1)
			w.do(w.WriteData(1, true, message(1)))
		}, "ok"},
		"an even number": {func(w *raw) { w.headers(2) }, "goaway PROTOCOL_ERROR"},
		"an old number":  {func(w *raw) { w.headers(3); w.do(w.WriteRSTStream(3, 0)); w.headers(1) }, "goaway STREAM_CLOSED"},
		"trailers":       {func(w *raw) { w.headers(1); w.headers(1) }, "reset PROTOCOL_ERROR"},
		"data after the end": {func(w *raw) {
			w.headers(1, "grpc-timeout", "9S")
			w.do(w.WriteData(1, false, nil))
			w.bytes(append(frames1(true, message(3<<10)), frames1(true, nil)...))
		}, ""},
		"a huge window":           {func(w *raw) { w.do(w.WriteWindowUpdate(0, 1<<31-1)) }, "goaway FLOW_CONTROL_ERROR"},
		"a call's huge window":    {func(w *raw) { w.headers(1); w.do(w.WriteWindowUpdate(1, 1<<31-1)) }, "reset FLOW_CONTROL_ERROR"},
		"no window":               {func(w *raw) { w.do(w.WriteWindowUpdate(0, 0)) }, "goaway PROTOCOL_ERROR"},
		"a call's missing window": {func(w *raw) { w.headers(1); w.do(w.WriteWindowUpdate(1, 0)) }, "reset PROTOCOL_ERROR"},
		"settings of no sense":    {func(w *raw) { w.do(w.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1})) }, "goaway PROTOCOL_ERROR"},
		"a push":                  {func(w *raw) { w.do(w.WriteRawFrame(http2.FramePushPromise, 4, 1, make([]byte, 8))) }, "goaway PROTOCOL_ERROR"},
		"a large frame":           {func(w *raw) { w.do(w.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 20<<10))) }, "goaway FRAME_SIZE_ERROR"},
		"headers of no sense": {func(w *raw) {
			w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: []byte{0xff, 0xff, 0xff}}))
		}, "goaway COMPRESSION_ERROR"},
		"large headers": {func(w *raw) { w.headers(1, "x", strings.Repeat("y", 5<<10)) }, "goaway ENHANCE_YOUR_CALM"},
		"large headers in a few bytes": {func(w *raw) {
			b := w.fields(append(usual[:len(usual):len(usual)], "x", strings.Repeat("y", 2<<10))...)
			w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: append(b, bytes.Repeat([]byte{0x80 | 62}, 500)...)}))
		}, "goaway ENHANCE_YOUR_CALM"},
		"headers without an end": {func(w *raw) {
			w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.fields(usual...)}))
			for range 100 {
				w.do(w.WriteContinuation(1, false, nil))
			}
		}, "goaway ENHANCE_YOUR_CALM"},
		"others between headers": {func(w *raw) {
			w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.fields(usual...)}))
			w.do(w.WritePing(false, [8]byte{}))
		}, "goaway PROTOCOL_ERROR"},
		"too many pings": {func(w *raw) {
			for range 5 {
				w.do(w.WritePing(false, [8]byte{}))
			}
		}, "goaway ENHANCE_YOUR_CALM"},
	} {
		t.Run(name, func(t *testing.T) {
			w := r.raw(t)
			test.do(w)
			if got, _ := w.outcome(1); got != test.want && test.want != "" {
				t.Errorf("%s, want %s", got, test.want)
			}
		})
	}
	c, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: a.very.long.one.example\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Fatal(err)
	}
	if _, err := r.client(t).UnaryCall(t.Context(), &testpb.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
}

// call makes a call with a header that replaces the usual one.
func (w *raw) call(id uint32, name, value string) {
	headers := append([]string(nil), usual...)
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == name {
			headers[i+1], name = value, ""
		}
	}
	if name != "" {
		headers = append(headers, name, value)
	}
	w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: w.fields(headers...)}))
	w.do(w.WriteData(id, true, message(1)))
}

func (w *raw) pieces(id uint32, b []byte) {
	for i := range b {
		w.do(w.WriteData(id, i == len(b)-1, b[i:i+1]))
	}
}

// flood sends n bytes that begin with b.
func (w *raw) flood(id uint32, n int, b []byte) {
	all := append(bytes.Clone(b), make([]byte, n-len(b))...)
	for len(all) > 0 {
		part := all[:min(len(all), 16<<10)]
		w.do(w.WriteData(id, false, part))
		all = all[len(part):]
	}
}

// frames1 is a frame of data of stream 1.
func frames1(end bool, data []byte) []byte {
	var flags http2.Flags
	if end {
		flags = http2.FlagDataEndStream
	}
	return append(appendFrameHeader(nil, len(data), http2.FrameData, flags, 1), data...)
}

// Answers keep to the client's windows, large and small ones, whenever they change.
func TestClientWindows(t *testing.T) {
	r := newRig(t, echo, nil)
	for _, passed := range []bool{false, true} {
		w := r.raw(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		w.headers(1)
		if passed {
			w.headers(3, "host", "x")
			w.do(w.WriteRSTStream(1, http2.ErrCodeCancel))
		}
		id := map[bool]uint32{false: 1, true: 3}[passed]
		b := message(30 << 10)
		w.do(w.WriteData(id, false, b[:16<<10]))
		w.do(w.WriteData(id, true, b[16<<10:]))
		got, allowed := 0, 10
		for got < len(b) {
			f, err := w.ReadFrame()
			if err != nil {
				t.Fatalf("passed %t, after %d of %d bytes, %d allowed: %v", passed, got, len(b), allowed, err)
			}
			d, ok := f.(*http2.DataFrame)
			if !ok {
				continue
			}
			if got += len(d.Data()); got > allowed {
				t.Fatalf("passed %t: %d bytes, %d allowed", passed, got, allowed)
			}
			if got == allowed {
				if allowed == 10 { // all calls' windows grow
					w.do(w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000}))
					allowed = 1000
				} else {
					w.do(w.WriteWindowUpdate(id, 9000))
					allowed += 9000
				}
			}
		}
		if how, _ := w.outcome(id); how != "ok" {
			t.Fatal(how)
		}
		// The connection's window: 65535 at first.
		w.do(w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}))
		b = message(50 << 10)
		w.headers(5)
		for rest := b; len(rest) > 0; {
			part := rest[:min(len(rest), 16<<10)]
			rest = rest[len(part):]
			w.do(w.WriteData(5, len(rest) == 0, part))
		}
		for total := got; total < 65535; {
			f, err := w.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if d, ok := f.(*http2.DataFrame); ok {
				total += len(d.Data())
				if total > 65535 {
					t.Fatalf("%d bytes in a window of 65535", total)
				}
			}
		}
		w.do(w.WriteWindowUpdate(0, 1<<20))
		if how, _ := w.outcome(5); how != "ok" {
			t.Fatal(how)
		}
	}
}

// Calls that are reset at once do not run in numbers without bound, nor calls that are not.
func TestCallsAreBounded(t *testing.T) {
	var running, most atomic.Int32
	release := make(chan struct{})
	r := newRig(t, func(_ *Call, _, reply []byte) ([]byte, func(), error) {
		if n := running.Add(1); n > most.Load() {
			most.Store(n)
		}
		<-release
		running.Add(-1)
		return reply, nil, nil
	}, func(c *Config) { c.MaxConcurrentStreams = 10 })
	w := r.raw(t)
	for id := uint32(1); id < 401; id += 2 {
		w.headers(id)
		w.do(w.WriteData(id, true, message(1)))
		w.do(w.WriteRSTStream(id, http2.ErrCodeCancel))
	}
	w.headers(401)
	if how, _ := w.outcome(401); how != "reset REFUSED_STREAM" {
		t.Error(how)
	}
	close(release)
	for running.Load() != 0 {
		time.Sleep(time.Millisecond)
	}
	if n := most.Load(); n > 10 {
		t.Errorf("%d handlers at a time", n)
	}
}

// Requests that do not arrive end, and clients that are gone are found out.
func TestSlowClients(t *testing.T) {
	r := newRig(t, echo, func(c *Config) {
		c.ReceiveTimeout, c.IdleTimeout, c.AnswerTimeout = 50*time.Millisecond, 400*time.Millisecond, 200*time.Millisecond
	})
	w := r.raw(t)
	w.headers(1)
	w.headers(3)
	w.do(w.WriteData(3, false, message(100)[:50]))
	if how, _ := w.outcome(3); how != "status 1" {
		t.Errorf("a request that does not arrive: %s", how)
	}
	for r.slow.Load() != 2 {
		time.Sleep(time.Millisecond)
	}
	for {
		f, err := w.ReadFrame()
		if err != nil {
			t.Fatalf("before being asked: %v", err)
		}
		if p, ok := f.(*http2.PingFrame); ok {
			w.do(w.WritePing(true, p.Data)) // alive, for once
			break
		}
	}
	if how, _ := w.outcome(99); how != "closed" {
		t.Errorf("a client that does not answer: %s", how)
	}
	r = newRig(t, echo, func(c *Config) { c.HandshakeTimeout = 100 * time.Millisecond })
	c, err := net.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil { // what the server says first, and the end
		t.Fatal(err)
	}
}

// A client with a small table for headers is served by the other server, which has the table.
func TestSmallHeaderTable(t *testing.T) {
	r := newRig(t, echo, nil)
	w := r.raw(t, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
	w.ReadMetaHeaders = hpack.NewDecoder(0, nil)
	for id := uint32(1); id < 9; id += 2 {
		w.call(id, "x", "y")
		if how, _ := w.outcome(id); how != "ok" {
			t.Fatal(how)
		}
	}
	if n := r.other.unary.Load(); n != 4 {
		t.Fatalf("%d calls were passed on", n)
	}
}

// FuzzFrames: no client ends the server, and none keeps others from being served.
func FuzzFrames(f *testing.F) {
	r := newRig(f, echo, func(c *Config) { c.ReceiveTimeout = 100 * time.Millisecond })
	var b bytes.Buffer
	w := &raw{Framer: http2.NewFramer(&b, nil), t: f}
	w.enc = hpack.NewEncoder(&w.block)
	w.headers(1)
	w.do(w.WriteData(1, true, message(10)))
	w.headers(3, "grpc-encoding", "gzip")
	w.do(w.WriteData(3, true, message(10)))
	w.do(w.WriteWindowUpdate(3, 10))
	w.do(w.WriteRSTStream(3, 1))
	w.do(w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 3}))
	w.do(w.WritePing(false, [8]byte{}))
	f.Add(b.Bytes())
	f.Add(frames1(true, nil))
	client := r.client(f)
	f.Fuzz(func(t *testing.T, frames []byte) {
		w := r.raw(t)
		w.bytes(frames)
		w.do(w.WriteGoAway(0, 0, nil))
		_ = w.conn.(*net.TCPConn).CloseWrite()
		if _, err := io.Copy(io.Discard, w.conn); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Fatal(err)
		}
		if _, err := client.UnaryCall(t.Context(), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
	})
}
