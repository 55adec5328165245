// Package raftlogtest is the contract between raft and a store of its log and votes, as tests that any such
// store has to pass, and a store in memory for tests of what stands on one.
package raftlogtest

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

// Store is what is tested.
type Store interface {
	raft.LogStore
	raft.StableStore
	Reset() error
	Close() error
}

// Open opens the store in dir, making it at first, with a guard as in raftlog.Options. Errors are fatal to tb.
type Open func(tb testing.TB, dir string, guard func() uint64) Store

// Errors are the store's refusals.
type Errors struct{ Gap, Guarded error }

// Run runs all tests, as subtests of t.
func Run(t *testing.T, open Open, errs Errors) {
	t.Run("EmptyLog", func(t *testing.T) { testEmptyLog(t, open) })
	t.Run("EntriesKeepEverything", func(t *testing.T) { testEntriesKeepEverything(t, open) })
	t.Run("MissingKeys", func(t *testing.T) { testMissingKeys(t, open) })
	t.Run("Votes", func(t *testing.T) { testVotes(t, open) })
	t.Run("VoteWithoutCandidate", func(t *testing.T) { testVoteWithoutCandidate(t, open) })
	t.Run("WholeLogReplaced", func(t *testing.T) { testWholeLogReplaced(t, open, errs) })
	t.Run("Closed", func(t *testing.T) { testClosed(t, open) })
	t.Run("Model", func(t *testing.T) { testModel(t, open, errs) })
}

func none() uint64 { return 0 }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Entry returns an entry that depends only on index and term.
func Entry(index, term uint64) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogType(index % 6 / 5 * 5),
		Data: bytes.Repeat([]byte{byte(index), byte(term)}, int(index%40))}
}

// Entries returns the entries from lo to hi, both included.
func Entries(lo, hi, term uint64) (entries []*raft.Log) {
	for i := lo; i <= hi; i++ {
		entries = append(entries, Entry(i, term))
	}
	return entries
}

func same(a, b *raft.Log) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && bytes.Equal(a.Data, b.Data) &&
		bytes.Equal(a.Extensions, b.Extensions) && a.AppendedAt.Equal(b.AppendedAt)
}

func testEmptyLog(t *testing.T, open Open) {
	s := open(t, t.TempDir(), none)
	defer s.Close()
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if first != 0 || last != 0 || err1 != nil || err2 != nil {
		t.Errorf("bounds %d %d, %v %v", first, last, err1, err2)
	}
	for _, index := range []uint64{0, 1, 1 << 40} {
		if err := s.GetLog(index, new(raft.Log)); err != raft.ErrLogNotFound {
			t.Errorf("entry %d: %v", index, err)
		}
	}
	check(t, s.DeleteRange(1, 10))
	check(t, s.StoreLogs(nil))
	check(t, s.Reset())
}

func testEntriesKeepEverything(t *testing.T, open Open) {
	dir := t.TempDir()
	s := open(t, dir, none)
	want := []*raft.Log{
		{Index: 7, Term: 3, Type: raft.LogConfiguration, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: time.Now()},
		{Index: 8, Term: 4, Type: raft.LogNoop},
		{Index: 9, Term: 4, Data: bytes.Repeat([]byte("x"), 1<<20)},
	}
	check(t, s.StoreLogs(want))
	for range 2 {
		for _, w := range want {
			got := raft.Log{Index: 99, Term: 99, Type: 5, Data: []byte("old"), Extensions: []byte("old"), AppendedAt: time.Now()}
			check(t, s.GetLog(w.Index, &got))
			if !same(&got, w) {
				t.Errorf("entry %d came back changed", w.Index)
			}
		}
		check(t, s.Close())
		s = open(t, dir, none)
	}
	check(t, s.Close())
}

// Raft compares this error's text, and takes nil for no candidate.
func testMissingKeys(t *testing.T, open Open) {
	s := open(t, t.TempDir(), none)
	defer s.Close()
	for _, key := range []string{"CurrentTerm", "LastVoteTerm", "LastVoteCand", "anything"} {
		value, err := s.Get([]byte(key))
		if value != nil || err == nil || err.Error() != "not found" {
			t.Errorf("%s: %q, %v", key, value, err)
		}
		if n, err := s.GetUint64([]byte(key)); n != 0 || err == nil || err.Error() != "not found" {
			t.Errorf("%s: %d, %v", key, n, err)
		}
	}
}

func vote(t testing.TB, s Store) string {
	t.Helper()
	term, err1 := s.GetUint64([]byte("LastVoteTerm"))
	candidate, err2 := s.Get([]byte("LastVoteCand"))
	if (err1 == nil) != (err2 == nil) || (err2 == nil) != (candidate != nil) {
		t.Fatalf("half a vote: %d %v, %q %v", term, err1, candidate, err2)
	}
	return fmt.Sprintf("%d %s", term, candidate)
}

