// Package h2 is a gRPC server for the unary calls that a service has most of: it reads and writes HTTP/2 itself, with a
// fraction of the work per call that grpc-go needs, and leaves all other calls of its connections to grpc-go.
package h2

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Config says what a Server serves. The zero value of every bound and duration means its default.
type Config struct {
	// Methods are the unary calls served here, by path ("/package.Service/Method").
	Methods map[string]Handler

	// Keep names two headers that handlers may ask for (Call.Kept).
	Keep [2]string

	// Dial connects to the gRPC server that serves all other calls, and all that are not as usual: compressed ones, for
	// example. It must announce a window of 65535 bytes for streams, and no more concurrent streams than this one.
	Dial func() (net.Conn, error)

	MaxMessageBytes      int    // of one request; 4 MiB
	MaxConcurrentStreams uint32 // on one connection; 16384
	MaxHeaderBytes       int    // of one request, as HTTP/2 counts them; 64 KiB
	// MaxReceivingBytes bounds the requests of all connections whose last byte has not arrived, except the first 64 KiB
	// of each; 128 MiB.
	MaxReceivingBytes int64

	// MaxStalledBytes bounds the answers of all connections that wait for their clients; 512 MiB. Others fail with
	// Stalled then.
	MaxStalledBytes int64
	Stalled         error // ResourceExhausted

	HandshakeTimeout time.Duration // for a connection's preface; 10 s
	PingInterval     time.Duration // clients may not ping more often; 5 s, and 2 h while they have no calls
	IdleTimeout      time.Duration // after which a client is asked whether it is alive; 2 h
	AnswerTimeout    time.Duration // to say so, and to take what is written; 20 s and 60 s
	ReceiveTimeout   time.Duration // for a request's message to arrive; 10 s
	// CrowdedTimeout replaces ReceiveTimeout while more than Crowd requests of all connections are arriving; 2 s, 256.
	CrowdedTimeout time.Duration
	Crowd          int64

	// Slow is told of requests that were given up because they did not arrive in time; nil = nobody is.
	Slow func()
}

// Handler serves one call. frame is the request's message after FrameBytes that the handler may overwrite; it may keep
// it. The answer's message is appended to reply; release, if not nil, is called once the answer is not kept in memory
// any more. Errors become gRPC statuses. It may panic only to end the process.
type Handler func(call *Call, frame, reply []byte) (answer []byte, release func(), err error)

// FrameBytes come before each message on the wire.
const FrameBytes = 5

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c *Config) setDefaults() {
	setDefault(&c.MaxMessageBytes, 4<<20)
	setDefault(&c.MaxConcurrentStreams, 16384)
	setDefault(&c.MaxHeaderBytes, 64<<10)
	setDefault(&c.MaxReceivingBytes, 128<<20)
	setDefault(&c.MaxStalledBytes, 512<<20)
	setDefault(&c.HandshakeTimeout, 10*time.Second)
	setDefault(&c.PingInterval, 5*time.Second)
	setDefault(&c.IdleTimeout, 2*time.Hour)
	setDefault(&c.AnswerTimeout, 20*time.Second)
	setDefault(&c.ReceiveTimeout, 10*time.Second)
	setDefault(&c.CrowdedTimeout, 2*time.Second)
	setDefault(&c.Crowd, 256)
	if c.Stalled == nil {
		c.Stalled = status.Error(codes.ResourceExhausted, "grpc: too many answers wait for their clients")
	}
	if c.Slow == nil {
		c.Slow = func() {}
	}
}

// Server serves connections until Close. All methods are safe for concurrent use.
type Server struct {
	cfg       Config
	start     time.Time
	work      chan *Call // to goroutines that wait for the next call
	idle      atomic.Int32
	arriving  atomic.Int64  // requests whose message has not arrived
	receiving atomic.Int64  // bytes of theirs beyond the first window
	stalled   atomic.Int64  // bytes of answers that wait for their clients
	woken     atomic.Int64  // answers that waited and were told to go on
	wake      chan struct{} // capacity 1: there is a connection
	stop      chan struct{}
	stopped   sync.Once
	running   sync.WaitGroup // goroutines
	calls     sync.WaitGroup // workers

	mu        sync.Mutex
	conns     map[*conn]struct{}
	listeners map[net.Listener]struct{}
	closing   bool
	empty     chan struct{} // closed when closing and without connections
}

