package transport

import (
	"slices"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/raft"
)

// earlyPair is a leader's pipeline to a follower, which has been sent entry 1 in term 1.
type earlyPair struct {
	*pair
	t   *testing.T
	pl  raft.AppendPipeline
	got [][]uint64 // indexes of the entries of each message that came
}

func newEarlyPair(t *testing.T, planted faults) *earlyPair {
	e := &earlyPair{pair: newPair(t, nil), t: t}
	e.ga.t.faults = planted
	serve(e.gb, func(req any) (any, error) {
		r := req.(*raft.AppendEntriesRequest)
		var indexes []uint64
		for _, entry := range r.Entries {
			indexes = append(indexes, entry.Index)
		}
		e.got = append(e.got, indexes)
		return &raft.AppendEntriesResponse{Term: r.Term, Success: string(r.Entries[0].Data) != "no"}, nil
	})
	var err error
	if e.pl, err = e.ga.AppendEntriesPipeline("b/1", "b/1"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.pl.Close() })
	e.ask(entries(1, 1, 1, 1))
	if f := nextFuture(t, e.pl); !f.Response().Success {
		t.Fatal("the first entry was refused")
	}
	return e
}

// early is what the leader does before it writes the entries.
func (e *earlyPair) early(term uint64, r *raft.AppendEntriesRequest) {
	e.ga.AppendEarly(term, 0, r.Entries)
	synctest.Wait()
}

// ask is raft that asks for entries to be sent.
func (e *earlyPair) ask(r *raft.AppendEntriesRequest) {
	e.t.Helper()
	if _, err := e.pl.AppendEntries(r, new(raft.AppendEntriesResponse)); err != nil {
		e.t.Fatal(err)
	}
	synctest.Wait()
}

// answered expects the answer to the request that ends at an index.
func (e *earlyPair) answered(last uint64) {
	e.t.Helper()
	f := nextFuture(e.t, e.pl)
	r := f.Request().Entries
	if f.Error() != nil || !f.Response().Success || f.Response().Term != 1 || r[len(r)-1].Index != last {
		e.t.Errorf("answer to %d, expected one to %d: %+v, %v", r[len(r)-1].Index, last, f.Response(), f.Error())
	}
}

func (e *earlyPair) silent() {
	e.t.Helper()
	synctest.Wait()
	select {
	case f := <-e.pl.Consumer():
		e.t.Errorf("raft got an answer that it has not asked for: %+v", f.Request())
	default:
	}
}

func (e *earlyPair) came(want ...[]uint64) {
	e.t.Helper()
	if !slices.EqualFunc(e.got, append([][]uint64{{1}}, want...), slices.Equal) {
		e.t.Errorf("the follower got %v, and after the first one should have got %v", e.got, want)
	}
}

func TestEarlyEntriesAreSentOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEarlyPair(t, faults{})
		e.early(1, entries(1, 2, 2, 1))
		e.silent()
		e.ask(entries(1, 2, 2, 1)) // exactly these
		e.answered(3)
		e.early(1, entries(1, 4, 1, 1))
		e.early(1, entries(1, 5, 1, 1))
		e.ask(entries(1, 4, 3, 1)) // two of them and one more
		e.answered(6)
		e.early(1, entries(1, 7, 3, 1))
		e.ask(entries(1, 7, 2, 1)) // in two parts
		e.answered(8)
		e.ask(entries(1, 9, 1, 1))
		e.answered(9)
		e.silent()
		e.came([]uint64{2, 3}, []uint64{4}, []uint64{5}, []uint64{6}, []uint64{7, 8, 9})
		if m := e.ga.MatchIndex("b/1", 1); m != 9 {
			t.Errorf("match %d", m)
		}
	})
}

// An answer that comes after raft has asked reaches it too.
func TestEarlyEntriesAreAnsweredLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEarlyPair(t, faults{})
		e.net.memory.Partition("a", "b")
		e.early(1, entries(1, 2, 1, 1))
		e.ask(entries(1, 2, 1, 1))
		e.silent()
		e.net.memory.HealAll()
		e.answered(2)
		e.came([]uint64{2})
	})
}

// What does not follow what was sent, or belongs to another term, does not leave early.
func TestOnlyWhatFollowsLeavesEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEarlyPair(t, faults{})
		e.early(1, entries(1, 3, 1, 1))
		e.early(2, entries(2, 2, 1, 1))
		e.early(1, &raft.AppendEntriesRequest{})
		e.ga.Suspend(true)
		e.early(1, entries(1, 2, 1, 1))
		e.ga.Suspend(false)
		e.came()
		fresh, err := e.ga.AppendEntriesPipeline("b/1", "b/1")
		if err != nil {
			t.Fatal(err)
		}
		_ = e.pl.Close()
		e.early(1, entries(1, 2, 1, 1)) // nothing has been sent on the fresh one, and the other is closed
		e.came()
		_ = fresh.Close()
		if n := len(e.ga.pipelines); n != 0 {
			t.Errorf("%d pipelines are remembered", n)
		}
	})
}

// What was sent early answers for itself alone: entries of another term, or for a leader of another term, are sent.
// The planted fault answers for whatever raft asks for.
func TestEarlyEntriesAnswerForNoOthers(t *testing.T) {
	other := entries(1, 2, 1, 1)
	other.Entries[0].Term = 7
	for name, asked := range map[string]*raft.AppendEntriesRequest{
		"another entry": other, "another leader's term": entries(2, 2, 1, 1), "earlier ones too": entries(1, 1, 2, 1),
	} {
		for _, planted := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				e := newEarlyPair(t, faults{answersForOthers: planted})
				e.early(1, entries(1, 2, 1, 1))
				before := len(e.got)
				e.ask(asked)
				if sent := len(e.got) > before; sent == planted {
					t.Errorf("%s, planted fault %v: sent %v", name, planted, sent)
				}
			})
		}
	}
}

// A follower that refuses what came early, or does not answer, ends the pipeline: raft sends it again.
func TestARefusalOfEarlyEntriesReachesRaft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEarlyPair(t, faults{})
		refused := entries(1, 2, 1, 1)
		refused.Entries[0].Data = []byte("no")
		e.early(1, refused)
		e.silent()
		if _, err := e.pl.AppendEntries(entries(1, 2, 1, 1), new(raft.AppendEntriesResponse)); err == nil {
			t.Error("the pipeline goes on")
		}
		if m := e.ga.MatchIndex("b/1", 1); m != 1 {
			t.Errorf("match %d", m)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := newEarlyPair(t, faults{})
		e.net.memory.Partition("a", "b")
		e.early(1, entries(1, 2, 1, 1))
		e.ask(entries(1, 2, 1, 1))
		e.net.memory.Drop("a", "b")
		if f := nextFuture(t, e.pl); f.Error() == nil || f.Response().Success {
			t.Errorf("lost, and answered with %+v", f.Response())
		}
	})
}
