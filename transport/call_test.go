package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestCalls(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		a, b := net.start("a", nil), net.start("b", nil)
		b.Handle("echo", echo)
		b.Handle("who", func(_ context.Context, from Peer, _ []byte) ([]byte, error) {
			return fmt.Appendf(nil, "%s in %x", from.Node, from.ClusterID), nil
		})
		b.Handle("refuse", func(context.Context, Peer, []byte) ([]byte, error) {
			return nil, fmt.Errorf("wrapped: %w", &RemoteError{Code: 42, Message: "no"})
		})
		b.Handle("break", func(context.Context, Peer, []byte) ([]byte, error) { return nil, ErrUnreachable })
		ctx := t.Context()
		for _, size := range []int{0, 1, 1000, fragmentBytes, 5*fragmentBytes + 3} {
			in := bytes.Repeat([]byte{byte(size)}, size)
			if out, err := a.Call(ctx, "b", "echo", in); err != nil || !bytes.Equal(in, out) {
				t.Fatalf("echo of %d bytes: %d bytes, %v", size, len(out), err)
			}
		}
		if out, err := a.Call(ctx, "b", "who", nil); err != nil || string(out) != "a in c1" {
			t.Errorf("who: %q, %v", out, err)
		}
		var remote *RemoteError
		if _, err := a.Call(ctx, "b", "refuse", nil); !errors.As(err, &remote) || remote.Code != 42 || remote.Message != "no" {
			t.Errorf("refuse: %v", err)
		}
		// A handler's own failure must never look like a definite one of the transport.
		if _, err := a.Call(ctx, "b", "break", nil); !errors.As(err, &remote) || remote.Code != 0 || errors.Is(err, ErrUnreachable) {
			t.Errorf("break: %v", err)
		}
		if _, err := a.Call(ctx, "b", "unknown", nil); !errors.Is(err, ErrNoHandler) {
			t.Errorf("unknown method: %v", err)
		}
		if _, err := a.Call(ctx, "c", "echo", nil); !errors.Is(err, ErrUnreachable) {
			t.Errorf("unknown node: %v", err)
		}
	})
}

func TestConcurrentCalls(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		a, b := net.start("a", nil), net.start("b", nil)
		a.Handle("echo", echo)
		b.Handle("echo", echo)
		var wg sync.WaitGroup
		for i := range 20 {
			for from, to := range map[*Transport]string{a: "b", b: "a"} {
				wg.Go(func() {
					for j := range 20 {
						size := 10
						if j == 10 {
							size = fragmentBytes / 6 // of about 8 bytes each
						}
						in := bytes.Repeat(fmt.Appendf(nil, "%s %d %d.", to, i, j), size)
						if out, err := from.Call(t.Context(), to, "echo", in); err != nil || !bytes.Equal(in, out) {
							t.Errorf("to %s: %v", to, err)
							return
						}
					}
				})
			}
		}
		wg.Wait()
	})
}

// held is a handler that reports when it starts, and ends with its context or when released.
type held struct {
	started chan struct{}
	ended   chan error
	release chan struct{}
}

func newHeld() *held {
	return &held{make(chan struct{}, 100), make(chan error, 100), make(chan struct{})}
}

func (h *held) handle(ctx context.Context, _ Peer, _ []byte) ([]byte, error) {
	h.started <- struct{}{}
	select {
	case <-ctx.Done():
		h.ended <- ctx.Err()
		return nil, ctx.Err()
	case <-h.release:
		return []byte("released"), nil
	}
}

// calling starts a call and waits until its handler runs.
func (h *held) calling(ctx context.Context, t *Transport, node string) <-chan error {
	result := make(chan error, 1)
	go func() {
		_, err := t.Call(ctx, node, "held", nil)
		result <- err
	}()
	<-h.started
	return result
}

func TestCancelledCallEndsItsHandler(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		a, b, h := net.start("a", nil), net.start("b", nil), newHeld()
		b.Handle("held", h.handle)
		ctx, cancel := context.WithCancel(t.Context())
		result := h.calling(ctx, a, "b")
		cancel()
		if err := <-h.ended; err != context.Canceled {
			t.Errorf("the handler's context: %v", err)
		}
		if err := <-result; err != context.Canceled {
			t.Errorf("the call: %v", err)
		}
	})
}

