package bench

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const ms = int64(time.Millisecond)

func TestTimelineHasNoGaps(t *testing.T) {
	r := newRecorder([]string{"put"}, 2, 100*time.Millisecond)
	r.shards[0].record(0, 10*ms, 4*ms, outcome{})
	r.shards[1].record(0, 20*ms, 8*ms, outcome{})
	r.advance(50 * ms)
	r.shards[0].record(0, 99*ms, 2*ms, outcome{err: status.Error(codes.Unavailable, "away")})
	r.advance(150 * ms)
	r.shards[1].record(0, 99*ms, 6*ms, outcome{}) // its interval is over
	r.shards[1].record(0, 420*ms, 40*ms, outcome{})
	_, timeline := r.finish(450 * time.Millisecond)
	about := func(d time.Duration, want int64) bool {
		return d >= time.Duration(want*99/100) && d <= time.Duration(want*101/100)
	}
	if len(timeline) != 5 {
		t.Fatalf("%d intervals: %+v", len(timeline), timeline)
	}
	for i, want := range []struct{ count, errors, p50, max int64 }{{2, 1, 4 * ms, 8 * ms}, {1, 0, 6 * ms, 6 * ms}, {}, {}, {1, 0, 40 * ms, 40 * ms}} {
		got := timeline[i]
		if got.Offset != time.Duration(i)*100*time.Millisecond || got.Count != want.count || got.Errors != want.errors ||
			!about(got.P50, want.p50) || !about(got.Max, want.max) || !about(got.P99, want.max) {
			t.Errorf("interval %d: %+v, want %+v", i, got, want)
		}
	}
}

// Whatever the shards, nothing is lost or counted twice, and percentiles are those of the sorted latencies.
func TestRecorderAddsUp(t *testing.T) {
	rng := seeded(t)
	r := newRecorder([]string{"a", "b"}, 3, 10*time.Millisecond)
	const n = 20_000
	var latencies []int64
	var want [2]tally
	now := int64(0)
	for range n {
		now += rng.Int64N(ms / 10)
		kind, latency := rng.IntN(2), int64(rand.New(rng).ExpFloat64()*float64(ms))
		o := outcome{keys: rng.IntN(3), conflict: rng.IntN(4) == 0}
		if rng.IntN(10) == 0 {
			o = outcome{err: status.Error(codes.Code(1+rng.IntN(16)), "no")}
		} else {
			want[kind].count++
			want[kind].keys += int64(o.keys)
			if o.conflict {
				want[kind].conflicts++
			}
			if kind == 0 {
				latencies = append(latencies, latency)
			}
		}
		r.shards[rng.IntN(3)].record(kind, now, latency, o)
		if rng.IntN(100) == 0 {
			r.advance(now)
		}
	}
	operations, timeline := r.finish(time.Duration(now))
	failed, timed := int64(0), int64(0)
	for k, o := range operations {
		failed += o.Failed()
		if o.Count != want[k].count || o.Keys != want[k].keys || o.Conflicts != want[k].conflicts || o.Latency.TotalCount() != o.Count {
			t.Errorf("%+v, want %+v", o, want[k])
		}
		if !slices.IsSortedFunc(o.Errors, func(a, b ErrorCount) int { return int(a.Code) - int(b.Code) }) {
			t.Errorf("errors not in order: %v", o.Errors)
		}
	}
	if sum := operations[0].Count + operations[1].Count + failed; sum != n {
		t.Errorf("%d requests, want %d", sum, n)
	}
	for _, i := range timeline {
		timed += i.Count + i.Errors
	}
	if timed != n || r.done.Load()+r.failed.Load() != n {
		t.Errorf("%d requests on the timeline, %d seen by the progress, want %d", timed, r.done.Load()+r.failed.Load(), n)
	}
	slices.Sort(latencies)
	for _, p := range []float64{50, 90, 99, 99.9} {
		want := float64(latencies[int(float64(len(latencies))*p/100+0.5)-1])
		if got := float64(operations[0].Percentile(p)); got < want*0.998 || got > want*1.002 {
			t.Errorf("p%v is %v, want %v", p, got, want)
		}
	}
}

func TestLatencyIsBounded(t *testing.T) {
	r := newRecorder([]string{"put"}, 1, time.Second)
	r.shards[0].record(0, 0, int64(24*time.Hour), outcome{})
	r.shards[0].record(0, 0, -5, outcome{})
	operations, _ := r.finish(0)
	if o := operations[0]; o.Count != 2 || o.Latency.TotalCount() != 2 || o.Max() < MaxLatency || o.Max() > MaxLatency*101/100 {
		t.Errorf("%d of %d, at most %v", o.Latency.TotalCount(), o.Count, o.Max())
	}
}

func TestUnheardCodesAreUnknown(t *testing.T) {
	r := newRecorder([]string{"put"}, 1, time.Second)
	r.shards[0].record(0, 0, 0, outcome{err: status.Error(codes.Code(99), "new")})
	operations, _ := r.finish(0)
	if e := operations[0].Errors; len(e) != 1 || e[0].Code != codes.Unknown || e[0].Outcome != Unknown || e[0].Count != 1 {
		t.Errorf("%+v", e)
	}
}
