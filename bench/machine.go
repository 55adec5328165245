package bench

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"time"
)

// Report is a Result as JSON writes it. Fields keep their names and meanings; new ones may come.
type Report struct {
	Workload     string   `json:"workload"`           // put, get, range, txn, mixed or watch
	Shape        string   `json:"shape,omitempty"`    // of mixed: A to F
	Order        string   `json:"order,omitempty"`    // of put, get, range and txn: random, sequential or zipfian
	Consistency  string   `json:"consistency"`        // of reads: linearizable or serializable
	Loop         string   `json:"loop"`               // open or closed
	Rate         float64  `json:"rate,omitempty"`     // requests due per second, in an open loop
	Watchers     int      `json:"watchers,omitempty"` // of watch
	Endpoints    []string `json:"endpoints"`
	Clients      int      `json:"clients"`
	Conns        int      `json:"conns"`
	Keys         int      `json:"keys"`
	RangeKeys    int      `json:"range_keys,omitempty"` // of range
	KeyBytes     int      `json:"key_bytes"`
	ValueBytes   int      `json:"value_bytes"`
	Seed         uint64   `json:"seed"`
	WarmupSecond float64  `json:"warmup_seconds"`

	Start   time.Time `json:"start"` // of the measured part
	Elapsed float64   `json:"elapsed_seconds"`
	Loaded  int       `json:"loaded_keys"` // written beforehand

	Operations []OperationReport `json:"operations"`
	Total      OperationReport   `json:"total"` // all operations together

	ClientCPU      float64 `json:"client_cpu_seconds"`          // of the client's process, during the measured part
	ClientCPUPerOp float64 `json:"client_cpu_us_per_operation"` // microseconds
	Unsent         int64   `json:"unsent"`                      // due in an open loop, but never sent
	MaxLag         float64 `json:"max_lag_us"`                  // longest time from due to sent, in an open loop
	Missing        int64   `json:"missing_events"`              // of watch

	Interval float64          `json:"interval_seconds"` // of the timeline
	Timeline []IntervalReport `json:"timeline"`
}

// OperationReport is an Operation as JSON writes it.
type OperationReport struct {
	Operation string        `json:"operation"`
	Count     int64         `json:"count"` // succeeded
	PerSecond float64       `json:"per_second"`
	Keys      int64         `json:"keys"` // read or written
	Conflicts int64         `json:"conflicts"`
	Failed    int64         `json:"failed"`
	Unknown   int64         `json:"failed_unknown"` // of failed: may or may not have happened
	Errors    []ErrorReport `json:"errors"`
	Latency   LatencyReport `json:"latency_us"`
	// Histogram of latencies in nanoseconds: base64 of HdrHistogram's V2 compressed encoding.
	Histogram string `json:"histogram"`
}

// ErrorReport is an ErrorCount as JSON writes it.
type ErrorReport struct {
	Code    string  `json:"code"` // name of a gRPC code
	Outcome Outcome `json:"outcome"`
	Count   int64   `json:"count"`
	Example string  `json:"example"`
}

