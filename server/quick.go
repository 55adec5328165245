package server

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"kvd/server/h2"
)

// The unary calls that clients make most are served by h2, all others of the same connections by grpc-go, which listens
// in memory.

// grpcOptions are those of the grpc-go server that has the listener, or is behind the one that has it.
func (s *Server) grpcOptions() []grpc.ServerOption {
	switch {
	case !s.cfg.OnlyGRPCGo:
		return []grpc.ServerOption{grpc.StaticStreamWindowSize(innerWindow), grpc.ReadBufferSize(innerReadBytes)}
	case s.cfg.TLS != nil:
		return []grpc.ServerOption{grpc.Creds(credentials.NewTLS(s.cfg.TLS))}
	}
	return nil
}

func (s *Server) newQuick() *h2.Server {
	s.inner = bufconn.Listen(innerBufferBytes)
	return h2.New(h2.Config{
		Methods: map[string]h2.Handler{
			pb.KV_Put_FullMethodName:         s.quick(pb.KV_Put_FullMethodName, s.kv.putFrame),
			pb.KV_Range_FullMethodName:       s.quick(pb.KV_Range_FullMethodName, s.kv.rangeFrame),
			pb.KV_DeleteRange_FullMethodName: s.quick(pb.KV_DeleteRange_FullMethodName, frames(s.kv.DeleteRange)),
			pb.KV_Txn_FullMethodName:         s.quick(pb.KV_Txn_FullMethodName, frames(s.kv.Txn)),
		},
		Keep:                 [2]string{rpctypes.MetadataClientAPIVersionKey, rpctypes.MetadataRequireLeaderKey},
		Dial:                 func() (net.Conn, error) { return s.inner.DialContext(s.router.ctx) },
		MaxMessageBytes:      s.cfg.MaxRequestBytes + overheadBytes,
		MaxConcurrentStreams: s.cfg.MaxConcurrentStreams,
		MaxReceivingBytes:    s.cfg.MaxPendingBytes,
		HandshakeTimeout:     connectTimeout,
		PingInterval:         keepaliveMinTime,
		IdleTimeout:          keepaliveInterval,
		AnswerTimeout:        keepaliveTimeout,
		ReceiveTimeout:       receiveTimeout,
		CrowdedTimeout:       crowdedTimeout,
		Crowd:                crowd,
		MaxStalledBytes:      s.cfg.MaxAnswerBytes,
		Stalled:              refusal(errBusy),
		Slow:                 s.metrics.slow.Inc,
	})
}

const (
	innerBufferBytes = 16 << 10 // each way: connections with streams are many
	innerReadBytes   = 4 << 10
	innerWindow      = 65535 // what h2 has told the clients
)

// onlyHTTP2 is the configuration for a listener of gRPC.
func onlyHTTP2(conf *tls.Config) *tls.Config {
	conf = conf.Clone()
	conf.NextProtos = []string{"h2"}
	return conf
}

// frameHandler serves a call: the request's message comes after h2.FrameBytes of the frame, the answer's is appended to
// reply. What it returns of the reply may be large; it counts until it is sent.
type frameHandler func(ctx context.Context, frame, reply []byte) ([]byte, error)

// quick does for a method of h2 what the interceptors do for those of grpc-go.
func (s *Server) quick(path string, serve frameHandler) h2.Handler {
	of := s.metrics.calls.of(path)
	return func(call *h2.Call, frame, reply []byte) (answer []byte, release func(), err error) {
		start := time.Now()
		of.started.Inc()
		of.received.Inc()
		before := len(reply)
		answer, err = s.serveFrame(call, path, serve, frame, reply)
		if err == nil {
			of.sent.Inc()
			if size := len(answer) - before; size > freeAnswerBytes {
				s.router.answers.bytes.Add(int64(size))
				release = func() { s.router.answers.bytes.Add(-int64(size)) }
			}
		}
		of.ended(start, err)
		return answer, release, err
	}
}

func (s *Server) serveFrame(call *h2.Call, path string, serve frameHandler, frame, reply []byte) (answer []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			answer, err = nil, s.recovered(path, p)
		}
	}()
	if err := s.admitAs(call.Kept(0), call.Kept(1)); err != nil {
		return nil, err
	}
	return serve(call, frame, reply)
}

// frames makes a frameHandler of a service's method, with the general encoding.
func frames[Q, A any, PQ message[Q], PA message[A]](serve func(context.Context, PQ) (PA, error)) frameHandler {
	return func(ctx context.Context, frame, reply []byte) ([]byte, error) {
		request := PQ(new(Q))
		if err := unmarshal(frame[h2.FrameBytes:], request); err != nil {
			return nil, err
		}
		response, err := serve(ctx, request)
		if err != nil {
			return nil, err
		}
		return marshal(reply, response)
	}
}

func unmarshal(b []byte, m proto.Message) error {
	if err := proto.Unmarshal(b, m); err != nil {
		return status.Errorf(codes.Internal, "grpc: failed to unmarshal the received message: %v", err)
	}
	return nil
}

func marshal(b []byte, m proto.Message) ([]byte, error) {
	b, err := proto.MarshalOptions{}.MarshalAppend(b, m)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "grpc: error while marshaling: %v", err)
	}
	return b, nil
}

// putFrame is Put with the request as it came: it goes to the log without being encoded again.
func (s *kv) putFrame(ctx context.Context, frame, reply []byte) ([]byte, error) {
	var r pb.PutRequest
	if len(frame)-h2.FrameBytes >= maxWrapped || !decodePut(frame[h2.FrameBytes:], &r) {
		return frames(s.Put)(ctx, frame, reply)
	}
	resp, err := s.put(ctx, &r, func() ([]byte, error) { return wrapPut(frame), nil })
	if err != nil {
		return nil, err
	}
	if hasUnknown(resp) || resp.PrevKv != nil && hasUnknown(resp.PrevKv) {
		return marshal(reply, resp)
	}
	return appendPutResponse(reply, resp), nil
}

func (s *kv) rangeFrame(ctx context.Context, frame, reply []byte) ([]byte, error) {
	r := &pb.RangeRequest{}
	if !decodeRange(frame[h2.FrameBytes:], r) {
		return frames(s.Range)(ctx, frame, reply)
	}
	resp, err := s.Range(ctx, r)
	if err != nil {
		return nil, err
	}
	if s.router.sharded { // parts may come from nodes of later versions
		return marshal(reply, resp)
	}
	return appendRangeResponse(reply, resp), nil
}
