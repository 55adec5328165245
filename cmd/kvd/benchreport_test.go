package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvd/bench/report"
)

// built is kvd as users run it: the report starts nodes with the program that it is part of.
func built(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kvd")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return path
}

// processesWith are those whose command line has a text.
func processesWith(t *testing.T, text string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline") // none on other systems
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if line, err := os.ReadFile(f); err == nil && bytes.Contains(line, []byte(text)) { // it may have ended
			found = append(found, f)
		}
	}
	return found
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("%s has %v, %v", dir, entries, err)
	}
}

func TestBenchReport(t *testing.T) {
	program := built(t)
	t.Run("whole", func(t *testing.T) { wholeReport(t, program) })
	t.Run("interrupted", func(t *testing.T) { interruptedReport(t, program) })
}

// wholeReport is one of one strategy: nodes are started, killed and started again, and every figure is there.
func wholeReport(t *testing.T, program string) {
	t.Parallel()
	data, out := t.TempDir(), filepath.Join(t.TempDir(), "new", "report")
	text, err := exec.CommandContext(t.Context(), program, "bench", "report", "--quick", "--strategy", "full", "--dir", data, "--out", out).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	wantEmpty(t, data)
	if left := processesWith(t, data); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
	for _, name := range []string{"report.md", "report.html", "report.json"} {
		if info, err := os.Stat(filepath.Join(out, name)); err != nil || info.Size() < 1000 || !bytes.Contains(text, []byte(name)) {
			t.Errorf("%s: %v, or not named in\n%s", name, err, text)
		}
	}
	raw, err := os.ReadFile(filepath.Join(out, "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r report.Report
	if err := json.Unmarshal(raw, &r); err != nil {
		t.Fatal(err)
	}
	if len(r.Problems()) > 0 || len(r.Clusters) != 1 || len(r.Tests) != 3 || !r.Quick || r.Took <= 0 {
		t.Errorf("it has %d clusters and %d tests, problems: %v", len(r.Clusters), len(r.Tests), r.Problems())
	}
	for _, b := range r.Clusters[0].Bulks {
		if b.Requests < 100 && b.Name != report.WriteSustained && b.Name != report.ReadSustained || b.Took <= 0 || b.Mean <= 0 || len(b.Histogram) == 0 {
			t.Errorf("bulk %+v", b)
		}
	}
	for _, f := range r.Clusters[0].Failures {
		if f.FirstWrite <= 0 || f.Restarted < f.FirstWrite || f.CaughtUp <= 0 || f.Acknowledged < 10 || f.Lost > 0 || len(f.Load.List) == 0 || f.Keys < 110 {
			t.Errorf("failure of a %s: %+v", f.Role, f)
		}
	}
	if a, b := r.Clusters[0].Failures[0].Node, r.Clusters[0].Failures[1].Node; a == "" || b == "" {
		t.Errorf("%q and %q were killed", a, b)
	}
	for _, test := range r.Tests {
		if !test.Passed() || test.ReadAfter <= 0 || len(test.Killed) == 0 || len(test.Through) < 2 {
			t.Errorf("test %+v", test)
		}
	}
}

// interruptedReport: Ctrl-C in the middle ends all nodes, and leaves neither files nor a report.
func interruptedReport(t *testing.T, program string) {
	t.Parallel()
	data, out := t.TempDir(), t.TempDir()
	cmd := exec.Command(program, "bench", "report", "--strategy", "full", "--dir", data, "--out", out)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }() // if it still runs
	lines := bufio.NewScanner(stdout)
	for lines.Scan() && !strings.Contains(lines.Text(), "until all serve") {
	}
	if _, err := os.Stat("/proc/self"); err == nil && len(processesWith(t, data)) < 3 {
		t.Error("there are no nodes to be ended")
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() { // to the end, which Wait wants
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted {
		t.Errorf("it ended with %v\n%s", err, &errOut)
	}
	if left := processesWith(t, data); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
	wantEmpty(t, data)
	wantEmpty(t, out)
}

func TestBenchReportFlags(t *testing.T) {
	for _, args := range [][]string{{"--strategy", "magic"}, {"--pairs", "-1"}, {"--endpoints", "127.0.0.1:2379"}, {"more"}} {
		if code, _, _ := kvd(t, "", append([]string{"bench", "report"}, args...)...); code != exitUsage {
			t.Errorf("%v ends with %d", args, code)
		}
	}
	if code, _, text := kvd(t, "", "bench", "report", "--out", filepath.Join(os.DevNull, "x")); code != exitFailed {
		t.Errorf("without a place for the report it ends with %d: %s", code, text)
	}
}

// A report with problems is no success.
func TestBenchReportVerdict(t *testing.T) {
	failed := &report.Test{Number: 1, Error: "it hangs"}
	lost := &report.Test{Number: 2, Written: 10, Read: 9}
	for _, c := range []struct {
		tests []*report.Test
		want  int
	}{{nil, exitOK}, {[]*report.Test{failed}, exitFailed}, {[]*report.Test{failed, lost}, exitDataLost}} {
		if got := exitCode(t.Context(), verdict(&report.Report{Tests: c.tests})); got != c.want {
			t.Errorf("%d tests that failed: exit code %d, not %d", len(c.tests), got, c.want)
		}
	}
}

func TestStepPrinter(t *testing.T) {
	var out bytes.Buffer
	p := &stepPrinter{out: &out, begin: time.Now()}
	s := report.Step{Number: 1, Total: 2, Where: "here", What: "do this"}
	p.step(s)
	s.Result = "done"
	p.step(s)
	s.Number, s.What, s.Result = 2, "do that", ""
	p.live = true
	p.step(s)
	s.Err, s.Result = errTest, "broken\nin two"
	p.step(s)
	want := "\nhere\n   0.0 s  do this: done\n[###############...............] 2 of 2: do that\r\x1b[K   0.0 s  do that: FAILED: broken in two\n"
	if out.String() != want {
		t.Errorf("it printed %q", out.String())
	}
}
