package raftlog

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"kvd/shard/raftlog/raftlogtest"
)

const childEnv = "KVD_RAFTLOG_CHILD_FILE"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		fmt.Println("failed:", writeUntilKilled(path))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// writeUntilKilled appends, votes and truncates, and says on stdout what is durable after each.
func writeUntilKilled(path string) error {
	s, err := Open(Options{Path: path})
	if err != nil {
		return err
	}
	first, last, err := s.bounds()
	if err != nil {
		return err
	}
	term, _ := s.GetUint64(keyVoteTerm)
	for {
		term++
		if err := s.SetUint64(keyVoteTerm, term); err != nil {
			return err
		}
		if err := s.Set(keyVoteCandidate, fmt.Appendf(nil, "candidate of %d", term)); err != nil {
			return err
		}
		if err := s.StoreLogs(raftlogtest.Entries(last+1, last+30, 1)); err != nil {
			return err
		}
		last += 30
		fmt.Println(first, last, term)
		if last-first < 300 {
			continue
		}
		if err := s.DeleteRange(first, last-200); err != nil {
			return err
		}
		if first, _, err = s.bounds(); err != nil {
			return err
		}
		fmt.Println(first, last, term)
	}
}

// A process is killed again and again while it writes. What it said was durable is there, the log has no hole,
// and a vote's term has its own candidate.
func TestKill(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(t.TempDir(), "raft.db")
	for round := range 12 {
		said := runAndKill(t, path, 1+rnd.IntN(40))
		found, err := indexes(path)
		must(t, err)
		s, err := Open(Options{Path: path})
		must(t, err)
		if len(found) == 0 || found[len(found)-1] < said.last || found[0] > said.last {
			t.Fatalf("round %d: said %+v, found %d entries", round, said, len(found))
		}
		for _, index := range []uint64{found[0], said.last} {
			var entry raft.Log
			must(t, s.GetLog(index, &entry))
			if want := raftlogtest.Entry(index, 1); entry.Index != index || string(entry.Data) != string(want.Data) {
				t.Fatalf("round %d: entry %d is damaged", round, index)
			}
		}
		term, err1 := s.GetUint64(keyVoteTerm)
		candidate, err2 := s.Get(keyVoteCandidate)
		if err1 != nil || err2 != nil || term < said.term || string(candidate) != fmt.Sprintf("candidate of %d", term) {
			t.Fatalf("round %d: said term %d, found %d %q, %v %v", round, said.term, term, candidate, err1, err2)
		}
		must(t, s.Close())
	}
}

type durable struct{ first, last, term uint64 }

// runAndKill kills the child at some moment after it has said so many lines, and returns the last it said.
func runAndKill(t *testing.T, path string, lines int) (said durable) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+path)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	must(t, err)
	must(t, child.Start())
	scanner := bufio.NewScanner(out)
	for n := 1; scanner.Scan(); n++ {
		if n == lines {
			must(t, child.Process.Kill())
		}
		if line := scanner.Text(); !strings.HasPrefix(line, "failed") {
			_, err := fmt.Sscan(line, &said.first, &said.last, &said.term)
			must(t, err)
		} else {
			t.Fatal(line)
		}
	}
	_ = child.Wait() // killed
	return said
}
