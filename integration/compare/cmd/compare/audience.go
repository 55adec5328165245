package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"

	"kvd/integration/compare/servers"
)

const (
	methodWatch  = "/etcdserverpb.Watch/Watch"
	watchTimeout = time.Minute // for watches to be there, and for the last events to come
)

// audience is many watches, each of one key, over streams with a connection each. It knows what each watch is to be
// told next: a key's versions, one after the other. Anything else ends all of them, with an error.
type audience struct {
	began   time.Time // values begin with the time that has passed since, in nanoseconds
	key     func(watch int) string
	streams []*audienceStream
	ctx     context.Context // its cause: what is wrong
	fail    context.CancelCauseFunc
	readers sync.WaitGroup

	ending   atomic.Bool
	there    atomic.Int64 // watches that have begun
	gone     atomic.Int64 // those that were cancelled
	received atomic.Int64 // events
	awaited  atomic.Int64 // when what counts has come to this, arrived is signalled
	arrived  chan struct{}
}

// audienceStream has the watches from first on.
type audienceStream struct {
	*audience
	conn    *grpc.ClientConn
	stream  grpc.ClientStream
	first   int
	created []bool

	mu        sync.Mutex
	versions  []int64         // that each watch has been told of
	latencies []time.Duration // from the put to the event
	last      time.Time       // when the last event came
}

// newAudience returns when all watches are there. Watches are dealt to the streams, and these to the endpoints, as evenly
// as can be.
func newAudience(ctx context.Context, endpoints []string, streams, watches int, key func(watch int) string) (*audience, error) {
	a := &audience{began: time.Now(), key: key, arrived: make(chan struct{}, 1)}
	a.ctx, a.fail = context.WithCancelCause(ctx)
	a.awaited.Store(int64(watches))
	for i := range streams {
		first, end := i*watches/streams, (i+1)*watches/streams
		if err := a.open(endpoints[i%len(endpoints)], first, end-first); err != nil {
			a.fail(err)
			return nil, a.close()
		}
	}
	if err := a.await(&a.there, int64(watches), "watches are there"); err != nil {
		a.fail(err)
		return nil, a.close()
	}
	return a, nil
}

func (a *audience) open(endpoint string, first, watches int) error {
	conn, err := servers.Dial(endpoint)
	if err != nil {
		return err
	}
	s := &audienceStream{audience: a, conn: conn, first: first, created: make([]bool, watches), versions: make([]int64, watches)}
	a.streams = append(a.streams, s)
	s.stream, err = conn.NewStream(a.ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, methodWatch, grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		return err
	}
	a.readers.Go(func() {
		if err := s.read(); err != nil {
			a.fail(err)
		}
	})
	a.readers.Go(s.create)
	return nil
}

// create asks for the stream's watches; their ids count from 1. An error shows in read, too.
func (s *audienceStream) create() {
	for i := range s.created {
		request := &pb.WatchCreateRequest{Key: []byte(s.key(s.first + i)), WatchId: int64(i + 1)}
		if s.stream.SendMsg(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: request}}) != nil {
			return
		}
	}
}

// read takes what comes until the stream ends.
func (s *audienceStream) read() error {
	var message []byte
	var n notice
	for {
		err := s.stream.RecvMsg(&message)
		now := time.Now()
		if err == nil {
			err = n.read(message)
		}
		if err == nil {
			err = s.take(n, now)
		}
		if err != nil {
			return err
		}
	}
}

// take looks whether what has come is what had to come.
func (s *audienceStream) take(n notice, now time.Time) error {
	i := int(n.watch) - 1
	switch {
	case i < 0 || i >= len(s.created):
		return fmt.Errorf("%w: a watch of id %d, of %d", errWrong, n.watch, len(s.created))
	case n.canceled && !s.ending.Load():
		return fmt.Errorf("the watch of %s was ended: %s", s.key(s.first+i), n.reason)
	case n.created == s.created[i]:
		return fmt.Errorf("%w: the watch of %s is created twice, or is told of what it is not there for", errWrong, s.key(s.first+i))
	}
	if n.created {
		s.created[i] = true
		s.count(&s.there, 1)
	}
	if n.canceled {
		s.created[i] = false
		s.count(&s.gone, 1)
	}
	if len(n.events) == 0 {
		return nil
	}
	s.mu.Lock()
	err := s.takeEvents(i, n.events, now)
	s.mu.Unlock()
	if err == nil {
		s.count(&s.received, len(n.events))
	}
	return err
}

func (s *audienceStream) takeEvents(i int, events []event, now time.Time) error {
	key := s.key(s.first + i)
	for _, e := range events {
		if e.kind != mvccpb.Event_PUT || string(e.key) != key || e.version != s.versions[i]+1 || len(e.value) != valueBytes {
			return fmt.Errorf("%w: the watch of %s gets %v of version %d of %s, of %d bytes, after version %d",
				errWrong, key, e.kind, e.version, e.key, len(e.value), s.versions[i])
		}
		s.versions[i]++
		s.latencies = append(s.latencies, now.Sub(s.began)-time.Duration(binary.LittleEndian.Uint64(e.value)))
	}
	s.last = now
	return nil
}

func (a *audience) count(what *atomic.Int64, n int) {
	if what.Add(int64(n)) < a.awaited.Load() {
		return
	}
	select {
	case a.arrived <- struct{}{}:
	default:
	}
}

// await returns when a count has reached n. Only one may wait at a time.
func (a *audience) await(what *atomic.Int64, n int64, title string) error {
	a.awaited.Store(n)
	timeout := time.NewTimer(watchTimeout)
	defer timeout.Stop()
	for what.Load() < n {
		select {
		case <-a.arrived:
		case <-a.ctx.Done():
			return context.Cause(a.ctx)
		case <-timeout.C:
			return fmt.Errorf("%w: after %v only %d of %d %s", errWrong, watchTimeout, what.Load(), n, title)
		}
	}
	return nil
}

// value of a put that is sent now.
func (a *audience) value(seed int) []byte {
	value := valueOf(seed, 0)
	binary.LittleEndian.PutUint64(value, uint64(time.Since(a.began)))
	return value
}

// taken returns the latencies of all events since the last call, and when the last of them came.
func (a *audience) taken() (latencies []time.Duration, last time.Time) {
	for _, s := range a.streams {
		s.mu.Lock()
		latencies, s.latencies = append(latencies, s.latencies...), s.latencies[:0]
		if s.last.After(last) {
			last = s.last
		}
		s.mu.Unlock()
	}
	return latencies, last
}

// end cancels all watches, and so looks at whatever is still on its way: nothing may be.
func (a *audience) end() error {
	a.ending.Store(true)
	received := a.received.Load()
	for _, s := range a.streams {
		a.readers.Go(s.cancel)
	}
	if err := a.await(&a.gone, a.there.Load(), "watches are cancelled"); err != nil {
		a.fail(err)
	}
	if err := a.close(); err != nil {
		return err
	}
	if more := a.received.Load() - received; more > 0 {
		return fmt.Errorf("%w: %d events more than puts", errWrong, more)
	}
	return nil
}

// cancel asks for the end of the stream's watches. An error shows in read, too.
func (s *audienceStream) cancel() {
	for i := range s.versions {
		request := &pb.WatchCancelRequest{WatchId: int64(i + 1)}
		if s.stream.SendMsg(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: request}}) != nil {
			return
		}
	}
}

// close gives up what is left, and returns what was wrong.
func (a *audience) close() error {
	err := context.Cause(a.ctx)
	a.fail(nil)
	a.readers.Wait()
	for _, s := range a.streams {
		s.conn.Close()
	}
	return err
}
