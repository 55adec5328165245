package server

import (
	"context"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/tap"
)

// How long a client may take to send its first message. What has arrived of it
// is kept in memory, for as many requests as all connections together may have
// under way: when many are being received, they must be faster.
const (
	receiveTimeout = 10 * time.Second
	crowdedTimeout = 2 * time.Second
	crowd          = 256
	receiptPause   = time.Second // between two looks
)

// receipts are the requests whose first message has not arrived yet. A
// goroutine ends those that take too long; it runs while there are any.
type receipts struct {
	router *router

	mu      sync.Mutex
	open    map[*receipt]struct{}
	running bool
}

type receipt struct {
	ctx    context.Context // of the request
	cancel context.CancelFunc
	since  time.Time
}

type receiptKey struct{}

// idle are the streams of which clients need not ask anything at once.
var idle = map[string]bool{pb.Watch_Watch_FullMethodName: true, pb.Lease_LeaseKeepAlive_FullMethodName: true}

// begin is told of every request when its headers have arrived.
func (r *receipts) begin(ctx context.Context, info *tap.Info) (context.Context, error) {
	if idle[info.FullMethodName] {
		return ctx, nil
	}
	one := &receipt{since: time.Now()}
	ctx, one.cancel = context.WithCancel(ctx)
	one.ctx = ctx
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open == nil {
		r.open = make(map[*receipt]struct{})
	}
	r.open[one] = struct{}{}
	if !r.running {
		r.running = r.router.spawn(r.run)
	}
	return context.WithValue(ctx, receiptKey{}, one), nil
}

// end is told when the first message has arrived.
func (r *receipts) end(ctx context.Context) {
	if one, ok := ctx.Value(receiptKey{}).(*receipt); ok {
		r.mu.Lock()
		delete(r.open, one)
		r.mu.Unlock()
	}
}

func (r *receipts) run() {
	ticker := time.NewTicker(receiptPause)
	defer ticker.Stop()
	for r.sweep(time.Now()) {
		select {
		case <-ticker.C:
		case <-r.router.ctx.Done():
			return
		}
	}
}

// sweep ends what has taken too long and forgets what has ended by itself. It
// reports whether anything is left.
func (r *receipts) sweep(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	limit := receiveTimeout
	if len(r.open) > crowd {
		limit = crowdedTimeout
	}
	for one := range r.open {
		switch {
		case one.ctx.Err() != nil:
			delete(r.open, one)
		case now.Sub(one.since) >= limit:
			one.cancel()
			delete(r.open, one)
			r.router.metrics.slow.Inc()
		}
	}
	r.running = len(r.open) > 0
	if !r.running {
		r.open = nil // a map does not shrink
	}
	return r.running
}

// receivingStream ends the receipt of a stream with its first message.
type receivingStream struct {
	grpc.ServerStream
	receipts *receipts
	once     sync.Once
}

func (s *receivingStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil {
		s.once.Do(func() { s.receipts.end(s.Context()) })
	}
	return err
}
