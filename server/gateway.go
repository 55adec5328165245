package server

import (
	"context"
	"fmt"
	"math"
	"net"
	"net/http"
	"sync"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"go.etcd.io/etcd/api/v3/etcdserverpb/gw"
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
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)))
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
	} {
		if err := register(context.Background(), mux, conn); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("server: gateway: %w", err)
		}
	}
	// Keys and values are in base64; leave room for that.
	limit := int64(2 * (maxRequestBytes + overheadBytes))
	g := &gateway{server: server, conn: conn, handler: http.MaxBytesHandler(mux, limit)}
	g.serving.Go(func() { _ = server.Serve(listener) })
	return g, nil
}

func (g *gateway) close(ctx context.Context) {
	_ = g.conn.Close()
	stopGRPC(ctx, g.server)
	g.serving.Wait()
}
