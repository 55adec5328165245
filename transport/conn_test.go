package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// TestMalformedFrameClosesWithReason: each of these ends the connection, and the log says why.
func TestMalformedFrameClosesWithReason(t *testing.T) {
	badCRC := appendFrame(nil, kindCall, 1, []byte("payload"))
	badCRC[headerBytes] ^= 1
	tooLong := appendFrame(nil, kindCall, 1, nil)
	binary.LittleEndian.PutUint32(tooLong, maxFrameBytes+1)
	raftMessage := func(t messageType, body []byte) []byte {
		b := appendUint(append(appendString(appendUint(nil, 1), "b/1"), byte(t)), 1e9)
		return appendFrame(nil, kindRaftRequest, 1, append(b, body...))
	}
	for name, c := range map[string]struct {
		bytes  []byte
		reason string
	}{
		"checksum":      {badCRC, "malformed frame: checksum"},
		"length":        {tooLong, "malformed frame: length"},
		"unknown kind":  {appendFrame(nil, 200, 1, nil), "malformed frame: kind 200"},
		"hello again":   {appendFrame(nil, kindHello, 1, nil), "malformed frame: kind 1"},
		"stream data":   {appendFrame(nil, kindStreamData, 1, nil), "malformed frame: kind"},
		"call":          {appendFrame(nil, kindCall, 1, nil), "malformed frame: call"},
		"raft envelope": {appendFrame(nil, kindRaftRequest, 1, []byte{1}), "malformed frame: raft message"},
		"raft message":  {raftMessage(typeAppendEntries, []byte{1}), "malformed frame: message ends"},
		"configuration": {raftMessage(typeAppendEntries, appendRequest(nil, &raft.AppendEntriesRequest{
			Entries: []*raft.Log{{Index: 7, Type: raft.LogConfiguration, Data: []byte("garbage")}}})), "entry 7: malformed frame: configuration: failed to decode"},
		"raft type":           {raftMessage(77, nil), "malformed frame: unknown raft message type"},
		"snapshot without it": {raftMessage(typeInstallSnapshot, nil), "malformed frame: raft message"},
	} {
		synctest.Test(t, func(t *testing.T) {
			net := newTestNet(t, true)
			net.start("b", nil).Handle("echo", echo)
			w := net.dialAs(t, "a", "b", purposePeer)
			if _, err := w.Write(c.bytes); err != nil {
				t.Fatal(err)
			}
			if _, err := w.frames.next(); err == nil {
				t.Errorf("%s: answered instead of closed", name)
			}
			synctest.Wait()
			if !strings.Contains(net.logs.String(), `reason="`+c.reason) {
				t.Errorf("%s: the log does not say %q", name, c.reason)
			}
		})
	}
}

// TestGarbageInsteadOfHello: strangers are turned away, logged, and cost little.
func TestGarbageInsteadOfHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		net.start("b", nil)
		for _, garbage := range [][]byte{
			[]byte("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
			appendFrame(nil, kindHello, 0, []byte("not the magic")),
			appendFrame(nil, kindHello, 0, make([]byte, maxHelloBytes+1)),
			appendFrame(nil, kindCall, 0, nil),
			nil, // says nothing at all
		} {
			c, err := net.memory.Dial(t.Context(), "a", "b")
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write(garbage)
			start := time.Now()
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("%q: %v", garbage[:min(len(garbage), 10)], err)
			}
			if d := time.Since(start); d > 2*time.Second {
				t.Errorf("%q: turned away after %v", garbage[:min(len(garbage), 10)], d)
			}
			_ = c.Close()
		}
		if n := strings.Count(net.logs.String(), "handshake of an incoming peer connection failed"); n != 5 {
			t.Errorf("%d log lines for 5 strangers", n)
		}
	})
}

func TestTooManyConnectionsAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		net.start("b", func(c *Config) { c.MaxInbound = 2 })
		net.addrs["a1"], net.addrs["a2"] = "a1", "a2"
		first := net.dialAs(t, "a1", "b", purposePeer)
		net.dialAs(t, "a2", "b", purposePeer)
		c, err := net.memory.Dial(t.Context(), "a3", "b")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("third connection: %v", err)
		}
		_ = first.Close()
		synctest.Wait()
		net.dialAs(t, "a3", "b", purposePeer)
	})
}

// ended reports whether the other end of a connection has been closed; if not, it is silent.
func ended(w *wire) bool {
	_ = w.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := io.Copy(io.Discard, w)
	return err == nil
}

// TestStrangersMakeRoom: the oldest of them, for others of their host, and for anybody when all is full.
func TestStrangersMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		b := net.start("b", func(c *Config) { c.MaxInbound = 100 })
		b.Handle("echo", echo)
		a := net.start("a", nil)
		call := func(what string) {
			t.Helper()
			if _, err := a.Call(t.Context(), "b", "echo", nil); err != nil {
				t.Errorf("a call %s: %v", what, err)
			}
		}
		call("before")
		begin := time.Now()
		var first *wire
		for i := range 2 * maxGuests {
			// An Ask needs no common cluster.
			w := net.dialAs(t, "stranger", "b", purposeAsk)
			if i == 0 {
				first = w
			}
		}
		synctest.Wait()
		if !ended(first) {
			t.Error("the oldest stranger keeps its place")
		}
		if n := len(b.door.visitors); n != maxGuests+1 {
			t.Errorf("%d connections are open", n)
		}
		for i := range 100 {
			c, err := net.memory.Dial(t.Context(), fmt.Sprintf("host%d", i), "b")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
		}
		synctest.Wait()
		if n := len(b.door.visitors); n != 100 {
			t.Errorf("%d connections are open", n)
		}
		call("among strangers")
		net.start("c", nil)
		late := net.dialAs(t, "c", "b", purposePeer)
		synctest.Wait()
		if ended(late) {
			t.Error("a node found no room")
		}
		if n := strings.Count(net.logs.String(), "connected to peer"); n != 1 || time.Since(begin) > time.Second {
			t.Errorf("connected %d times, after %v", n, time.Since(begin))
		}
	})
}

// TestOneNodesConnectionsAreBounded: the newest are those that it uses.
func TestOneNodesConnectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		b := net.start("b", nil)
		net.addrs["a"], net.addrs["c"] = "a", "c"
		other := net.dialAs(t, "c", "b", purposePeer)
		var open []*wire
		for range maxPerNode + 2 {
			open = append(open, net.dialAs(t, "a", "b", purposePeer))
		}
		synctest.Wait()
		for i, w := range open {
			if gone := ended(w); gone != (i < 2) {
				t.Errorf("connection %d: closed is %v", i, gone)
			}
		}
		if ended(other) {
			t.Error("another node's connection was closed")
		}
		for _, w := range append(open, other) {
			_ = w.Close()
		}
		synctest.Wait()
		if n := len(b.door.visitors); n != 0 {
			t.Errorf("%d connections are on the books", n)
		}
	})
}

// TestSilentPeerIsGivenUp: the peer keeps the connection open but says nothing, as a stopped process does.
func TestSilentPeerIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a := net.start("a", nil)
		stopped := net.acceptAs(t, "b")
		start := time.Now()
		if _, err := a.Call(t.Context(), "b", "x", nil); !errors.Is(err, ErrConnectionLost) || !errors.Is(err, errSilent) {
			t.Errorf("%v", err)
		}
		if d := time.Since(start); d != 5*time.Second {
			t.Errorf("given up after %v", d)
		}
		w := <-stopped.conns
		m, err := w.frames.next()
		if err != nil || m.kind != kindCall {
			t.Errorf("first came kind %d, %v", m.kind, err)
		}
		if m, err = w.frames.next(); err != nil || m.kind != kindPing {
			t.Errorf("then came kind %d, %v, want a ping", m.kind, err)
		}
		_ = w.Close()
	})
}

