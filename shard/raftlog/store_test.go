package raftlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"

	"kvd/shard/raftlog/raftlogtest"
)

func TestConformance(t *testing.T) {
	for name, cacheBytes := range map[string]int{"cached": 0, "small cache": 2000, "uncached": -1} {
		t.Run(name, func(t *testing.T) {
			raftlogtest.Run(t, func(tb testing.TB, dir string, guard func() uint64) raftlogtest.Store {
				return open(tb, Options{Path: filepath.Join(dir, "raft.db"), CacheBytes: cacheBytes, Guard: guard})
			}, raftlogtest.Errors{Gap: ErrGap, Guarded: ErrGuarded})
		})
	}
}

// open opens a store without fsync, and has its file checked when the test ends.
func open(tb testing.TB, o Options) *Store {
	tb.Helper()
	o.NoSync = true
	s, err := Open(o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
		if _, err := indexes(o.Path); err != nil {
			tb.Error(err)
		}
	})
	return s
}

func newStore(tb testing.TB, o Options) *Store {
	tb.Helper()
	o.Path = filepath.Join(tb.TempDir(), "raft.db")
	return open(tb, o)
}

// indexes reads the file without any help: the indexes of the log, which must have no hole, in a file that
// bbolt finds sound.
func indexes(path string) (found []uint64, err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		for cerr := range tx.Check() {
			err = cerr
		}
		if err != nil || tx.Bucket([]byte("logs")) == nil {
			return err
		}
		return tx.Bucket([]byte("logs")).ForEach(func(k, _ []byte) error {
			index := binary.BigEndian.Uint64(k)
			if n := len(found); n > 0 && found[n-1]+1 != index {
				return fmt.Errorf("entry %d follows %d", index, found[n-1])
			}
			found = append(found, index)
			return nil
		})
	})
	return found, err
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// images copies the file before each write transaction from now on: what a crash there would leave.
func images(tb testing.TB, s *Store) (paths *[]string) {
	paths = new([]string)
	dir := tb.TempDir()
	s.hooks.beforeWrite = func() error {
		path := filepath.Join(dir, fmt.Sprintf("crash-%d.db", len(*paths)))
		*paths = append(*paths, path)
		b, err := os.ReadFile(s.path)
		must(tb, err)
		must(tb, os.WriteFile(path, b, 0o600))
		return nil
	}
	return paths
}

// A crash in the middle of a removal leaves a log without a hole, and the removal can be done again.
func TestCrashInsideARemoval(t *testing.T) {
	const n = 3*suffixStep + 100
	guard := uint64(0)
	for _, c := range []struct {
		name       string
		guard      uint64
		remove     func(s *Store) error
		steps      int
		keepsFirst bool
	}{
		{"beginning", 4*prefixStep + 7, func(s *Store) error { return s.DeleteRange(1, n-1) }, 5, false},
		{"end", 10, func(s *Store) error { return s.DeleteRange(11, n) }, 4, true},
		{"reset", n, func(s *Store) error { return s.Reset() }, 4, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			guard = c.guard
			s := newStore(t, Options{Guard: func() uint64 { return guard }})
			must(t, s.StoreLogs(raftlogtest.Entries(1, n, 1)))
			crashes := images(t, s)
			must(t, c.remove(s))
			if len(*crashes) != c.steps {
				t.Errorf("%d steps, want %d", len(*crashes), c.steps)
			}
			want, err := indexesAfterClose(s)
			must(t, err)
			before := uint64(n) + 1
			for i, path := range *crashes {
				found, err := indexes(path)
				if err != nil || uint64(len(found)) >= before || c.keepsFirst != (found[0] == 1) && i > 0 {
					t.Fatalf("crash before step %d: %d entries, before %d, %v", i, len(found), before, err)
				}
				before = uint64(len(found))
				again := open(t, Options{Path: path, Guard: func() uint64 { return guard }})
				must(t, c.remove(again))
				if now, err := indexesAfterClose(again); err != nil || len(now) != len(want) {
					t.Fatalf("crash before step %d, then again: %d entries left, want %d (%v)", i, len(now), len(want), err)
				}
			}
		})
	}
}