func TestDeadlineTravels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a, b, h := net.start("a", nil), net.start("b", nil), newHeld()
		b.Handle("held", h.handle)
		// The handler hears of the deadline only by what was sent along: nothing gets through any more.
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		result := h.calling(ctx, a, "b")
		net.memory.Partition("a", "b")
		net.memory.Partition("b", "a") // nor does the handler's word, which is as late as the caller's own deadline
		if err := <-h.ended; err != context.DeadlineExceeded || time.Since(start) != 3*time.Second {
			t.Errorf("the handler's context: %v after %v", err, time.Since(start))
		}
		if err := <-result; err != context.DeadlineExceeded {
			t.Errorf("the call: %v", err)
		}
	})
}

func TestBrokenConnectionEndsHandlersAndCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a, b, h := net.start("a", nil), net.start("b", nil), newHeld()
		b.Handle("held", h.handle)
		result := h.calling(t.Context(), a, "b")
		net.memory.Drop("a", "b")
		if err := <-h.ended; err != context.Canceled {
			t.Errorf("the handler's context: %v", err)
		}
		if err := <-result; !errors.Is(err, ErrConnectionLost) || errors.Is(err, ErrUnreachable) {
			t.Errorf("the call: %v", err)
		}
	})
}

func TestBusyIsDefinite(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		a := net.start("a", nil)
		b := net.start("b", func(c *Config) { c.MaxConcurrentCalls = 2 })
		h := newHeld()
		b.Handle("held", h.handle)
		first, second := h.calling(t.Context(), a, "b"), h.calling(t.Context(), a, "b")
		if _, err := a.Call(t.Context(), "b", "held", nil); !errors.Is(err, ErrBusy) {
			t.Errorf("third call: %v", err)
		}
		if len(h.started) != 0 {
			t.Error("the handler saw a call that was answered busy")
		}
		close(h.release)
		if err := errors.Join(<-first, <-second); err != nil {
			t.Error(err)
		}
		eventually(t, "room for another call", func() bool {
			_, err := a.Call(t.Context(), "b", "held", nil)
			return err == nil
		})
	})
}

func TestBusyByBytes(t *testing.T) {
	net := newTestNet(t, true)
	a := net.start("a", nil)
	b := net.start("b", func(c *Config) { c.MaxCallBytes = 1000 })
	b.Handle("echo", echo)
	if _, err := a.Call(t.Context(), "b", "echo", make([]byte, 1000)); !errors.Is(err, ErrBusy) {
		t.Errorf("over the bound: %v", err)
	}
	for range 3 {
		if _, err := a.Call(t.Context(), "b", "echo", make([]byte, 900)); err != nil {
			t.Errorf("within the bound: %v", err)
		}
		eventually(t, "the handler's end", func() bool { return b.payload.Load() == 0 && b.running.Load() == 0 })
	}
}

// outcomes counts how calls ended.
type outcomes struct {
	ok, unreachable, lost, handledButLost, wrong atomic.Int64
}

