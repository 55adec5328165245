package h2

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding/gzip"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// A burst of calls with large headers that are passed on waits for the other server; it does not end the connection.
func TestBurstIsPassedOn(t *testing.T) {
	r := newRig(t, echo, nil)
	client := r.client(t)
	var wg sync.WaitGroup
	var failed atomic.Int32
	for range 3000 {
		token := make([]byte, 500)
		_, _ = rand.Read(token)
		ctx := metadata.AppendToOutgoingContext(t.Context(), "token", hex.EncodeToString(token))
		wg.Go(func() {
			if _, err := client.UnaryCall(ctx, &testpb.SimpleRequest{}, grpc.UseCompressor(gzip.Name)); err != nil && failed.Add(1) == 1 {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// A client whose window is shut, so that the other server cannot answer, may not send it frames without bound.
func TestPassedFramesAreBounded(t *testing.T) {
	for _, name := range []string{"data", "windows"} {
		t.Run(name, func(t *testing.T) {
			held := make(chan struct{})
			r := newRig(t, echo, func(c *Config) {
				c.Dial = func() (net.Conn, error) { // it reads nothing more
					ours, theirs := net.Pipe()
					go func() { <-held; _ = theirs.Close() }()
					return ours, nil
				}
			})
			defer close(held)
			w := r.raw(t)
			w.headers(1, "grpc-encoding", "gzip")
			var sent atomic.Int64
			go func() {
				var some bytes.Buffer
				f := http2.NewFramer(&some, nil)
				for range 1000 {
					if name == "data" {
						w.do(f.WriteData(1, false, []byte{1}))
					} else {
						w.do(f.WriteWindowUpdate(1, 1))
					}
				}
				for range 1000 { // less than the connection's window
					n, err := w.conn.Write(some.Bytes())
					if sent.Add(int64(n)); err != nil {
						return
					}
				}
			}()
			for before := int64(-1); before != sent.Load(); time.Sleep(100 * time.Millisecond) { // until the system's buffers are full
				before = sent.Load()
			}
			var queued int
			r.mu.Lock()
			for c := range r.conns {
				c.mu.Lock()
				p := c.pass
				c.mu.Unlock()
				p.mu.Lock()
				queued = len(p.queue)*int(segmentBytes) + p.queued
				p.mu.Unlock()
			}
			r.mu.Unlock()
			if queued > 4*maxPassBytes {
				t.Errorf("%d bytes wait", queued)
			}
			_ = w.conn.Close()
		})
	}
}

// Answers that wait for their clients take no more memory than they may, and answers of other clients that need not
// wait do not fail.
func TestStalledAnswersAreBounded(t *testing.T) {
	const size, calls = 20 << 10, 100
	r := newRig(t, echo, func(c *Config) { c.MaxStalledBytes = 10 * (size + stalledBytes + 100) })
	for _, window := range []uint32{0, 100} { // without a byte of the answer, and after some
		w := r.raw(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
		w.do(w.WriteWindowUpdate(0, 1<<20))
		outcomes := make(map[string]int)
		for id := uint32(1); id < 2*calls; id += 2 {
			w.headers(id)
			b := message(size)
			w.do(w.WriteData(id, false, b[:16<<10]))
			w.do(w.WriteData(id, true, b[16<<10:]))
		}
		for n := 0; n < calls-10; {
			how := ""
			f, err := w.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			switch f := f.(type) {
			case *http2.MetaHeadersFrame:
				if f.StreamEnded() {
					how = f.RegularFields()[1].Value
				}
			case *http2.RSTStreamFrame:
				how = f.ErrCode.String()
			}
			if how != "" {
				outcomes[how]++
				n++
			}
		}
		want := map[uint32]string{0: "8", 100: "ENHANCE_YOUR_CALM"}[window]
		if outcomes[want] != calls-10 {
			t.Errorf("window %d: %v", window, outcomes)
		}
		if _, err := r.client(t).UnaryCall(t.Context(), &testpb.SimpleRequest{}); err != nil {
			t.Fatal(err)
		}
		w.do(w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}))
		for range 10 { // those that waited
			for {
				f, err := w.ReadFrame()
				if err != nil {
					t.Fatal(err)
				}
				if h, ok := f.(*http2.MetaHeadersFrame); ok && h.StreamEnded() {
					break
				}
			}
		}
	}
	for r.stalled.Load() != 0 {
		time.Sleep(time.Millisecond)
	}
}

// One frame of a client wakes only those of its answers that can use it, and none is forgotten.
func TestAnswersWakeInTurn(t *testing.T) {
	const calls = 500
	r := newRig(t, echo, nil)
	w := r.raw(t)
	b := message(1000)
	for id := uint32(1); id < 2*calls; id += 2 {
		w.headers(id)
		w.do(w.WriteData(id, true, b))
	}
	for r.stalled.Load() < (calls-67)*stalledBytes { // 65 answers fit into the window
		time.Sleep(time.Millisecond)
	}
	before := r.woken.Load()
	for range 500 {
		w.do(w.WriteWindowUpdate(0, 1))
	}
	for id := uint32(calls); id < 2*calls; id += 20 { // some are not waited for any more
		w.do(w.WriteRSTStream(id|1, http2.ErrCodeCancel))
	}
	w.do(w.WritePing(false, [8]byte{1}))
	for {
		f, err := w.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := f.(*http2.PingFrame); ok {
			break
		}
	}
	if n := r.woken.Load() - before; n > 3000 {
		t.Errorf("woken %d times", n)
	}
	w.do(w.WriteWindowUpdate(0, 1<<20))
	for r.stalled.Load() != 0 {
		time.Sleep(time.Millisecond)
	}
}

// A connection that ends in good order does not lose the last answer, although its client is still sending.
func TestLastAnswerArrives(t *testing.T) {
	began, release := make(chan struct{}), make(chan struct{})
	r := newRig(t, func(c *Call, frame, reply []byte) ([]byte, func(), error) {
		began <- struct{}{}
		<-release
		return echo(c, frame, reply)
	}, nil)
	w := r.raw(t)
	w.do(w.WriteWindowUpdate(0, 1<<20))
	w.do(w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}))
	w.headers(1)
	b := message(60 << 10)
	for rest := b; len(rest) > 0; {
		part := rest[:min(len(rest), 16<<10)]
		rest = rest[len(part):]
		w.do(w.WriteData(1, len(rest) == 0, part))
	}
	<-began
	var closing sync.WaitGroup
	closing.Go(func() { r.Close(t.Context()) })
	for isAsked := false; !isAsked; {
		f, err := w.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if p, ok := f.(*http2.PingFrame); ok {
			w.do(w.WritePing(true, p.Data))
			isAsked = true
		}
	}
	stop := make(chan struct{})
	var sending sync.WaitGroup
	flooded := make(chan struct{}, 20)
	var some bytes.Buffer
	f := http2.NewFramer(&some, nil)
	for range 10000 {
		w.do(f.WritePriority(1, http2.PriorityParam{}))
	}
	sending.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				w.bytes(some.Bytes())
				select {
				case flooded <- struct{}{}:
				default:
				}
			}
		}
	})
	for range 20 {
		<-flooded
	}
	close(release)
	got := 0
	for {
		f, err := w.ReadFrame()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Errorf("after %d bytes: %v", got, err) // ECONNRESET
			break
		}
		if d, ok := f.(*http2.DataFrame); ok {
			got += len(d.Data())
		}
	}
	close(stop)
	sending.Wait()
	_ = w.conn.Close()
	closing.Wait()
	if got != len(b) {
		t.Errorf("%d of %d bytes", got, len(b))
	}
}

