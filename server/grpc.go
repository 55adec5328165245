package server

import (
	"context"
	"math"
	"runtime/debug"
	"unicode/utf8"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
)

// newGRPC makes a gRPC server with all services. Limits and keepalive are
// etcd's, except that the requests of one connection are bounded.
func (s *Server) newGRPC(more ...grpc.ServerOption) *grpc.Server {
	options := append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(s.cfg.MaxRequestBytes + overheadBytes),
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.MaxConcurrentStreams(s.cfg.MaxConcurrentStreams),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveMinTime}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveInterval, Timeout: keepaliveTimeout}),
		grpc.ForceServerCodecV2(newCodec(&s.router.answers)),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.InTapHandle(s.receipts.begin),
		grpc.ChainUnaryInterceptor(s.metrics.calls.unary, s.interceptUnary),
		grpc.ChainStreamInterceptor(s.metrics.calls.stream, s.interceptStream),
	}, more...)
	server := grpc.NewServer(options...)
	pb.RegisterKVServer(server, s.kv)
	pb.RegisterWatchServer(server, s.watch)
	pb.RegisterLeaseServer(server, s.lease)
	pb.RegisterClusterServer(server, s.members)
	pb.RegisterMaintenanceServer(server, s.maintenance)
	v3lockpb.RegisterLockServer(server, newLocks(s.sessions))
	v3electionpb.RegisterElectionServer(server, newElections(s.sessions))
	for _, u := range unsupportedServices {
		refuseAll(server, u.desc, u.err)
	}
	if s.cfg.Services != nil {
		s.cfg.Services(server)
	}
	healthpb.RegisterHealthServer(server, s.health)
	reflection.Register(server)
	return server
}

// interceptUnary is innermost, so that the metrics see its answers too.
func (s *Server) interceptUnary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (response any, err error) {
	s.receipts.end(ctx)
	defer func() {
		if p := recover(); p != nil {
			response, err = nil, s.recovered(info.FullMethod, p)
		}
	}()
	if err := s.admit(ctx); err != nil {
		return nil, err
	}
	return handle(ctx, request)
}

func (s *Server) interceptStream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.recovered(info.FullMethod, p)
		}
	}()
	if err := s.admit(stream.Context()); err != nil {
		return err
	}
	return handle(server, &receivingStream{ServerStream: stream, receipts: s.receipts})
}

// recovered keeps a request from ending the process (I8).
func (s *Server) recovered(method string, p any) error {
	s.metrics.panics.Inc()
	s.cfg.Logger.Error("panic while serving a request", "method", method, "panic", p, "stack", string(debug.Stack()))
	return kvdError(codes.Internal, ReasonInternal, "internal error")
}

// admit checks what clients say of themselves. One that asked for a leader
// (clientv3.WithRequireLeader) does not want to wait for an election.
func (s *Server) admit(ctx context.Context) error {
	first := func(name string) string {
		if v := metadata.ValueFromIncomingContext(ctx, name); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	return s.admitAs(first(rpctypes.MetadataClientAPIVersionKey), first(rpctypes.MetadataRequireLeaderKey))
}

func (s *Server) admitAs(version, leader string) error {
	if !utf8.ValidString(version) {
		return rpctypes.ErrGRPCInvalidClientAPIVersion
	}
	if leader != rpctypes.MetadataHasLeader {
		return nil
	}
	if replica := s.cfg.Replica(userGroup); replica == nil || replica.Leader().Node == "" {
		return rpctypes.ErrGRPCNoLeader
	}
	return nil
}