// LatencyReport is in microseconds.
type LatencyReport struct {
	Min   float64 `json:"min"`
	Mean  float64 `json:"mean"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P95   float64 `json:"p95"`
	P99   float64 `json:"p99"`
	P999  float64 `json:"p99_9"`
	P9999 float64 `json:"p99_99"`
	Max   float64 `json:"max"`
}

// IntervalReport is an Interval as JSON writes it.
type IntervalReport struct {
	At     float64 `json:"at_seconds"` // from the start of the measured part
	Count  int64   `json:"count"`
	Failed int64   `json:"failed"`
	P50    float64 `json:"p50_us"`
	P99    float64 `json:"p99_us"`
	Max    float64 `json:"max_us"`
}

// Report returns what JSON writes.
func (r *Result) Report() (*Report, error) {
	o, w := r.Options, r.Options.Workload
	report := &Report{
		Workload: string(w.Kind), Consistency: "linearizable", Loop: "closed", Rate: o.Rate, Endpoints: o.Endpoints,
		Clients: o.Clients, Conns: o.Conns, Keys: o.Keys, KeyBytes: o.KeyBytes, ValueBytes: o.ValueBytes, Seed: o.Seed,
		WarmupSecond: o.Warmup.Seconds(), Start: r.Start, Elapsed: r.Elapsed.Seconds(), Loaded: r.Loaded,
		ClientCPU: r.ClientCPU.Seconds(), ClientCPUPerOp: micros(r.ClientCPUPerOperation()), Unsent: r.Unsent,
		MaxLag: micros(r.MaxLag), Missing: r.Missing, Interval: o.Interval.Seconds(), Timeline: []IntervalReport{},
	}
	if w.Serializable {
		report.Consistency = "serializable"
	}
	if o.Rate > 0 {
		report.Loop = "open"
	}
	switch w.Kind {
	case Mixed:
		report.Shape = w.Shape
	case Watch:
		report.Watchers = w.Watchers
	case Range:
		report.RangeKeys, report.Order = w.RangeKeys, string(w.Order)
	default:
		report.Order = string(w.Order)
	}
	for _, o := range r.Operations {
		operation, err := r.operation(o)
		if err != nil {
			return nil, err
		}
		report.Operations = append(report.Operations, operation)
	}
	var err error
	if report.Total, err = r.operation(r.sum()); err != nil {
		return nil, err
	}
	for _, i := range r.Timeline {
		report.Timeline = append(report.Timeline, IntervalReport{
			At: i.Offset.Seconds(), Count: i.Count, Failed: i.Errors, P50: micros(i.P50), P99: micros(i.P99), Max: micros(i.Max),
		})
	}
	return report, nil
}

func (r *Result) operation(o *Operation) (OperationReport, error) {
	report := OperationReport{
		Operation: o.Name, Count: o.Count, PerSecond: r.PerSecond(o), Keys: o.Keys, Conflicts: o.Conflicts, Failed: o.Failed(),
		Errors: []ErrorReport{},
	}
	for _, e := range o.Errors {
		if e.Outcome == Unknown {
			report.Unknown += e.Count
		}
		report.Errors = append(report.Errors, ErrorReport{e.Code.String(), e.Outcome, e.Count, e.Example})
	}
	at := func(p float64) float64 { return micros(o.Percentile(p)) }
	report.Latency = LatencyReport{
		Mean: micros(o.Mean()), P50: at(50), P90: at(90), P95: at(95), P99: at(99), P999: at(99.9), P9999: at(99.99), Max: micros(o.Max()),
	}
	if o.Count > 0 {
		report.Latency.Min = micros(time.Duration(o.Latency.Min()))
	}
	histogram, err := o.Latency.EncodeV2()
	report.Histogram = string(histogram)
	return report, err
}

// JSON writes a Report, indented.
func (r *Result) JSON(w io.Writer) error {
	report, err := r.Report()
	if err != nil {
		return err
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(report)
}

// CSV writes a header and a line for each operation. Latencies are in microseconds.
func (r *Result) CSV(w io.Writer) error {
	report, err := r.Report()
	if err != nil {
		return err
	}
	c := csv.NewWriter(w)
	c.Write([]string{
		"workload", "shape", "operation", "loop", "rate", "clients", "conns", "keys", "key_bytes", "value_bytes", "elapsed_seconds",
		"count", "per_second", "failed", "failed_unknown", "min_us", "mean_us", "p50_us", "p90_us", "p95_us", "p99_us", "p99_9_us",
		"p99_99_us", "max_us", "client_cpu_us_per_operation",
	})
	for _, o := range report.Operations {
		l := o.Latency
		row := []string{report.Workload, report.Shape, o.Operation, report.Loop}
		for _, v := range []float64{
			report.Rate, float64(report.Clients), float64(report.Conns), float64(report.Keys), float64(report.KeyBytes),
			float64(report.ValueBytes), report.Elapsed, float64(o.Count), o.PerSecond, float64(o.Failed), float64(o.Unknown),
			l.Min, l.Mean, l.P50, l.P90, l.P95, l.P99, l.P999, l.P9999, l.Max, report.ClientCPUPerOp,
		} {
			row = append(row, number(v))
		}
		c.Write(row)
	}
	c.Flush()
	return c.Error()
}

// TimelineCSV writes a header and a line for each interval.
func (r *Result) TimelineCSV(w io.Writer) error {
	c := csv.NewWriter(w)
	c.Write([]string{"at_seconds", "count", "failed", "p50_us", "p99_us", "max_us"})
	for _, i := range r.Timeline {
		c.Write([]string{
			number(i.Offset.Seconds()), fmt.Sprint(i.Count), fmt.Sprint(i.Errors),
			number(micros(i.P50)), number(micros(i.P99)), number(micros(i.Max)),
		})
	}
	c.Flush()
	return c.Error()
}

// number writes no exponent, and at most three digits after the point.
func number(v float64) string {
	s := strconv.FormatFloat(v, 'f', 3, 64)
	for s[len(s)-1] == '0' {
		s = s[:len(s)-1]
	}
	if s[len(s)-1] == '.' {
		s = s[:len(s)-1]
	}
	return s
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