func testVotes(t *testing.T, open Open) {
	dir := t.TempDir()
	for i, candidate := range []string{"n1/1", "", "n2/12", "n2/12"} {
		s := open(t, dir, none)
		check(t, s.SetUint64([]byte("CurrentTerm"), uint64(i+5)))
		check(t, s.SetUint64([]byte("LastVoteTerm"), uint64(i+5)))
		check(t, s.Set([]byte("LastVoteCand"), []byte(candidate)))
		check(t, s.Set([]byte("other"), []byte(candidate)))
		check(t, s.Reset())
		for range 2 {
			if got, want := vote(t, s), fmt.Sprintf("%d %s", i+5, candidate); got != want {
				t.Errorf("vote %q, want %q", got, want)
			}
			if term, err := s.GetUint64([]byte("CurrentTerm")); err != nil || term != uint64(i+5) {
				t.Errorf("term %d, %v", term, err)
			}
			if other, err := s.Get([]byte("other")); err != nil || string(other) != candidate {
				t.Errorf("other %q, %v", other, err)
			}
			check(t, s.Close())
			s = open(t, dir, none)
		}
		check(t, s.Close())
	}
}

// A term without its candidate changes nothing, and a candidate is never stored under another term.
func testVoteWithoutCandidate(t *testing.T, open Open) {
	dir := t.TempDir()
	s := open(t, dir, none)
	if err := s.Set([]byte("LastVoteCand"), []byte("n1/1")); err == nil {
		t.Error("a candidate without a term was stored")
	}
	check(t, s.SetUint64([]byte("LastVoteTerm"), 5))
	check(t, s.Set([]byte("LastVoteCand"), []byte("n1/1")))
	if err := s.Set([]byte("LastVoteCand"), []byte("n2/1")); err == nil {
		t.Error("a second candidate was stored for one term")
	}
	check(t, s.SetUint64([]byte("LastVoteTerm"), 6))
	if got := vote(t, s); got != "5 n1/1" {
		t.Errorf("vote %q", got)
	}
	check(t, s.Close())
	s = open(t, dir, none)
	defer s.Close()
	if got := vote(t, s); got != "5 n1/1" {
		t.Errorf("vote after a restart %q", got)
	}
	if err := s.Set([]byte("LastVoteCand"), []byte("n3/1")); err == nil {
		t.Error("a term survived a restart without its candidate")
	}
}

// All entries of a follower conflict: raft removes them all, and stores others in their place. To the store
// that looks like the removal of a beginning that the guard forbids.
func testWholeLogReplaced(t *testing.T, open Open, errs Errors) {
	dir := t.TempDir()
	s := open(t, dir, func() uint64 { return 99 })
	check(t, s.StoreLogs(Entries(100, 110, 1)))
	check(t, s.DeleteRange(100, 110))
	check(t, s.StoreLogs(Entries(100, 103, 2)))
	wantLog(t, s, Entries(100, 103, 2))

	check(t, s.DeleteRange(100, 103)) // as the removal of a beginning
	wantLog(t, s, Entries(100, 103, 2))
	check(t, s.StoreLogs(Entries(104, 105, 2)))
	if err := s.StoreLogs(Entries(100, 101, 3)); !errors.Is(err, errs.Gap) {
		t.Errorf("overwriting without a removal: %v", err)
	}
	check(t, s.Close())
	s = open(t, dir, none)
	defer s.Close()
	wantLog(t, s, Entries(100, 105, 2))
}

func wantLog(t testing.TB, s Store, want []*raft.Log) {
	t.Helper()
	var wantFirst, wantLast uint64
	if len(want) > 0 {
		wantFirst, wantLast = want[0].Index, want[len(want)-1].Index
	}
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err1 != nil || err2 != nil || first != wantFirst || last != wantLast {
		t.Fatalf("bounds %d %d (%v %v), want %d %d", first, last, err1, err2, wantFirst, wantLast)
	}
	for _, w := range want {
		var got raft.Log
		if err := s.GetLog(w.Index, &got); err != nil || !same(&got, w) {
			t.Fatalf("entry %d: %+v, %v, want %+v", w.Index, got, err, w)
		}
	}
	for _, index := range []uint64{0, wantFirst - 1, wantLast + 1} {
		if index < wantFirst || index > wantLast {
			if err := s.GetLog(index, new(raft.Log)); err != raft.ErrLogNotFound {
				t.Fatalf("entry %d outside of the log: %v", index, err)
			}
		}
	}
}

