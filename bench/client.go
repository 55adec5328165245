package bench

import (
	"context"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const (
	dialTimeout  = 5 * time.Second
	homewardEach = time.Second // how often a client away from its own connection looks whether that is back
	reconnectMax = time.Second

	// windowBytes are set so that gRPC need not probe for them with pings.
	windowBytes = 4 << 20
	bufferBytes = 128 << 10
)

// dial opens connections to all endpoints in turn, and waits until each is ready.
func dial(ctx context.Context, o Options) ([]*grpc.ClientConn, error) {
	security := insecure.NewCredentials()
	if o.TLS != nil {
		security = credentials.NewTLS(o.TLS)
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(security),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.StaticMethod(), grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithStaticStreamWindowSize(windowBytes), grpc.WithStaticConnWindowSize(windowBytes),
		grpc.WithReadBufferSize(bufferBytes), grpc.WithWriteBufferSize(bufferBytes),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: reconnectMax / 10, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectMax},
			MinConnectTimeout: dialTimeout,
		}),
	}
	if o.Dial != nil {
		opts = append(opts, grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return o.Dial(ctx, address) }))
	}
	conns := make([]*grpc.ClientConn, 0, o.Conns)
	for i := range o.Conns {
		conn, err := grpc.NewClient("passthrough:///"+o.Endpoints[i%len(o.Endpoints)], opts...)
		if err != nil {
			closeAll(conns)
			return nil, err
		}
		conn.Connect()
		conns = append(conns, conn)
	}
	waitCtx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	for i, conn := range conns {
		for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
			if state != connectivity.TransientFailure && conn.WaitForStateChange(waitCtx, state) {
				continue
			}
			closeAll(conns)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, &UnreachableError{o.Endpoints[i%len(o.Endpoints)]}
		}
	}
	return conns, nil
}

func closeAll(conns []*grpc.ClientConn) {
	for _, conn := range conns {
		conn.Close()
	}
}

// client sends one request at a time. All but mu's fields belong to one goroutine.
type client struct {
	run   *run
	shard *shard
	rng   *rand.Rand
	call  call
	key   []byte
	end   []byte
	value []byte
	keys  chooser
	begun int64 // when the operation under way began, or was due

	conns      []*grpc.ClientConn // of all clients
	home, conn int                // which is its own, and which it uses
	left       int64              // when it left its own, or last looked whether that is back
	failures   int                // one after the other

	parent context.Context

	mu      sync.Mutex
	ctx     context.Context
	cancel  context.CancelFunc
	since   int64 // when the request under way began; 0: none is
	expired bool  // the request under way has been given up
}

// invoke sends the client's call. A request has no deadline of its own, which would cost client and server a timer each;
// the run's watch over clients gives it up.
func (c *client) invoke(method string, read func(*call, []byte) error) error {
	ctx := c.begin()
	c.call.read = read
	err := c.conns[c.pick()].Invoke(ctx, method, &c.call, &c.call)
	expired := c.done()
	if expired && err != nil {
		err = status.Error(codes.DeadlineExceeded, "no answer within "+c.run.o.Timeout.String())
	}
	if err != nil {
		c.call.forget()
		if expired || status.Code(err) == codes.Unavailable {
			c.leaveFor(c.conn + 1)
		}
	}
	return err
}

// pick is the connection to use: the client's own, or the next one that is ready until that is back.
func (c *client) pick() int {
	if c.conn != c.home {
		c.lookHome()
	}
	if c.conns[c.conn].GetState() == connectivity.Ready {
		return c.conn
	}
	for i := 1; i < len(c.conns); i++ {
		if next := (c.conn + i) % len(c.conns); c.conns[next].GetState() == connectivity.Ready {
			c.leaveFor(next)
			break
		}
	}
	return c.conn
}

func (c *client) leaveFor(next int) {
	c.conn, c.left = next%len(c.conns), c.run.now()
}

// lookHome goes back to the client's own connection if that is ready, but not soon after leaving it: until gRPC has
// noticed, one that is broken counts as ready.
func (c *client) lookHome() {
	now := c.run.now()
	if now-c.left <= int64(homewardEach) {
		return
	}
	c.left = now
	switch own := c.conns[c.home]; own.GetState() {
	case connectivity.Ready:
		c.conn = c.home
	case connectivity.Idle:
		own.Connect()
	}
}

func (c *client) begin() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx == nil {
		c.ctx, c.cancel = context.WithCancel(c.parent)
	}
	c.since = max(1, c.run.now())
	return c.ctx
}

func (c *client) done() (expired bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.since = 0
	if expired = c.expired; expired {
		c.expired, c.ctx = false, nil
	}
	return expired
}

// expire gives up a request that began before a time.
func (c *client) expire(before int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.since != 0 && c.since < before && !c.expired {
		c.expired = true
		c.cancel()
	}
}

// release frees what the client holds.
func (c *client) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancel != nil {
		c.cancel()
	}
}
