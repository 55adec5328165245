package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

func (r result) String() string {
	return fmt.Sprintf("%8.0f/s  %6.0f µs of CPU each  latency p50 %.1f ms, p99 %.1f ms",
		r.perSecond, micros(r.cpu), float64(r.p50)/float64(time.Millisecond), float64(r.p99)/float64(time.Millisecond))
}

// report prints a table for puts and one for gets. Their last lines compare rounds that were neighbours in time, since
// whatever else the machine does comes and goes.
func report(out io.Writer, contestants []*contestant, atLeast float64) error {
	etcd, full, consistent := contestants[0], contestants[1], contestants[2]
	for _, operation := range []struct {
		name    string
		results func(*contestant) []result
	}{
		{"puts", func(c *contestant) []result { return c.puts }},
		{"gets", func(c *contestant) []result { return c.gets }},
	} {
		table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintf(table, "%s\tper s min\tmedian\tmax\tCPU µs each min\tmedian\tmax\t\n", operation.name)
		for _, c := range contestants {
			rates, cpus := columns(operation.results(c))
			row(table, c.name, "%.0f", rates, cpus)
		}
		for _, pair := range [][2]*contestant{{full, etcd}, {consistent, etcd}, {consistent, full}} {
			rates, cpus := ratios(operation.results(pair[0]), operation.results(pair[1]))
			row(table, pair[0].name+" / "+pair[1].name, "%.2f", rates, cpus)
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	rates, _ := ratios(full.puts, etcd.puts)
	if ratio := median(rates); ratio < atLeast {
		return fmt.Errorf("kvd full takes %.2f times etcd's puts, less than %.2f", ratio, atLeast)
	}
	return nil
}

func row(table io.Writer, name, format string, rates, cpus []float64) {
	fmt.Fprintf(table, name+strings.Repeat("\t"+format, 6)+"\t\n",
		slices.Min(rates), median(rates), slices.Max(rates), slices.Min(cpus), median(cpus), slices.Max(cpus))
}

func columns(results []result) (rates, cpus []float64) {
	for _, r := range results {
		rates, cpus = append(rates, r.perSecond), append(cpus, micros(r.cpu))
	}
	return rates, cpus
}

// ratios compares round by round.
func ratios(results, base []result) (rates, cpus []float64) {
	for i, r := range results {
		rates = append(rates, r.perSecond/base[i].perSecond)
		cpus = append(cpus, float64(r.cpu)/float64(base[i].cpu))
	}
	return rates, cpus
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	middle := len(values) / 2
	if len(values)%2 == 1 {
		return values[middle]
	}
	return (values[middle-1] + values[middle]) / 2
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