// callOverBreaks cuts the connection while calls stream over it, again and again, and checks every
// ErrUnreachable against what the handler has seen.
func callOverBreaks(t *testing.T, planted faults) *outcomes {
	r := seeded(t)
	net := newTestNet(t, true)
	hasty := func(c *Config) { c.RetryMin, c.RetryMax = time.Millisecond, time.Millisecond }
	a, b := net.start("a", hasty), net.start("b", nil)
	a.faults = planted
	var seen sync.Map
	b.Handle("note", func(_ context.Context, _ Peer, payload []byte) ([]byte, error) {
		seen.Store(string(payload[:20]), true)
		return nil, nil
	})
	var o outcomes
	var wg sync.WaitGroup
	for i := range 50 {
		size := 20 + r.IntN(1000)
		if i%10 == 0 {
			size = fragmentBytes + 100
		}
		wg.Go(func() {
			for j := range 100 {
				payload := make([]byte, size)
				copy(payload, fmt.Sprintf("%20d", i*1000+j))
				_, err := a.Call(t.Context(), "b", "note", payload)
				time.Sleep(5 * time.Millisecond) // what is on its way arrives
				_, handled := seen.Load(string(payload[:20]))
				o.count(err, handled)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	net.memory.Delay("a", "b", time.Millisecond)
	net.memory.Delay("b", "a", 2*time.Millisecond)
	for {
		select {
		case <-done:
			t.Logf("ok %d, unreachable %d, lost %d, of which handled %d", o.ok.Load(), o.unreachable.Load(), o.lost.Load(), o.handledButLost.Load())
			return &o
		case <-time.After(time.Duration(r.IntN(20)) * time.Millisecond):
			net.memory.Drop("a", "b")
		}
	}
}

func (o *outcomes) count(err error, handled bool) {
	switch {
	case err == nil && handled:
		o.ok.Add(1)
	case errors.Is(err, ErrUnreachable) && !handled:
		o.unreachable.Add(1)
	case errors.Is(err, ErrConnectionLost) && !errors.Is(err, ErrUnreachable):
		o.lost.Add(1)
		if handled {
			o.handledButLost.Add(1)
		}
	default:
		o.wrong.Add(1)
	}
}

func TestUnreachableMeansNotHandled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := callOverBreaks(t, faults{})
		if n := o.wrong.Load(); n != 0 {
			t.Errorf("%d calls ended in a wrong way", n)
		}
		if o.ok.Load() == 0 || o.unreachable.Load() == 0 || o.handledButLost.Load() == 0 {
			t.Error("the test did not meet all outcomes")
		}
	})
}

func TestWrongUnreachableIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if o := callOverBreaks(t, faults{lostIsUnreachable: true}); o.wrong.Load() == 0 {
			t.Error("the planted fault was not noticed")
		}
	})
}

// TestUnwrittenCallIsUnreachable: the queue is stuck behind a write that the peer does not take.
func TestUnwrittenCallIsUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a := net.start("a", nil)
		stuck := net.acceptAs(t, "b") // shakes hands and never reads again
		first := make(chan error, 1)
		go func() {
			_, err := a.Call(t.Context(), "b", "x", make([]byte, 2*memoryWindow))
			first <- err
		}()
		synctest.Wait()
		second := make(chan error, 1)
		go func() {
			_, err := a.Call(t.Context(), "b", "x", make([]byte, fragmentBytes+1))
			second <- err
		}()
		synctest.Wait()
		stuck.close()
		// Of the first call fragments were written, but never its last.
		for _, result := range []chan error{first, second} {
			if err := <-result; !errors.Is(err, ErrUnreachable) || errors.Is(err, ErrConnectionLost) {
				t.Error(err)
			}
		}
	})
}

func TestDeadPeerFailsFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a, b := net.start("a", nil), net.start("b", nil)
		b.Handle("echo", echo)
		net.memory.Isolate("b")
		start := time.Now()
		if _, err := a.Call(t.Context(), "b", "echo", nil); !errors.Is(err, ErrUnreachable) {
			t.Fatal(err)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("the first call failed after %v, the dial timeout is 1s", d)
		}
		start = time.Now()
		if _, err := a.Call(t.Context(), "b", "echo", nil); !errors.Is(err, ErrUnreachable) || time.Since(start) != 0 {
			t.Errorf("a call just after a failed attempt: %v after %v", err, time.Since(start))
		}
		net.memory.Rejoin("b")
		time.Sleep(time.Second) // the longest pause between attempts
		if _, err := a.Call(t.Context(), "b", "echo", nil); err != nil {
			t.Errorf("after the peer is back: %v", err)
		}
	})
}

func TestPeerThatComesBackIsDialedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a := net.start("a", func(c *Config) { c.RetryMin, c.RetryMax = time.Hour, time.Hour })
		a.Handle("echo", echo)
		net.addrs["b"] = "b"
		if _, err := a.Call(t.Context(), "b", "echo", nil); !errors.Is(err, ErrUnreachable) {
			t.Fatal(err)
		}
		b := net.start("b", nil)
		b.Handle("echo", echo)
		if _, err := a.Call(t.Context(), "b", "echo", nil); !errors.Is(err, ErrUnreachable) {
			t.Fatalf("within the pause: %v", err)
		}
		if _, err := b.Call(t.Context(), "a", "echo", nil); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Call(t.Context(), "b", "echo", nil); err != nil {
			t.Fatalf("after the peer has shown itself: %v", err)
		}
	})
}