func indexesAfterClose(s *Store) ([]uint64, error) {
	if err := s.Close(); err != nil {
		return nil, err
	}
	return indexes(s.path)
}

// The order of the steps is what keeps holes away: in the other order the check above sees one.
func TestHolesAreSeen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft.db")
	s, err := Open(Options{Path: path, NoSync: true})
	must(t, err)
	must(t, s.StoreLogs(raftlogtest.Entries(1, 100, 1)))
	must(t, s.bolt.DeleteRange(50, 60)) // the first step of an end removed upwards
	if _, err := indexesAfterClose(s); err == nil {
		t.Error("no hole seen")
	}
}

// Appends pass between the steps of a long removal of the beginning.
func TestAppendsPassDuringARemoval(t *testing.T) {
	s := newStore(t, Options{})
	must(t, s.StoreLogs(raftlogtest.Entries(1, 4*prefixStep, 1)))
	var steps int
	var once sync.Once
	appended := make(chan error, 1)
	s.hooks.beforeWrite = func() error { // runs under s.write
		once.Do(func() {
			go func() { appended <- s.StoreLogs(raftlogtest.Entries(4*prefixStep+1, 4*prefixStep+5, 2)) }()
		})
		steps++
		return nil
	}
	must(t, s.DeleteRange(1, 3*prefixStep))
	must(t, <-appended)
	first, last, err := s.bounds()
	if err != nil || first != 3*prefixStep+1 || last != 4*prefixStep+5 || steps != 4 {
		t.Errorf("%d to %d in %d writes, %v", first, last, steps, err)
	}
}

func TestGuardClampsTheBeginning(t *testing.T) {
	guard := uint64(40)
	s := newStore(t, Options{Guard: func() uint64 { return guard }})
	must(t, s.StoreLogs(raftlogtest.Entries(1, 100, 1)))
	for _, c := range []struct{ guard, hi, wantFirst uint64 }{{0, 50, 1}, {40, 50, 41}, {40, 60, 41}, {70, 60, 61}, {80, 100, 81}} {
		guard = c.guard
		must(t, s.DeleteRange(1, c.hi))
		if first, _ := s.FirstIndex(); first != c.wantFirst {
			t.Errorf("guard %d, removal up to %d: begins at %d, want %d", c.guard, c.hi, first, c.wantFirst)
		}
	}
	guard = math.MaxUint64
	must(t, s.DeleteRange(1, 100))
	if first, last, _ := s.bounds(); first != 0 || last != 0 {
		t.Errorf("not empty: %d to %d", first, last)
	}
}

// After a failed write nothing more is written, and reads go on.
func TestFailedWriteIsTheLast(t *testing.T) {
	s := newStore(t, Options{})
	must(t, s.StoreLogs(raftlogtest.Entries(1, 10, 1)))
	disk := errors.New("no space left on device")
	s.hooks.beforeWrite = func() error { return disk }
	if err := s.StoreLogs(raftlogtest.Entries(11, 12, 1)); !errors.Is(err, ErrFailed) || !errors.Is(err, disk) {
		t.Errorf("the failing write: %v", err)
	}
	s.hooks.beforeWrite = nil
	for name, write := range map[string]func() error{
		"StoreLogs":   func() error { return s.StoreLogs(raftlogtest.Entries(11, 12, 1)) },
		"DeleteRange": func() error { return s.DeleteRange(1, 5) },
		"Reset":       s.Reset,
		"Set":         func() error { return s.Set([]byte("k"), nil) },
		"vote":        func() error { return s.SetUint64(keyVoteTerm, 5) },
	} {
		if err := write(); !errors.Is(err, ErrFailed) {
			t.Errorf("%s after a failure: %v", name, err)
		}
	}
	if !errors.Is(s.Err(), ErrFailed) || strings.Contains(s.Err().Error(), "\n") {
		t.Errorf("Err: %v", s.Err())
	}
	var entry raft.Log
	if err := s.GetLog(10, &entry); err != nil {
		t.Error(err)
	}
	if _, last, _ := s.bounds(); last != 10 {
		t.Errorf("last %d", last)
	}
}

