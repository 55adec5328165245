package report

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Plots are SVG with positions in percent of the plot's area, so that they fit any width without their text or dots being
// stretched; only paths, which know no percent, are in a nested picture of plotWidth x plotHeight that is stretched.
// Colours are the page's, by class.
const (
	plotWidth  = 10000
	plotHeight = 1000
)

// tick is a mark of an axis: where, in percent, and what it says.
type tick struct {
	At    float64
	Label string
	Minor bool // left out where there is little room
}

// span maps values to percent of an axis.
type span struct {
	low, high float64
	log       bool
}

// at is not bounded: what is outside of the span is outside of the plot.
func (s span) at(v float64) float64 {
	if s.log {
		return 100 * (math.Log10(v) - math.Log10(s.low)) / (math.Log10(s.high) - math.Log10(s.low))
	}
	return 100 * (v - s.low) / (s.high - s.low)
}

// steps are the distances of ticks that people like.
var steps = []float64{1, 2, 5}

// ticks are n or fewer, at round values of a linear span.
func (s span) ticks(n int, label func(float64) string) (list []tick) {
	step := math.Pow(10, math.Floor(math.Log10((s.high-s.low)/float64(n))))
search:
	for {
		for _, m := range steps {
			if (s.high-s.low)/(m*step) <= float64(n) {
				step *= m
				break search
			}
		}
		step *= 10
	}
	for i := math.Ceil(s.low / step); i*step <= s.high+step/1e6; i++ {
		list = append(list, tick{At: s.at(i * step), Label: label(i * step), Minor: int(math.Abs(i))%2 == 1})
	}
	return list
}

// decades are the ticks of a logarithmic span of nanoseconds.
func (s span) decades() (list []tick) {
	for v := math.Pow(10, math.Ceil(math.Log10(s.low)-1e-9)); v <= s.high*1.000001; v *= 10 {
		list = append(list, tick{At: s.at(v), Label: latencyLabel(v)})
	}
	return list
}

// latencyLabel names a power of ten of nanoseconds.
func latencyLabel(v float64) string {
	switch {
	case v >= 0.9e9:
		return fmt.Sprintf("%.0f s", v/1e9)
	case v >= 0.9e6:
		return fmt.Sprintf("%.0f ms", v/1e6)
	}
	return fmt.Sprintf("%.0f µs", v/1e3)
}

// latencySpan is the half decades that hold everything from low to high, from a microsecond on.
func latencySpan(low, high time.Duration) span {
	first := math.Floor(2*math.Log10(float64(max(low, time.Microsecond)))) / 2
	last := math.Ceil(2*math.Log10(float64(max(high, time.Microsecond)))) / 2
	return span{low: math.Pow(10, first), high: math.Pow(10, max(last, first+1)), log: true}
}

// path writes coordinates of a nested picture; y counts from the bottom.
type path struct{ strings.Builder }

func (p *path) to(command byte, x, y float64) {
	fmt.Fprintf(p, "%c%d %d", command, int(x*plotWidth/100), plotHeight-int(y*plotHeight/100))
}

// dot is a line without length: its round ends are the dot.
func (p *path) dot(x, y float64) {
	p.to('M', x, y)
	p.WriteString("h0")
}

// mark is a moment worth a line.
type mark struct {
	At     float64
	Number int
	Row    int // of its number, above the plot: numbers in a row do not overlap
	Text   string
}

// cross is a request that failed.
type cross struct{ X, Y float64 }

// timeline is the plot of one failure: every request, when it was due and how long it took.
type timeline struct {
	Title, Caption, Summary string
	Failed                  string // why there is nothing, or not all, to be seen
	X, Y                    []tick
	Writes, Reads           string // paths of dots
	Crosses                 []cross
	Marks                   []mark
	Rows                    int
	DownFrom, DownWidth     float64 // while the node was down, percent
}

// Timelines are of all failures, with the same scales.
func (r *Report) Timelines() (list []timeline) {
	x, y := r.timelineScales()
	for _, c := range r.Clusters {
		for _, f := range c.Failures {
			list = append(list, c.timeline(f, x, y))
		}
	}
	return list
}

// timelineScales hold every request, also the slowest.
func (r *Report) timelineScales() (x, y span) {
	fastest, slowest := time.Hour, time.Duration(0)
	for _, c := range r.Clusters {
		for _, f := range c.Failures {
			x.low, x.high = min(x.low, f.Load.From.Seconds()), max(x.high, f.Load.To.Seconds())
			for _, s := range f.Load.List {
				fastest, slowest = min(fastest, s.Took), max(slowest, s.Took)
			}
		}
	}
	return x, latencySpan(fastest, slowest)
}

const mostCrosses = 1000

