//go:build unix

package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

var (
	jobsFlag = flag.Int("jobs", 5, "tests of etcd that run beside each other; they mostly wait")
	allFlag  = flag.Bool("all", false, "also run the packages of etcd's tests that take minutes")
	etcdFlag = flag.Bool("etcd", false, "run the tests against etcd itself, too")
	portFlag = flag.Int("port", 20000, "first `port` of the servers; systems give connections higher ones")
	treeFlag = flag.String("tree", "", "`directory` to build in, where etcd's tests stay for the next run; only kvd is built again then")
	testFlag = flag.String("tests", "", "`regexp` of the tests of etcd to run, package:name")
)

// The strategies of kvd.
const full, consistent = "full", "consistent"

// packages of etcd's tests.
var (
	needed = []string{"common", "integration/clientv3/concurrency", "integration/clientv3/experimental/recipes"}
	more   = []string{"integration", "integration/clientv3", "integration/clientv3/lease"}
	shards = slices.Concat(needed, tagged)
)

const (
	envPort     = "KVD_E2E_BASE_PORT"
	portsPerJob = 1000
	testTimeout = 2 * time.Minute
	logTail     = 3 << 10 // bytes of a node's log that are shown
	outputTail  = 12 << 10
)

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", strconv.Itoa(*jobsFlag))
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	if *treeFlag == "" {
		dir, err := os.MkdirTemp("", "kvd-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		*treeFlag = dir
	}
	return m.Run()
}

// kvdTree is what both strategies need.
var kvdTree = sync.OnceValues(func() (*tree, error) {
	return newTree(context.Background(), filepath.Join(*treeFlag, "kvd"), slices.Concat(chosen(), tagged), true)
})

func TestFull(t *testing.T) {
	t.Parallel()
	runKVD(t, full, chosen(), "--strategy", full)
}

func TestConsistent(t *testing.T) {
	t.Parallel()
	runKVD(t, consistent, shards, "--strategy", consistent, "--shards", "3", "--replication-factor", "3")
}

// TestEtcd shows that what is run passes against etcd.
func TestEtcd(t *testing.T) {
	if !*etcdFlag {
		t.Skip("only with -etcd")
	}
	tree, err := newTree(t.Context(), filepath.Join(*treeFlag, "etcd"), chosen(), false)
	if err != nil {
		t.Fatal(err)
	}
	skips, err := readSkips("skips.txt", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	(&suite{tree: tree, packages: chosen(), skips: skips}).run(t)
}

// chosen are the packages for servers that have all keys in one place.
func chosen() []string {
	if *allFlag {
		return slices.Concat(needed, more)
	}
	return needed
}

func runKVD(t *testing.T, strategy string, packages []string, flags ...string) {
	skips, err := readSkips("skips.txt", strategy)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := kvdTree()
	if err != nil {
		t.Fatal(err)
	}
	flags = append(flags, "--heartbeat-timeout", "300ms", "--election-timeout", "300ms")
	env := []string{
		"ETCD_SHIM_KVD=" + filepath.Join(tree.bin, "kvd"), "ETCD_SHIM_FLAGS=" + strings.Join(flags, " "),
		"ETCD_SHIM_CERT=" + filepath.Join(tree.bin, "own.crt"), "ETCD_SHIM_KEY=" + filepath.Join(tree.bin, "own.key"),
		"KVD_E2E_BINARY=" + filepath.Join(tree.bin, "kvd"), "KVD_E2E_FLAGS=" + strings.Join(flags, " "),
	}
	s := &suite{tree: tree, packages: packages, skips: skips, env: env}
	s.run(t)
	if *testFlag != "" {
		return
	}
	for _, skip := range s.skips {
		if !skip.used && slices.Contains(packages, skip.pkg) {
			t.Errorf("skips.txt: no test is like %q", skip.line)
		}
	}
}

// suite is what is run, and with what.
type suite struct {
	tree     *tree
	packages []string
	skips    []*skip
	env      []string
}

// ports are the first ports of the jobs, which all suites share.
var ports = sync.OnceValue(func() chan int {
	free := make(chan int, *jobsFlag)
	for i := range *jobsFlag {
		free <- *portFlag + i*portsPerJob
	}
	return free
})

// run runs every test in a process of its own: where a test ends its process, the others are not lost.
func (s *suite) run(t *testing.T) {
	wanted, err := regexp.Compile(*testFlag)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("tests", func(t *testing.T) { // returns when all are done
		for _, pkg := range s.packages {
			names, err := s.list(t.Context(), pkg)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range names {
				if !wanted.MatchString(pkg + ":" + name) {
					continue
				}
				if untagged, ok := strings.CutSuffix(pkg, tagSuffix); ok {
					if reason, _ := skipsOf(s.skips, untagged, name); reason == "" {
						continue
					}
				}
				reason, parts := skipsOf(s.skips, pkg, name)
				t.Run(pkg+":"+name, func(t *testing.T) {
					if reason != "" {
						t.Skip(reason)
					}
					t.Parallel()
					s.test(t, pkg, name, parts)
				})
			}
		}
	})
}

// list returns the names of a package's tests and examples.
func (s *suite) list(ctx context.Context, pkg string) ([]string, error) {
	cmd := s.command(ctx, pkg, *portFlag, os.TempDir(), "-test.list", ".")
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list the tests of %s: %w", pkg, err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "Test") || strings.HasPrefix(line, "Example") {
			names = append(names, line)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s has no tests", pkg)
	}
	return names, nil
}

