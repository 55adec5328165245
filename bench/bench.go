// Package bench puts load on a server of etcd's API, kvd or another, and measures how it answers.
//
// Requests are encoded and answers read by hand over plain gRPC connections, so that the client takes as little of a
// shared machine as it can; what it takes is in the result.
package bench

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Kind says what the requests of a workload are.
type Kind string

// The kinds of workload.
const (
	Put   Kind = "put"   // writes of random keys
	Get   Kind = "get"   // reads of random keys that are there
	Range Kind = "range" // reads of Workload.RangeKeys neighbouring keys
	Txn   Kind = "txn"   // compare-and-put: the write goes through if nobody has written the key since this client knew it
	Mixed Kind = "mixed" // one of the core workloads of YCSB: see Workload.Shape
	Watch Kind = "watch" // puts, and Workload.Watchers watchers that see each of them
)

// Kinds lists them all.
var Kinds = []Kind{Put, Get, Range, Txn, Mixed, Watch}

// Order says which of the keys a request is for.
type Order string

// The orders of keys.
const (
	Random     Order = "random"     // all keys alike
	Sequential Order = "sequential" // one after the other, and again
	Zipfian    Order = "zipfian"    // few keys often, scattered over the key space: see zipfian.go
)

// Orders lists them all.
var Orders = []Order{Random, Sequential, Zipfian}

// Workload is what is asked of the server. Fields that the kind does not name are ignored.
type Workload struct {
	Kind Kind // required
	// Shape of Mixed: "A" to "F" as in YCSB's core workloads, with keys chosen by scrambled zipfian:
	// A half reads, half updates; B 95% reads, 5% updates; C reads; D 95% reads of the newest keys, 5% inserts;
	// E 95% scans of 1 to 100 keys, 5% inserts; F half reads, half read-modify-writes (a read, then a put if the key is
	// still at the revision read; measured as one operation).
	Shape        string
	Order        Order // of Put, Get, Range and Txn; default Random
	Serializable bool  // reads are answered by any node from what it has; otherwise they are linearizable
	RangeKeys    int   // keys in a Range; default 100
	Watchers     int   // of Watch; default 100
}

// Options of a run. The zero value of each has the default it names; Endpoints and Workload.Kind have none.
type Options struct {
	Endpoints []string    // host:port of nodes; connections go to them in turn
	TLS       *tls.Config // nil: plain text
	// Dial opens connections; nil: TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	Workload Workload
	Clients  int // each has one request under way; default 1. With Rate, they bound the requests under way
	Conns    int // connections that clients share; default: one for 50 clients, at least one for each endpoint
	// Rate is the number of requests that become due per second, whatever becomes of those before (open loop). A request's
	// latency counts from when it was due, not from when it was sent: a server that stalls can't hide it by holding up
	// the client (coordinated omission). 0: every client sends its next request once the last is answered (closed loop).
	Rate float64

	Total    int           // requests; 0: until Duration is over
	Duration time.Duration // of the measured part; 0: until Total; if both are 0, DefaultDuration
	Warmup   time.Duration // before the measured part, with the same load, not measured
	Timeout  time.Duration // after which a request is given up; default 5 s

	Keys       int    // different keys; default 10,000. Workloads that read write them first
	KeyBytes   int    // default: the length of Prefix and 10 digits
	ValueBytes int    // default 256, less than 0: empty values. Values are random and do not compress
	Prefix     string // of all keys; default DefaultPrefix
	SkipLoad   bool   // the keys are there already
	Seed       uint64 // of keys, values and the mix of operations; 0: 1

	Interval time.Duration  // of Result.Timeline; default 100 ms
	Progress func(Progress) // nil, or called some times a second, by one goroutine at a time
	// Observe is nil, or called after each measured request, concurrently. It must be quick.
	Observe func(Sample)
}

// Defaults of Options.
const (
	DefaultDuration   = 10 * time.Second
	DefaultTimeout    = 5 * time.Second
	DefaultKeys       = 10_000
	DefaultValueBytes = 256
	DefaultPrefix     = "bench/"
	DefaultInterval   = 100 * time.Millisecond
	DefaultRangeKeys  = 100
	DefaultWatchers   = 100

	defaultDigits  = 10 // of the number of a key
	clientsPerConn = 50
)

// Bounds of Options.
const (
	MaxClients    = 100_000
	MaxConns      = 10_000
	MaxRate       = 10_000_000
	MaxKeys       = 100_000_000
	MaxKeyBytes   = 4096
	MaxValueBytes = 1 << 20
	MaxRangeKeys  = 100_000
	MaxWatchers   = 100_000
	MinInterval   = time.Millisecond

	maxScanKeys = 100
)

var (
	// ErrOptions: the options contradict themselves or exceed a bound. Nothing was sent.
	ErrOptions = errors.New("bench: invalid options")
	// ErrUnreachable: an endpoint could not be connected to before the run. The error is an *UnreachableError.
	ErrUnreachable = errors.New("bench: unreachable")
	// ErrNoWatch: the server does not offer watches.
	ErrNoWatch = errors.New("bench: the server has no Watch")
	// ErrLoad: the keys that the workload reads could not be written.
	ErrLoad = errors.New("bench: load keys")
)

// UnreachableError names the endpoint that could not be connected to.
type UnreachableError struct{ Endpoint string }

func (e *UnreachableError) Error() string { return "bench: cannot connect to " + e.Endpoint }

