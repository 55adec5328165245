package bench

import (
	"testing"
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
	if len(f.puts) != 200 || len(f.keys) > 50 {
		t.Fatalf("%d puts of %d keys", len(f.puts), len(f.keys))
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