func TestTooLargeIsRefusedBeforeItIsSent(t *testing.T) {
	net := newTestNet(t, true)
	small := func(c *Config) { c.MaxMessageBytes = 1 << 20 }
	a, b := net.start("a", small), net.start("b", small)
	b.Handle("echo", echo)
	b.Handle("huge", func(context.Context, Peer, []byte) ([]byte, error) { return make([]byte, 1<<20), nil })
	if _, err := a.Call(t.Context(), "b", "echo", make([]byte, 1<<20)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("large request: %v", err)
	}
	var remote *RemoteError
	if _, err := a.Call(t.Context(), "b", "huge", nil); !errors.As(err, &remote) || errors.Is(err, ErrTooLarge) {
		t.Errorf("large answer: %v", err)
	}
	if _, err := a.Call(t.Context(), "b", "echo", []byte("x")); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestFullQueueIsDefinite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a := net.start("a", func(c *Config) { c.QueueBytes = 1 << 20 })
		stuck := net.acceptAs(t, "b")
		defer stuck.close()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var full atomic.Int64
		for range 10 { // the window takes one, the write loop holds a part of one, the queue takes two
			wg.Go(func() {
				start := time.Now()
				_, err := a.Call(ctx, "b", "x", make([]byte, 1<<20))
				if errors.Is(err, ErrUnreachable) && strings.Contains(err.Error(), "full") {
					full.Add(1)
					if d := time.Since(start); d != 0 {
						t.Errorf("failed only after %v", d)
					}
				}
			})
			synctest.Wait()
		}
		cancel()
		wg.Wait()
		if n := full.Load(); n < 6 {
			t.Errorf("%d of 10 calls found the queue full", n)
		}
	})
}

func TestClusterMismatchIsRefusedOnBothEnds(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		in := func(cluster uint64) func(*Config) {
			return func(c *Config) {
				identity := c.Identity
				c.Identity = func() Peer { p := identity(); p.ClusterID = cluster; return p }
			}
		}
		a, b, none := net.start("a", in(1)), net.start("b", in(2)), net.start("none", in(0))
		for _, x := range []*Transport{a, b, none} {
			x.Handle("echo", echo)
			x.HandleAsk("echo", func(_ context.Context, from Peer, _ []byte) ([]byte, error) {
				return fmt.Appendf(nil, "%s %d", from.Node, from.ClusterID), nil
			})
		}
		for _, c := range []struct {
			from *Transport
			to   string
			want string
		}{
			{a, "b", "a is in cluster 0000000000000001, b is in cluster 0000000000000002"},
			{a, "none", "none is in no cluster yet"},
			{none, "a", "none is in no cluster yet"},
		} {
			_, err := c.from.Call(t.Context(), c.to, "echo", nil)
			if !errors.Is(err, ErrClusterMismatch) || !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("call to %s: %v", c.to, err)
			}
		}
		eventually(t, "the accepting end logs it", func() bool {
			return strings.Contains(net.logs.String(), `msg="handshake of an incoming peer connection failed" self=b`)
		})
		for from, want := range map[*Transport]string{a: "a 1", none: "none 0"} {
			addr, _ := net.resolve("b")
			if out, err := from.Ask(t.Context(), addr, "echo", nil); err != nil || string(out) != want {
				t.Errorf("ask: %q, %v, want %q", out, err, want)
			}
		}
	})
}

// TestDialerJudgesToo: a listener that welcomes everybody does not get a foreign node's messages.
func TestDialerJudgesToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a := net.start("a", nil)
		for name, c := range map[string]struct {
			reply helloReply
			want  error
		}{
			"foreign":  {helloReply{version: 1, from: Peer{Node: "foreign", ClusterID: 99}}, ErrClusterMismatch},
			"imposter": {helloReply{version: 1, from: Peer{Node: "somebody", ClusterID: testCluster}}, ErrWrongNode},
			"future":   {helloReply{version: 9, from: Peer{Node: "future", ClusterID: testCluster}}, ErrVersion},
			"old":      {helloReply{version: 1, verdict: verdictVersion, from: Peer{Node: "old"}, reason: "too new"}, ErrVersion},
		} {
			w := net.acceptWith(t, name, c.reply)
			if _, err := a.Call(t.Context(), name, "x", nil); !errors.Is(err, c.want) || !errors.Is(err, ErrUnreachable) {
				t.Errorf("%s: %v, want %v", name, err, c.want)
			}
			w.close()
		}
	})
}