// Unwrap returns ErrUnreachable.
func (e *UnreachableError) Unwrap() error { return ErrUnreachable }

// Progress is how far a run is.
type Progress struct {
	Phase       string        // "load", "warmup" or "run"
	Done, Total int64         // requests of the phase; Total is 0 where Duration decides
	Elapsed     time.Duration // of the phase
	Duration    time.Duration // of the phase; 0 where Total decides
	PerSecond   float64       // requests that succeeded of late
	Errors      int64         // requests that failed, of the phase
}

// Sample is one request.
type Sample struct {
	Operation  string    // as Operation.Name
	Begin, End time.Time // Begin is when it was due in an open loop, else when it was sent; both have the monotonic clock
	Err        error     // nil: success; else a gRPC status
}

// withDefaults fills in what is not set.
func (o Options) withDefaults() Options {
	w := &o.Workload
	w.Order = cmp.Or(w.Order, Random)
	w.RangeKeys = cmp.Or(w.RangeKeys, DefaultRangeKeys)
	w.Watchers = cmp.Or(w.Watchers, DefaultWatchers)
	o.Clients = cmp.Or(o.Clients, 1)
	if o.Conns == 0 {
		o.Conns = max(len(o.Endpoints), (o.Clients+clientsPerConn-1)/clientsPerConn)
	}
	if o.Total == 0 && o.Duration == 0 {
		o.Duration = DefaultDuration
	}
	o.Timeout = cmp.Or(o.Timeout, DefaultTimeout)
	o.Keys = cmp.Or(o.Keys, DefaultKeys)
	o.Prefix = cmp.Or(o.Prefix, DefaultPrefix)
	o.KeyBytes = cmp.Or(o.KeyBytes, len(o.Prefix)+defaultDigits)
	o.ValueBytes = max(0, cmp.Or(o.ValueBytes, DefaultValueBytes))
	o.Seed = cmp.Or(o.Seed, 1)
	o.Interval = cmp.Or(o.Interval, DefaultInterval)
	return o
}

// Validate returns an ErrOptions that says in one line what is wrong.
func (o Options) Validate() error {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrOptions, err)
	}
	return nil
}

func (o Options) validate() error {
	w := o.Workload
	if err := o.checkBounds(); err != nil {
		return err
	}
	switch {
	case len(o.Endpoints) == 0 || slices.Contains(o.Endpoints, ""):
		return errors.New("an endpoint is missing")
	case !slices.Contains(Kinds, w.Kind):
		return fmt.Errorf("%q is no workload: there are %s", w.Kind, list(Kinds))
	case w.Kind == Mixed && mixes[w.Shape] == nil:
		return fmt.Errorf("%q is no shape of a mixed workload: there are A to F", w.Shape)
	case !slices.Contains(Orders, w.Order):
		return fmt.Errorf("%q is no order of keys: there are %s", w.Order, list(Orders))
	case math.IsNaN(o.Rate) || o.Rate < 0 || o.Rate > MaxRate:
		return fmt.Errorf("the rate must be above 0 and at most %d requests per second", MaxRate)
	case o.Rate > 0 && o.Rate < 0.001:
		return errors.New("the rate must be at least 0.001 requests per second")
	case o.Total < 0 || o.Duration < 0 || o.Warmup < 0 || o.Timeout < 0:
		return errors.New("the total, the duration, the warmup and the timeout must not be below 0")
	case o.Interval < MinInterval:
		return fmt.Errorf("the interval must be at least %v", MinInterval)
	case w.Kind == Watch && o.ValueBytes < minWatchValueBytes:
		return fmt.Errorf("values of a watch workload have at least %d bytes, for the time of the put", minWatchValueBytes)
	case w.Kind == Watch && o.Warmup > 0:
		return errors.New("a watch workload has no warmup")
	case w.Kind == Range && w.RangeKeys > o.Keys:
		return fmt.Errorf("a range of %d keys is larger than all %d keys", w.RangeKeys, o.Keys)
	case o.Conns > o.Clients && w.Kind != Watch && o.Conns > len(o.Endpoints):
		return fmt.Errorf("%d connections are more than %d clients can use", o.Conns, o.Clients)
	}
	return nil
}

// checkBounds tells the first bound that is not kept.
func (o Options) checkBounds() error {
	digits := len(strconv.Itoa(o.Keys - 1))
	for _, bound := range []struct {
		what             string
		value, low, high int
	}{
		{"clients", o.Clients, 1, MaxClients},
		{"connections", o.Conns, 1, MaxConns},
		{"keys", o.Keys, 1, MaxKeys},
		{"the key size", o.KeyBytes, len(o.Prefix) + digits, MaxKeyBytes},
		{"the value size", o.ValueBytes, 0, MaxValueBytes},
		{"keys in a range", o.Workload.RangeKeys, 1, MaxRangeKeys},
		{"watchers", o.Workload.Watchers, 1, MaxWatchers},
	} {
		if bound.value < bound.low || bound.value > bound.high {
			return fmt.Errorf("%s must be from %d to %d, not %d", bound.what, bound.low, bound.high, bound.value)
		}
	}
	return nil
}

func list[T ~string](all []T) string {
	var s strings.Builder
	for i, v := range all {
		if i > 0 {
			s.WriteString(", ")
		}
		s.WriteString(string(v))
	}
	return s.String()
}