func testClosed(t *testing.T, open Open) {
	s := open(t, t.TempDir(), none)
	check(t, s.StoreLogs(Entries(1, 3, 1)))
	check(t, s.Close())
	check(t, s.Close())
	for name, call := range map[string]func() error{
		"FirstIndex":  func() error { _, err := s.FirstIndex(); return err },
		"LastIndex":   func() error { _, err := s.LastIndex(); return err },
		"GetLog":      func() error { return s.GetLog(2, new(raft.Log)) },
		"StoreLogs":   func() error { return s.StoreLogs(Entries(4, 4, 1)) },
		"DeleteRange": func() error { return s.DeleteRange(1, 3) },
		"Reset":       func() error { return s.Reset() },
		"Set":         func() error { return s.Set([]byte("k"), []byte("v")) },
		"SetUint64":   func() error { return s.SetUint64([]byte("k"), 1) },
		"SetVoteTerm": func() error { return s.SetUint64([]byte("LastVoteTerm"), 1) },
		"Get":         func() error { _, err := s.Get([]byte("k")); return err },
	} {
		if err := call(); err == nil || errors.Is(err, raft.ErrLogNotFound) || err.Error() == "not found" {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

// testModel compares random calls with a plain slice of entries.
func testModel(t *testing.T, open Open, errs Errors) {
	rapid.Check(t, func(rt *rapid.T) {
		var guard uint64
		dir := t.TempDir()
		reopen := func() Store { return open(t, dir, func() uint64 { return guard }) }
		m := &model{s: reopen(), errs: errs}
		defer func() { _ = m.s.Close() }()
		rt.Repeat(map[string]func(*rapid.T){
			"append":    m.append,
			"misplaced": m.misplaced,
			"beginning": func(rt *rapid.T) { m.beginning(rt, guard) },
			"end":       func(rt *rapid.T) { m.end(rt, guard) },
			"hole":      m.hole,
			"guard": func(rt *rapid.T) {
				guard = rapid.Uint64Range(guard, max(guard, m.last())).Draw(rt, "guard")
			},
			"reset": func(rt *rapid.T) {
				if rapid.IntRange(0, 4).Draw(rt, "rarely") == 0 {
					noError(rt, m.s.Reset())
					m.log, m.replaceable = nil, false
				}
			},
			"reopen": func(rt *rapid.T) {
				noError(rt, m.s.Close())
				m.s, m.replaceable = reopen(), false
			},
			"": func(rt *rapid.T) { wantLog(t, m.s, m.log) },
		})
	})
}

type model struct {
	s    Store
	errs Errors
	log  []*raft.Log
	term uint64

	replaceable bool // all of the log, by what is stored next
}

func noError(rt *rapid.T, err error) {
	rt.Helper()
	if err != nil {
		rt.Fatal(err)
	}
}

func (m *model) first() uint64 {
	if len(m.log) == 0 {
		return 0
	}
	return m.log[0].Index
}

func (m *model) last() uint64 {
	if len(m.log) == 0 {
		return 0
	}
	return m.log[len(m.log)-1].Index
}

func (m *model) append(rt *rapid.T) {
	m.term++
	from := m.last() + 1
	if len(m.log) == 0 {
		from = rapid.Uint64Range(1, 1000).Draw(rt, "from")
	}
	entries := Entries(from, from+rapid.Uint64Range(0, 20).Draw(rt, "more"), m.term)
	noError(rt, m.s.StoreLogs(entries))
	m.log, m.replaceable = append(m.log, entries...), false
}

func (m *model) misplaced(rt *rapid.T) {
	if len(m.log) == 0 || m.replaceable {
		return
	}
	from := rapid.Uint64Range(m.first(), m.last()+10).Filter(func(i uint64) bool { return i != m.last()+1 }).Draw(rt, "from")
	if err := m.s.StoreLogs(Entries(from, from+3, m.term)); !errors.Is(err, m.errs.Gap) {
		rt.Fatalf("entry %d after %d: %v", from, m.last(), err)
	}
	torn := append(Entries(m.last()+1, m.last()+2, m.term), Entry(m.last()+4, m.term))
	if err := m.s.StoreLogs(torn); !errors.Is(err, m.errs.Gap) {
		rt.Fatalf("a batch with a hole: %v", err)
	}
}

func (m *model) beginning(rt *rapid.T, guard uint64) {
	if len(m.log) == 0 {
		return
	}
	lo := rapid.Uint64Range(m.first()-min(3, m.first()), m.first()).Draw(rt, "lo")
	hi := rapid.Uint64Range(m.first(), m.last()+2).Draw(rt, "hi")
	noError(rt, m.s.DeleteRange(lo, hi))
	m.replaceable = m.replaceable || lo == m.first() && hi >= m.last() && guard < lo
	for len(m.log) > 0 && m.log[0].Index <= min(hi, guard) {
		m.log = m.log[1:]
	}
}

func (m *model) end(rt *rapid.T, guard uint64) {
	if len(m.log) < 2 {
		return
	}
	lo := rapid.Uint64Range(m.first()+1, m.last()).Draw(rt, "lo")
	err := m.s.DeleteRange(lo, m.last()+rapid.Uint64Range(0, 2).Draw(rt, "beyond"))
	if lo <= guard {
		if !errors.Is(err, m.errs.Guarded) {
			rt.Fatalf("removing from %d, guard %d: %v", lo, guard, err)
		}
		return
	}
	noError(rt, err)
	m.log = m.log[:lo-m.first()]
}

func (m *model) hole(rt *rapid.T) {
	if len(m.log) < 3 {
		return
	}
	lo := rapid.Uint64Range(m.first()+1, m.last()-1).Draw(rt, "lo")
	if err := m.s.DeleteRange(lo, rapid.Uint64Range(lo, m.last()-1).Draw(rt, "hi")); !errors.Is(err, m.errs.Gap) {
		rt.Fatalf("a hole: %v", err)
	}
}
