package server

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (r *receipts) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.open)
}

// A request whose message does not arrive holds memory, and must end.
func TestUnfinishedRequestsEnd(t *testing.T) {
	n := startNode(t, nil)
	if _, err := put(t.Context(), n.Server); err != nil {
		t.Fatal(err)
	}
	conn := n.dial(t)
	var streams []grpc.ClientStream
	for _, method := range []string{"/etcdserverpb.KV/Compact", "/etcdserverpb.KV/RangeStream"} {
		s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	for n.receipts.count() != len(streams) {
		runtime.Gosched()
	}
	if !n.receipts.sweep(time.Now().Add(receiveTimeout - time.Minute)) {
		t.Fatal("given up too early")
	}
	if n.receipts.sweep(time.Now().Add(receiveTimeout)) {
		t.Fatal("still waiting")
	}
	for _, s := range streams {
		if err := s.RecvMsg(&pb.PutResponse{}); status.Code(err) != codes.Canceled {
			t.Fatal(err)
		}
	}
	// One whose message has arrived may take as long as it likes.
	stream, err := pb.NewMaintenanceClient(conn).Snapshot(t.Context(), &pb.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if n.receipts.sweep(time.Now().Add(receiveTimeout)) {
		t.Fatal("a request that has arrived counts as one that has not")
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if err != io.EOF {
		t.Fatal(err)
	}
}

// A slow body costs its client the connection.
func TestSlowBodiesEnd(t *testing.T) {
	served := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	web := httptest.NewServer(patient(served, 100, 50*time.Millisecond))
	defer web.Close()
	for name, test := range map[string]struct {
		body string
		want int
	}{
		"whole":   {"0123456789", http.StatusOK},
		"half":    {"01234", http.StatusRequestTimeout},
		"chunked": {"", http.StatusRequestTimeout},
		"large":   {strings.Repeat("x", 101), http.StatusRequestEntityTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", web.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			length := fmt.Sprintf("Content-Length: %d", max(len(test.body), 10))
			if test.body == "" {
				length = "Transfer-Encoding: chunked"
			}
			if _, err := fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s", length, test.body); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			if resp.StatusCode != test.want {
				t.Fatalf("status %d, want %d", resp.StatusCode, test.want)
			}
		})
	}
}

// Clients may not use up the files that this process may open.
func TestConnectionsAreBounded(t *testing.T) {
	n := startNode(t, func(c *Config) { c.MaxConnections = 1 })
	var conns [2]net.Conn
	for i := range conns {
		var err error
		if conns[i], err = net.Dial("tcp", n.address); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conns[i].Close() }()
		if i == 0 { // its settings come when it is served
			if _, err := io.ReadFull(conns[i], make([]byte, 9)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := conns[1].SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := conns[1].Read(make([]byte, 9)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a second connection is served: %v", err)
	}
	if err := errors.Join(conns[0].Close(), conns[1].SetReadDeadline(time.Time{})); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conns[1], make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
}