// A connection that is to end does so with its last call, even if the client takes that back.
func TestLastCallIsReset(t *testing.T) {
	began := make(chan struct{})
	r := newRig(t, func(c *Call, _, reply []byte) ([]byte, func(), error) {
		began <- struct{}{}
		<-c.Done()
		return reply, nil, nil
	}, nil)
	w := r.raw(t)
	w.headers(1)
	w.do(w.WriteData(1, true, message(1)))
	<-began
	var closing sync.WaitGroup
	closing.Go(func() { r.Close(t.Context()) })
	for {
		f, err := w.ReadFrame()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *http2.PingFrame:
			w.do(w.WritePing(true, f.Data))
		case *http2.GoAwayFrame:
			if f.LastStreamID == 1 {
				w.do(w.WriteRSTStream(1, http2.ErrCodeCancel))
			}
		}
	}
	_ = w.conn.Close()
	closing.Wait()
}

// What is malformed about a call that would be served here is judged by the other server.
func TestMalformedHeaders(t *testing.T) {
	r := newRig(t, echo, nil)
	for name, change := range map[string]func([]string) []string{
		"a pseudo header twice":   func(h []string) []string { return append([]string{":path", h[5]}, h...) },
		"one after the others":    func(h []string) []string { return append(h[2:len(h):len(h)], h[:2]...) },
		"an unknown one":          func(h []string) []string { return append([]string{":x", "y"}, h...) },
		"one of answers":          func(h []string) []string { return append([]string{":status", "200"}, h...) },
		"a name in upper case":    func(h []string) []string { return append(h, "Name", "x") },
		"a name with a space":     func(h []string) []string { return append(h, "na me", "x") },
		"a value with a new line": func(h []string) []string { return append(h, "name", "x\ny") },
		"connection":              func(h []string) []string { return append(h, "connection", "close") },
	} {
		t.Run(name, func(t *testing.T) {
			w := r.raw(t)
			w.do(w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: w.fields(change(append([]string(nil), usual...))...)}))
			w.do(w.WriteData(1, true, message(1)))
			if how, _ := w.outcome(1); how == "ok" {
				t.Error("served")
			}
		})
	}
}