// TestIdleConnectionLives: pings keep it, and a slow handler does not end it.
func TestIdleConnectionLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a, b, h := net.start("a", nil), net.start("b", nil), newHeld()
		b.Handle("held", h.handle)
		result := h.calling(t.Context(), a, "b")
		time.Sleep(time.Hour)
		close(h.release)
		if err := <-result; err != nil {
			t.Error(err)
		}
		if n := strings.Count(net.logs.String(), "connected to peer"); n != 1 {
			t.Errorf("connected %d times", n)
		}
	})
}

// TestPartitionedHandlersEnd: the accepting end notices a partition as well.
func TestPartitionedHandlersEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a, b, h := net.start("a", nil), net.start("b", nil), newHeld()
		b.Handle("held", h.handle)
		result := h.calling(t.Context(), a, "b")
		start := time.Now()
		net.memory.Partition("a", "b")
		if err := <-h.ended; err == nil || time.Since(start) > 5*time.Second {
			t.Errorf("the handler's context: %v after %v", err, time.Since(start))
		}
		if err := <-result; !errors.Is(err, ErrConnectionLost) && !errors.As(err, new(*RemoteError)) {
			t.Errorf("the call: %v", err)
		}
	})
}

// TestPeerThatStopsReading: senders fail or wait within bounds, and memory stays bounded.
func TestPeerThatStopsReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a := net.start("a", func(c *Config) { c.QueueBytes = 2 << 20 })
		stuck := net.acceptAs(t, "b")
		defer stuck.close()
		g, err := a.Group(1, "a/1", noInstall)
		if err != nil {
			t.Fatal(err)
		}
		req := &raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 1, Entries: []*raft.Log{{Index: 2, Data: make([]byte, 1<<20)}}}
		results := make(chan error, 20)
		start := time.Now()
		for range cap(results) {
			go func() { results <- g.AppendEntries("b/1", "b/1", req, new(raft.AppendEntriesResponse)) }()
		}
		synctest.Wait()
		c := a.links["b"].conn
		c.mu.Lock()
		if c.queued > 4<<20 {
			t.Errorf("%d bytes are queued", c.queued)
		}
		c.mu.Unlock()
		for range cap(results) {
			if err := <-results; err == nil || time.Since(start) > 10*time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
		}
	})
}

// TestRepliesToAPeerThatStopsReading: it sends calls but never reads their answers.
func TestRepliesToAPeerThatStopsReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		b := net.start("b", func(c *Config) { c.QueueBytes = 1 << 20 })
		b.Handle("large", func(_ context.Context, _ Peer, _ []byte) ([]byte, error) { return make([]byte, 1<<20), nil })
		w := net.dialAs(t, "a", "b", purposePeer)
		start := time.Now()
		for id := range uint64(50) {
			body := appendUint(appendString(nil, "large"), 0)
			if _, err := w.Write(appendFrame(nil, kindCall, id+1, body)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		for c := range b.conns {
			c.mu.Lock()
			if c.queued > 3<<20 {
				t.Errorf("%d bytes of answers are queued", c.queued)
			}
			c.mu.Unlock()
		}
		if n := b.running.Load(); n < 40 {
			t.Errorf("%d handlers wait for room", n)
		}
		// It is pinging all the time, so only the write that does not move can end it.
		for b.running.Load() > 0 {
			_, _ = w.Write(appendFrame(nil, kindPong, 0, nil))
			time.Sleep(time.Second)
		}
		if d := time.Since(start); d > 7*time.Second {
			t.Errorf("the handlers ended after %v", d)
		}
	})
}

// TestPingFloodIsBounded: pings whose pongs are never read end the connection.
func TestPingFloodIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		b := net.start("b", nil)
		w := net.dialAs(t, "a", "b", purposePeer)
		pings := bytes.Repeat(appendFrame(nil, kindPing, 1, nil), 10_000)
		_ = w.SetWriteDeadline(time.Now().Add(time.Minute))
		sent := 0
		for {
			if _, err := w.Write(pings); err != nil {
				break
			}
			if sent += len(pings); sent > 64<<20 {
				t.Fatal("the connection took 64 MiB of pings")
			}
		}
		synctest.Wait()
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.conns) != 0 {
			t.Error("the connection lives")
		}
	})
}