func (c *Cluster) timeline(f *Failure, x, y span) timeline {
	t := timeline{Title: fmt.Sprintf("%s: kill -9 of a %s", upper(c.Name()), f.Role)}
	if f.Error != "" {
		t.Failed = failedBecause(f.Error)
	} else if f.Lost > 0 {
		t.Failed = failedBecause(f.LostWords())
	}
	t.Summary = upper(fmt.Sprintf("%s, the longest of the others took %s; %s.", f.FailedWords(), Short(f.Load.Longest()), f.LostWords())) + f.unsentWords()
	if len(f.Load.List) == 0 || x.low >= x.high {
		return t
	}
	t.X = x.ticks(10, func(s float64) string { return fmt.Sprintf("%.0f s", s) })
	t.Y = y.decades()
	var writes, reads path
	for _, s := range f.Load.List {
		px, py := x.at(s.Due.Seconds()), y.at(float64(max(s.Took, time.Microsecond)))
		switch {
		case s.Code != "":
			if len(t.Crosses) < mostCrosses {
				t.Crosses = append(t.Crosses, cross{px, 100 - py})
			}
		case s.Read:
			reads.dot(px, py)
		default:
			writes.dot(px, py)
		}
	}
	t.Writes, t.Reads = writes.String(), reads.String()
	t.Marks, t.Rows = marks(f, c.Strategy != Full, x)
	t.DownFrom = x.at(0)
	t.DownWidth = x.at(f.Restarted.Seconds()) - t.DownFrom
	if f.Restarted == 0 {
		t.DownWidth = x.at(f.Load.To.Seconds()) - t.DownFrom
	}
	t.Caption = c.timelineCaption(f)
	return t
}

// timelineCaption says what is seen.
func (c *Cluster) timelineCaption(f *Failure) string {
	if c.Strategy == Full {
		if f.Role == Follower {
			return "The others have a leader and a majority without the follower: requests go on, but for those that were under way at the node itself."
		}
		return fmt.Sprintf("What becomes due after the leader's death waits until the next one is elected; the first write succeeds %s after the kill.", Short(f.FirstWrite))
	}
	if f.Role == Follower {
		return fmt.Sprintf("Only keys of the %s that the node led wait for elections; the others go on.", plural(f.Led, "shard"))
	}
	return fmt.Sprintf("The node led %s, and group 0, which hands out revisions: writes of all shards wait for its election, reads only where the shard's leader died.", plural(f.Led, "shard"))
}

// marks are what happened, in order of time.
func marks(f *Failure, sharded bool, x span) (list []mark, rows int) {
	add := func(at time.Duration, happened bool, text string) {
		if happened {
			list = append(list, mark{At: x.at(at.Seconds()), Number: len(list) + 1, Text: text})
		}
	}
	add(0, true, fmt.Sprintf("kill -9 of %s", f.Node))
	switch {
	case !sharded:
		add(f.FirstWrite, f.FirstWrite > 0, Short(f.FirstWrite)+" after the kill: the next write succeeds")
	default:
		add(f.AllWrites, f.AllWrites > 0, fmt.Sprintf("%s after the kill: all %d shards take writes, the first one after %s", Short(f.AllWrites), len(f.Writes), Short(f.FirstWrite)))
		add(f.Restored, f.Restored > 0, Short(f.Restored)+" after the kill: every key has all its copies again, on the others")
	}
	add(f.Restarted, f.Restarted > 0, f.Node+" is started again")
	add(f.Restarted+f.CaughtUp, f.CaughtUp > 0, Short(f.CaughtUp)+" after its start: it has caught up")
	add(f.Restarted+f.Home, f.Home > 0, Short(f.Home)+" after its start: every key is home")
	var free []float64 // of each row, where the next number fits
	for i := range list {
		row := 0
		for row < len(free) && list[i].At < free[row] {
			row++
		}
		if row == len(free) {
			free = append(free, 0)
		}
		free[row], list[i].Row = list[i].At+numberWidth, row
	}
	return list, len(free)
}

// numberWidth is the percentage of a narrow plot that a mark's number takes.
const numberWidth = 6

// bar of the throughput plot.
type bar struct {
	Name, Class, Value string
	Width              float64
	Failed             bool
}

// widestBar leaves room for its figure, also on a telephone.
const widestBar = 0.8

// bars are a cluster's.
type bars struct {
	Name string
	Bars []bar
}

