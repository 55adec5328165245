package bench

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"
)

// sample is a result of which every figure is known.
func sample() *Result {
	o := Options{
		Endpoints: []string{"n1:2379", "n2:2379"}, Clients: 100, Rate: 1500, Total: 12345,
		Workload: Workload{Kind: Mixed, Shape: "A"},
	}.withDefaults()
	read := &Operation{Name: "read", Count: 12000, Keys: 12000, Latency: newHistogram()}
	update := &Operation{Name: "update", Count: 340, Keys: 340, Conflicts: 1, Latency: newHistogram(), Errors: []ErrorCount{
		{codes.ResourceExhausted, Definite, 2, "too many requests"}, {codes.Unavailable, Unknown, 3, "no\nleader"},
	}}
	for range 12000 {
		read.Latency.RecordValue(int64(250 * time.Microsecond))
	}
	for range 340 {
		update.Latency.RecordValue(int64(4 * time.Millisecond))
	}
	return &Result{
		Options: o, Start: time.Date(2026, 11, 23, 1, 2, 3, 0, time.UTC), Elapsed: 10 * time.Second, Loaded: 10000,
		Operations: []*Operation{read, update}, Timeline: []Interval{{Count: 5, P50: time.Millisecond}, {Offset: 100 * time.Millisecond, Errors: 2}},
		ClientCPU: 123450 * time.Microsecond, Unsent: 7, MaxLag: 1500 * time.Millisecond,
	}
}

const sampleTable = `mixed A (50% read, 50% update), linearizable, 1,500 requests/s due (open loop), at most 100 under way on 2 connections to n1:2379, n2:2379
10,000 keys of 16 bytes; values of 256 bytes; seed 1

OPERATION   COUNT  OPS/S     MEAN      P50      P90      P99    P99.9      MAX  ERRORS
read       12,000  1,200   250 µs   250 µs   250 µs   250 µs   250 µs   250 µs       0
update        340     34  4.00 ms  4.00 ms  4.00 ms  4.00 ms  4.00 ms  4.00 ms       5
all        12,340  1,234   353 µs   250 µs   250 µs  4.00 ms  4.00 ms  4.00 ms       5

FAILED  COUNT  CODE               OUTCOME   FIRST
update      2  ResourceExhausted  definite  too many requests
update      3  Unavailable        unknown   no leader

took 10.0 s; this client itself used 10.0 µs of CPU per operation, 0.01 cores
10,000 keys were written beforehand
update: 1 found that another client had changed the key, and wrote nothing
latency counts from when a request was due; the latest one was sent 1.50 s after that
WARNING: 7 requests were due, but never sent: the server, or this client, did not keep up with the rate
`

func TestTable(t *testing.T) {
	var out strings.Builder
	if err := sample().Table(&out); err != nil || out.String() != sampleTable {
		t.Errorf("%v:\n%s", err, out.String())
	}
}

