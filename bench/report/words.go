package report

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// What the founding report said a write and a read take on average. It is what measurements are compared with.
const (
	foundingWrite = 50 * time.Millisecond
	foundingRead  = 30 * time.Millisecond
)

// Short writes a duration for people, with two or three digits. Its space does not break.
func Short(d time.Duration) string {
	switch ms := float64(d) / float64(time.Millisecond); {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < 9950*time.Microsecond:
		return fmt.Sprintf("%.1f ms", ms)
	case d < 999500*time.Microsecond:
		return fmt.Sprintf("%.0f ms", ms)
	case d < 9995*time.Millisecond:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// number writes a number with commas.
func number[N int | int64 | float64](n N) string {
	digits := fmt.Sprintf("%.0f", float64(n))
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// plural is a number with a noun.
func plural[N int | int64](n N, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return number(n) + " " + noun + "s"
}

// oneLine is text without line breaks.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// failedBecause is what stands where a measurement would.
func failedBecause(why string) string { return "FAILED: " + oneLine(why) }

// bulkPairs says how long a pair of bulks took: one request after the other, and many at a time.
func (c *Cluster) bulkPairs(names ...string) (list []string) {
	for _, name := range names {
		if b := c.Bulk(name); b != nil {
			list = append(list, b.words()+".")
		}
	}
	return orNotMeasured(list)
}

func orNotMeasured(list []string) []string {
	if len(list) == 0 {
		return []string{"Not measured."}
	}
	return list
}

func (b *Bulk) words() string {
	if b.Error != "" {
		return failedBecause(b.Error)
	}
	how := "One after the other"
	if b.Clients > 1 {
		how = fmt.Sprintf("%d at a time", b.Clients)
	}
	return fmt.Sprintf("%s: %s pairs in %s, %s each on average, %s per second", how, number(b.Requests), Short(b.Took), Short(b.Mean), number(b.PerSecond))
}

// WriteWords is the founding report's write performance.
func (c *Cluster) WriteWords() []string { return c.bulkPairs(WriteOne, WriteMany) }

// ReadWords is its read performance.
func (c *Cluster) ReadWords() []string { return c.bulkPairs(ReadOne, ReadMany) }

// FailureWords is its node failure performance.
func (c *Cluster) FailureWords() []string {
	return c.failures(func(f *Failure) string {
		text := "the next write succeeded after " + Short(f.FirstWrite)
		if c.Strategy != Full {
			text += fmt.Sprintf(", in all %d shards after %s; every key had all its copies again after %s", len(f.Writes), Short(f.AllWrites), Short(f.Restored))
		}
		return text + "; " + f.FailedWords() + ", the longest of the others took " + Short(f.Load.Longest())
	})
}

// RecoveryWords is its node recovery performance.
func (c *Cluster) RecoveryWords() []string {
	return c.failures(func(f *Failure) string {
		text := "caught up " + Short(f.CaughtUp) + " after its process started"
		if c.Strategy != Full {
			text += ", every key home after " + Short(f.Home)
		}
		return text
	})
}

func (c *Cluster) failures(words func(*Failure) string) (list []string) {
	for _, f := range c.Failures {
		text := failedBecause(f.Error)
		switch {
		case f.Lost > 0:
			text = failedBecause(f.LostWords())
		case f.Error == "":
			text = words(f)
		}
		list = append(list, upper(f.Role)+" killed: "+text+".")
	}
	return orNotMeasured(list)
}

// LostWords says how much of what was acknowledged is there.
func (f *Failure) LostWords() string {
	if f.Lost == 0 {
		return fmt.Sprintf("all %s read back", plural(f.Acknowledged, "acknowledged pair"))
	}
	return fmt.Sprintf("%s of %s missing or wrong", number(f.Lost), plural(f.Acknowledged, "acknowledged pair"))
}

// FailedWords says how many requests failed, and how.
func (f *Failure) FailedWords() string {
	total, codes := len(f.Load.List), f.Load.Failed()
	failed := 0
	var how []string
	for _, code := range slices.Sorted(maps.Keys(codes)) {
		failed += codes[code]
		how = append(how, fmt.Sprintf("%d %s", codes[code], code))
	}
	switch {
	case total == 0:
		return "no request was made"
	case failed == 0:
		return fmt.Sprintf("none of %s failed", plural(total, "request"))
	}
	return fmt.Sprintf("%s of %s failed (%s)", number(failed), plural(total, "request"), strings.Join(how, ", "))
}

// unsentWords warn of a machine that did not bear the load; a few requests are always just due in the end.
func (f *Failure) unsentWords() string {
	if f.Load.Unsent*100 < int64(len(f.Load.List)) {
		return ""
	}
	return fmt.Sprintf(" %s could not even be sent in time.", plural(f.Load.Unsent, "more request"))
}

// Verdict of a test, in a sentence.
func (t *Test) Verdict() string {
	switch {
	case t.Error != "":
		return failedBecause(t.Error)
	case !t.Passed():
		return failedBecause(fmt.Sprintf("%d of %d acknowledged pairs are missing or wrong", t.Written-t.Read, t.Written))
	}
	text := fmt.Sprintf("all %d pairs were read through %s, %s after kill -9 of %s", t.Written, and(t.Through), Short(t.ReadAfter), and(t.Killed))
	if t.Number == 3 && len(t.Killed) == 2 {
		text = fmt.Sprintf("%s was killed, recovered, and had caught up %s after its start; %s, and all %d pairs were read through %s",
			t.Killed[0], Short(t.CaughtUp), t.Killed[1]+" was killed then", t.Written, and(t.Through))
	}
	return "passed: " + text
}

func and(names []string) string {
	if n := len(names); n > 1 {
		return strings.Join(names[:n-1], ", ") + " and " + names[n-1]
	}
	return strings.Join(names, "")
}

// passed counts tests.
func (r *Report) passed() (passed int) {
	for _, t := range r.Tests {
		if t.Passed() {
			passed++
		}
	}
	return passed
}

// readBack counts what was acknowledged while nodes failed, and what of it was lost.
func (r *Report) readBack() (acknowledged, lost int) {
	for _, c := range r.Clusters {
		for _, f := range c.Failures {
			acknowledged, lost = acknowledged+f.Acknowledged, lost+f.Lost
		}
	}
	for _, t := range r.Tests {
		acknowledged += t.Written
		if t.Error == "" {
			lost += t.Written - t.Read
		}
	}
	return acknowledged, lost
}

// Headline is the report in one sentence.
func (r *Report) Headline() string {
	tests := fmt.Sprintf("%d of %s passed", r.passed(), plural(len(r.Tests), "fault tolerance test"))
	acknowledged, lost := r.readBack()
	data := fmt.Sprintf("all %s that were checked while nodes failed were read back", plural(acknowledged, "acknowledged pair"))
	if lost > 0 {
		data = fmt.Sprintf("%s of %s LOST", number(lost), plural(acknowledged, "acknowledged pair"))
	}
	text := tests + ", and " + data
	if n := len(r.Problems()); n > 0 {
		text += "; " + plural(n, "step") + " of the measurement failed"
	}
	return text + "."
}

// Analysis are the sentences of that section; each says what was measured.
func (r *Report) Analysis() (list []string) {
	list = append(list, r.Headline())
	for _, c := range r.Clusters {
		w, rd := c.Bulk(WriteOne), c.Bulk(ReadOne)
		if w == nil || rd == nil || w.Error != "" || rd.Error != "" {
			continue
		}
		list = append(list, fmt.Sprintf("%s: one after the other, a write takes %s on average, %s the founding report's %s, and a read %s, %s its %s.",
			upper(c.Name()), Short(w.Mean), times(foundingWrite, w.Mean), Short(foundingWrite), Short(rd.Mean), times(foundingRead, rd.Mean), Short(foundingRead)))
	}
	for _, c := range r.Clusters {
		l, f := c.Failure(Leader), c.Failure(Follower)
		if l == nil || f == nil || l.Error != "" || f.Error != "" {
			continue
		}
		if c.Strategy == Full {
			list = append(list, fmt.Sprintf("%s: when the leader dies, writes wait for an election, %s here; when a follower dies, the next write takes %s.",
				upper(c.Name()), Short(l.FirstWrite), Short(f.FirstWrite)))
			continue
		}
		list = append(list, fmt.Sprintf("%s: every node leads some of the shards. With the one that also led group 0, which hands out revisions and keeps the cluster map, %d of %d lost their leader: %s until all took writes. With another one it was %d: %s. Copies are made elsewhere once a node has been silent for %s (--down-after): every key had %d again after %s and %s.",
			upper(c.Name()), l.Led, c.Shards, Short(l.AllWrites), f.Led, Short(f.AllWrites), Short(r.Load.DownAfter), c.Copies, Short(l.Restored), Short(f.Restored)))
	}
	return list
}

// times says how much less than before something is.
func times(before, now time.Duration) string {
	switch factor := float64(before) / float64(max(now, 1)); {
	case factor >= 10:
		return fmt.Sprintf("%.0f times less than", factor)
	case factor >= 1.05:
		return fmt.Sprintf("%.1f times less than", factor)
	case factor > 0.95:
		return "as much as"
	default:
		return fmt.Sprintf("%.1f times more than", 1/factor)
	}
}

func upper(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

// Conclusion follows from whether everything was as it should be.
func (r *Report) Conclusion() string {
	switch _, lost := r.readBack(); {
	case lost > 0:
		return "Acknowledged data was lost. What this run has shown is a fault, not fault tolerance."
	case len(r.Problems()) > 0:
		return "A part of the measurement failed: of that part this report concludes nothing. Nothing that was acknowledged and checked was lost."
	}
	return "The distributed key-value store manages nodes with fault tolerance in each of the strategies above: what was acknowledged was there after every failure, and nodes that came back had all of it again. The figures above are of this machine and this run."
}

// Words name the machine in a line.
func (m Machine) Words() string {
	var list []string
	add := func(text string, known bool) {
		if known {
			list = append(list, text)
		}
	}
	add(m.CPU, m.CPU != "")
	add(plural(m.Cores, "core"), true)
	add(fmt.Sprintf("%.0f GiB of memory", float64(m.MemoryBytes)/(1<<30)), m.MemoryBytes > 0)
	add(cmp.Or(m.Kernel, m.System), true)
	add(m.FileSystem, m.FileSystem != "")
	return strings.Join(list, ", ")
}

// row of a table: what, and a value for each cluster.
type row struct {
	Group  string // what the rows around it have in common; may be empty
	Begins bool   // the group
	What   string
	Values []string
	Bad    []bool
}

// Summary is a table of the most important figures of all clusters.
func (r *Report) Summary() (rows []row) {
	bulk := func(what, name string, value func(*Bulk) string) {
		rows = append(rows, r.row(what, func(c *Cluster) (string, bool) {
			b := c.Bulk(name)
			if b == nil || b.Error != "" {
				return "failed", true
			}
			return value(b), false
		}))
	}
	mean := func(b *Bulk) string { return Short(b.Mean) }
	total := func(b *Bulk) string { return Short(b.Took) }
	rate := func(b *Bulk) string { return number(b.PerSecond) + "/s" }
	pairs, many := number(r.Load.Pairs), fmt.Sprintf(", %d at a time", r.Load.Clients)
	bulk("A write, one at a time", WriteOne, mean)
	bulk("A read, one at a time", ReadOne, mean)
	bulk(pairs+" writes, one after the other", WriteOne, total)
	bulk(pairs+" writes"+many, WriteMany, total)
	bulk(pairs+" reads, one after the other", ReadOne, total)
	bulk(pairs+" reads"+many, ReadMany, total)
	bulk("Writes"+many+", sustained", WriteSustained, rate)
	bulk("Reads"+many+", sustained", ReadSustained, rate)
	for _, role := range []string{Leader, Follower} {
		more := r.failureRows(role)
		more[0].Begins = true
		rows = append(rows, more...)
	}
	return rows
}

func (r *Report) failureRows(role string) (rows []row) {
	add := func(what string, value func(*Cluster, *Failure) string) {
		line := r.row(what, func(c *Cluster) (string, bool) {
			f := c.Failure(role)
			if f == nil || f.Error != "" {
				return "failed", true
			}
			return value(c, f), false
		})
		line.Group = upper(role) + " killed"
		rows = append(rows, line)
	}
	sharded := func(d func(*Failure) time.Duration) func(*Cluster, *Failure) string {
		return func(c *Cluster, f *Failure) string {
			if c.Strategy == Full {
				return "–" // there are no shards
			}
			return Short(d(f))
		}
	}
	add("the next write", func(_ *Cluster, f *Failure) string { return Short(f.FirstWrite) })
	add("a write in every shard", sharded(func(f *Failure) time.Duration { return f.AllWrites }))
	add("all copies of every key back", sharded(func(f *Failure) time.Duration { return f.Restored }))
	add("requests failed", func(_ *Cluster, f *Failure) string {
		failed := 0
		for _, n := range f.Load.Failed() {
			failed += n
		}
		return number(failed) + " of " + number(len(f.Load.List))
	})
	add("the longest request", func(_ *Cluster, f *Failure) string { return Short(f.Load.Longest()) })
	add("started again, caught up", func(_ *Cluster, f *Failure) string { return Short(f.CaughtUp) })
	add("started again, every key home", sharded(func(f *Failure) time.Duration { return f.Home }))
	return rows
}

func (r *Report) row(what string, value func(*Cluster) (string, bool)) row {
	line := row{What: what}
	for _, c := range r.Clusters {
		text, bad := value(c)
		line.Values, line.Bad = append(line.Values, text), append(line.Bad, bad)
	}
	return line
}
