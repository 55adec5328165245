package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"go.etcd.io/etcd/api/v3/etcdserverpb/gw"
	electiongw "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb/gw"
	lockgw "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb/gw"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
)

// gateway translates JSON over HTTP into gRPC, as etcd's does. It has a gRPC
// server of its own, reached through memory, so that it works whatever TLS the
// clients' one demands.
type gateway struct {
	handler http.Handler
	server  *grpc.Server
	conn    *grpc.ClientConn
	serving sync.WaitGroup
}

const gatewayBufferBytes = 256 << 10

func newGateway(server *grpc.Server, maxRequestBytes int) (*gateway, error) {
	listener := bufconn.Listen(gatewayBufferBytes)
	conn, err := grpc.NewClient("passthrough:///gateway",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(gatewayAnswerBytes), grpc.MaxCallSendMsgSize(math.MaxInt32)))
	if err != nil {
		return nil, fmt.Errorf("server: gateway: %w", err)
	}
	mux := runtime.NewServeMux(runtime.WithMarshalerOption(runtime.MIMEWildcard, &runtime.HTTPBodyMarshaler{
		Marshaler: &runtime.JSONPb{
			MarshalOptions:   protojson.MarshalOptions{UseProtoNames: true},
			UnmarshalOptions: protojson.UnmarshalOptions{DiscardUnknown: true},
		},
	}))
	for _, register := range []func(context.Context, *runtime.ServeMux, *grpc.ClientConn) error{
		gw.RegisterKVHandler, gw.RegisterWatchHandler, gw.RegisterLeaseHandler,
		gw.RegisterClusterHandler, gw.RegisterMaintenanceHandler, gw.RegisterAuthHandler,
		lockgw.RegisterLockHandler, electiongw.RegisterElectionHandler,
	} {
		if err := register(context.Background(), mux, conn); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("server: gateway: %w", err)
		}
	}
	// Keys and values are in base64; leave room for that.
	limit := int64(2 * (maxRequestBytes + overheadBytes))
	g := &gateway{server: server, conn: conn, handler: patient(mux, limit, bodyTimeout)}
	g.serving.Go(func() { _ = server.Serve(listener) })
	return g, nil
}

func (g *gateway) close(ctx context.Context) {
	_ = g.conn.Close()
	stopGRPC(ctx, g.server)
	g.serving.Wait()
}

const (
	maxGatewayRequests = 64               // being read or answered; more wait
	maxLasting         = 1024             // of those that may be under way for long; more wait
	maxLastingBytes    = 256 << 10        // of the body of one of them
	gatewayAnswerBytes = 16 << 20         // of one answer, before it becomes JSON
	bodyTimeout        = 10 * time.Second // for a request's body to arrive
	writeTimeout       = 30 * time.Second // for the client to take what is written at once
)

// lasting are the paths whose requests may be under way for long: most of that
// time they take next to nothing.
var lasting = map[string]bool{
	"/v3/watch": true, "/v3/lease/keepalive": true,
	"/v3/lock/lock": true, "/v3/election/campaign": true, "/v3/election/observe": true,
}

// slots bound how many requests are under way.
type slots chan struct{}

// take waits for a slot until ctx ends; it returns nil then.
func (s slots) take(ctx context.Context) (release func()) {
	select {
	case s <- struct{}{}:
		return sync.OnceFunc(func() { <-s })
	case <-ctx.Done():
		return nil
	}
}

// patient bounds the time and the memory that slow clients of h take: their
// requests are read as a whole before they are served, their answers must move.
func patient(h http.Handler, maxBodyBytes int64, timeout time.Duration) http.Handler {
	requests, lastingRequests := make(slots, maxGatewayRequests), make(slots, maxLasting)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		limit := maxBodyBytes
		if lasting[r.URL.Path] {
			ended := lastingRequests.take(r.Context())
			if ended == nil {
				return
			}
			defer ended()
			limit = min(limit, maxLastingBytes)
		}
		read := requests.take(r.Context())
		if read == nil {
			return
		}
		defer read()
		control := http.NewResponseController(w)
		if err := control.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
		if err != nil {
			refuseBody(w, err, timeout)
			return
		}
		if err := control.SetReadDeadline(time.Time{}); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		if lasting[r.URL.Path] {
			read()
		}
		defer func() { _ = control.SetWriteDeadline(time.Time{}) }() // the connection may serve others
		h.ServeHTTP(&movingWriter{w, control}, r)
	})
}

func refuseBody(w http.ResponseWriter, err error, timeout time.Duration) {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		http.Error(w, fmt.Sprintf("the request's body has more than %d bytes", tooLarge.Limit), http.StatusRequestEntityTooLarge)
	case errors.Is(err, os.ErrDeadlineExceeded):
		http.Error(w, fmt.Sprintf("the request's body did not arrive within %v", timeout), http.StatusRequestTimeout)
	default:
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

// movingWriter fails when the client does not take what is written.
type movingWriter struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (w *movingWriter) Write(b []byte) (int, error) {
	if err := w.control.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return 0, err
	}
	return w.ResponseWriter.Write(b)
}

func (w *movingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Flush is what streamed answers need. Then there may be nothing to write for a long time; over HTTP/2 a deadline that
// passes ends the request even so.
func (w *movingWriter) Flush() {
	if w.control.Flush() == nil {
		_ = w.control.SetWriteDeadline(time.Time{})
	}
}