func TestTableSaysWhatWasRun(t *testing.T) {
	for want, w := range map[string]Workload{
		"get, serializable, 100 clients (closed loop) on 2 connections": {Kind: Get, Serializable: true},
		"put, 100 clients":                         {Kind: Put},
		"range of 100 keys, linearizable,":         {Kind: Range},
		"txn, 100 clients":                         {Kind: Txn},
		"watch, 1 watcher, 100 clients":            {Kind: Watch, Watchers: 1},
		"10,000 keys of 16 bytes, zipfian; values": {Kind: Get, Order: Zipfian},
	} {
		o := Options{Endpoints: []string{"n1:2379", "n2:2379"}, Clients: 100, Workload: w}.withDefaults()
		if got := o.describe(); !strings.Contains(got, want) {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestHumanUnits(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "-", 1: "1 ns", 999: "999 ns", 1000: "1.00 µs", 9994: "9.99 µs", 9996: "10.0 µs", 99_940: "99.9 µs", 99_960: "100 µs",
		999_400: "999 µs", 999_600: "1.00 ms", time.Second: "1.00 s", 90 * time.Second: "90.0 s", time.Hour: "3600 s",
	} {
		if got := latency(d); got != want {
			t.Errorf("%d ns is %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1234: "-1,234", -123: "-123"} {
		if got := count(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0", 0.5: "0.5", 12.345: "12.3", 1234.5: "1,235", 99.96: "100"} {
		if got := rate(v); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
}

// Scripts rely on these names.
func TestJSON(t *testing.T) {
	var out bytes.Buffer
	if err := sample().JSON(&out); err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(out.Bytes(), &fields); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]any{
		"workload": "mixed", "shape": "A", "consistency": "linearizable", "loop": "open", "rate": 1500.0, "clients": 100.0, "conns": 2.0,
		"keys": 10000.0, "key_bytes": 16.0, "value_bytes": 256.0, "seed": 1.0, "warmup_seconds": 0.0, "start": "2026-11-23T01:02:03Z",
		"elapsed_seconds": 10.0, "loaded_keys": 10000.0, "client_cpu_seconds": 0.12345, "client_cpu_us_per_operation": 10.0,
		"unsent": 7.0, "max_lag_us": 1.5e6, "missing_events": 0.0, "interval_seconds": 0.1,
		"operations.1.operation": "update", "operations.1.count": 340.0, "operations.1.per_second": 34.0, "operations.1.keys": 340.0,
		"operations.1.conflicts": 1.0, "operations.1.failed": 5.0, "operations.1.failed_unknown": 3.0,
		"operations.1.errors.1.code": "Unavailable", "operations.1.errors.1.outcome": "unknown", "operations.1.errors.1.count": 3.0,
		"operations.1.errors.1.example": "no\nleader", "operations.0.errors": []any{},
		"total.count": 12340.0, "total.failed": 5.0,
		"timeline.0.at_seconds": 0.0, "timeline.0.count": 5.0, "timeline.0.p50_us": 1000.0, "timeline.1.failed": 2.0,
		"timeline.1.at_seconds": 0.1, "timeline.1.p99_us": 0.0, "timeline.1.max_us": 0.0,
	} {
		if got := dig(fields, path); !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
	for _, p := range []string{"min", "mean", "p50", "p90", "p95", "p99", "p99_9", "p99_99", "max"} {
		if got, ok := dig(fields, "operations.0.latency_us."+p).(float64); !ok || got < 249 || got > 251 {
			t.Errorf("%s is %v", p, got)
		}
	}
	encoded, _ := dig(fields, "operations.0.histogram").(string)
	if h, err := hdrhistogram.Decode([]byte(encoded)); err != nil || h.TotalCount() != 12000 || !h.Equals(sample().Operations[0].Latency) {
		t.Errorf("%v: another histogram", err)
	}
}

// dig finds a.0.b.
func dig(v any, path string) any {
	for name := range strings.SplitSeq(path, ".") {
		switch at := v.(type) {
		case map[string]any:
			v = at[name]
		case []any:
			v = at[name[0]-'0']
		}
	}
	return v
}

func TestCSV(t *testing.T) {
	var out, timeline bytes.Buffer
	if err := sample().CSV(&out); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&out).ReadAll()
	if err != nil || len(rows) != 3 {
		t.Fatalf("%v: %v", err, rows)
	}
	row := map[string]string{}
	for i, name := range rows[0] {
		row[name] = rows[2][i]
	}
	for name, want := range map[string]string{
		"workload": "mixed", "shape": "A", "operation": "update", "loop": "open", "rate": "1500", "clients": "100", "count": "340",
		"per_second": "34", "failed": "5", "failed_unknown": "3", "elapsed_seconds": "10", "client_cpu_us_per_operation": "10",
	} {
		if row[name] != want {
			t.Errorf("%s is %q, want %q", name, row[name], want)
		}
	}
	if err := sample().TimelineCSV(&timeline); err != nil || timeline.String() != "at_seconds,count,failed,p50_us,p99_us,max_us\n0,5,0,1000,0,0\n0.1,0,2,0,0,0\n" {
		t.Errorf("%v: %s", err, timeline.String())
	}
}

func TestResultOfNothing(t *testing.T) {
	r := &Result{Options: Options{Endpoints: []string{"a:1"}}.withDefaults(), Operations: []*Operation{{Name: "put", Latency: newHistogram()}}}
	var out strings.Builder
	for _, write := range []func() error{func() error { return r.Table(&out) }, func() error { return r.JSON(&out) }, func() error { return r.CSV(&out) }} {
		if err := write(); err != nil {
			t.Error(err)
		}
	}
	if strings.Contains(out.String(), "NaN") || strings.Contains(out.String(), "Inf") {
		t.Error(out.String())
	}
}
