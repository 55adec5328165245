package wal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"pgregory.net/rapid"
)

// life of a replica in the log.
type life int

const (
	unborn life = iota
	alive
	removed
)

// state is what a replica has durable in the log. It is a value: whoever changes it makes a new one.
type state struct {
	life    life
	entries []*raft.Log
	keys    map[string]string
	term    uint64 // of the vote
	vote    string // its candidate
	voted   bool
}

func (s *state) first() uint64 {
	if len(s.entries) == 0 {
		return 0
	}
	return s.entries[0].Index
}

func (s *state) last() uint64 {
	if len(s.entries) == 0 {
		return 0
	}
	return s.entries[len(s.entries)-1].Index
}

// from returns the entries at or above index.
func (s *state) from(index uint64) []*raft.Log {
	if len(s.entries) == 0 || index <= s.first() {
		return s.entries
	}
	return s.entries[min(uint64(len(s.entries)), index-s.first()):]
}

func (s *state) below(index uint64) []*raft.Log {
	return slices.Clip(s.entries[:len(s.entries)-len(s.from(index))])
}

func (s *state) with(entries []*raft.Log) *state {
	out := *s
	out.entries = entries
	return &out
}

func (s *state) withKey(key, value string) *state {
	out := *s
	out.keys = maps.Clone(s.keys)
	if out.keys == nil {
		out.keys = map[string]string{}
	}
	out.keys[key] = value
	return &out
}

// differs says how s is not want, "" if it is.
func (s *state) differs(want *state) string {
	switch {
	case s.life != want.life:
		return fmt.Sprintf("life %d, want %d", s.life, want.life)
	case s.first() != want.first() || s.last() != want.last():
		return fmt.Sprintf("entries %d to %d, want %d to %d", s.first(), s.last(), want.first(), want.last())
	case s.voted != want.voted || s.term != want.term || s.vote != want.vote:
		return fmt.Sprintf("vote %v %d %q, want %v %d %q", s.voted, s.term, s.vote, want.voted, want.term, want.vote)
	case !maps.Equal(s.keys, want.keys):
		return fmt.Sprintf("keys %q, want %q", s.keys, want.keys)
	}
	for i, entry := range s.entries {
		if !sameEntry(entry, want.entries[i]) {
			return fmt.Sprintf("entry %d is of term %d with %d bytes, want term %d with %d bytes, or its contents differ",
				entry.Index, entry.Term, len(entry.Data), want.entries[i].Term, len(want.entries[i].Data))
		}
	}
	return ""
}

func sameEntry(a, b *raft.Log) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type && bytes.Equal(a.Data, b.Data) &&
		bytes.Equal(a.Extensions, b.Extensions) && a.AppendedAt.Equal(b.AppendedAt)
}

// wantState says how s is none of those allowed.
func wantState(s *state, allowed []*state) error {
	var differences []string
	for _, want := range allowed {
		difference := s.differs(want)
		if difference == "" {
			return nil
		}
		differences = append(differences, difference)
	}
	return fmt.Errorf("%q", differences)
}

// The stable keys that a model's replica uses, besides the vote.
var modelKeys = []string{"CurrentTerm", "other", "large"}

var (
	voteTermKey      = []byte("LastVoteTerm")
	voteCandidateKey = []byte("LastVoteCand")
)

// observe reads everything that a Store has.
func observe(s *Store) (*state, error) {
	out := &state{life: alive}
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if (first == 0) != (last == 0) || first > last || last-first > 1<<20 {
		return nil, fmt.Errorf("bounds %d to %d", first, last)
	}
	for index := first; index <= last && first > 0; index++ {
		entry := new(raft.Log)
		if err := s.GetLog(index, entry); err != nil {
			return nil, fmt.Errorf("entry %d of %d to %d: %w", index, first, last, err)
		}
		if entry.Index != index {
			return nil, fmt.Errorf("entry %d is entry %d", index, entry.Index)
		}
		out.entries = append(out.entries, entry)
	}
	for _, index := range []uint64{0, first - 1, last + 1} {
		if err := s.GetLog(index, new(raft.Log)); err != raft.ErrLogNotFound && (index < first || index > last) {
			return nil, fmt.Errorf("entry %d outside of %d to %d: %w", index, first, last, err)
		}
	}
	return out, observeKeys(s, out)
}