// Padding of frames that are passed on does not use up a stream's window.
func TestPaddingIsPassedOn(t *testing.T) {
	r := newRig(t, echo, nil)
	w := r.raw(t)
	w.headers(1, "host", "x") // the other server's
	window := 65535
	granted := make(chan int, 1000)
	go func() {
		defer close(granted)
		for {
			f, err := w.ReadFrame()
			if err != nil {
				return
			}
			switch f := f.(type) {
			case *http2.WindowUpdateFrame:
				if f.StreamID == 1 {
					granted <- int(f.Increment)
				}
			case *http2.MetaHeadersFrame:
				if f.StreamEnded() {
					return
				}
			}
		}
	}()
	b := message(3000)
	for i := 0; i < len(b); i += 4 {
		for window < 300 {
			n, ok := <-granted
			if !ok {
				t.Fatal("the connection has ended")
			}
			window += n
		}
		end := min(i+4, len(b))
		window -= end - i + 1 + 255
		w.do(w.WriteDataPadded(1, end == len(b), b[i:end], make([]byte, 255)))
	}
	for range granted {
	}
}

// Nothing that a client says in bulk makes it hold much memory, or keeps others from being served.
func TestFloods(t *testing.T) {
	r := newRig(t, echo, func(c *Config) { c.MaxConcurrentStreams = 100 })
	client := r.client(t)
	many := func(n int, add func(*raw, *http2.Framer)) func(*raw) []byte {
		return func(w *raw) []byte {
			var b bytes.Buffer
			f := http2.NewFramer(&b, nil)
			f.AllowIllegalWrites = true
			for range n {
				add(w, f)
			}
			return b.Bytes()
		}
	}
	next := uint32(1)
	call := func(w *raw, f *http2.Framer, end bool) {
		w.do(f.WriteHeaders(http2.HeadersFrameParam{StreamID: next, EndHeaders: true, EndStream: end, BlockFragment: w.fields(usual...)}))
		next += 2
	}
	for name, flood := range map[string]func(*raw) []byte{
		"settings": many(20000, func(w *raw, f *http2.Framer) {
			w.do(f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1}))
		}),
		"acknowledgments": many(20000, func(w *raw, f *http2.Framer) { w.do(f.WriteSettingsAck()) }),
		"priorities":      many(20000, func(w *raw, f *http2.Framer) { w.do(f.WritePriority(1, http2.PriorityParam{Weight: 3})) }),
		"windows":         many(20000, func(w *raw, f *http2.Framer) { w.do(f.WriteWindowUpdate(0, 1)) }),
		"unknown frames":  many(20000, func(w *raw, f *http2.Framer) { w.do(f.WriteRawFrame(99, 0, 0, nil)) }),
		"calls":           many(5000, func(w *raw, f *http2.Framer) { call(w, f, false) }),
		"ended calls":     many(5000, func(w *raw, f *http2.Framer) { call(w, f, true) }),
		"resets": many(5000, func(w *raw, f *http2.Framer) {
			call(w, f, false)
			w.do(f.WriteData(next-2, true, message(1)))
			w.do(f.WriteRSTStream(next-2, http2.ErrCodeCancel))
		}),
		"resets of what is passed on": many(5000, func(w *raw, f *http2.Framer) {
			call(w, f, true)
			w.do(f.WriteRSTStream(next-2, http2.ErrCodeCancel))
		}),
		"empty data": many(20000, func(w *raw, f *http2.Framer) {
			if next == 1 {
				call(w, f, false)
			}
			w.do(f.WriteData(1, false, nil))
		}),
		"wrong data": many(5000, func(w *raw, f *http2.Framer) {
			call(w, f, false)
			w.do(f.WriteData(next-2, true, nil))
			w.do(f.WriteData(next-2, true, message(1)))
		}),
	} {
		t.Run(name, func(t *testing.T) {
			next = 1
			w := r.raw(t)
			done := make(chan struct{})
			go func() { defer close(done); w.bytes(flood(w)) }() // nothing is read
			for range 20 {
				if _, err := client.UnaryCall(t.Context(), &testpb.SimpleRequest{}); err != nil {
					t.Fatal(err)
				}
			}
			r.mu.Lock()
			for c := range r.conns {
				c.mu.Lock()
				if len(c.out) > 2*maxOutBytes || len(c.calls) > 100 || c.running > 100 || c.line.Len() > 100 {
					t.Errorf("%d bytes wait, %d calls, %d of them run, %d in line", len(c.out), len(c.calls), c.running, c.line.Len())
				}
				c.mu.Unlock()
			}
			r.mu.Unlock()
			_ = w.conn.Close()
			<-done
		})
	}
}

