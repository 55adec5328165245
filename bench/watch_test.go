package bench

import (
	"context"
	"errors"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// fakeWatch sends every put of a fake to every watcher, after a delay.
type fakeWatch struct {
	pb.UnimplementedWatchServer
	delay  time.Duration
	drop   int // of a hundred events
	refuse string

	mu       sync.Mutex
	watchers map[int64]chan<- *pb.WatchResponse
	next     int64
	sent     int
}

func startWatchFake(t *testing.T, w *fakeWatch) *fake {
	w.watchers = map[int64]chan<- *pb.WatchResponse{}
	f := startFake(t, func(s *grpc.Server) { pb.RegisterWatchServer(s, w) })
	f.before = func(_ context.Context, r any) error {
		if put, ok := r.(*pb.PutRequest); ok {
			w.publish(&mvccpb.Event{Kv: &mvccpb.KeyValue{Key: put.Key, Value: put.Value}})
		}
		return nil
	}
	return f
}

func (w *fakeWatch) publish(e *mvccpb.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id, out := range w.watchers {
		if w.sent++; w.sent%100 < w.drop {
			continue
		}
		out <- &pb.WatchResponse{WatchId: id, Events: []*mvccpb.Event{e, {Kv: &mvccpb.KeyValue{Value: []byte("a put of somebody else")}}}}
	}
}

func (w *fakeWatch) Watch(stream pb.Watch_WatchServer) error {
	out := make(chan *pb.WatchResponse, 10_000)
	var receiver sync.WaitGroup
	defer receiver.Wait()
	receiver.Go(func() { w.receive(stream, out) })
	for {
		select {
		case r := <-out:
			if len(r.Events) > 0 {
				time.Sleep(w.delay)
			}
			if err := stream.Send(r); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (w *fakeWatch) receive(stream pb.Watch_WatchServer, out chan<- *pb.WatchResponse) {
	for {
		r, err := stream.Recv()
		if err != nil {
			return
		}
		w.mu.Lock()
		w.next++
		id := w.next
		if w.refuse == "" && string(r.GetCreateRequest().GetKey()) == "bench/0000000000" && string(r.GetCreateRequest().GetRangeEnd()) == "bench/:" {
			w.watchers[id] = out
		}
		w.mu.Unlock()
		out <- &pb.WatchResponse{WatchId: id, Created: true, Canceled: w.refuse != "", CancelReason: w.refuse}
	}
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startWatchFake(t, &fakeWatch{delay: time.Millisecond})
		o := f.options(Workload{Kind: Watch, Watchers: 10})
		o.Total, o.Rate, o.Conns = 100, 10, 2
		r := mustRun(t, o, 100+1000)
		put, event := r.Operation("put"), r.Operation("event")
		if put.Count != 100 || event.Count != 1000 || r.Missing != 0 {
			t.Errorf("%d puts, %d events, %d missing", put.Count, event.Count, r.Missing)
		}
		// Five watchers share a stream, whose events are a millisecond apart.
		if p := event.Max(); math.Abs(float64(p-5*time.Millisecond)) > float64(time.Millisecond)/10 {
			t.Errorf("events took at most %v, want 5ms", p)
		}
		if p := event.Percentile(20); math.Abs(float64(p-time.Millisecond)) > float64(time.Millisecond)/10 {
			t.Errorf("the first fifth of the events took %v, want 1ms", p)
		}
		timed := int64(0)
		for _, i := range r.Timeline {
			timed += i.Count
		}
		if timed != 1000 {
			t.Errorf("%d on the timeline, want the events", timed)
		}
	})
}

func TestMissingEventsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startWatchFake(t, &fakeWatch{drop: 5})
		o := f.options(Workload{Kind: Watch, Watchers: 10})
		o.Total, o.Timeout = 100, time.Minute
		if r := mustRun(t, o, 100+950); r.Missing != 50 || r.Elapsed > 2*time.Minute {
			t.Errorf("%d missing of 1000 of which 50 were dropped, %v", r.Missing, r.Elapsed)
		}
	})
}

func TestServerWithoutWatch(t *testing.T) {
	f := startFake(t)
	_, err := Run(t.Context(), f.options(Workload{Kind: Watch}))
	if !errors.Is(err, ErrNoWatch) || len(f.puts) > 0 {
		t.Errorf("%v after %d puts", err, len(f.puts))
	}
}

func TestRefusedWatchers(t *testing.T) {
	f := startWatchFake(t, &fakeWatch{refuse: "not you"})
	_, err := Run(t.Context(), f.options(Workload{Kind: Watch}))
	if err == nil || errors.Is(err, ErrNoWatch) || status.Code(err) == codes.OK || len(f.puts) > 0 {
		t.Errorf("%v after %d puts", err, len(f.puts))
	}
}

// A stream that breaks takes its watchers with it: that is seen.
func TestBrokenStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &fakeWatch{}
		f := startWatchFake(t, w)
		before, puts := f.before, 0
		f.before = func(ctx context.Context, r any) error {
			if puts++; puts == 50 {
				w.mu.Lock()
				for _, out := range w.watchers {
					out <- &pb.WatchResponse{Canceled: true, CancelReason: "too slow"}
				}
				clear(w.watchers)
				w.mu.Unlock()
			}
			return before(ctx, r)
		}
		o := f.options(Workload{Kind: Watch, Watchers: 4})
		o.Clients, o.Conns, o.Total = 1, 1, 100
		r, err := Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		e := r.Operation("event").Errors
		if len(e) != 1 || e[0].Count != 4 || e[0].Example != "too slow" || r.Missing != 4*51 || r.Operation("put").Count != 100 {
			t.Errorf("%+v, %d missing", e, r.Missing)
		}
	})
}