func TestWrongNodeAtAnAddress(t *testing.T) {
	net := newTestNet(t, false)
	a, b := net.start("a", nil), net.start("b", nil)
	b.Handle("echo", echo)
	net.addrs["c"] = net.addrs["b"] // c has moved away, b listens there now
	if _, err := a.Call(t.Context(), "c", "echo", nil); !errors.Is(err, ErrWrongNode) || !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}

func TestAsk(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		a, b := net.start("a", nil), net.start("b", nil)
		b.HandleAsk("echo", echo)
		b.Handle("call only", echo)
		addr, _ := net.resolve("b")
		large := bytes.Repeat([]byte("x"), 3*fragmentBytes)
		if out, err := a.Ask(t.Context(), addr, "echo", large); err != nil || !bytes.Equal(out, large) {
			t.Errorf("%d bytes, %v", len(out), err)
		}
		if _, err := a.Ask(t.Context(), addr, "call only", nil); !errors.Is(err, ErrNoHandler) {
			t.Errorf("a Call's method: %v", err)
		}
		if _, err := a.Ask(t.Context(), addr, "echo", make([]byte, maxAskBytes)); !errors.Is(err, ErrTooLarge) {
			t.Errorf("too large: %v", err)
		}
		_ = b.Close()
		if _, err := a.Ask(t.Context(), addr, "echo", nil); !errors.Is(err, ErrUnreachable) {
			t.Errorf("nobody there: %v", err)
		}
	})
}

func TestAskIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		a, b, h := net.start("a", nil), net.start("b", nil), newHeld()
		b.HandleAsk("held", h.handle)
		start := time.Now()
		_, err := a.Ask(t.Context(), "b", "held", nil)
		// Both ends give up at the same moment: the handler's word may come first.
		var remote *RemoteError
		if !errors.Is(err, context.DeadlineExceeded) && !errors.As(err, &remote) || time.Since(start) != 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		if err := <-h.ended; err == nil {
			t.Error("the handler's context goes on")
		}
	})
}

func TestIdentitiesAreLearned(t *testing.T) {
	net := newTestNet(t, true)
	var mu sync.Mutex
	learned := map[string]string{}
	on := func(self string) func(*Config) {
		return func(c *Config) {
			c.OnPeer = func(p Peer) {
				mu.Lock()
				defer mu.Unlock()
				learned[self] = p.Node + " at " + p.PeerAddr
			}
		}
	}
	a, b := net.start("a", on("a")), net.start("b", on("b"))
	b.Handle("echo", echo)
	if _, err := a.Call(t.Context(), "b", "echo", nil); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if learned["a"] != "b at b" || learned["b"] != "a at a" {
		t.Errorf("learned: %v", learned)
	}
}

func TestClose(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		a, b, h := net.start("a", nil), net.start("b", nil), newHeld()
		b.Handle("held", h.handle)
		result := h.calling(t.Context(), a, "b")
		_ = b.Close()
		if err := <-h.ended; err != context.Canceled {
			t.Errorf("the handler's context: %v", err)
		}
		if err := <-result; !errors.Is(err, ErrConnectionLost) && !errors.As(err, new(*RemoteError)) {
			t.Errorf("a call to a node that closes: %v", err)
		}
		_ = a.Close()
		_ = a.Close()
		if _, err := a.Call(t.Context(), "b", "held", nil); !errors.Is(err, ErrUnreachable) {
			t.Errorf("a call after Close: %v", err)
		}
		if _, err := a.Ask(t.Context(), "b", "held", nil); !errors.Is(err, ErrClosed) {
			t.Errorf("an Ask after Close: %v", err)
		}
		if _, err := a.Group(1, "a/1", noInstall); !errors.Is(err, ErrClosed) {
			t.Errorf("a Group after Close: %v", err)
		}
	})
}