// written takes all that is queued on a connection without a writer: one line per write, and in it the
// frames as id:flags.
func written(t *testing.T, c *conn) (lines []string) {
	for {
		out := c.take(nil)
		if len(out) == 0 {
			return lines
		}
		var line []string
		for len(out) > 0 {
			n := int(binary.LittleEndian.Uint32(out)) + prefixBytes
			line = append(line, fmt.Sprintf("%d:%d", binary.LittleEndian.Uint64(out[10:]), out[9]))
			out = out[n:]
		}
		lines = append(lines, strings.Join(line, " "))
	}
}

// idleConn is a connection without its goroutines.
func idleConn(t *testing.T) *conn {
	net := newTestNet(t, true)
	tr := net.start("a", nil)
	w := newWire(nil, 1<<30)
	w.traffic = tr.metrics.traffic("b")
	return newConn(tr, w, hello{purpose: purposePeer}, true)
}

func (c *conn) put(t *testing.T, l lane, id, group uint64, size int) {
	t.Helper()
	frame := append(newFrame(), make([]byte, size)...)
	if err := c.submit(outgoing{lane: l, kind: kindRaftRequest, id: id, group: group, frame: frame}, nil); err != nil {
		t.Fatal(err)
	}
}

func TestSmallMessagesOvertakeLargeOnes(t *testing.T) {
	c := idleConn(t)
	c.put(t, laneSmall, 1, 0, 3*fragmentBytes)
	for id := uint64(2); id < 5; id++ {
		c.put(t, laneSmall, id, 0, 10)
	}
	c.put(t, laneControl, 5, 0, 10)
	got := strings.Join(written(t, c), "\n")
	want := "5:3 2:3 3:3 4:3 1:1\n1:0\n1:2" // all that is queued in one write, then the rest of the large one
	if got != want {
		t.Errorf("written:\n%s\nwant:\n%s", got, want)
	}
	if c.queued != 0 {
		t.Errorf("%d bytes remain on the books", c.queued)
	}
}

func TestGroupKeepsItsOrder(t *testing.T) {
	c := idleConn(t)
	c.put(t, laneSmall, 1, 7, 2*fragmentBytes)
	c.put(t, laneSmall, 2, 7, 10)               // the same group: behind the large one
	c.put(t, laneSmall, 3, 8, 10)               // another group: at once
	c.put(t, laneSmall, 4, 7, fragmentBytes+10) // the same group
	c.put(t, laneSmall, 5, 7, 20)
	got := strings.Join(written(t, c), "\n")
	want := "3:3 1:1\n1:2\n2:3\n4:1\n4:2\n5:3"
	if got != want {
		t.Errorf("written:\n%s\nwant:\n%s", got, want)
	}
	c.put(t, laneSmall, 6, 7, 10)
	if len(c.bulk) != 0 || len(c.ordered) != 0 || c.queued != 10+headerBytes {
		t.Errorf("after the large ones have left: %d bulk, %d ordered, %d bytes", len(c.bulk), len(c.ordered), c.queued)
	}
}

// A large message does not overtake small ones of its group that wait behind those of others.
func TestGroupKeepsItsOrderBehindOthers(t *testing.T) {
	c := idleConn(t)
	for id := uint64(1); id <= 3; id++ {
		c.put(t, laneSmall, id, 8, fragmentBytes-100)
	}
	c.put(t, laneSmall, 4, 7, 1000)
	c.put(t, laneSmall, 5, 7, fragmentBytes+10)
	c.put(t, laneSmall, 6, 8, fragmentBytes-100)
	got := strings.Join(written(t, c), "\n")
	if strings.Index(got, "4:3") > strings.Index(got, "5:1") {
		t.Errorf("written:\n%s\nthe large message of the group goes before the small one", got)
	}
}

