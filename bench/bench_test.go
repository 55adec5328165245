package bench

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// mustRun runs and wants no errors and count operations.
func mustRun(t *testing.T, o Options, count int64) *Result {
	t.Helper()
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if r.Count() != count || r.Failed() != 0 {
		t.Fatalf("%d operations and %d failures, want %d and none: %+v", r.Count(), r.Failed(), count, r.Operations)
	}
	return r
}

func TestPut(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Put})
	o.ValueBytes = 100
	r := mustRun(t, o, 200)
	if len(f.puts) != 200 || len(f.keys) > 50 || r.Loaded != 0 {
		t.Fatalf("%d puts of %d keys, %d loaded", len(f.puts), len(f.keys), r.Loaded)
	}
	values := map[string]bool{}
	for _, p := range f.puts {
		if len(p.Key) != len(DefaultPrefix)+defaultDigits || len(p.Value) != 100 {
			t.Fatalf("put %q of %d bytes", p.Key, len(p.Value))
		}
		values[string(p.Value)] = true
	}
	if len(values) < 190 {
		t.Errorf("%d values only differ", len(values))
	}
	if o := r.Operation("put"); o.Latency.TotalCount() != 200 || o.Max() <= 0 {
		t.Errorf("%d latencies, the longest %v", o.Latency.TotalCount(), o.Max())
	}
	var timed int64
	for _, i := range r.Timeline {
		timed += i.Count
	}
	if timed != 200 {
		t.Errorf("%d requests on the timeline", timed)
	}
}

func TestEmptyValues(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Put})
	o.ValueBytes = -1
	mustRun(t, o, 200)
	if i := slices.IndexFunc(f.puts, func(p *pb.PutRequest) bool { return len(p.Value) > 0 }); i >= 0 {
		t.Errorf("put %v", f.puts[i])
	}
}

func TestSequentialPutsEveryKeyOnce(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Put, Order: Sequential})
	o.Keys, o.KeyBytes, o.Prefix = 200, 12, "x/"
	mustRun(t, o, 200)
	if len(f.keys) != 200 || f.keys[0] != "x/0000000000" || f.keys[199] != "x/0000000199" {
		t.Errorf("%d keys: %v", len(f.keys), f.keys)
	}
}

// One client asks for the same things with the same seed, and for others with another.
func TestSeed(t *testing.T) {
	trace := func(seed uint64) string {
		f := startFake(t)
		o := f.options(Workload{Kind: Mixed, Shape: "F"})
		o.Clients, o.Seed = 1, seed
		mustRun(t, o, 200)
		var s strings.Builder
		for _, r := range f.ranges {
			fmt.Fprintf(&s, "%s ", r.Key)
		}
		for _, p := range f.puts[50:] { // those before were loaded by many
			fmt.Fprintf(&s, "%s %x ", p.Key, p.Value)
		}
		return s.String()
	}
	first, again, other := trace(7), trace(7), trace(8)
	if first != again {
		t.Error("two runs with one seed differ")
	}
	if first == other {
		t.Error("two seeds make the same run")
	}
}

func TestGet(t *testing.T) {
	for _, serializable := range []bool{false, true} {
		f := startFake(t)
		r := mustRun(t, f.options(Workload{Kind: Get, Serializable: serializable}), 200)
		if r.Loaded != 50 || len(f.keys) != 50 || len(f.ranges) != 200 || r.Operation("get").Keys != 200 {
			t.Errorf("%d of %d keys loaded, %d reads of %d keys", r.Loaded, len(f.keys), len(f.ranges), r.Operation("get").Keys)
		}
		for _, g := range f.ranges {
			if g.Serializable != serializable || len(g.RangeEnd) > 0 {
				t.Fatalf("read %v", g)
			}
		}
	}
}

func TestGetOfMissingKeysFails(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Get})
	o.SkipLoad, o.Total = true, 5
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if e := r.Operation("get").Errors; len(e) != 1 || e[0].Code != codes.NotFound || e[0].Count != 5 || r.Count() != 0 {
		t.Errorf("%d succeeded, %+v", r.Count(), e)
	}
}

