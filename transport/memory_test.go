package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
)

func memoryPair(t testing.TB, n *MemoryNetwork) (dialed, accepted net.Conn) {
	t.Helper()
	l, err := n.Listen("b")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if dialed, err = n.Dial(t.Context(), "a", "b"); err != nil {
		t.Fatal(err)
	}
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return dialed, accepted
}

// TestMemoryConnIsAConn runs the Go project's own tests of what a net.Conn must do.
func TestMemoryConnIsAConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		c1, c2 = memoryPair(t, NewMemoryNetwork())
		return c1, c2, func() { _, _ = c1.Close(), c2.Close() }, nil
	})
}

func readAll(t *testing.T, c net.Conn, n int) {
	t.Helper()
	if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

func TestMemoryPartitionIsDirected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemoryNetwork()
		a, b := memoryPair(t, n)
		n.Partition("a", "b")
		if _, err := a.Write([]byte("late")); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Write([]byte("back")); err != nil {
			t.Fatal(err)
		}
		readAll(t, a, 4)
		_ = b.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := b.Read(make([]byte, 4)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("read over a partition: %v", err)
		}
		_ = b.SetReadDeadline(time.Time{})
		start := time.Now()
		time.AfterFunc(time.Second, func() { n.Heal("a", "b") })
		readAll(t, b, 4)
		if d := time.Since(start); d != time.Second {
			t.Fatalf("read after %v", d)
		}
	})
}

func TestMemoryCloseWaitsForPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemoryNetwork()
		a, b := memoryPair(t, n)
		n.Isolate("a")
		_ = a.Close()
		if _, err := b.Write([]byte("x")); err != nil {
			t.Fatalf("write to a peer whose close is not known: %v", err)
		}
		time.AfterFunc(time.Second, func() { n.Rejoin("a") })
		if _, err := b.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("read: %v", err)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Fatalf("write after the peer's close: %v", err)
		}
	})
}

func TestMemoryDelayKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemoryNetwork()
		a, b := memoryPair(t, n)
		start := time.Now()
		n.Delay("a", "b", 3*time.Second)
		_, _ = a.Write([]byte("1"))
		n.Delay("a", "b", time.Second)
		_, _ = a.Write([]byte("2"))
		_ = a.Close()
		got, err := io.ReadAll(b)
		if err != nil || string(got) != "12" || time.Since(start) != 3*time.Second {
			t.Fatalf("%q, %v after %v", got, err, time.Since(start))
		}
	})
}

func TestMemoryWindowBlocksWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := memoryPair(t, NewMemoryNetwork())
		_ = a.SetWriteDeadline(time.Now().Add(time.Second))
		k, err := a.Write(make([]byte, 2*memoryWindow))
		if !errors.Is(err, os.ErrDeadlineExceeded) || k != memoryWindow {
			t.Fatalf("%d bytes, %v", k, err)
		}
	})
}

func TestMemoryDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewMemoryNetwork()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := n.Dial(ctx, "a", "b"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("without a listener: %v", err)
		}
		l, err := n.Listen("b")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Listen("b"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatalf("second listener: %v", err)
		}
		n.Refuse("a", "b", true)
		if _, err := n.Dial(ctx, "a", "b"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("refused: %v", err)
		}
		n.Refuse("a", "b", false)
		n.Partition("b", "a") // the answer to the dial is lost
		time.AfterFunc(time.Second, func() { n.Heal("b", "a") })
		start := time.Now()
		c, err := n.Dial(ctx, "a", "b")
		if err != nil || time.Since(start) != time.Second {
			t.Fatalf("dial over a partition that heals: %v after %v", err, time.Since(start))
		}
		n.Isolate("b")
		if _, err := n.Dial(ctx, "a", "b"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("dial over a partition that does not heal: %v", err)
		}
		n.Drop("b", "a")
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("read on a dropped connection: %v", err)
		}
		_ = l.Close()
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("accept after close: %v", err)
		}
	})
}
