package h2

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
)

// rig is a Server in front of grpc-go, with a handler for UnaryCall.
type rig struct {
	*Server
	address string
	other   *other
	slow    atomic.Int32
}

// other is the service of grpc-go.
type other struct {
	testpb.UnimplementedTestServiceServer
	unary atomic.Int32
}

func (o *other) UnaryCall(_ context.Context, r *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	o.unary.Add(1)
	return &testpb.SimpleResponse{Payload: r.Payload}, nil
}

func (o *other) FullDuplexCall(stream testpb.TestService_FullDuplexCallServer) error {
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(&testpb.StreamingOutputCallResponse{Payload: r.Payload}); err != nil {
			return err
		}
	}
}

// echo answers a SimpleRequest with its payload.
func echo(_ *Call, frame, reply []byte) ([]byte, func(), error) {
	var r testpb.SimpleRequest
	if err := proto.Unmarshal(frame[FrameBytes:], &r); err != nil {
		return nil, nil, err
	}
	answer, err := proto.MarshalOptions{}.MarshalAppend(reply, &testpb.SimpleResponse{Payload: r.Payload})
	return answer, nil, err
}

func newRig(t testing.TB, h Handler, edit func(*Config)) *rig {
	t.Helper()
	r := &rig{other: &other{}}
	inner := bufconn.Listen(64 << 10)
	behind := grpc.NewServer(grpc.StaticStreamWindowSize(65535))
	testpb.RegisterTestServiceServer(behind, r.other)
	var serving sync.WaitGroup
	serving.Go(func() { _ = behind.Serve(inner) })
	cfg := Config{
		Methods: map[string]Handler{testpb.TestService_UnaryCall_FullMethodName: h},
		Keep:    [2]string{"first", "second"},
		Dial:    func() (net.Conn, error) { return inner.DialContext(context.Background()) },
		Slow:    func() { r.slow.Add(1) },
	}
	if edit != nil {
		edit(&cfg)
	}
	r.Server = New(cfg)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.address = l.Addr().String()
	serving.Go(func() {
		if err := r.Serve(l); !errors.Is(err, ErrClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		r.Close(ctx)
		behind.Stop()
		serving.Wait()
		if n := r.arriving.Load(); n != 0 {
			t.Errorf("%d requests still count as arriving", n)
		}
		if n := r.receiving.Load(); n != 0 {
			t.Errorf("%d bytes still count as arriving", n)
		}
	})
	return r
}

func (r *rig) client(t testing.TB) testpb.TestServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(r.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return testpb.NewTestServiceClient(conn)
}

func seeded(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

func payload(g *rand.Rand, n int) *testpb.Payload {
	b := make([]byte, min(n, 1021))
	for i := range b {
		b[i] = byte(g.Uint32())
	}
	for len(b) < n { // shifted blocks are seen to be
		b = append(b, b[:min(len(b), n-len(b))]...)
	}
	return &testpb.Payload{Body: b}
}

// All calls of a connection are answered, whichever server they are for and however large they are.
func TestCalls(t *testing.T) {
	r := newRig(t, echo, nil)
	client := r.client(t)
	seed := seeded(t).Uint64()
	sizes := []int{0, 1, 100, 16 << 10, 70 << 10, 300 << 10, 1 << 20}
	var wg sync.WaitGroup
	for i := range 12 {
		g := rand.New(rand.NewPCG(seed, uint64(i)))
		wg.Go(func() {
			for range 4 {
				p := payload(g, sizes[g.IntN(len(sizes))])
				var options []grpc.CallOption
				if i%6 == 0 {
					options = append(options, grpc.UseCompressor(gzip.Name))
				}
				got, err := client.UnaryCall(t.Context(), &testpb.SimpleRequest{Payload: p}, options...)
				if err != nil || !bytes.Equal(got.GetPayload().GetBody(), p.Body) {
					t.Errorf("%d bytes: %v", len(p.Body), err)
					return
				}
			}
		})
		if i%4 != 0 {
			continue
		}
		wg.Go(func() {
			g := rand.New(rand.NewPCG(seed, uint64(1000+i)))
			stream, err := client.FullDuplexCall(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			for range 4 {
				p := payload(g, sizes[g.IntN(len(sizes))])
				sent := make(chan error, 1)
				go func() { sent <- stream.Send(&testpb.StreamingOutputCallRequest{Payload: p}) }()
				got, err := stream.Recv()
				if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(got.GetPayload().GetBody(), p.Body) {
					t.Errorf("stream, %d bytes: %v", len(p.Body), err)
					return
				}
			}
			if err := stream.CloseSend(); err != nil {
				t.Error(err)
			}
			if _, err := stream.Recv(); err != io.EOF {
				t.Errorf("end of a stream: %v", err)
			}
		})
	}
	wg.Wait()
	if n := r.other.unary.Load(); n != 2*4 {
		t.Errorf("%d unary calls were passed on, not the 8 compressed ones", n)
	}
	if _, err := client.EmptyCall(t.Context(), &testpb.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a method that nobody has: %v", err)
	}
}

// Errors arrive whole, and so do the headers that handlers may see.
func TestErrorsAndHeaders(t *testing.T) {
	refusal, err := status.New(codes.FailedPrecondition, "100% näh\n").WithDetails(&errdetails.ErrorInfo{Reason: "WHY"})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, func(c *Call, _, reply []byte) ([]byte, func(), error) {
		switch c.Kept(0) + c.Kept(1) {
		case "ab":
			return reply, nil, nil
		case "":
			return nil, nil, errors.New("no headers")
		}
		return nil, nil, refusal.Err()
	}, nil)
	client := r.client(t)
	call := func(headers ...string) error {
		_, err := client.UnaryCall(metadata.AppendToOutgoingContext(t.Context(), headers...), &testpb.SimpleRequest{})
		return err
	}
	if err := call("first", "a", "first", "x", "second", "b", "third", "y"); err != nil {
		t.Fatal(err)
	}
	if got := status.Convert(call("first", "no")); !proto.Equal(got.Proto(), refusal.Proto()) {
		t.Fatalf("%v, want %v", got, refusal)
	}
	if got := status.Convert(call()); got.Code() != codes.Unknown || got.Message() != "no headers" {
		t.Fatal(got)
	}
}

// A call's context ends with its client's patience, with the server's, and with the call.
func TestContexts(t *testing.T) {
	type seen struct {
		err      error
		child    error
		deadline time.Time
		limited  bool
	}
	handled := make(chan seen, 1)
	began := make(chan *Call, 1)
	var limit atomic.Int64
	r := newRig(t, func(c *Call, _, _ []byte) ([]byte, func(), error) {
		s := seen{}
		if l := limit.Load(); l != 0 {
			s.limited = c.Limit(time.Duration(l))
		}
		s.deadline, _ = c.Deadline()
		child, cancel := context.WithCancel(c)
		defer cancel()
		began <- c
		<-child.Done()
		s.err, s.child = c.Err(), child.Err()
		<-c.Done()
		handled <- s
		return nil, nil, status.FromContextError(s.err).Err()
	}, nil)
	client := r.client(t)
	check := func(name string, want error, limited, deadline bool) {
		t.Helper()
		s := <-handled
		if s.err != want || s.child != want || s.limited != limited || s.deadline.IsZero() == deadline {
			t.Errorf("%s: %+v", name, s)
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-began; cancel() }()
	if _, err := client.UnaryCall(ctx, &testpb.SimpleRequest{}); status.Code(err) != codes.Canceled {
		t.Fatal(err)
	}
	check("cancelled", context.Canceled, false, false)

	w := r.raw(t) // grpc-go's client would give up before it has sent the request, if it were held up
	w.headers(1, "grpc-timeout", "30m")
	w.do(w.WriteData(1, true, message(1)))
	if how, _ := w.outcome(1); how != "status 4" {
		t.Fatal(how)
	}
	<-began
	check("timeout", context.DeadlineExceeded, false, true)

	limit.Store(int64(time.Millisecond))
	if _, err := client.UnaryCall(t.Context(), &testpb.SimpleRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Fatal(err)
	}
	check("limited", context.DeadlineExceeded, true, true)
	c := <-began
	if c.Err() == nil || c.AfterFunc(func() {})() {
		t.Error("the context of a call that has ended has not")
	}
}

// A request that is larger than may be is refused, whatever the client goes on to send.
func TestTooLarge(t *testing.T) {
	r := newRig(t, echo, func(c *Config) { c.MaxMessageBytes, c.MaxReceivingBytes = 200<<10, 100<<10 })
	client := r.client(t)
	g := seeded(t)
	for range 3 {
		for size, want := range map[int]codes.Code{
			100:       codes.OK,
			130 << 10: codes.OK,
			190 << 10: codes.ResourceExhausted, // more than may be on its way
			300 << 10: codes.ResourceExhausted,
			4 << 20:   codes.ResourceExhausted,
		} {
			if _, err := client.UnaryCall(t.Context(), &testpb.SimpleRequest{Payload: payload(g, size)}); status.Code(err) != want {
				t.Errorf("%d bytes: %v", size, err)
			}
		}
	}
}

// Close waits for the calls under way, takes no new ones, and does not wait for ever.
func TestClose(t *testing.T) {
	began, release := make(chan struct{}, 10), make(chan struct{})
	r := newRig(t, func(c *Call, frame, reply []byte) ([]byte, func(), error) {
		began <- struct{}{}
		select {
		case <-release:
			return echo(c, frame, reply)
		case <-c.Done():
			return nil, nil, c.Err()
		}
	}, nil)
	client, stuck := r.client(t), r.client(t)
	answered, given := make(chan error), make(chan error)
	go func() { _, err := client.UnaryCall(context.Background(), &testpb.SimpleRequest{}); answered <- err }()
	<-began
	ctx, cancel := context.WithCancel(t.Context())
	closed := make(chan struct{})
	go func() { _, err := stuck.UnaryCall(context.Background(), &testpb.SimpleRequest{}); given <- err }()
	<-began
	go func() { r.Close(ctx); close(closed) }()
	for {
		if c, err := net.Dial("tcp", r.address); err != nil {
			break
		} else {
			_ = c.Close()
		}
	}
	release <- struct{}{} // whichever of the two it is
	select {
	case err := <-answered:
		answered = given
		if err != nil {
			t.Fatal(err)
		}
	case err := <-given:
		if err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-closed:
		t.Fatal("closed with a call under way")
	case <-time.After(20 * time.Millisecond):
	}
	cancel()
	if err := <-answered; status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled {
		t.Fatal(err)
	}
	<-closed
	r.Close(ctx)
}

func TestPercentEncode(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "plain text": "plain text", "50%": "50%25", "ä\n": "%C3%A4%0A", strings.Repeat("~", 9): strings.Repeat("~", 9),
	} {
		if got := percentEncode(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestParseTimeout(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"1n": 1, "20u": 20 * time.Microsecond, "5m": 5 * time.Millisecond, "7S": 7 * time.Second, "2M": 2 * time.Minute,
		"1H": time.Hour, "0S": 0, "99999999H": 1 << 62,
	} {
		if got, ok := parseTimeout(in); !ok || got != want {
			t.Errorf("%q: %v, %v", in, got, ok)
		}
	}
	for _, in := range []string{"", "S", "1", "1x", "-1S", "123456789S", "1 S"} {
		if got, ok := parseTimeout(in); ok {
			t.Errorf("%q: %v", in, got)
		}
	}
}
