package bench

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// MaxLatency bounds what histograms can hold: longer ones count as this.
const MaxLatency = 10 * time.Minute

// lastCode is the last one that gRPC defines.
const lastCode = codes.Unauthenticated

// recorder gathers what happened. Requests are recorded in one of several shards, so that clients do not wait for each
// other; at the end the shards are merged.
type recorder struct {
	kinds    []string
	first    int // kinds below are not in the timeline; set before anything is recorded
	interval int64
	shards   []*shard

	done, failed atomic.Int64 // as of the last advance

	mu       sync.Mutex
	open     map[int64]*window // intervals that have not ended everywhere
	free     []*window
	timeline []Interval
}

// shard is a part of what happened.
type shard struct {
	rec *recorder

	mu     sync.Mutex
	kinds  []tally
	at     int64 // the interval that now is filling
	window *window
	_      [64]byte // keeps neighbours' locks on other cache lines
}

// tally of one kind of request.
type tally struct {
	count, conflicts, keys int64
	latency                *hdrhistogram.Histogram
	errors                 map[codes.Code]*ErrorCount
}

// window of the timeline.
type window struct {
	count, failed int64 // of all kinds
	timed, errors int64 // of the kinds in the timeline
	latency       *hdrhistogram.Histogram
}

func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, int64(MaxLatency), 3)
}

func newWindow() *window {
	return &window{latency: hdrhistogram.New(int64(time.Microsecond), int64(MaxLatency), 2)}
}

func (w *window) reset() {
	w.count, w.failed, w.timed, w.errors = 0, 0, 0, 0
	w.latency.Reset()
}

func newRecorder(kinds []string, shards int, interval time.Duration) *recorder {
	r := &recorder{kinds: kinds, interval: int64(interval), open: map[int64]*window{}}
	for range shards {
		s := &shard{rec: r, kinds: make([]tally, len(kinds)), window: newWindow()}
		for k := range s.kinds {
			s.kinds[k] = tally{latency: newHistogram(), errors: map[codes.Code]*ErrorCount{}}
		}
		r.shards = append(r.shards, s)
	}
	return r
}

// outcome of a request besides its latency.
type outcome struct {
	err      error
	keys     int
	conflict bool
}

// record notes that a request of kind ended now, in nanoseconds from the start, having taken so long.
func (s *shard) record(kind int, now, latency int64, o outcome) {
	latency = min(max(latency, 0), int64(MaxLatency))
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := now / s.rec.interval; at > s.at {
		s.hand(at)
	}
	k := &s.kinds[kind]
	if o.err != nil {
		k.fail(o.err)
		s.window.failed++
		if kind >= s.rec.first {
			s.window.errors++
		}
		return
	}
	k.count++
	k.keys += int64(o.keys)
	if o.conflict {
		k.conflicts++
	}
	k.latency.RecordValue(latency)
	s.window.count++
	if kind >= s.rec.first {
		s.window.timed++
		s.window.latency.RecordValue(latency)
	}
}

func (k *tally) fail(err error) {
	st := status.Convert(err)
	code := st.Code()
	if code > lastCode {
		code = codes.Unknown
	}
	e := k.errors[code]
	if e == nil {
		e = &ErrorCount{Code: code, Outcome: OutcomeOf(code), Example: st.Message()}
		k.errors[code] = e
	}
	e.Count++
}

// hand gives the window of the interval that is over to the recorder. The caller has locked s.
func (s *shard) hand(next int64) {
	if s.window.count+s.window.failed > 0 {
		s.rec.add(s.at, s.window)
		s.window.reset()
	}
	s.at = next
}

func (r *recorder) add(at int64, w *window) {
	r.mu.Lock()
	defer r.mu.Unlock()
	sum := r.open[at]
	if sum == nil {
		if n := len(r.free); n > 0 {
			sum, r.free = r.free[n-1], r.free[:n-1]
		} else {
			sum = newWindow()
		}
		r.open[at] = sum
	}
	sum.count += w.count
	sum.failed += w.failed
	sum.timed += w.timed
	sum.errors += w.errors
	sum.latency.Merge(w.latency)
}

// advance ends all intervals before the one that now, in nanoseconds from the start, is in.
func (r *recorder) advance(now int64) {
	at := now / r.interval
	for _, s := range r.shards {
		s.mu.Lock()
		if at > s.at {
			s.hand(at)
		}
		s.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for next := int64(len(r.timeline)); next < at; next++ {
		i := Interval{Offset: time.Duration(next * r.interval)}
		if w := r.open[next]; w != nil {
			delete(r.open, next)
			i.Count, i.Errors = w.timed, w.errors
			if w.timed > 0 {
				i.P50 = time.Duration(w.latency.ValueAtPercentile(50))
				i.P99 = time.Duration(w.latency.ValueAtPercentile(99))
				i.Max = time.Duration(w.latency.Max())
			}
			r.done.Add(w.count)
			r.failed.Add(w.failed)
			w.reset()
			r.free = append(r.free, w)
		}
		r.timeline = append(r.timeline, i)
	}
}

// finish returns everything, at the end, elapsed after the start. Nothing may be recorded any more.
func (r *recorder) finish(elapsed time.Duration) ([]*Operation, []Interval) {
	r.advance(int64(elapsed) + r.interval)
	var operations []*Operation
	for k, name := range r.kinds {
		o := &Operation{Name: name, Latency: newHistogram()}
		errors := map[codes.Code]*ErrorCount{}
		for _, s := range r.shards {
			t := &s.kinds[k]
			o.Count += t.count
			o.Conflicts += t.conflicts
			o.Keys += t.keys
			o.Latency.Merge(t.latency)
			for code, e := range t.errors {
				if errors[code] == nil {
					errors[code] = &ErrorCount{Code: code, Outcome: e.Outcome, Example: e.Example}
				}
				errors[code].Count += e.Count
			}
		}
		for code := range lastCode + 1 {
			if e := errors[code]; e != nil {
				o.Errors = append(o.Errors, *e)
			}
		}
		operations = append(operations, o)
	}
	return operations, r.timeline
}

// count of requests of a kind that succeeded.
func (r *recorder) count(kind int) (n int64) {
	for _, s := range r.shards {
		s.mu.Lock()
		n += s.kinds[kind].count
		s.mu.Unlock()
	}
	return n
}
