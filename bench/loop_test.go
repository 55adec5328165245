package bench

import (
	"context"
	"errors"
	"math"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// stalling makes a server answer after latency, but from `from` after its first request on it answers nobody for long.
func stalling(f *fake, latency, from, long time.Duration) {
	var first atomic.Pointer[time.Time]
	f.before = func(context.Context, any) error {
		now := time.Now()
		first.CompareAndSwap(nil, &now)
		time.Sleep(latency)
		if since := time.Since(*first.Load()); since >= from && since < from+long {
			time.Sleep(from + long - since)
		}
		return nil
	}
}

// A server that stalls for one second of ten shows that to a tenth of the requests of an open loop: those that were due
// meanwhile. In a closed loop it makes the clients stall, too, and few requests see it. Time is the bubble's.
func TestAStallShowsInAnOpenLoop(t *testing.T) {
	run := func(t *testing.T, rate float64, latency time.Duration) (r *Result) {
		synctest.Test(t, func(t *testing.T) {
			f := startFake(t)
			stalling(f, latency, 4*time.Second, time.Second)
			o := f.options(Workload{Kind: Put})
			o.Total, o.Duration, o.Rate = 0, 10*time.Second, rate
			var err error
			if r, err = Run(t.Context(), o); err != nil {
				t.Fatal(err)
			}
		})
		return r
	}
	open, closed := run(t, 200, time.Millisecond), run(t, 0, 10*time.Millisecond)
	about := func(what string, got, want time.Duration) {
		if math.Abs(float64(got-want)) > 0.02*float64(want)+float64(time.Millisecond) {
			t.Errorf("%s is %v, want about %v", what, got, want)
		}
	}
	// The latencies of the stall's requests, the last tenth of all, run evenly from 1 s down to the 50 ms that it takes
	// four clients to catch up.
	o := open.Operation("put")
	about("the open loop's p50", o.Percentile(50), time.Millisecond)
	about("the open loop's p95", o.Percentile(95), 525*time.Millisecond)
	about("the open loop's p99", o.Percentile(99), 905*time.Millisecond)
	about("the open loop's max", o.Max(), time.Second)
	about("the lag", open.MaxLag, time.Second)
	if o.Count != 2000 || open.Unsent != 0 {
		t.Errorf("%d requests, %d not sent", o.Count, open.Unsent)
	}
	about("the closed loop's p99", closed.Operation("put").Percentile(99), 10*time.Millisecond)
	about("the closed loop's max", closed.Operation("put").Max(), time.Second)

	// And in the timeline: ten intervals without an answer, then one with all that waited.
	for i := 41; i < 50; i++ {
		if open.Timeline[i].Count != 0 {
			t.Errorf("interval %d has %d answers", i, open.Timeline[i].Count)
		}
	}
	if after := open.Timeline[50]; after.Count < 150 || after.Max < 900*time.Millisecond {
		t.Errorf("after the stall: %+v", after)
	}
}

func TestUnsentRequestsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		stalling(f, time.Millisecond, time.Second, 3*time.Second)
		o := f.options(Workload{Kind: Put})
		o.Total, o.Duration, o.Rate = 0, 2*time.Second, 100
		r, err := Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if sent := r.Count(); sent+r.Unsent != 200 || r.Unsent < 90 {
			t.Errorf("%d sent, %d not, of 200 that were due", sent, r.Unsent)
		}
	})
}

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		o := f.options(Workload{Kind: Put})
		o.Total, o.Rate = 500, 1000
		r := mustRun(t, o, 500)
		if r.Elapsed < 499*time.Millisecond || r.Elapsed > 510*time.Millisecond {
			t.Errorf("500 requests at 1000 per second took %v", r.Elapsed)
		}
		for _, i := range r.Timeline[:5] {
			if i.Count < 99 || i.Count > 101 {
				t.Errorf("%+v", i)
			}
		}
	})
}

func TestWarmupIsNotMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		f.before = func(context.Context, any) error { time.Sleep(10 * time.Millisecond); return nil }
		o := f.options(Workload{Kind: Put})
		var observed atomic.Int64
		o.Clients, o.Total, o.Duration, o.Warmup = 2, 0, time.Second, 2*time.Second
		o.Observe = func(s Sample) {
			observed.Add(1)
			if s.End.Sub(s.Begin) != 10*time.Millisecond || s.Operation != "put" || s.Err != nil {
				t.Errorf("%+v", s)
			}
		}
		mustRun(t, o, 200)
		if len(f.puts) != 600 || observed.Load() != 200 {
			t.Errorf("%d puts, %d observed", len(f.puts), observed.Load())
		}
	})
}

// A request without an answer is given up, its outcome is unknown, and the client goes on.
func TestHangingRequestsAreGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		var n atomic.Int64
		f.before = func(ctx context.Context, _ any) error {
			if n.Add(1)%10 == 0 {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		o := f.options(Workload{Kind: Put})
		o.Clients, o.Total, o.Timeout = 1, 30, 2*time.Second
		r, err := Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		errs := r.Operations[0].Errors
		if len(errs) != 1 || errs[0].Code != codes.DeadlineExceeded || errs[0].Outcome != Unknown || errs[0].Count != 3 || r.Count() != 27 {
			t.Errorf("%d succeeded, %+v", r.Count(), errs)
		}
		if r.Elapsed < 6*time.Second || r.Elapsed > 7*time.Second {
			t.Errorf("took %v", r.Elapsed)
		}
	})
}

func TestErrorsAreCountedByCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		var n atomic.Int64
		f.before = func(context.Context, any) error {
			switch n.Add(1) % 4 {
			case 0:
				return status.Error(codes.ResourceExhausted, "too much")
			case 1:
				return status.Error(codes.Unavailable, "no leader")
			}
			return nil
		}
		r, err := Run(t.Context(), f.options(Workload{Kind: Put}))
		if err != nil {
			t.Fatal(err)
		}
		errs := r.Operations[0].Errors
		want := []ErrorCount{{codes.ResourceExhausted, Definite, 50, "too much"}, {codes.Unavailable, Unknown, 50, "no leader"}}
		if r.Count() != 100 || r.Failed() != 100 || len(errs) != 2 || errs[0] != want[0] || errs[1] != want[1] {
			t.Errorf("%d succeeded, %+v", r.Count(), errs)
		}
	})
}

// Clients whose node dies go to the next one after the request that showed them, and come back when it does.
func TestClientsLeaveADeadNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		steady, dying := startFake(t), startFake(t)
		slow := func(context.Context, any) error { time.Sleep(10 * time.Millisecond); return nil }
		steady.before, dying.before = slow, slow
		o := steady.options(Workload{Kind: Put})
		o.Endpoints, o.Clients, o.Conns, o.Total, o.Duration = []string{"steady", "dying"}, 4, 2, 0, 10*time.Second
		var down atomic.Bool
		var live atomic.Pointer[net.Conn]
		o.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			if address == "steady" {
				return steady.dial(ctx, "")
			}
			if down.Load() {
				return nil, errors.New("connection refused")
			}
			conn, err := dying.dial(ctx, "")
			live.Store(&conn)
			return conn, err
		}
		var after, during atomic.Int64
		begin := time.Now()
		dying.before = func(ctx context.Context, r any) error {
			switch since := time.Since(begin); {
			case since > 7*time.Second:
				after.Add(1)
			case since > 3*time.Second && since < 5*time.Second:
				during.Add(1)
			}
			return slow(ctx, r)
		}
		kill := time.AfterFunc(2995*time.Millisecond, func() {
			down.Store(true)
			(*live.Load()).Close()
		})
		revive := time.AfterFunc(5*time.Second, func() { down.Store(false) })
		defer kill.Stop()
		defer revive.Stop()
		r, err := Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if r.Failed() < 1 || r.Failed() > 2 {
			t.Errorf("%d requests failed, want those of two clients at most: %+v", r.Failed(), r.Operations[0].Errors)
		}
		if r.Count() < 3900 {
			t.Errorf("%d requests succeeded of 4000", r.Count())
		}
		if during.Load() > 0 || after.Load() < 500 {
			t.Errorf("%d requests reached the node while it was dead, %d after it came back", during.Load(), after.Load())
		}
	})
}

func TestInterruptedRunKeepsWhatItMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		f.before = func(context.Context, any) error { time.Sleep(10 * time.Millisecond); return nil }
		o := f.options(Workload{Kind: Put})
		o.Total, o.Duration = 0, time.Hour
		ctx, cancel := context.WithTimeout(t.Context(), 1005*time.Millisecond)
		defer cancel()
		r, err := Run(ctx, o)
		if !errors.Is(err, context.DeadlineExceeded) || r == nil || r.Count() != 400 || r.Failed() != 0 {
			t.Fatalf("%v, %+v", err, r)
		}
		o.Warmup = time.Hour
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if r, err := Run(ctx, o); !errors.Is(err, context.DeadlineExceeded) || r != nil {
			t.Errorf("%v, %+v", err, r)
		}
	})
}

func TestUnreachable(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Put})
	o.Endpoints, o.Conns = []string{"here", "gone"}, 2
	o.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		if address == "gone" {
			return nil, errors.New("connection refused")
		}
		return f.dial(ctx, address)
	}
	_, err := Run(t.Context(), o)
	if e, ok := errors.AsType[*UnreachableError](err); !ok || e.Endpoint != "gone" || !errors.Is(err, ErrUnreachable) {
		t.Errorf("%v", err)
	}
	if len(f.puts) != 0 {
		t.Error("the load went to the others")
	}
}

func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		f.before = func(context.Context, any) error { time.Sleep(10 * time.Millisecond); return nil }
		o := f.options(Workload{Kind: Get})
		o.Total, o.Duration, o.Warmup, o.Keys = 0, 2*time.Second, 2*time.Second, 5_000
		var phases []string
		var last Progress
		o.Progress = func(p Progress) {
			if len(phases) == 0 || phases[len(phases)-1] != p.Phase {
				phases = append(phases, p.Phase)
			}
			last = p
			if p.Phase == "run" && p.Elapsed > time.Second && math.Abs(p.PerSecond-400) > 20 {
				t.Errorf("%+v", p)
			}
		}
		r := mustRun(t, o, 800)
		if len(phases) != 3 || phases[0] != "load" || phases[1] != "warmup" || last.Phase != "run" || last.Done < 700 || last.Duration != 2*time.Second {
			t.Errorf("%v, %+v", phases, last)
		}
		if r.Loaded != 5_000 || len(f.keys) != 5_000 {
			t.Errorf("%d keys loaded, %d there", r.Loaded, len(f.keys))
		}
	})
}
