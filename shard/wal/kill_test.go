package wal

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/raft"

	"kvd/shard/raftlog/raftlogtest"
)

const (
	childEnv     = "KVD_WAL_CHILD_DIR"
	killReplicas = 5
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		fmt.Println("failed:", writeUntilKilled(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// writeUntilKilled appends, votes and truncates for some replicas at once, and says on stdout what is durable.
func writeUntilKilled(dir string) error {
	l, err := Open(Options{Dir: dir, SegmentBytes: 1 << 20})
	if err != nil {
		return err
	}
	failed := make(chan error)
	var said sync.Mutex
	for i := range uint64(killReplicas) {
		id := ID{i, 1}
		if len(l.Replicas()) <= int(i) {
			if err := l.Create(id); err != nil {
				return err
			}
		}
		s, err := l.Replica(id, ReplicaOptions{CacheBytes: -1})
		if err != nil {
			return err
		}
		go func() {
			failed <- appendForEver(s, 10+20*i, func(d durable) {
				said.Lock()
				defer said.Unlock()
				fmt.Println(i, d.first, d.last, d.term)
			})
		}()
	}
	return <-failed
}

type durable struct{ first, last, term uint64 }

func appendForEver(s *Store, keep uint64, say func(durable)) error {
	var d durable
	d.first, d.last = s.rep.bounds()
	d.term, _ = s.GetUint64(keyVoteTerm)
	for {
		d.term++
		if err := s.SetUint64(keyVoteTerm, d.term); err != nil {
			return err
		}
		if err := s.Set(keyVoteCandidate, fmt.Appendf(nil, "candidate of %d", d.term)); err != nil {
			return err
		}
		if err := s.StoreLogs(raftlogtest.Entries(d.last+1, d.last+30, 1)); err != nil {
			return err
		}
		d.last += 30
		say(d)
		if d.last-d.first > 2*keep {
			if err := s.DeleteRange(0, d.last-keep); err != nil {
				return err
			}
			d.first, d.last = s.rep.bounds()
			say(d)
		}
	}
}

// A process is killed again and again while it writes. What it said was durable is there.
func TestKill(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	dir := filepath.Join(t.TempDir(), "log")
	for round := range 10 {
		said := runAndKill(t, dir, killReplicas+rnd.IntN(300))
		l := open(t, Options{Dir: dir, SegmentBytes: 1 << 20})
		for i, d := range said {
			if err := d.check(l, ID{uint64(i), 1}); err != nil {
				t.Fatalf("round %d: replica %d: %v", round, i, err)
			}
		}
		must(t, l.Close())
	}
}

func (d durable) check(l *Log, id ID) error {
	if d.last == 0 {
		return nil // it had not said anything yet
	}
	s, err := l.Replica(id, ReplicaOptions{CacheBytes: -1})
	if err != nil {
		return err
	}
	first, last := s.rep.bounds()
	if first < d.first || first > d.last || last < d.last {
		return fmt.Errorf("said %+v, found %d to %d", d, first, last)
	}
	for i := first; i <= last; i++ {
		var e raft.Log
		if err := s.GetLog(i, &e); err != nil {
			return err
		}
		if want := raftlogtest.Entry(i, 1); string(e.Data) != string(want.Data) || e.Index != i {
			return fmt.Errorf("entry %d is damaged", i)
		}
	}
	term, err1 := s.GetUint64(keyVoteTerm)
	candidate, err2 := s.Get(keyVoteCandidate)
	if err1 != nil || err2 != nil || term < d.term || string(candidate) != fmt.Sprintf("candidate of %d", term) {
		return fmt.Errorf("said term %d, found %d %q, %v %v", d.term, term, candidate, err1, err2)
	}
	return s.Close()
}

// runAndKill kills the child at some moment after it has said so many lines, and returns the last it said of each.
func runAndKill(t *testing.T, dir string, lines int) (said [killReplicas]durable) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+dir)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	must(t, err)
	must(t, child.Start())
	scanner := bufio.NewScanner(out)
	for n := 1; scanner.Scan(); n++ {
		if n == lines {
			must(t, child.Process.Kill())
		}
		if strings.HasPrefix(scanner.Text(), "failed") {
			t.Fatal(scanner.Text())
		}
		var i int
		var d durable
		if _, err := fmt.Sscan(scanner.Text(), &i, &d.first, &d.last, &d.term); err != nil {
			t.Fatal(err)
		}
		said[i] = d
	}
	_ = child.Wait() // killed
	return said
}