// Throughput compares all clusters.
func (r *Report) Throughput() (list []bars) {
	most := 0.0
	for _, c := range r.Clusters {
		for _, name := range []string{WriteSustained, ReadSustained} {
			if b := c.Bulk(name); b != nil && b.Error == "" {
				most = max(most, b.PerSecond)
			}
		}
	}
	scale := span{high: most / widestBar}
	for _, c := range r.Clusters {
		group := bars{Name: c.Name()}
		for _, kind := range []struct{ name, label, class string }{{WriteSustained, "writes", "write"}, {ReadSustained, "reads", "read"}} {
			line := bar{Name: kind.label, Class: kind.class, Value: "failed", Failed: true}
			if b := c.Bulk(kind.name); b != nil && b.Error == "" {
				line.Failed, line.Value, line.Width = false, number(b.PerSecond)+"/s", scale.at(b.PerSecond)
			}
			group.Bars = append(group.Bars, line)
		}
		list = append(list, group)
	}
	return list
}

// strip is a row of dots: of each shard, when its first write after a kill succeeded.
type strip struct {
	Name string
	Dots []float64
	Note string
}

// strips is the plot of them.
type strips struct {
	Rows []strip
	X    []tick
}

// FirstWrites compares how soon writes succeeded after each kill.
func (r *Report) FirstWrites() (s strips) {
	first, last := time.Hour, time.Duration(0)
	for _, c := range r.Clusters {
		for _, f := range c.Failures {
			if f.AllWrites > 0 {
				first, last = min(first, f.FirstWrite), max(last, f.AllWrites)
			}
		}
	}
	if last == 0 {
		return s
	}
	x := latencySpan(first, last)
	s.X = x.decades()
	for _, c := range r.Clusters {
		for _, f := range c.Failures {
			row := strip{Name: c.Name() + ", " + f.Role, Note: Short(f.AllWrites)}
			if f.AllWrites == 0 {
				row.Note = "failed"
			}
			for _, w := range f.Writes {
				if f.AllWrites > 0 {
					row.Dots = append(row.Dots, x.at(float64(w)))
				}
			}
			s.Rows = append(s.Rows, row)
		}
	}
	return s
}

// panel is a histogram of writes and one of reads, of one cluster.
type panel struct {
	Name          string
	Writes, Reads string // paths of areas
	Notes         []string
	X             []tick
}

// histograms are panels that share their axes.
type histograms struct {
	Title  string
	Panels []panel
	Most   string // the share of requests at the top
}

// Histograms are of requests one after the other, and of many at a time.
func (r *Report) Histograms() (list []histograms) {
	for _, kind := range []struct{ title, write, read string }{
		{"One request after the other", WriteOne, ReadOne},
		{fmt.Sprintf("%d requests at a time", r.Load.Clients), WriteMany, ReadMany},
	} {
		if h := r.histograms(kind.write, kind.read); len(h.Panels) > 0 {
			h.Title = kind.title
			list = append(list, h)
		}
	}
	return list
}

func (r *Report) histograms(write, read string) (h histograms) {
	x, most := r.histogramScale()
	if most == 0 {
		return h
	}
	h.Most = fmt.Sprintf("%.0f%%", 100*most)
	for _, c := range r.Clusters {
		p := panel{Name: c.Name(), X: x.decades()}
		w, rd := c.Bulk(write), c.Bulk(read)
		p.Writes = area(w, x, most)
		p.Reads = area(rd, x, most)
		p.Notes = []string{median("writes", w), median("reads", rd)}
		h.Panels = append(h.Panels, p)
	}
	return h
}

func median(what string, b *Bulk) string {
	if b == nil || b.Error != "" {
		return what + ": failed"
	}
	return fmt.Sprintf("%s: half within %s, 99%% within %s", what, Short(b.P50), Short(b.P99))
}

// histogramScale holds the latencies and the highest share of all of them.
func (r *Report) histogramScale() (x span, most float64) {
	low, high := time.Hour, time.Duration(0)
	for _, c := range r.Clusters {
		for _, name := range []string{WriteOne, ReadOne, WriteMany, ReadMany} {
			b := c.Bulk(name)
			if b == nil || b.Error != "" {
				continue
			}
			for _, bucket := range b.Histogram {
				low, high = min(low, bucket.From), max(high, bucket.To)
				most = max(most, float64(bucket.Count)/float64(b.Requests))
			}
		}
	}
	return latencySpan(low, high), most
}

// area is a histogram's outline.
func area(b *Bulk, x span, most float64) string {
	if b == nil || b.Error != "" || b.Requests == 0 {
		return ""
	}
	var p path
	end := -1.0
	for _, bucket := range b.Histogram {
		from, to, top := x.at(float64(bucket.From)), x.at(float64(bucket.To)), 100*float64(bucket.Count)/float64(b.Requests)/most
		switch {
		case end < 0:
			p.to('M', from, 0)
		case from > end+0.01: // nothing in between
			p.to('L', end, 0)
			p.to('L', from, 0)
		}
		p.to('L', from, top)
		p.to('L', to, top)
		end = to
	}
	p.to('L', end, 0)
	p.WriteByte('z')
	return p.String()
}
