package mvcc

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// naive is an index that keeps all changes of all keys in one list.
type naive map[string][]Stamp

func (n naive) get(key string, rev int64) (found Stamp, ok bool) {
	for _, s := range n[key] {
		if s.Main <= rev {
			found, ok = s, !s.Tombstone()
		}
	}
	return found, ok
}

func (n naive) put(key string, r Revision) Stamp {
	s := Stamp{Main: r.Main, Sub: r.Sub, Created: r.Main, Version: 1}
	if last, ok := n.get(key, r.Main); ok {
		s.Created, s.Version = last.Created, last.Version+1
	}
	n[key] = append(n[key], s)
	return s
}

func (n naive) scan(span Span, rev int64) []string {
	var found []string
	for _, key := range slices.Sorted(maps.Keys(n)) {
		if s, ok := n.get(key, rev); ok && key >= span.Start && (span.Unbounded || key < span.End) {
			found = append(found, fmt.Sprint(key, s))
		}
	}
	return found
}

// compact returns the revisions that a compaction drops.
func (n naive) compact(rev int64) (dropped []Revision) {
	for key, all := range n {
		n[key] = slices.DeleteFunc(all, func(s Stamp) bool {
			rules := s
			for _, later := range all {
				if later.Main <= rev {
					rules = later
				}
			}
			drop := s.Main <= rev && (s != rules || s.Tombstone() && s.Main < rev)
			if drop {
				dropped = append(dropped, s.Revision())
			}
			return drop
		})
	}
	SortRevisions(dropped)
	return dropped
}

func scan(x *Index, span Span, rev int64, budget int) (found []string) {
	for from, done := span.Start, false; !done; {
		from, done = x.Scan(span, from, rev, budget, func(key string, s Stamp) bool {
			found = append(found, fmt.Sprint(key, s))
			return true
		})
	}
	return found
}

func TestIndex(t *testing.T) {
	for range 20 {
		seed := rand.Uint64N(1 << 32)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { runIndex(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func runIndex(t *testing.T, random *rand.Rand) {
	x, n := &Index{}, naive{}
	key := func() string { return fmt.Sprint("k", random.IntN(60)) }
	compacted := int64(-1)
	for rev := int64(2); rev < 400; rev++ {
		for sub := range uint32(random.IntN(4)) {
			k, r := key(), Revision{rev, sub}
			if random.IntN(3) == 0 {
				_, exists := n.get(k, rev)
				if exists {
					n[k] = append(n[k], Stamp{Main: rev, Sub: sub})
				}
				if x.Delete(k, r) != exists {
					t.Fatalf("delete of %s at %v: it existed: %v", k, r, exists)
				}
			} else if got, want := x.Put([]byte(k), r), n.put(k, r); got != want {
				t.Fatalf("put of %s: %v, want %v", k, got, want)
			}
		}
		if random.IntN(40) == 0 {
			compacted += random.Int64N(rev - compacted + 1)
			if got, want := compactAll(x, compacted, 1+random.IntN(20)), n.compact(compacted); !slices.Equal(got, want) {
				t.Fatalf("compaction at %d dropped %v, want %v", compacted, got, want)
			}
		}
		at := max(0, compacted) + random.Int64N(rev-max(0, compacted)+1)
		k := key()
		got, ok := x.Get(k, at)
		if want, wantOK := n.get(k, at); ok != wantOK || ok && got != want {
			t.Fatalf("get of %s at %d: %v %v, want %v %v", k, at, got, ok, want, wantOK)
		}
		span := NewSpan([]byte(key()), []byte(key()))
		if random.IntN(4) == 0 {
			span = NewSpan([]byte(key()), []byte{0})
		}
		if got, want := scan(x, span, at, 1+random.IntN(80)), n.scan(span, at); !slices.Equal(got, want) {
			t.Fatalf("scan of %v at %d: %v, want %v", span, at, got, want)
		}
		if live := len(n.scan(Span{Unbounded: true}, rev)); x.Live() != live {
			t.Fatalf("%d live keys, want %d", x.Live(), live)
		}
	}
	restored := restore(n)
	for rev := max(0, compacted); rev < 400; rev++ {
		all := Span{Unbounded: true}
		if got, want := scan(restored, all, rev, 1000), scan(x, all, rev, 1000); !slices.Equal(got, want) {
			t.Fatalf("restored index at %d: %v, want %v", rev, got, want)
		}
	}
	if restored.Live() != x.Live() || restored.Len() != x.Len() {
		t.Errorf("restored index has %d live keys of %d, want %d of %d", restored.Live(), restored.Len(), x.Live(), x.Len())
	}
}

// compactAll compacts in steps, and checks that the revisions of each key come oldest first.
func compactAll(x *Index, rev int64, budget int) (dropped []Revision) {
	for next, done := "", false; !done; {
		next, done, dropped = x.Compact(next, rev, budget, dropped)
	}
	SortRevisions(dropped)
	return dropped
}

// restore builds an index from all changes, as from a file.
func restore(n naive) *Index {
	type change struct {
		key   string
		stamp Stamp
	}
	var changes []change
	for key, all := range n {
		for _, s := range all {
			changes = append(changes, change{key, s})
		}
	}
	slices.SortFunc(changes, func(a, b change) int { return a.stamp.Revision().Compare(b.stamp.Revision()) })
	x := &Index{}
	for _, c := range changes {
		x.Restore([]byte(c.key), c.stamp)
	}
	return x
}

func TestCompactOfOneLongHistory(t *testing.T) {
	x := &Index{}
	const n = 10 * smallHistory
	for rev := int64(2); rev < n; rev++ {
		x.Put([]byte("k"), Revision{Main: rev})
	}
	var dropped []Revision
	steps := 0
	for next, done := "", false; !done; steps++ {
		before := len(dropped)
		next, done, dropped = x.Compact(next, n-10, 100, dropped)
		if len(dropped)-before > 100 {
			t.Fatalf("one step dropped %d changes", len(dropped)-before)
		}
		if s, ok := x.Get("k", n-10); !ok || s.Main != n-10 || s.Version != n-11 {
			t.Fatalf("after step %d: %v %v", steps, s, ok)
		}
	}
	if len(dropped) != n-12 || !slices.IsSortedFunc(dropped, Revision.Compare) {
		t.Errorf("dropped %d changes, want %d", len(dropped), n-12)
	}
}
