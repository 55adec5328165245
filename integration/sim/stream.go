package sim

import (
	"context"
	"errors"
	"fmt"
	"io"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/metadata"

	"kvd/integration/linearizability"
	"kvd/integration/watches"
	"kvd/node"
)

// streamBuffer is how many messages are under way, each way: a client that does not read holds its server up.
const streamBuffer = 16

// pipe is a stream between a client and a node, in one process. It breaks for the client when the node dies.
type pipe[Q, A any] struct {
	ctx      context.Context
	life     *life
	requests chan *Q
	answers  chan *A
	ended    chan struct{} // the server has returned
	err      error         // why; set before ended is closed
}

// open serves a stream on the host until the client's ctx ends, the node does, or serve returns.
func open[Q, A any](ctx context.Context, h *host, serve func(*node.Node, *pipeEnd[Q, A]) error) (*pipe[Q, A], error) {
	n, l := h.current()
	if n == nil {
		return nil, fmt.Errorf("%w: the node is down", linearizability.ErrNotSent)
	}
	p := &pipe[Q, A]{ctx: ctx, life: l, requests: make(chan *Q, streamBuffer), answers: make(chan *A, streamBuffer), ended: make(chan struct{})}
	serving, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		select { // as connections break, when the process ends or its client is cut off
		case <-l.dead:
		case <-p.ended:
		}
	}()
	go func() {
		defer close(p.ended)
		p.err = serve(n, &pipeEnd[Q, A]{p, serving})
	}()
	return p, nil
}

// Send is the client's.
func (p *pipe[Q, A]) Send(request *Q) error {
	select {
	case p.requests <- request:
		return nil
	case <-p.ended:
	case <-p.life.dead:
	case <-p.ctx.Done():
	}
	return io.EOF // Recv tells why
}

// Recv is the client's.
func (p *pipe[Q, A]) Recv() (*A, error) {
	select {
	case <-p.life.dead:
		return nil, errCut
	default:
	}
	select {
	case answer := <-p.answers:
		return answer, nil
	case <-p.life.dead:
		return nil, errCut
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	case <-p.ended:
		select {
		case answer := <-p.answers: // what was said last
			return answer, nil
		default:
			return nil, errors.Join(io.EOF, p.err)
		}
	}
}

// pipeEnd is the server's end.
type pipeEnd[Q, A any] struct {
	pipe *pipe[Q, A]
	ctx  context.Context
}

func (e *pipeEnd[Q, A]) Context() context.Context { return e.ctx }

func (e *pipeEnd[Q, A]) Send(answer *A) error {
	select {
	case e.pipe.answers <- answer:
		return nil
	case <-e.ctx.Done():
		return e.ctx.Err()
	}
}

func (e *pipeEnd[Q, A]) Recv() (*Q, error) {
	select {
	case request := <-e.pipe.requests:
		return request, nil
	case <-e.ctx.Done():
		return nil, e.ctx.Err()
	}
}

func (e *pipeEnd[Q, A]) SendMsg(m any) error {
	answer, ok := m.(*A)
	if !ok {
		return fmt.Errorf("sim: a stream of %T was sent %T", answer, m)
	}
	return e.Send(answer)
}

func (e *pipeEnd[Q, A]) RecvMsg(any) error            { return errors.ErrUnsupported }
func (e *pipeEnd[Q, A]) SetHeader(metadata.MD) error  { return nil }
func (e *pipeEnd[Q, A]) SendHeader(metadata.MD) error { return nil }
func (e *pipeEnd[Q, A]) SetTrailer(metadata.MD)       {}

func (s service) Watch(ctx context.Context) (watches.Stream, error) {
	return open(ctx, s.h, func(n *node.Node, e *pipeEnd[pb.WatchRequest, pb.WatchResponse]) error {
		return n.Watch().Watch(e)
	})
}

func (s service) Compact(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	return call(ctx, s.h, pb.KVServer.Compact, r)
}

func (s service) LeaseGrant(ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	return callLease(ctx, s.h, pb.LeaseServer.LeaseGrant, r)
}

func (s service) LeaseRevoke(ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	return callLease(ctx, s.h, pb.LeaseServer.LeaseRevoke, r)
}

func (s service) LeaseTimeToLive(ctx context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	return callLease(ctx, s.h, pb.LeaseServer.LeaseTimeToLive, r)
}

// KeepAlive renews a lease once.
func (s service) KeepAlive(ctx context.Context, id int64) (*pb.LeaseKeepAliveResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := open(ctx, s.h, func(n *node.Node, e *pipeEnd[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
		return n.Lease().LeaseKeepAlive(e)
	})
	if err != nil {
		return nil, err
	}
	if err := p.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
		return nil, err
	}
	return p.Recv()
}
