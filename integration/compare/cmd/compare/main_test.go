package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kvd/integration/compare/servers"
)

// TestQuickRun measures everything once with real servers, and looks whether each figure is there.
func TestQuickRun(t *testing.T) {
	file, jsonFile := filepath.Join(t.TempDir(), "performance.md"), filepath.Join(t.TempDir(), "figures.json")
	if err := os.WriteFile(file, []byte("# before\n"+beginMarker+"old\n"+endMarker+"# after\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	o := options{rounds: 1, keys: minKeys, watchers: 200, leases: 500, ending: 200, duration: time.Second, quick: true, dir: t.TempDir(), out: file, jsonOut: jsonFile}
	if err := run(t.Context(), &out, t.Output(), o); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	written, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if text := string(written); !strings.HasPrefix(text, "# before\n"+beginMarker) || !strings.HasSuffix(text, endMarker+"# after\n") ||
		!strings.Contains(text, out.String()) || strings.Contains(text, "old") {
		t.Errorf("the file is now\n%s", text)
	}
	text, err := os.ReadFile(jsonFile)
	if err != nil {
		t.Fatal(err)
	}
	var report fileReport
	if err := json.Unmarshal(text, &report); err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		i := slices.IndexFunc(report.Rows, func(r rowReport) bool { return r.Key == row.key })
		for _, server := range []string{etcd, full, consistent} {
			if i < 0 || len(report.Rows[i].Figures[server]) != 1 {
				t.Errorf("no %s of %s", row.key, server)
			}
		}
	}
	if want := 2*len(targets) - 2; len(report.Targets) != want {
		t.Errorf("%d of %d targets are judged", len(report.Targets), want)
	}
}

// TestPutsThatAreNotThereAreNoticed takes a server that acknowledges all and keeps nothing for a real one.
func TestPutsThatAreNotThereAreNoticed(t *testing.T) {
	dir := t.TempDir()
	c := &comparison{
		o: options{quick: true, duration: 100 * time.Millisecond}, readKeys: 1, chosen: map[string]bool{"put": true}, dir: dir,
		binaries: map[string]string{}, progress: t.Output(), begun: time.Now(), figures: figures{},
	}
	for _, pkg := range []string{servers.KVD, servers.Floor} {
		var err error
		if c.binaries[pkg], err = servers.Build(t.Context(), pkg, dir); err != nil {
			t.Fatal(err)
		}
	}
	liar := *contestants[floor]
	liar.name = full
	tried := &trial{comparison: c, contestant: &liar}
	if err := tried.measure(t.Context(), (*trial).loads); err == nil || !strings.Contains(err.Error(), "puts were acknowledged, 1 are there") {
		t.Errorf("nothing was noticed: %v", err)
	}
	if s := c.figures.of("put-1/rate", full); len(s) != 0 {
		t.Errorf("its figures count: %v", s)
	}
}

func TestBenchResultsAreChecked(t *testing.T) {
	right := benchResult{Elapsed: 1, Total: benchOperation{Count: 10, Keys: 1000}}
	l := load{"range", "range", 100}
	if err := right.check(l); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*benchResult){
		"failed":   func(r *benchResult) { r.Total.Failed = 1 },
		"none":     func(r *benchResult) { r.Total.Count, r.Total.Keys = 0, 0 },
		"too few":  func(r *benchResult) { r.Total.Keys-- },
		"too many": func(r *benchResult) { r.Total.Keys++ },
	} {
		r := right
		if spoil(&r); r.check(l) == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

const sampleReport = `
Summary:
  Total:	8.1 secs.
  Requests/sec:	6172.8395

Latency distribution:
  50% in 0.0134 secs.
`

func TestParseBenchmark(t *testing.T) {
	if rate, err := parseBenchmark([]byte(sampleReport)); rate != 6172.8395 || err != nil {
		t.Errorf("%v, %v", rate, err)
	}
	for name, out := range map[string]string{
		"nothing":     "",
		"failed puts": sampleReport + "\nError distribution:\n  [3]\tetcdserver: request timed out\n",
	} {
		if rate, err := parseBenchmark([]byte(out)); err == nil {
			t.Errorf("%s: %v", name, rate)
		}
	}
}

func TestAtHome(t *testing.T) {
	shard := func(state, leader string) string {
		return `{"shards": [{"state": "ok", "leader": "n1", "target": [{"node": "n1"}, {"node": "n2"}]},
			{"state": "` + state + `", "leader": "` + leader + `", "target": [{"node": "n2"}, {"node": "n1"}]}]}`
	}
	for out, want := range map[string]bool{
		shard("ok", "n2"): true, shard("ok", "n1"): false, shard("moving", "n2"): false, shard("ok", ""): false, `{"shards": []}`: false,
	} {
		if got, err := atHome([]byte(out)); got != want || err != nil {
			t.Errorf("%s: %v, %v", out, got, err)
		}
	}
	if _, err := atHome([]byte("Error")); err == nil {
		t.Error("no error")
	}
}

// TestTargetsJudgeNeighbouringRounds: a machine that is slow in one round is so for all servers.
func TestTargetsJudgeNeighbouringRounds(t *testing.T) {
	c := &comparison{figures: figures{}}
	for round, rates := range [][2]float64{{100, 150}, {10, 20}, {200, 340}, {100, 190}, {50, 60}} {
		c.figures.set("put-100/rate", etcd, round, rates[0])
		c.figures.set("put-100/rate", full, round, rates[1])
	}
	c.figures.set("put-100/rate", consistent, 1, 15)
	c.figures.set("compaction/ratio", full, 0, 2.1)
	for _, server := range both {
		c.figures.set("put-1000/rate", server, 0, 0)
	}
	text := strings.Join(strings.Fields(c.markdown()), " ")
	for _, want := range []string{
		"≥ 1.6 | 1.70 (1.20–2.00) | met | 1.50 | **not met** |",
		"≤ 2 | 2.10 | **not met** | | not measured |",
		"100 (10–200) | 150 (20–340) | 15 |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestSpread(t *testing.T) {
	s := spread{3, 1, 2}
	if s.min() != 1 || s.median() != 2 || s.max() != 3 || s[0] != 3 {
		t.Error(s.min(), s.median(), s.max(), s)
	}
	if m := (spread{4, 1, 2, 3}).median(); m != 2.5 {
		t.Error(m)
	}
	if s := (spread{0.5, 0.25}).format(1); s != "0.4 (0.2–0.5)" {
		t.Error(s)
	}
}

// TestTailIsOfTheWindow: puts that were due before or after it do not count, those that came back after it do.
func TestTailIsOfTheWindow(t *testing.T) {
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	var samples []sample
	for i := range 1000 {
		s := sample{due: at(i), latency: time.Millisecond}
		if i < 300 || i >= 700 {
			s.latency = time.Hour
		}
		if i >= 690 && i < 700 {
			s.latency = time.Second // 10 of 400
		}
		samples = append(samples, s)
	}
	if got, err := p99(samples, at(300), at(700)); got != time.Second || err != nil {
		t.Error(got, err)
	}
	if got, err := p99(samples, at(300), at(690)); got != time.Millisecond || err != nil {
		t.Error(got, err)
	}
	if _, err := p99(samples, at(300), at(399)); err == nil {
		t.Error("99 puts are enough")
	}
}

func TestReadingsNearestToATimeCount(t *testing.T) {
	start := time.Now()
	var all []reading
	for i := range 11 {
		all = append(all, reading{at: start.Add(time.Duration(i) * 20 * time.Millisecond), servers: float64(i), machine: float64(2 * i)})
	}
	m := &meter{func() {}, make(chan []reading, 1)}
	m.result <- all
	got, err := m.between(start.Add(45*time.Millisecond), 0.101)
	if err != nil || got.servers != 5 || got.machine != 10 { // from 40 ms to 140 ms
		t.Errorf("%+v, %v", got, err)
	}
}

func TestOptions(t *testing.T) {
	valid := options{rounds: 1, keys: minKeys, watchers: 1, leases: 1, ending: 1, duration: time.Second, only: "put,restart"}
	if err := valid.validate(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*options){
		"rounds": func(o *options) { o.rounds = 0 }, "keys": func(o *options) { o.keys = 1 },
		"watchers": func(o *options) { o.watchers = 0 }, "leases": func(o *options) { o.leases = 0 }, "ending": func(o *options) { o.ending = 0 },
		"duration": func(o *options) { o.duration = 0 }, "only": func(o *options) { o.only = "puts" },
	} {
		o := valid
		if spoil(&o); o.validate() == nil {
			t.Errorf("%s: no error", name)
		}
	}
	file := filepath.Join(t.TempDir(), "f.md")
	if checkMarkers(file) == nil {
		t.Error("a file that is not there can be written into")
	}
	for text, want := range map[string]bool{
		"": false, beginMarker: false, endMarker + beginMarker: false, beginMarker + endMarker: true,
	} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := checkMarkers(file); err == nil != want {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestRowsAndTargets: each is there once, and every target has its row.
func TestRowsAndTargets(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rows {
		if seen[r.key] || !slices.Contains(sections, r.section) {
			t.Errorf("%s is there twice, or in no section", r.key)
		}
		seen[r.key] = true
	}
	for _, target := range targets {
		if !seen[target.row] {
			t.Errorf("no row %s", target.row)
		}
	}
}
