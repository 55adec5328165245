package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/html"
)

func render(t *testing.T, write func(io.Writer) error) string {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// founding are the founding report's headings, in order.
var founding = []string{
	"Report: Distributed Key-Value Store with Fault Tolerance",
	"Introduction",
	"Modules and Classes", "1. ConsistentHash", "2. TestPerformanceFull", "3. TestPerformanceConsistent",
	"Performance Test Results", "“Full” Strategy", "“Consistent” Strategy",
	"Experimental Results", "Fault Tolerance Testing", "Performance Measurement",
	"Analysis", "Conclusion",
}

// placeholders are what must not be left where a figure belongs.
var placeholders = regexp.MustCompile(`\[Execution Time\]|%!|NaN|[+-]Inf|<no value>|ZgotmplZ|-\d+(\.\d+)?\x{a0}m?s`)

func inOrder(t *testing.T, text string, parts ...string) {
	t.Helper()
	at := 0
	for _, part := range parts {
		i := strings.Index(text[at:], part)
		if i < 0 {
			t.Errorf("%q is missing, or not where it belongs", part)
			continue
		}
		at += i + len(part)
	}
}

func TestMarkdown(t *testing.T) {
	text := render(t, sampleReport().Markdown)
	inOrder(t, strings.NewReplacer("**", "", `"Full"`, "“Full”", `"Consistent"`, "“Consistent”").Replace(text), founding...)
	if found := placeholders.FindString(text); found != "" {
		t.Errorf("it has %q", found)
	}
	for what, want := range map[string]int{
		"Write Performance**:": 3, "Read Performance**:": 3, "Node Failure Performance**:": 3, "Node Recovery Performance**:": 3,
		"**Setup**": 6 + 6, "**Operation**": 6 + 6, "**Result**": 6 + 6, "**Result**: passed: all": 4, "**Result**: passed: n1 was killed, recovered": 2,
	} {
		if got := strings.Count(text, what); got != want {
			t.Errorf("%q is there %d times, not %d", what, got, want)
		}
	}
	inOrder(t, strings.ReplaceAll(text, "\u00a0", " "),
		"6 of 6 fault tolerance tests passed", "| Machine | A CPU, 2 cores, 24 GiB of memory, Linux 6, ext4 |", "| kvd | 1.2.3, abcdef |", "| Go | go1.26 |",
		"kvd start --strategy consistent --shards 16 --replication-factor 3 --down-after 3s",
		"| A write, one at a time | 2.0 ms | 2.0 ms | 2.0 ms |", "| Leader killed: the next write | 1.50 s | 1.50 s | 1.50 s |",
		"| Leader killed: a write in every shard | – | 2.50 s | 2.50 s |", "| Leader killed: requests failed | 1 of 6 | 1 of 6 | 1 of 6 |", "| Leader killed: the longest request | 1.50 s |",
		"- **Write Performance**: One after the other: 1,000 pairs in 2.00 s, 2.0 ms each on average, 500 per second. 32 at a time: ",
		"Leader killed: the next write succeeded after 1.50 s; 1 of 6 requests failed (1 Unavailable), the longest of the others took 1.50 s. Follower killed: ",
		"in all 2 shards after 2.50 s; every key had all its copies again after 5.00 s",
		"caught up 300 ms after its process started, every key home after 900 ms",
		"Average write time: 2.0 ms, 25 times less than 50 ms.", "Average read time: 2.0 ms, 15 times less than 30 ms.")
	for line := range strings.Lines(text) { // a table whose lines differ is none
		if strings.HasPrefix(line, "|") && strings.Count(line, "|") != 3 && strings.Count(line, "|") != 5 {
			t.Errorf("a line of a table is %q", line)
		}
	}
}

// outline is the page's headings and plots in order.
func outline(n *html.Node) (list []string) {
	if n.Type == html.ElementNode {
		switch n.Data {
		case "h1", "h2", "h3":
			return append(list, n.Data+" "+textOf(n))
		case "table":
			list = append(list, "table")
		case "figure":
			list = append(list, fmt.Sprintf("figure: %d svg", count(n, "svg")))
		}
	}
	for c := n.FirstChild; c != nil; c = c.NextSibling {
		list = append(list, outline(c)...)
	}
	return list
}

func textOf(n *html.Node) string {
	if n.Type == html.TextNode {
		return n.Data
	}
	var s strings.Builder
	for c := n.FirstChild; c != nil; c = c.NextSibling {
		s.WriteString(textOf(c))
	}
	return s.String()
}

func count(n *html.Node, tag string) (found int) {
	for d := range n.Descendants() {
		if d.Type == html.ElementNode && d.Data == tag {
			found++
		}
	}
	return found
}

func parse(t *testing.T, page string) *html.Node {
	t.Helper()
	root, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

const wantOutline = `h1 Report: Distributed Key-Value Store with Fault Tolerance
table
h2 Introduction
table
h2 Modules and Classes
h3 1. ConsistentHash
h3 2. TestPerformanceFull
h3 3. TestPerformanceConsistent
h2 Performance Test Results
h3 “Full” Strategy
h3 “Consistent” Strategy
h3 Throughput
figure: 6 svg
h3 Latency
figure: 6 svg
figure: 6 svg
h3 Node failure and recovery
figure: 7 svg
figure: 2 svg
figure: 2 svg
figure: 2 svg
figure: 2 svg
figure: 2 svg
figure: 2 svg
h2 Experimental Results
h3 Fault Tolerance Testing
h3 Performance Measurement
h2 Analysis
h2 Conclusion
h2 How it was measured`

func TestPage(t *testing.T) {
	page := render(t, sampleReport().Page)
	root := parse(t, page)
	if got := strings.Join(outline(root), "\n"); got != wantOutline {
		t.Errorf("the page is\n%s", got)
	}
	if found := placeholders.FindString(page); found != "" {
		t.Errorf("it has %q", found)
	}
	selfContained(t, root)
	accessible(t, root)
	whole := textOf(root)
	inOrder(t, strings.ReplaceAll(whole, "\u00a0", " "), founding...)
	if page := render(t, sampleReport().Page); !strings.Contains(page, "prefers-color-scheme: dark") || !strings.Contains(page, "width=device-width") {
		t.Error("it is for light screens, or wide ones, only")
	}
}

// selfContained: nothing is fetched, nothing is executed.
func selfContained(t *testing.T, root *html.Node) {
	t.Helper()
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		if slices.Contains([]string{"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "foreignObject", "a"}, n.Data) {
			t.Errorf("there is a <%s>", n.Data)
		}
		for _, a := range n.Attr {
			switch {
			case a.Key == "href" && strings.HasPrefix(a.Val, "#"), a.Key == "aria-label":
			case slices.Contains([]string{"href", "src", "srcset", "action", "data", "poster", "background", "xlink:href"}, a.Key), strings.HasPrefix(a.Key, "on"):
				t.Errorf("<%s> has %s=%q", n.Data, a.Key, a.Val)
			case strings.Contains(a.Val, "://"), strings.Contains(a.Val, "url("):
				t.Errorf("<%s> refers to %q", n.Data, a.Val)
			}
		}
		if style := textOf(n); n.Data == "style" && (strings.Contains(style, "url(") || strings.Contains(style, "@import")) {
			t.Error("the style refers to something")
		}
	}
}

// accessible: each picture says what it shows, or that it shows nothing of its own.
func accessible(t *testing.T, root *html.Node) {
	t.Helper()
	for n := range root.Descendants() {
		if n.Type != html.ElementNode || n.Data != "svg" || n.Parent.Namespace == "svg" {
			continue
		}
		var role, label, hidden string
		for _, a := range n.Attr {
			switch a.Key {
			case "role":
				role = a.Val
			case "aria-label":
				label = a.Val
			case "aria-hidden":
				hidden = a.Val
			}
		}
		if hidden != "true" && (role != "img" || label == "") {
			t.Errorf("a picture says nothing: %v", n.Attr)
		}
	}
}

// What a server, a file system or a command line says is text, whatever is in it.
func TestTextStaysText(t *testing.T) {
	r := sampleReport()
	r.Machine.CPU, r.Program.Command, r.Program.Version = nasty, nasty, nasty
	r.Clusters[0].Bulks[0].Error, r.Clusters[1].Failures[0].Error, r.Tests[0].Error = nasty, nasty, nasty
	r.Clusters[0].Failures[0].Node = nasty
	r.Clusters[0].Failures[0].Load.List[2].Code = nasty
	root := parse(t, render(t, r.Page))
	selfContained(t, root)
	if got, want := strings.Join(outline(root), "\n"), wantOutline; got != want {
		t.Errorf("the page is\n%s", got)
	}
	markdown := render(t, r.Markdown)
	for _, bad := range []string{"<script", "\nnext line", " [x]", " `b`"} {
		if strings.Contains(markdown, bad) {
			t.Errorf("the text has %q", bad)
		}
	}
}

// A step that failed is said to have, with its reason, in every form of the report.
func TestFailuresAreShown(t *testing.T) {
	for _, c := range []struct {
		what  string
		spoil func(r *Report)
		lost  bool
		want  string // in both
	}{
		{"bulk", func(r *Report) { r.Clusters[0].Bulks[0].Error = "the disk is full" }, false, "FAILED: the disk is full"},
		{"failure", func(r *Report) { r.Clusters[1].Failures[1].Error = "no leader" }, false, "FAILED: no leader"},
		{"loss after a failure", func(r *Report) { r.Clusters[1].Failures[0].Lost = 3 }, true, "3 of 101 acknowledged pairs missing or wrong"},
		{"test", func(r *Report) { r.Tests[2].Error = "it hangs" }, false, "FAILED: it hangs"},
		{"loss in a test", func(r *Report) { r.Tests[2].Read = 7 }, true, "FAILED: 3 of 10 acknowledged pairs are missing or wrong"},
		{"cluster", func(r *Report) {
			r.Clusters[2] = &Cluster{Layout: r.Clusters[2].Layout, Error: "the port is taken"}
		}, false, "the port is taken"},
	} {
		r := sampleReport()
		c.spoil(r)
		problems := r.Problems()
		if len(problems) != 1 || problems[0].Lost != c.lost {
			t.Errorf("%s: problems %+v", c.what, problems)
		}
		page, markdown := textOf(parse(t, render(t, r.Page))), render(t, r.Markdown)
		for _, text := range []string{page, markdown} {
			if !strings.Contains(text, c.want) {
				t.Errorf("%s: %q is not said", c.what, c.want)
			}
			if c.lost != strings.Contains(text, "LOST") || strings.Contains(text, "manages nodes with fault tolerance") {
				t.Errorf("%s: the verdict is wrong", c.what)
			}
			if found := placeholders.FindString(text); found != "" {
				t.Errorf("%s: it has %q", c.what, found)
			}
		}
	}
	if problems := sampleReport().Problems(); len(problems) != 0 {
		t.Errorf("a good report has problems: %+v", problems)
	}
}

// Nothing at all, and one strategy only, are reports, too.
func TestLittleWasMeasured(t *testing.T) {
	r := sampleReport()
	r.Clusters, r.Tests = r.Clusters[:1], r.Tests[:3]
	for _, r := range []*Report{{}, r} {
		page, markdown := render(t, r.Page), render(t, r.Markdown)
		selfContained(t, parse(t, page))
		for _, text := range []string{page, markdown} {
			if found := placeholders.FindString(text); found != "" {
				t.Errorf("it has %q", found)
			}
			if !strings.Contains(text, "Not measured in this run.") {
				t.Error("it does not say what is missing")
			}
		}
	}
}

func TestSave(t *testing.T) {
	dir := t.TempDir()
	r := sampleReport()
	files, err := r.Save(dir)
	if err != nil || len(files) != 3 {
		t.Fatal(files, err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(raw, &back); err != nil {
		t.Fatal(err)
	}
	if got, want := render(t, back.Page), render(t, r.Page); got != want {
		t.Error("what was read back is another report")
	}
	if _, err := r.Save(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("it was written to a directory that does not exist")
	}
}
