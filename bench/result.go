package bench

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"
)

// Result is what a run has measured.
type Result struct {
	Options Options // with the defaults filled in
	// Start of the measured part, with the monotonic clock.
	Start   time.Time
	Elapsed time.Duration // of the measured part, until its last answer
	// Loaded is the number of keys written beforehand.
	Loaded     int
	Operations []*Operation // in the order in which the workload names them
	// Timeline has an interval for each Options.Interval from Start on, without gaps. A request belongs to the one in which
	// its answer came. In a Watch workload it is of events, else of all operations.
	Timeline []Interval

	// ClientCPU is the processor time of this whole process during the measured part.
	ClientCPU time.Duration
	// Unsent is the number of requests of an open loop that were due, but could not be sent before the end, because all
	// clients were waiting. They are in no other figure: above 0, the server, or this machine, did not bear the rate.
	Unsent int64
	// MaxLag is the longest that a request of an open loop was sent after it was due.
	MaxLag time.Duration
	// Missing is the number of events of a Watch workload that had not come within Options.Timeout after the last put. If
	// puts failed, but were made nevertheless, it is too low by their events.
	Missing int64
}

// Operation is what became of the requests of one kind.
type Operation struct {
	// Name is "put", "get", "range", "txn"; of Mixed "read", "update", "insert", "scan", "read-modify-write"; of Watch
	// "put" and "event", where an event is one that one watcher received, and its latency counts from the begin of the put.
	Name      string
	Count     int64 // requests that succeeded
	Conflicts int64 // of these, compare-and-puts that found the key changed and wrote nothing
	Keys      int64 // that were read or written
	Errors    []ErrorCount
	// Latency of requests that succeeded, in nanoseconds, to three digits, at most MaxLatency.
	Latency *hdrhistogram.Histogram
}

// Failed is the number of requests that failed.
func (o *Operation) Failed() int64 {
	var n int64
	for _, e := range o.Errors {
		n += e.Count
	}
	return n
}

// Percentile returns the latency that p percent of the requests did not exceed; 0 without requests.
func (o *Operation) Percentile(p float64) time.Duration {
	return time.Duration(o.Latency.ValueAtPercentile(p))
}

// Mean latency; 0 without requests.
func (o *Operation) Mean() time.Duration {
	if o.Count == 0 {
		return 0
	}
	return time.Duration(o.Latency.Mean())
}

// Max is the longest latency.
func (o *Operation) Max() time.Duration { return time.Duration(o.Latency.Max()) }

// Outcome says whether a request that failed may have changed something.
type Outcome string

// Outcomes of requests that failed.
const (
	Definite Outcome = "definite" // nothing was changed
	Unknown  Outcome = "unknown"  // it may or may not have happened
)

// ErrorCount counts errors of one code.
type ErrorCount struct {
	Code    codes.Code
	Outcome Outcome
	Count   int64
	Example string // message of the first
}

// OutcomeOf tells what a code says about a request. Those that leave it open are Unknown.
func OutcomeOf(code codes.Code) Outcome {
	switch code {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied, codes.Unauthenticated,
		codes.ResourceExhausted, codes.FailedPrecondition, codes.OutOfRange, codes.Unimplemented:
		return Definite
	}
	return Unknown
}

// Interval is a part of the timeline.
type Interval struct {
	Offset        time.Duration // of its begin, from Result.Start
	Count, Errors int64         // requests that succeeded and that failed
	P50, P99, Max time.Duration // latency of those that succeeded, to two digits; 0 without any
}

// Count is the number of requests of all operations that succeeded; of a Watch workload, puts and events.
func (r *Result) Count() (n int64) {
	for _, o := range r.Operations {
		n += o.Count
	}
	return n
}

// Failed is the number of requests of all operations that failed.
func (r *Result) Failed() (n int64) {
	for _, o := range r.Operations {
		n += o.Failed()
	}
	return n
}

// PerSecond is the rate at which an operation succeeded.
func (r *Result) PerSecond(o *Operation) float64 { return perSecond(o.Count, r.Elapsed) }

// ClientCPUPerOperation is ClientCPU divided by all requests, those that failed among them.
func (r *Result) ClientCPUPerOperation() time.Duration {
	return r.ClientCPU / time.Duration(max(1, r.Count()+r.Failed()))
}

// Operation returns the one with a name, or nil.
func (r *Result) Operation(name string) *Operation {
	for _, o := range r.Operations {
		if o.Name == name {
			return o
		}
	}
	return nil
}

func perSecond(n int64, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return float64(n) / d.Seconds()
}