// command runs the tests of a package. When it ends or ctx does, all that it has started ends.
func (s *suite) command(ctx context.Context, pkg string, port int, logs string, args ...string) *exec.Cmd {
	if pkg == "common" {
		args = append(args, "--bin-dir", s.tree.bin)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(s.tree.bin, path.Base(pkg)+".test"), args...)
	cmd.Dir = filepath.Join(s.tree.dir, filepath.FromSlash(pkg))
	cmd.Env = append(os.Environ(), s.env...)
	cmd.Env = append(cmd.Env, envPort+"="+strconv.Itoa(port), "KVD_E2E_LOGS="+logs)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// skippedPart is a test or subtest that skipped itself.
var skippedPart = regexp.MustCompile(`(?m)^ *--- SKIP: (\S+)`)

// again is how many tests of a run may be tried a second time. Many of etcd's have deadlines of half a second for what
// takes several processes, which a busy machine misses now and then; what fails more often than that is wrong.
const again = 5

var triedAgain atomic.Int32

// test runs one test, without the parts that are left out.
func (s *suite) test(t *testing.T, pkg, name string, parts []*skip) {
	port := <-ports()
	defer func() { ports() <- port }()
	args := []string{"-test.v", "-test.count=1", "-test.run", "^" + name + "$", "-test.timeout", testTimeout.String()}
	if len(parts) > 0 {
		var patterns []string
		for _, p := range parts {
			t.Logf("without %s/%s: %s", name, p.parts, p.reason)
			patterns = append(patterns, "^"+name+"$/"+p.parts)
		}
		args = append(args, "-test.skip", strings.Join(patterns, "|"))
	}
	out, failure := s.attempt(t, pkg, port, args)
	if failure != nil && triedAgain.Add(1) <= again {
		t.Logf("it is tried again: %v", failure)
		out, failure = s.attempt(t, pkg, port, args)
	}
	if failure != nil {
		t.Error(failure)
		return
	}
	skipped := skippedPart.FindAllSubmatch(out, -1)
	for _, m := range skipped {
		if string(m[1]) == name {
			t.Skipf("it skips itself: %s", lastLog(out))
		}
		t.Logf("%s skips itself", m[1])
	}
	if bytes.Contains(out, []byte("testing: warning: no tests to run")) {
		t.Error("no test was run")
	}
}

// attempt runs a test once. A failure has its output and what the nodes logged.
func (s *suite) attempt(t *testing.T, pkg string, port int, args []string) (out []byte, failure error) {
	logs := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout+10*time.Second)
	defer cancel()
	cmd := s.command(ctx, pkg, port, logs, args...)
	out, err := cmd.CombinedOutput()
	if cmd.Process != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // the nodes of a test that has ended in the middle
	}
	if err == nil && !bytes.Contains(out, []byte("\nPASS\n")) {
		err = errors.New("it did not say PASS")
	}
	if err != nil {
		return nil, fmt.Errorf("%w\n%s%s", err, tail(withoutClients(out), outputTail), nodeLogs(logs))
	}
	return out, nil
}

// withoutClients leaves out what etcd's client and gRPC log.
func withoutClients(out []byte) []byte {
	var kept []byte
	drop, indent := false, 0
	for line := range bytes.Lines(out) {
		in := len(line) - len(bytes.TrimLeft(line, " "))
		if logged := logLine.FindSubmatch(line); logged != nil {
			drop, indent = bytes.Equal(logged[1], []byte("logger.go")), in
		} else if in <= indent {
			drop = false // not a further line of the same message
		}
		if !drop {
			kept = append(kept, line...)
		}
	}
	return kept
}

// logLine is the first line of what a test logs.
var logLine = regexp.MustCompile(`^ +(?:\S*/)?(\S+\.go):\d+: `)

// lastLog is the reason that a test gives for skipping itself.
func lastLog(out []byte) string {
	last := "no reason given"
	for line := range bytes.Lines(withoutClients(out)) {
		if logLine.Match(line) {
			last = string(bytes.TrimSpace(line))
		}
	}
	return last
}

func tail(text []byte, n int) []byte {
	if len(text) > n {
		return append([]byte("..."), text[len(text)-n:]...)
	}
	return text
}

// nodeLogs is the end of each node's log.
func nodeLogs(dir string) string {
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		return err.Error()
	}
	var out strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			text = []byte(err.Error())
		}
		fmt.Fprintf(&out, "--- %s\n%s\n", filepath.Base(file), tail(text, logTail))
	}
	return out.String()
}