// Answers go to the calls that they are for, whatever becomes of others: values have their own key and are told apart
// byte by byte, while calls are cancelled, time out and lose their connections.
func TestNoMixUps(t *testing.T) {
	g := seeded(t)
	var kept sync.Map // what handlers still hold after their calls have ended
	r := newRig(t, func(c *Call, frame, reply []byte) ([]byte, func(), error) {
		if b := frame[FrameBytes:]; len(b) > 40 { // as if it were in the log
			kept.Store(binary.BigEndian.Uint64(b[len(b)-8:]), frame)
		}
		select {
		case <-c.Done():
			if frame[len(frame)-1]&1 == 0 {
				return nil, nil, c.Err()
			}
		case <-time.After(time.Duration(frame[len(frame)-1]&7) * time.Millisecond):
		}
		return echo(c, frame, reply)
	}, nil)
	var wg sync.WaitGroup
	var answered atomic.Int64
	for range 6 {
		seed := g.Uint64()
		wg.Go(func() { r.mixUp(t, seed, &answered) })
	}
	wg.Wait()
	kept.Range(func(id, frame any) bool {
		b := frame.([]byte)[FrameBytes:]
		want := stamped(id.(uint64))
		if !bytes.HasSuffix(b, want) {
			t.Errorf("the request of call %x was overwritten", id)
		}
		return true
	})
	if answered.Load() < 50 {
		t.Errorf("only %d answers", answered.Load())
	}
}

// stamped is a body of 50 to 40,000 bytes that no other call has, with the call's number at its end.
func stamped(id uint64) []byte {
	n := 50
	if id%16 == 0 {
		n = int(id % 40000)
	}
	b := bytes.Repeat(binary.BigEndian.AppendUint64(nil, id), n/8+2)
	return b
}

func (r *rig) mixUp(t *testing.T, seed uint64, answered *atomic.Int64) {
	for life := range uint64(8) {
		c, err := net.Dial("tcp", r.address)
		if err != nil {
			t.Error(err)
			return
		}
		w := &raw{Framer: http2.NewFramer(c, c), t: t, conn: c}
		w.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		w.enc = hpack.NewEncoder(&w.block)
		w.bytes([]byte(http2.ClientPreface))
		w.do(w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(seed>>8%50000) + 1}))
		w.do(w.WriteWindowUpdate(0, 1<<30))
		var reading sync.WaitGroup
		reading.Go(func() { w.verify(t, seed+life, answered) })
		for i := range uint32(60) {
			id := 2*i + 1
			x := number(seed+life, id)
			var more []string
			if x%5 == 0 {
				more = []string{"grpc-timeout", fmt.Sprintf("%dm", x%7+1)}
			}
			w.headers(id, more...)
			b := request(x)
			for len(b) > 0 {
				part := b[:min(len(b), int(x%15000)+1000)]
				b = b[len(part):]
				w.do(w.WriteData(id, len(b) == 0, part))
			}
			if x%3 == 0 {
				w.do(w.WriteRSTStream(id, http2.ErrCodeCancel))
			} else {
				w.do(w.WriteWindowUpdate(id, 1<<20))
			}
		}
		if life%2 == 0 {
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		} else {
			time.Sleep(30 * time.Millisecond)
			_ = c.Close()
		}
		reading.Wait()
	}
}