func TestWriteStalled(t *testing.T) {
	s := newStore(t, Options{})
	inside, resume := make(chan struct{}), make(chan struct{})
	s.hooks.beforeWrite = func() error { close(inside); <-resume; return nil }
	if d := s.WriteStalled(); d != 0 {
		t.Errorf("idle: %v", d)
	}
	done := make(chan error)
	go func() { done <- s.StoreLogs(raftlogtest.Entries(1, 1, 1)) }()
	<-inside
	a, b := s.WriteStalled(), s.WriteStalled()
	if a <= 0 || b < a {
		t.Errorf("while a write runs: %v, then %v", a, b)
	}
	if _, err := s.LastIndex(); err != nil || s.Err() != nil { // these never wait for a write
		t.Error(err, s.Err())
	}
	close(resume)
	must(t, <-done)
	if d := s.WriteStalled(); d != 0 {
		t.Errorf("afterwards: %v", d)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(Options{}); err == nil {
		t.Error("opened without a path")
	}
	garbage := filepath.Join(dir, "garbage")
	must(t, os.WriteFile(garbage, bytes.Repeat([]byte("garbage "), 4096), 0o600))
	if _, err := Open(Options{Path: garbage}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), garbage) {
		t.Errorf("garbage: %v", err)
	}
	if _, err := Open(Options{Path: filepath.Join(dir, "no", "such")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	path := filepath.Join(dir, "raft.db")
	s := open(t, Options{Path: path})
	if _, err := Open(Options{Path: path}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("opened twice: %v", err)
	}
	must(t, s.bolt.StoreLog(&raft.Log{Index: 3}))
	must(t, s.Close())
	swapKey(t, path, 3, 4)
	if _, err := Open(Options{Path: path}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("an entry under a wrong index: %v", err)
	}
}

func swapKey(t *testing.T, path string, from, to uint64) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	must(t, err)
	defer db.Close()
	must(t, db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("logs"))
		value := bytes.Clone(b.Get(binary.BigEndian.AppendUint64(nil, from)))
		if err := b.Delete(binary.BigEndian.AppendUint64(nil, from)); err != nil {
			return err
		}
		return b.Put(binary.BigEndian.AppendUint64(nil, to), value)
	}))
}

// A file that was cut off is refused, or opens with all of its log: never a crash, never a part.
func TestOpenTruncatedFile(t *testing.T) {
	s := newStore(t, Options{})
	must(t, s.StoreLogs(raftlogtest.Entries(1, 2000, 1)))
	must(t, s.Close())
	whole, err := os.ReadFile(s.path)
	must(t, err)
	refused := 0
	for size := 0; size < len(whole); size += 4096 {
		path := filepath.Join(t.TempDir(), "cut.db")
		must(t, os.WriteFile(path, whole[:size], 0o600))
		cut, err := Open(Options{Path: path, NoSync: true})
		if err != nil {
			refused++
			continue
		}
		if _, last, _ := cut.bounds(); last != 2000 && size != 0 {
			t.Errorf("cut at %d: ends at %d", size, last)
		}
		must(t, cut.Close())
	}
	if refused == 0 {
		t.Error("no cut was refused")
	}
}

func TestCachedReadsDoNotAllocate(t *testing.T) {
	s := newStore(t, Options{})
	must(t, s.StoreLogs(raftlogtest.Entries(1, 100, 1)))
	var entry raft.Log
	if n := testing.AllocsPerRun(100, func() { _ = s.GetLog(77, &entry) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A replica may be opened again in one process, with the same registry.
func TestMetricsAreRegisteredOnce(t *testing.T) {
	reg := prometheus.NewRegistry()
	for range 2 {
		s := newStore(t, Options{Registerer: reg})
		must(t, s.StoreLogs(raftlogtest.Entries(1, 3, 1)))
	}
	families, err := reg.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == "kvd_raftlog_batch_entries" && f.GetMetric()[0].GetHistogram().GetSampleCount() == 2 {
			return
		}
	}
	t.Error("the second store's writes are not counted")
}