func TestRange(t *testing.T) {
	f := startFake(t)
	r := mustRun(t, f.options(Workload{Kind: Range, RangeKeys: 20}), 200)
	if keys := r.Operation("range").Keys; keys != 200*20 {
		t.Errorf("%d keys in 200 ranges of 20", keys)
	}
}

// Nobody but this run writes: with one client no compare fails, with many some do, and every put that went through is there.
func TestTxn(t *testing.T) {
	for _, clients := range []int{1, 16} {
		f := startFake(t)
		o := f.options(Workload{Kind: Txn})
		o.Clients, o.Keys, o.Total = clients, 5, 400
		r := mustRun(t, o, 400)
		conflicts := r.Operation("txn").Conflicts
		if got := int64(len(f.puts) - 5); got+conflicts != 400 {
			t.Errorf("%d clients: %d puts and %d conflicts", clients, got, conflicts)
		}
		if clients == 1 && conflicts > 0 {
			t.Errorf("%d conflicts with nobody", conflicts)
		}
	}
}

// A client learns from a compare that fails: the next one of the same key goes through.
func TestTxnLearns(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Txn})
	var once atomic.Bool
	o.Clients, o.Keys, o.Total = 1, 1, 10
	f.before = func(_ context.Context, r any) error {
		if _, ok := r.(*pb.TxnRequest); ok && once.CompareAndSwap(false, true) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.revision++
			f.put(&pb.PutRequest{Key: []byte(f.keys[0])})
		}
		return nil
	}
	if r := mustRun(t, o, 10); r.Operation("txn").Conflicts != 1 {
		t.Errorf("%d conflicts after one write of another", r.Operation("txn").Conflicts)
	}
}

func TestMixes(t *testing.T) {
	const total = 1000
	for shape, shares := range mixes {
		t.Run(shape, func(t *testing.T) {
			f := startFake(t)
			o := f.options(Workload{Kind: Mixed, Shape: shape})
			o.Total, o.Keys, o.Clients = total, 300, 8
			r := mustRun(t, o, total)
			for i, s := range shares {
				got := r.Operations[i]
				if got.Name != s.name || s.percent < 100 && deviation(int(got.Count), total, float64(s.percent)/100) > 6 {
					t.Errorf("%d of %d are %s, want %d%%", got.Count, total, got.Name, s.percent)
				}
			}
			inserted := int64(0)
			if o := r.Operation("insert"); o != nil {
				inserted = o.Count
			}
			if int64(len(f.keys)) != 300+inserted || f.keys[len(f.keys)-1] != fmt.Sprintf("bench/%010d", 300+inserted-1) {
				t.Errorf("%d keys after %d inserts, the last %s", len(f.keys), inserted, f.keys[len(f.keys)-1])
			}
		})
	}
}

// The reads of D are of keys that are there, most of them of the newest few.
func TestReadLatest(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Mixed, Shape: "D"})
	o.Total, o.Keys, o.Clients = 1500, 1000, 8
	mustRun(t, o, 1500)
	hits := map[string]int{}
	for _, r := range f.ranges {
		hits[string(r.Key)]++
	}
	recent := 0
	for _, key := range f.keys[1000-50:] {
		recent += hits[key]
	}
	if recent < len(f.ranges)/2 {
		t.Errorf("%d of %d reads are of the newest keys", recent, len(f.ranges))
	}
}

func TestScans(t *testing.T) {
	f := startFake(t)
	o := f.options(Workload{Kind: Mixed, Shape: "E"})
	o.Keys = 500
	mustRun(t, o, 200)
	limits := map[int64]bool{}
	for _, r := range f.ranges {
		if limits[r.Limit] = true; r.Limit < 1 || r.Limit > maxScanKeys || string(r.RangeEnd) != "bench/:" {
			t.Fatalf("scan %v", r)
		}
	}
	if len(limits) < 50 {
		t.Errorf("%d lengths only", len(limits))
	}
}

func TestLoadFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		f.before = func(context.Context, any) error { return status.Error(codes.ResourceExhausted, "no space") }
		_, err := Run(t.Context(), f.options(Workload{Kind: Get}))
		if !errors.Is(err, ErrLoad) || !strings.Contains(err.Error(), "50 of 50 keys: no space") {
			t.Errorf("%v", err)
		}
	})
}

// A load outlives errors that pass, such as those of an election.
func TestLoadTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFake(t)
		begin := time.Now()
		f.before = func(context.Context, any) error {
			if time.Since(begin) < 2*time.Second {
				return status.Error(codes.Unavailable, "no leader")
			}
			return nil
		}
		mustRun(t, f.options(Workload{Kind: Get}), 200)
	})
}

func TestOptionsAreChecked(t *testing.T) {
	good := Options{Endpoints: []string{"a:1"}, Workload: Workload{Kind: Put}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Options){
		"an endpoint is missing":                       func(o *Options) { o.Endpoints = nil },
		`"swim" is no workload`:                        func(o *Options) { o.Workload.Kind = "swim" },
		`"Z" is no shape`:                              func(o *Options) { o.Workload = Workload{Kind: Mixed, Shape: "Z"} },
		`"up" is no order`:                             func(o *Options) { o.Workload.Order = "up" },
		"clients must be from 1 to 100000, not -1":     func(o *Options) { o.Clients = -1 },
		"connections must be from 1":                   func(o *Options) { o.Conns = -1 },
		"5 connections are more than 2 clients":        func(o *Options) { o.Clients, o.Conns = 2, 5 },
		"the rate must be above 0":                     func(o *Options) { o.Rate = -1 },
		"the rate must be at least":                    func(o *Options) { o.Rate = 1e-9 },
		"must not be below 0":                          func(o *Options) { o.Duration = -1 },
		"the key size must be from 10 to 4096, not 9":  func(o *Options) { o.KeyBytes = 9 },
		"the value size must be from 0 to 1048576":     func(o *Options) { o.ValueBytes = 2 << 20 },
		"keys must be from 1 to 100000000":             func(o *Options) { o.Keys = 2_000_000_000 },
		"larger than all 50 keys":                      func(o *Options) { o.Workload.Kind, o.Keys = Range, 50 },
		"the interval must be at least 1ms":            func(o *Options) { o.Interval = 1 },
		"values of a watch workload have at least 16":  func(o *Options) { o.Workload.Kind, o.ValueBytes = Watch, 15 },
		"a watch workload has no warmup":               func(o *Options) { o.Workload.Kind, o.Warmup = Watch, time.Second },
		"watchers must be from 1 to 100000, not -1":    func(o *Options) { o.Workload = Workload{Kind: Watch, Watchers: -1} },
		"keys in a range must be from 1 to 100000, no": func(o *Options) { o.Workload.RangeKeys = 100_001 },
	} {
		o := good
		change(&o)
		_, err := Run(t.Context(), o)
		if !errors.Is(err, ErrOptions) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestDefaultConnections(t *testing.T) {
	for _, c := range []struct{ clients, endpoints, want int }{{1, 1, 1}, {1, 3, 3}, {50, 1, 1}, {51, 1, 2}, {1000, 3, 20}} {
		o := Options{Endpoints: make([]string, c.endpoints), Clients: c.clients}.withDefaults()
		if o.Conns != c.want {
			t.Errorf("%d connections for %d clients and %d endpoints, want %d", o.Conns, c.clients, c.endpoints, c.want)
		}
	}
}

func TestTLS(t *testing.T) {
	web := httptest.NewTLSServer(nil) // has a certificate for example.com
	defer web.Close()
	f := serveFake(t, grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&web.TLS.Certificates[0]))))
	o := f.options(Workload{Kind: Get})
	o.TLS = web.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	o.TLS.ServerName = "example.com"
	mustRun(t, o, 200)
	o.TLS = nil
	if _, err := Run(t.Context(), o); !errors.Is(err, ErrUnreachable) {
		t.Errorf("plain text: %v", err)
	}
}
