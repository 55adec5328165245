package report

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/bench"
)

// stepsPerCluster: forming it, six bulks, two failures.
const stepsPerCluster = 9

var errFormed = errors.New("not run: the cluster could not be formed")

// measure does all steps with a cluster of a layout.
func (m *runner) measure(ctx context.Context, l Layout, load Load) *Cluster {
	result := &Cluster{Layout: l, Flags: l.flags()}
	m.begin(l, "start the nodes")
	begin := time.Now()
	c, err := m.form(ctx, l)
	defer c.close()
	result.Formed, result.Error = time.Since(begin), reason(err)
	m.end(err, "%s until all serve", Short(result.Formed))
	for _, b := range bulks(load) {
		m.begin(l, b.title())
		if err != nil {
			b.Error = errFormed.Error()
		} else {
			b.run(ctx, c, load)
		}
		m.endBulk(b)
		result.Bulks = append(result.Bulks, b)
	}
	for _, role := range []string{Leader, Follower} {
		f := &Failure{Role: role}
		m.begin(l, "kill -9 of a "+role+", and its recovery")
		if err != nil {
			f.Error = errFormed.Error()
		} else {
			f.Error = reason(m.fail(ctx, c, f))
		}
		m.endFailure(f)
		result.Failures = append(result.Failures, f)
	}
	return result
}

// bulks are what is measured with every cluster, in this order.
func bulks(load Load) []*Bulk {
	return []*Bulk{
		{Name: WriteOne, Write: true, Clients: 1},
		{Name: ReadOne, Clients: 1},
		{Name: WriteMany, Write: true, Clients: load.Clients},
		{Name: ReadMany, Clients: load.Clients},
		{Name: WriteSustained, Write: true, Clients: load.Clients},
		{Name: ReadSustained, Clients: load.Clients},
	}
}

func (b *Bulk) sustained() bool { return b.Name == WriteSustained || b.Name == ReadSustained }

// title of the step.
func (b *Bulk) title() string {
	what := "read"
	if b.Write {
		what = "write"
	}
	switch {
	case b.sustained():
		return fmt.Sprintf("%s with %d clients for a while", what, b.Clients)
	case b.Clients == 1:
		return what + " pairs, one after the other"
	}
	return fmt.Sprintf("%s pairs, %d at a time", what, b.Clients)
}

// run does it.
func (b *Bulk) run(ctx context.Context, c *cluster, load Load) {
	o := bench.Options{
		Endpoints: c.Endpoints(), Workload: bench.Workload{Kind: bench.Get, Order: bench.Sequential},
		Clients: b.Clients, Keys: load.Pairs, Total: load.Pairs, ValueBytes: load.ValueBytes, SkipLoad: true,
		Prefix: keyPrefix + "one/",
	}
	if b.Clients > 1 {
		o.Prefix = keyPrefix + "many/"
	}
	if b.Write {
		o.Workload.Kind = bench.Put
	}
	if b.sustained() {
		o.Total, o.Duration, o.Warmup, o.Workload.Order = 0, load.Sustained, load.Sustained/10, bench.Random
	}
	if b.Name == WriteSustained {
		o.Prefix, o.Keys = keyPrefix+"sustained/", 10*load.Pairs
	}
	result, err := bench.Run(ctx, o)
	if err == nil {
		err = b.take(result)
	}
	if err == nil && b.Write && !b.sustained() {
		err = c.holds(ctx, o.Prefix, int64(load.Pairs))
	}
	b.Error = reason(err)
}

// take notes what was measured.
func (b *Bulk) take(r *bench.Result) error {
	if len(r.Operations) != 1 {
		return fmt.Errorf("%d kinds of requests were measured, not one", len(r.Operations))
	}
	o := r.Operations[0]
	b.Requests, b.Errors, b.Took, b.PerSecond = o.Count, errorsOf(o), r.Elapsed, r.PerSecond(o)
	b.Mean, b.P50, b.P99, b.Max = o.Mean(), o.Percentile(50), o.Percentile(99), o.Max()
	b.ClientCPU, b.Histogram = r.ClientCPU, buckets(o.Latency)
	if failed := o.Failed(); failed > 0 {
		return fmt.Errorf("%d of %d requests failed: %s: %s", failed, failed+o.Count, o.Errors[0].Code, o.Errors[0].Example)
	}
	if o.Count == 0 {
		return errors.New("no request succeeded")
	}
	return nil
}

// holds checks that there are as many pairs under a prefix as were acknowledged.
func (c *cluster) holds(ctx context.Context, prefix string, pairs int64) error {
	got, err := c.count(ctx, prefix)
	if err == nil && got != pairs {
		err = fmt.Errorf("%d pairs are there of %d that were acknowledged", got, pairs)
	}
	return err
}

// count counts the keys under a prefix.
func (c *cluster) count(ctx context.Context, prefix string) (keys int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	err = c.With(func(client *clientv3.Client) error {
		got, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err == nil {
			keys = got.Count
		}
		return err
	})
	return keys, err
}

// buckets counts a histogram's values on a logarithmic scale.
func buckets(h *hdrhistogram.Histogram) (list []Bucket) {
	edge := func(i int) time.Duration { return time.Duration(math.Pow(10, float64(i)/bucketsPerDecade)) }
	for _, bar := range h.Distribution() {
		if bar.Count == 0 {
			continue
		}
		middle := float64(bar.From+bar.To) / 2
		i := int(math.Floor(math.Log10(max(1, middle)) * bucketsPerDecade))
		if n := len(list); n == 0 || list[n-1].From != edge(i) {
			list = append(list, Bucket{From: edge(i), To: edge(i + 1)})
		}
		list[len(list)-1].Count += bar.Count
	}
	return list
}

func (m *runner) endBulk(b *Bulk) {
	var err error
	if b.Error != "" {
		err = errors.New(b.Error)
	}
	m.end(err, "%d in %s, %s each, %.0f per second", b.Requests, Short(b.Took), Short(b.Mean), b.PerSecond)
}
