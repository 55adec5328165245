package bench

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Table writes the result for people.
func (r *Result) Table(w io.Writer) error {
	rows := [][]string{{"OPERATION", "COUNT", "OPS/S", "MEAN", "P50", "P90", "P99", "P99.9", "MAX", "ERRORS"}}
	perOp := r.keysDiffer()
	if perOp {
		rows[0] = append(rows[0], "KEYS/OP")
	}
	operations := r.Operations
	if len(operations) > 1 && r.Options.Workload.Kind != Watch {
		operations = append(operations[:len(operations):len(operations)], r.sum())
	}
	for _, o := range operations {
		row := []string{
			o.Name, count(o.Count), rate(r.PerSecond(o)), latency(o.Mean()), latency(o.Percentile(50)), latency(o.Percentile(90)),
			latency(o.Percentile(99)), latency(o.Percentile(99.9)), latency(o.Max()), count(o.Failed()),
		}
		if perOp {
			row = append(row, strconv.FormatFloat(float64(o.Keys)/float64(max(1, o.Count)), 'f', 1, 64))
		}
		rows = append(rows, row)
	}
	var s strings.Builder
	fmt.Fprintf(&s, "%s\n\n", r.Options.describe())
	align(&s, rows, 1, len(rows[0]))
	r.errorTable(&s)
	s.WriteByte('\n')
	for _, note := range r.notes() {
		fmt.Fprintln(&s, note)
	}
	_, err := io.WriteString(w, s.String())
	return err
}

func (r *Result) keysDiffer() bool {
	for _, o := range r.Operations {
		if o.Keys != o.Count && o.Keys > 0 {
			return true
		}
	}
	return false
}

// sum of all operations.
func (r *Result) sum() *Operation {
	all := &Operation{Name: "all", Latency: newHistogram()}
	for _, o := range r.Operations {
		all.Count += o.Count
		all.Conflicts += o.Conflicts
		all.Keys += o.Keys
		all.Errors = append(all.Errors, o.Errors...)
		all.Latency.Merge(o.Latency)
	}
	return all
}

func (r *Result) errorTable(s *strings.Builder) {
	rows := [][]string{{"FAILED", "COUNT", "CODE", "OUTCOME", "FIRST"}}
	for _, o := range r.Operations {
		for _, e := range o.Errors {
			rows = append(rows, []string{o.Name, count(e.Count), e.Code.String(), string(e.Outcome), clip(e.Example)})
		}
	}
	if len(rows) > 1 {
		s.WriteByte('\n')
		align(s, rows, 1, 2)
	}
}

const maxExample = 100

// clip makes one short line of a message.
func clip(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if runes := []rune(s); len(runes) > maxExample {
		return string(runes[:maxExample-3]) + "..."
	}
	return s
}

// describe says in one line what was run.
func (o Options) describe() string {
	w := o.Workload
	var s strings.Builder
	switch w.Kind {
	case Mixed:
		fmt.Fprintf(&s, "mixed %s (", w.Shape)
		for i, share := range mixes[w.Shape] {
			if i > 0 {
				s.WriteString(", ")
			}
			fmt.Fprintf(&s, "%d%% %s", share.percent, share.name)
		}
		s.WriteString(")")
	case Range:
		fmt.Fprintf(&s, "range of %s keys", count(int64(w.RangeKeys)))
	case Watch:
		fmt.Fprintf(&s, "watch, %s", plural(w.Watchers, "watcher"))
	default:
		s.WriteString(string(w.Kind))
	}
	if w.Kind != Put && w.Kind != Txn && w.Kind != Watch {
		if w.Serializable {
			s.WriteString(", serializable")
		} else {
			s.WriteString(", linearizable")
		}
	}
	if o.Rate > 0 {
		fmt.Fprintf(&s, ", %s requests/s due (open loop), at most %s under way", rate(o.Rate), count(int64(o.Clients)))
	} else {
		fmt.Fprintf(&s, ", %s (closed loop)", plural(o.Clients, "client"))
	}
	fmt.Fprintf(&s, " on %s to %s\n", plural(o.Conns, "connection"), strings.Join(o.Endpoints, ", "))
	fmt.Fprintf(&s, "%s keys of %d bytes", count(int64(o.Keys)), o.KeyBytes)
	if w.Kind != Mixed && w.Kind != Watch {
		fmt.Fprintf(&s, ", %s", w.Order)
	}
	fmt.Fprintf(&s, "; values of %d bytes; seed %d", o.ValueBytes, o.Seed)
	return s.String()
}

// notes are what else one should know.
func (r *Result) notes() (notes []string) {
	note := func(format string, args ...any) { notes = append(notes, fmt.Sprintf(format, args...)) }
	if r.ClientCPU > 0 && r.Elapsed > 0 {
		note("took %s; this client itself used %s of CPU per operation, %.2f cores",
			latency(r.Elapsed), latency(r.ClientCPUPerOperation()), r.ClientCPU.Seconds()/r.Elapsed.Seconds())
	} else {
		note("took %s", latency(r.Elapsed))
	}
	if r.Loaded > 0 {
		note("%s keys were written beforehand", count(int64(r.Loaded)))
	}
	for _, o := range r.Operations {
		if o.Conflicts > 0 {
			note("%s: %s found that another client had changed the key, and wrote nothing", o.Name, count(o.Conflicts))
		}
	}
	if r.Options.Rate > 0 {
		note("latency counts from when a request was due; the latest one was sent %s after that", latency(r.MaxLag))
	}
	if r.Unsent > 0 {
		note("WARNING: %s requests were due, but never sent: the server, or this client, did not keep up with the rate", count(r.Unsent))
	}
	if r.Missing > 0 {
		note("WARNING: %s events of acknowledged puts did not come", count(r.Missing))
	}
	return notes
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return count(int64(n)) + " " + what + "s"
}

// align writes columns; those from first to before last to the right, the others to the left.
func align(s *strings.Builder, rows [][]string, first, last int) {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			if i > 0 {
				line.WriteString("  ")
			}
			if i >= first && i < last {
				line.WriteString(pad + cell)
			} else {
				line.WriteString(cell + pad)
			}
		}
		s.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

// count writes a number with a comma before every three digits.
func count(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// rate writes a number per second.
func rate(perSecond float64) string {
	if perSecond >= 100 || perSecond == float64(int64(perSecond)) {
		return count(int64(perSecond + 0.5))
	}
	return strconv.FormatFloat(perSecond, 'g', 3, 64)
}

// latency writes a duration with three digits and one unit; 0 as -.
func latency(d time.Duration) string {
	units := []struct {
		name string
		size time.Duration
	}{{"ns", time.Nanosecond}, {"µs", time.Microsecond}, {"ms", time.Millisecond}, {"s", time.Second}}
	if d <= 0 {
		return "-"
	}
	u := 0
	for u < len(units)-1 && float64(d)/float64(units[u].size) >= 999.5 {
		u++
	}
	v, digits := float64(d)/float64(units[u].size), 0
	switch {
	case units[u].size == time.Nanosecond:
	case v < 9.995:
		digits = 2
	case v < 99.95:
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64) + " " + units[u].name
}