func observeKeys(s *Store, out *state) error {
	for _, key := range modelKeys {
		value, err := s.Get([]byte(key))
		switch {
		case err == nil:
			out = mustKeep(out, key, value)
		case err.Error() != "not found":
			return err
		}
	}
	term, err1 := s.GetUint64(voteTermKey)
	candidate, err2 := s.Get(voteCandidateKey)
	if (err1 == nil) != (err2 == nil) || err2 == nil && candidate == nil {
		return fmt.Errorf("half a vote: %d %v, %q %v", term, err1, candidate, err2)
	}
	out.term, out.vote, out.voted = term, string(candidate), err1 == nil
	return nil
}

func mustKeep(out *state, key string, value []byte) *state {
	if out.keys == nil {
		out.keys = map[string]string{}
	}
	out.keys[key] = string(value)
	return out
}

// chooser draws a number from 0 to n-1; of shrunk runs the smallest.
type chooser func(n int, what string) int

func seeded(seed uint64) chooser {
	rnd := rand.New(rand.NewPCG(seed, 1))
	return func(n int, _ string) int { return rnd.IntN(n) }
}

func (c chooser) between(lo, hi uint64, what string) uint64 {
	return lo + uint64(c(int(hi-lo+1), what))
}

// oneIn is true once in n times.
func (c chooser) oneIn(n int, what string) bool { return c(n, what) == n-1 }

// makeEntry is different for each nonce, in every part of its data.
func makeEntry(index, term, nonce uint64, sizeBytes int) *raft.Log {
	data := make([]byte, sizeBytes)
	rnd := rand.NewPCG(nonce, index)
	for i := 0; i+8 <= len(data); i += 8 {
		binary.LittleEndian.PutUint64(data[i:], rnd.Uint64())
	}
	entry := &raft.Log{Index: index, Term: term, Type: raft.LogType(nonce % 6 / 5 * 5), Data: data}
	switch nonce % 5 {
	case 1:
		entry.Extensions = data[:sizeBytes/3]
	case 2:
		entry.AppendedAt = time.Unix(int64(nonce), int64(index))
	case 3:
		entry.Type = raft.LogConfiguration
	}
	if sizeBytes == 0 {
		entry.Data = nil
	}
	return entry
}

// Random calls of several replicas do what they do to a model, across restarts, kills and power cuts.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		choose := drawn(rt)
		w := newTrial(choose, 1+choose(4, "replicas"), Options{SegmentBytes: hostileSegmentBytes})
		w.cache = []int{-1, 0, 2000}[choose(3, "cache")]
		if err := w.open(); err != nil {
			rt.Fatal(err)
		}
		for range 4 + choose(8, "lives") {
			err := w.randomSteps(1 + choose(20, "steps"))
			if err == nil {
				err = w.check()
			}
			if err == nil {
				err = w.endLife()
			}
			if err != nil {
				rt.Fatal(w.failure("life", err))
			}
		}
		if err := w.log.Close(); err != nil {
			rt.Fatal(err)
		}
	})
}

// endLife ends the log in one of several ways, and opens it again.
func (w *trial) endLife() error {
	switch way := w.choose(5, "end of life"); way {
	case 0:
		w.note("goes on")
		return nil
	case 1, 2:
		w.note("close")
		if err := w.log.Close(); err != nil {
			return err
		}
		if way == 2 {
			w.fs = w.fs.Crash(uint64(w.choose(1000, "crash")))
		}
	case 3:
		w.note("kill")
		old := w.log
		w.fs = w.fs.Kill()
		defer closeLog(old)
	case 4:
		w.note("power cut")
		old := w.log
		w.fs = w.fs.Crash(uint64(w.choose(1000, "crash")))
		defer closeLog(old)
	}
	w.options.SegmentBytes = int64(1+w.choose(4, "segment")) * hostileSegmentBytes
	if err := w.open(); err != nil {
		return fmt.Errorf("open: %w", err)
	}
	return w.check()
}