// ErrClosed: the server does not serve any more.
var ErrClosed = errors.New("h2: server closed")

// New makes a Server.
func New(cfg Config) *Server {
	cfg.setDefaults()
	s := &Server{
		cfg: cfg, start: time.Now(), work: make(chan *Call), wake: make(chan struct{}, 1), stop: make(chan struct{}), empty: make(chan struct{}),
		conns: make(map[*conn]struct{}), listeners: make(map[net.Listener]struct{}),
	}
	s.running.Go(s.sweep)
	return s
}

// Serve accepts connections until the listener, which it closes, fails or the server closes: then it returns ErrClosed.
func (s *Server) Serve(l net.Listener) error {
	defer func() { _ = l.Close() }()
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return ErrClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	for wait := time.Duration(0); ; {
		nc, err := l.Accept()
		if err == nil {
			wait = 0
			s.take(nc)
			continue
		}
		select {
		case <-s.stop:
			return ErrClosed
		default:
		}
		if temporary, ok := err.(interface{ Temporary() bool }); !ok || !temporary.Temporary() {
			if s.isClosing() {
				return ErrClosed
			}
			return err
		}
		wait = min(max(2*wait, 5*time.Millisecond), time.Second) // out of files, perhaps
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-s.stop:
		}
		timer.Stop()
	}
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// take serves a connection.
func (s *Server) take(nc net.Conn) {
	c := newConn(s, nc)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		_ = nc.Close()
		return
	}
	s.conns[c] = struct{}{}
	select {
	case s.wake <- struct{}{}:
	default:
	}
	s.running.Go(func() {
		c.serve()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
		if s.closing && len(s.conns) == 0 {
			close(s.empty)
		}
	})
}

// Close stops listening, lets the calls under way end until ctx is done, and returns when nothing of the server runs any
// more. Idempotent.
func (s *Server) Close(ctx context.Context) {
	s.mu.Lock()
	if !s.closing {
		s.closing = true
		for l := range s.listeners {
			_ = l.Close()
		}
		if len(s.conns) == 0 {
			close(s.empty)
		}
	}
	conns := s.list()
	s.mu.Unlock()
	for _, c := range conns {
		s.calls.Go(c.drain) // a client may not take it
	}
	select {
	case <-s.empty:
	case <-ctx.Done():
	}
	s.stopped.Do(func() { close(s.stop) })
	s.mu.Lock()
	conns = s.list()
	s.mu.Unlock()
	for _, c := range conns {
		c.end(ErrClosed)
	}
	s.running.Wait()
	s.calls.Wait()
}

// list needs the lock.
func (s *Server) list() []*conn {
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// sweepInterval is how exactly calls end that have not been given a timeout by their client.
const sweepInterval = 100 * time.Millisecond

// sweep ends what takes too long, as long as there are connections.
func (s *Server) sweep() {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		s.mu.Lock()
		conns := s.list()
		s.mu.Unlock()
		if len(conns) == 0 {
			ticker.Stop()
			select {
			case <-s.wake:
			case <-s.stop:
				return
			}
			ticker.Reset(sweepInterval)
		}
		timeout := s.cfg.ReceiveTimeout
		if s.arriving.Load() > s.cfg.Crowd {
			timeout = s.cfg.CrowdedTimeout
		}
		now := s.now()
		for _, c := range conns {
			c.sweep(now, timeout)
		}
		select {
		case <-ticker.C:
		case <-s.stop:
			return
		}
	}
}

// now is the time since the server was made.
func (s *Server) now() time.Duration { return time.Since(s.start) }

// maxIdle goroutines wait for the next call, with stacks that need not grow again.
const maxIdle = 512

// run runs a call's handler on a goroutine.
func (s *Server) run(call *Call) {
	select {
	case s.work <- call:
	default:
		s.calls.Go(func() { s.worker(call) })
	}
}

func (s *Server) worker(call *Call) {
	var scratch []byte
	for {
		scratch = call.serve(scratch)
		call = nil
		if s.idle.Add(1) > maxIdle {
			s.idle.Add(-1)
			return
		}
		select {
		case call = <-s.work:
			s.idle.Add(-1)
		case <-s.stop:
			s.idle.Add(-1)
			return
		}
	}
}