// number is the one that call id of a connection puts into its request.
func number(conn uint64, id uint32) uint64 {
	return (conn*1000003+uint64(id))*0x9e3779b97f4a7c15 | 1<<63
}

func request(x uint64) []byte {
	b := message(0)
	body := stamped(x)
	m := append([]byte{0x1a}, binary.AppendUvarint(nil, uint64(len(body)+1+len(binary.AppendUvarint(nil, uint64(len(body))))))...)
	m = append(m, 0x12)
	m = append(binary.AppendUvarint(m, uint64(len(body))), body...)
	b = append(b[:1], binary.BigEndian.AppendUint32(nil, uint32(len(m)))...)
	return append(b, m...)
}

// verify reads answers: each must be that of its own request, whole, and once.
func (w *raw) verify(t *testing.T, conn uint64, answered *atomic.Int64) {
	got := make(map[uint32][]byte)
	ended := make(map[uint32]bool)
	for {
		f, err := w.ReadFrame()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("reading: %v", err)
			}
			return
		}
		id := f.Header().StreamID
		if id != 0 && ended[id] {
			t.Errorf("%v after the end of its call", f)
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			got[id] = append(got[id], f.Data()...)
		case *http2.RSTStreamFrame:
			ended[id] = true
		case *http2.GoAwayFrame:
			t.Errorf("%v %v", f, f.ErrCode)
		case *http2.MetaHeadersFrame:
			if !f.StreamEnded() {
				continue
			}
			ended[id] = true
			if f.RegularFields()[0].Name == "grpc-status" && f.RegularFields()[0].Value == "0" {
				answered.Add(1)
				// SimpleResponse's payload is field 1, the request's field 3.
				want := request(number(conn, id))
				want[FrameBytes] = 0x0a
				if !bytes.Equal(got[id], want) {
					t.Errorf("call %d has %d bytes that are not its own answer of %d", id, len(got[id]), len(want))
				}
			}
		}
	}
}

// Large messages that do not arrive are bounded and ended, also where the other server waits for them.
func TestLargeMessagesThatArePassedOnAreBounded(t *testing.T) {
	r := newRig(t, echo, func(c *Config) { c.MaxReceivingBytes, c.ReceiveTimeout = 1<<20, 200*time.Millisecond })
	w := r.raw(t)
	begin := func(id uint32) {
		w.headers(id, "host", "x") // the other server's
		w.do(w.WriteData(id, false, message(800 << 10)[:1000]))
	}
	begin(1)
	for { // until it may send the rest
		f, err := w.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if u, ok := f.(*http2.WindowUpdateFrame); ok && u.StreamID == 1 && u.Increment > 700<<10 {
			break
		}
	}
	begin(3)
	if how, _ := w.outcome(3); how != "reset ENHANCE_YOUR_CALM" {
		t.Error(how)
	}
	if how, _ := w.outcome(1); how != "reset CANCEL" || r.slow.Load() != 1 {
		t.Errorf("%s, %d slow requests", how, r.slow.Load())
	}
	stream, err := r.client(t).FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g := seeded(t)
	for range 5 {
		want := &testpb.StreamingOutputCallRequest{Payload: payload(g, 800<<10)}
		if err := stream.Send(want); err != nil {
			t.Fatal(err)
		}
		got, err := stream.Recv()
		if err != nil || !proto.Equal(got.Payload, want.Payload) {
			t.Fatalf("%v, %d bytes", err, len(got.GetPayload().GetBody()))
		}
		for r.receiving.Load() != 0 {
			time.Sleep(time.Millisecond)
		}
	}
}
