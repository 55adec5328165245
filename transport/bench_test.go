package transport

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// countWrites counts the writes, and so about the system calls, of a transport's connections.
func countWrites(n *atomic.Int64) func(*Config) {
	return func(c *Config) {
		dial := c.Dial
		c.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := dial(ctx, addr)
			return countedConn{conn, n}, err
		}
		c.Listener = countedListener{c.Listener, n}
	}
}

type countedListener struct {
	net.Listener
	n *atomic.Int64
}

func (l countedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return countedConn{conn, l.n}, err
}

type countedConn struct {
	net.Conn
	n *atomic.Int64
}

func (c countedConn) Write(b []byte) (int, error) {
	c.n.Add(1)
	return c.Conn.Write(b)
}

// BenchmarkCalls measures small calls from 100 concurrent callers over TCP loopback.
func BenchmarkCalls(b *testing.B) {
	for _, callers := range []int{1, 100} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			tn := newTestNet(b, false)
			counter := &atomic.Int64{}
			from, to := tn.start("a", countWrites(counter)), tn.start("b", countWrites(counter))
			to.Handle("echo", echo)
			payload := make([]byte, 256)
			if _, err := from.Call(b.Context(), "b", "echo", payload); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			counter.Store(0)
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if _, err := from.Call(b.Context(), "b", "echo", payload); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
			b.ReportMetric(float64(counter.Load())/float64(b.N), "writes/call")
		})
	}
}

// BenchmarkAppendEntries measures the codec with 64 entries of 1 KiB, and with none.
func BenchmarkAppendEntries(b *testing.B) {
	for _, n := range []int{0, 64} {
		req := entries(7, 1000, n, 1024)
		req.RPCHeader = raft.RPCHeader{ProtocolVersion: 3, ID: []byte("node-1/1"), Addr: []byte("node-1/1")}
		encoded := appendRequest(nil, req)
		b.Run(fmt.Sprintf("encode/entries=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(encoded)))
			for b.Loop() {
				putFrame(appendRequest(newFrame(), req))
			}
		})
		b.Run(fmt.Sprintf("decode/entries=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(encoded)))
			for b.Loop() {
				if _, err := decodeRequest(typeAppendEntries, encoded); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkFrames measures reading frames of 64 KiB, checksum and all.
func BenchmarkFrames(b *testing.B) {
	stream := bytes.Repeat(appendFrame(nil, kindCall, 1, make([]byte, 64<<10)), 16)
	b.SetBytes(int64(len(stream)))
	b.ReportAllocs()
	for b.Loop() {
		fr := newFrameReader(bytes.NewReader(stream), 1<<20)
		for range 16 {
			if _, err := fr.next(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkHeartbeat measures a heartbeat's round trip over TCP loopback.
func BenchmarkHeartbeat(b *testing.B) {
	tn := newTestNet(b, false)
	a, c := tn.start("a", nil), tn.start("b", nil)
	ga, err := a.Group(1, "a/1", noInstall)
	if err != nil {
		b.Fatal(err)
	}
	gb, err := c.Group(1, "b/1", noInstall)
	if err != nil {
		b.Fatal(err)
	}
	serve(gb, succeed)
	req, resp := heartbeat(1), new(raft.AppendEntriesResponse)
	b.ReportAllocs()
	for b.Loop() {
		if err := ga.AppendEntries("b/1", "b/1", req, resp); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAcked measures what a quorum reader pays.
func BenchmarkAcked(b *testing.B) {
	tn := newTestNet(b, true)
	g, err := tn.start("a", nil).Group(1, "a/1", noInstall)
	if err != nil {
		b.Fatal(err)
	}
	g.record("b/1", time.Now(), heartbeat(1), &raft.AppendEntriesResponse{Term: 1, Success: true})
	b.ReportAllocs()
	for b.Loop() {
		if g.Acked("b/1", 1).IsZero() {
			b.Fatal("nothing acknowledged")
		}
	}
}
