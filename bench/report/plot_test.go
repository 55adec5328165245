package report

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

func labels(list []tick) string {
	var s []string
	for _, t := range list {
		s = append(s, fmt.Sprintf("%s@%.0f", t.Label, t.At))
	}
	return strings.Join(s, " ")
}

func TestTicks(t *testing.T) {
	seconds := func(v float64) string { return fmt.Sprintf("%g", v) }
	for _, c := range []struct {
		s    span
		n    int
		want string
	}{
		{span{low: 0, high: 10}, 10, "0@0 1@10 2@20 3@30 4@40 5@50 6@60 7@70 8@80 9@90 10@100"},
		{span{low: -3, high: 17}, 10, "-2@5 0@15 2@25 4@35 6@45 8@55 10@65 12@75 14@85 16@95"},
		{span{low: 0, high: 0.5}, 5, "0@0 0.1@20 0.2@40 0.30000000000000004@60 0.4@80 0.5@100"},
		{span{low: 0, high: 99}, 3, "0@0 50@51"},
	} {
		if got := labels(c.s.ticks(c.n, seconds)); got != c.want {
			t.Errorf("ticks of %+v: %s", c.s, got)
		}
	}
	if got := labels(latencySpan(400*time.Microsecond, 2*time.Second).decades()); got != "1 ms@12 10 ms@38 100 ms@62 1 s@88" {
		t.Errorf("decades: %s", got)
	}
	if s := latencySpan(time.Hour, 0); s.low >= s.high {
		t.Errorf("without requests the span is %+v", s)
	}
}

var coordinates = regexp.MustCompile(`[ML](-?\d+) (-?\d+)`)

// inside checks that a path stays in its picture, and returns the number of its points.
func inside(t *testing.T, path string) int {
	t.Helper()
	points := coordinates.FindAllStringSubmatch(path, -1)
	for _, p := range points {
		x, _ := strconv.Atoi(p[1])
		y, _ := strconv.Atoi(p[2])
		if x < 0 || x > plotWidth || y < 0 || y > plotHeight {
			t.Errorf("%s is outside", p[0])
		}
	}
	return len(points)
}

// Every request is in the plot: those that succeeded as dots, the others as crosses.
func TestTimeline(t *testing.T) {
	for _, line := range sampleReport().Timelines() {
		if n := inside(t, line.Writes) + inside(t, line.Reads) + len(line.Crosses); n != 6 || len(line.Crosses) != 1 {
			t.Errorf("%s shows %d requests, %d failed", line.Title, n, len(line.Crosses))
		}
		for i, m := range line.Marks {
			if m.At < 0 || m.At > 100 || m.Number != i+1 || i > 0 && m.At < line.Marks[i-1].At {
				t.Errorf("%s: mark %+v", line.Title, m)
			}
			for _, other := range line.Marks[:i] {
				if m.Row == other.Row && m.At-other.At < numberWidth {
					t.Errorf("%s: numbers %d and %d overlap", line.Title, other.Number, m.Number)
				}
			}
		}
		if down := line.DownWidth; down < 49.9 || down > 50.1 { // 6 of 12 s
			t.Errorf("%s: down for %.1f%%", line.Title, down)
		}
	}
	r := sampleReport()
	r.Clusters[0].Failures[0] = &Failure{Role: Leader, Error: "no leader"}
	if line := r.Timelines()[0]; line.Failed == "" || line.X != nil {
		t.Errorf("a failure without a measurement is %+v", line)
	}
}

func TestHistogramArea(t *testing.T) {
	h := sampleReport().Histograms()
	if len(h) != 2 || len(h[0].Panels) != 3 || h[0].Most != "90%" {
		t.Fatalf("histograms are %+v", h)
	}
	x, most := sampleReport().histogramScale()
	path := area(sampleReport().Clusters[0].Bulks[0], x, most)
	inside(t, path)
	// It begins at the bottom, reaches the top, comes back to it between the buckets, and ends there.
	if want := "M0 1000L0 0L666 0L666 1000L6666 1000L6666 889L7333 889L7333 1000z"; path != want {
		t.Errorf("the outline is %s", path)
	}
}

func TestThroughput(t *testing.T) {
	r := sampleReport()
	r.Clusters[0].Bulk(ReadSustained).PerSecond = 1000
	r.Clusters[1].Bulk(ReadSustained).Error = "no"
	got := r.Throughput()
	if w := got[0].Bars; len(w) != 2 || w[0].Width != 40 || w[1].Width != 80 || w[1].Value != "1,000/s" {
		t.Errorf("bars are %+v", w)
	}
	if b := got[1].Bars[1]; !b.Failed || b.Width != 0 {
		t.Errorf("what failed is %+v", b)
	}
}

func TestFirstWritesPlot(t *testing.T) {
	s := sampleReport().FirstWrites()
	if len(s.Rows) != 6 || len(s.Rows[0].Dots) != 1 || len(s.Rows[2].Dots) != 2 || s.Rows[2].Dots[0] <= 0 || s.Rows[2].Dots[1] >= 100 || labels(s.X) != "1 s@0 10 s@100" {
		t.Errorf("rows are %+v", s.Rows)
	}
}

// No request is lost between the histogram and its buckets, and each is in the one it belongs to.
func TestBuckets(t *testing.T) {
	h := hdrhistogram.New(1, int64(time.Minute), 3)
	values := []time.Duration{time.Microsecond, 999 * time.Microsecond, time.Millisecond, 1100 * time.Microsecond, 3 * time.Second, 3 * time.Second}
	for _, v := range values {
		if err := h.RecordValue(int64(v)); err != nil {
			t.Fatal(err)
		}
	}
	list, total := buckets(h), 0
	for i, b := range list {
		total += int(b.Count)
		if b.From >= b.To || i > 0 && b.From < list[i-1].To-1 {
			t.Errorf("bucket %+v", b)
		}
		held := 0
		for _, v := range values {
			if near := time.Duration(float64(v) * 1.001); near >= b.From && v < b.To {
				held++
			}
		}
		if held < int(b.Count) {
			t.Errorf("bucket %+v holds %d", b, held)
		}
	}
	if total != len(values) {
		t.Errorf("%d of %d requests are in buckets: %+v", total, len(values), list)
	}
}