func TestOneWriteTakesWhatIsQueued(t *testing.T) {
	c := idleConn(t)
	for id := range uint64(1000) {
		c.put(t, laneSmall, id, 0, 100)
	}
	if lines := written(t, c); len(lines) != 1 {
		t.Errorf("%d writes for 1000 small messages", len(lines))
	}
}

// TestUnfinishedMessagesAreBounded: together, not only each; and what they took is given back.
func TestUnfinishedMessagesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		const limit = 8 << 20
		b := net.start("b", func(c *Config) { c.MaxMessageBytes, c.MaxPartialBytes = limit, limit })
		b.Handle("echo", echo)
		body := append(appendUint(appendString(nil, "echo"), 0), make([]byte, 3<<20)...)
		fragments := func(w *wire, from, to int) (err error) {
			for off := from; off < to && err == nil; off += fragmentBytes {
				flags, end := uint8(0), min(off+fragmentBytes, len(body))
				if off == 0 {
					flags |= flagFirst
				}
				if end == len(body) {
					flags |= flagLast
				}
				_, err = w.Write(appendFragment(nil, kindCall, flags, 1, len(body), body[off:end]))
			}
			synctest.Wait()
			return err
		}
		half := len(body) / 2
		var open []*wire
		for i := range 3 {
			w := net.dialAs(t, fmt.Sprintf("a%d", i), "b", purposePeer)
			open = append(open, w)
			_ = fragments(w, 0, half)
		}
		if !strings.Contains(net.logs.String(), `reason="`+errPartialBytes.Error()) {
			t.Error("nothing was closed for it")
		}
		if used := b.partial.used.Load(); used == 0 || used > limit {
			t.Errorf("%d bytes are on the books", used)
		}
		small := net.dialAs(t, "small", "b", purposePeer)
		if _, err := small.Write(appendFrame(nil, kindCall, 9, appendUint(appendString(nil, "echo"), 0))); err != nil {
			t.Error(err)
		}
		if m, err := small.frames.next(); err != nil || m.id != 9 {
			t.Errorf("a small call beside it: %v", err)
		}
		// The first ends its message, with others between its fragments; the second breaks off.
		between := append(appendUint(appendString(nil, "echo"), 0), make([]byte, 1<<20)...)
		for id := range uint64(4) {
			if _, err := open[0].Write(appendFrame(nil, kindCall, 2+id, between)); err != nil {
				t.Error(err)
			}
			if m, err := open[0].frames.next(); err != nil || m.id != 2+id {
				t.Errorf("answer %d instead of %d: %v", m.id, 2+id, err)
			}
		}
		done := (half + fragmentBytes - 1) / fragmentBytes * fragmentBytes
		if err := fragments(open[0], done, len(body)); err != nil {
			t.Error(err)
		}
		if m, err := open[0].frames.next(); err != nil || m.id != 1 {
			t.Errorf("answer %d instead of 1: %v", m.id, err)
		}
		_ = open[1].Close()
		synctest.Wait()
		if used := b.partial.used.Load(); used != 0 {
			t.Errorf("%d bytes stay on the books", used)
		}
	})
}

// TestMalformedMessageReturnsItsBytes: also when the message before it is what was unfinished.
func TestMalformedMessageReturnsItsBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		b := net.start("b", nil)
		w := net.dialAs(t, "a", "b", purposePeer)
		_, err := w.Write(appendFragment(nil, kindCall, flagFirst, 1, 2<<20, make([]byte, 1<<20)))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if b.partial.used.Load() == 0 {
			t.Error("nothing is on the books")
		}
		if _, err := w.Write(appendFrame(nil, kindHello, 2, nil)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if used := b.partial.used.Load(); used != 0 {
			t.Errorf("%d bytes stay on the books", used)
		}
	})
}
