package mvcc

import (
	"sort"
	"unsafe"

	"github.com/tidwall/btree"
)

// Stamp is what the index knows of one change of a key. It is complete in itself, so an index rebuilt from a
// partly compacted file equals the one that was lost.
type Stamp struct {
	Main    int64
	Created int64 // revision that created the key; 0 marks a tombstone
	Version int64 // 1 for the creating put; 0 for a tombstone
	Sub     uint32
}

// Revision is the revision of the change.
func (s Stamp) Revision() Revision { return Revision{Main: s.Main, Sub: s.Sub} }

// Tombstone says whether the change deleted the key.
func (s Stamp) Tombstone() bool { return s.Created == 0 }

// history is the changes of one key, oldest first. Most keys have one change since the last compaction, so the
// newest is stored in place and the others behind a pointer.
type history struct {
	newest Stamp
	older  *[]Stamp
}

func (h *history) push(s Stamp) {
	if h.older == nil {
		h.older = new([]Stamp)
	}
	*h.older = append(*h.older, h.newest)
	h.newest = s
}

// at returns the change that rules at main revision rev.
func (h *history) at(rev int64) (Stamp, bool) {
	if h.newest.Main <= rev {
		return h.newest, !h.newest.Tombstone()
	}
	if h.older == nil {
		return Stamp{}, false
	}
	older := *h.older
	i := sort.Search(len(older), func(i int) bool { return older[i].Main > rev })
	if i == 0 {
		return Stamp{}, false
	}
	return older[i-1], !older[i-1].Tombstone()
}

// obsolete is how many of the oldest changes no read at rev or later can see. A tombstone of exactly rev stays,
// because a watch may begin at rev.
func (h *history) obsolete(rev int64) int {
	rules, n := h.newest, 0
	if h.older != nil {
		n = len(*h.older)
	}
	if rules.Main > rev {
		if n == 0 {
			return 0
		}
		older := *h.older
		n = sort.Search(n, func(i int) bool { return older[i].Main > rev }) - 1
		if n < 0 {
			return 0
		}
		rules = older[n]
	}
	if rules.Tombstone() && rules.Main < rev {
		n++
	}
	return n
}

// smallHistory is how many changes are copied to let go of the memory of those before them. More of them stay
// where they are until the next growth, so that compaction never copies much at once.
const smallHistory = 1024

// drop removes the n oldest changes, appends their revisions to dropped, and says whether any change is left.
func (h *history) drop(n int, dropped []Revision) ([]Revision, bool) {
	if n == 0 {
		return dropped, true
	}
	var older []Stamp
	if h.older != nil {
		older = *h.older
	}
	for _, s := range older[:min(n, len(older))] {
		dropped = append(dropped, s.Revision())
	}
	switch rest := len(older) - n; {
	case rest < 0:
		return append(dropped, h.newest.Revision()), false
	case rest == 0:
		h.older = nil
	case rest <= smallHistory:
		*h.older = append(make([]Stamp, 0, rest+1), older[n:]...)
	default:
		*h.older = older[n:]
	}
	return dropped, true
}

// Index maps keys to their changes. The zero Index is empty. Methods that change it need exclusive access.
type Index struct {
	keys btree.Map[string, *history]
	live int
}

// Live is the number of keys that exist at the newest revision.
func (x *Index) Live() int { return x.live }

// Len is the number of keys that have any change, deleted ones included.
func (x *Index) Len() int { return x.keys.Len() }

// alias lets the bytes of a request look up a key without a copy; the string must not outlive the call.
func alias(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// Put records a put and returns its stamp. The revision must be above all of the key's.
func (x *Index) Put(key []byte, r Revision) Stamp {
	s := Stamp{Main: r.Main, Sub: r.Sub, Created: r.Main, Version: 1}
	h, ok := x.keys.Get(alias(key))
	if !ok {
		x.keys.Set(string(key), &history{newest: s})
		x.live++
		return s
	}
	if h.newest.Tombstone() {
		x.live++
	} else {
		s.Created, s.Version = h.newest.Created, h.newest.Version+1
	}
	h.push(s)
	return s
}

// Delete records a tombstone and says whether there was anything to delete.
func (x *Index) Delete(key string, r Revision) bool {
	h, ok := x.keys.Get(key)
	if !ok || h.newest.Tombstone() {
		return false
	}
	h.push(Stamp{Main: r.Main, Sub: r.Sub})
	x.live--
	return true
}

// Restore adds a change read back from disk. Changes must come in ascending revision.
func (x *Index) Restore(key []byte, s Stamp) {
	h, ok := x.keys.Get(alias(key))
	if !ok {
		x.keys.Set(string(key), &history{newest: s})
		if !s.Tombstone() {
			x.live++
		}
		return
	}
	if was := h.newest.Tombstone(); was != s.Tombstone() {
		if was {
			x.live++
		} else {
			x.live--
		}
	}
	h.push(s)
}

// Get returns the change of key that rules at rev; ok is false if the key does not exist then.
func (x *Index) Get(key string, rev int64) (s Stamp, ok bool) {
	h, ok := x.keys.Get(key)
	if !ok {
		return Stamp{}, false
	}
	return h.at(rev)
}

// Scan visits the keys of span that exist at rev, in order from key from on, until visit returns false or budget
// keys have been looked at. If done is false, next is where to go on.
func (x *Index) Scan(span Span, from string, rev int64, budget int, visit func(key string, s Stamp) bool) (next string, done bool) {
	done = true
	x.keys.Ascend(from, func(key string, h *history) bool {
		if !span.Unbounded && key >= span.End {
			return false
		}
		if budget == 0 {
			next, done = key, false
			return false
		}
		budget--
		if s, ok := h.at(rev); ok {
			return visit(key, s)
		}
		return true
	})
	return next, done
}

// Change is one change of one key.
type Change struct {
	Key   string
	Stamp Stamp
}

// Changes appends what changed from revision low to high in the next keys of span, from key from on, until it has
// looked at budget keys; of each key at most the first limit changes. Those before complete, which is above high
// unless the limit was met, are all that the keys have. If done is false, next is where to go on.
func (x *Index) Changes(span Span, from string, low, high int64, budget, limit int, into []Change) (_ []Change, complete int64, next string, done bool) {
	complete, done = high+1, true
	visit := func(key string, h *history) {
		var cut int64
		into, cut = h.between(key, low, high, limit, into)
		complete = min(complete, cut)
	}
	if span.Single {
		if h, ok := x.keys.Get(span.Start); ok {
			visit(span.Start, h)
		}
		return into, complete, "", true
	}
	x.keys.Ascend(from, func(key string, h *history) bool {
		if !span.Unbounded && key >= span.End {
			return false
		}
		if budget == 0 {
			next, done = key, false
			return false
		}
		budget--
		if h.newest.Main >= low {
			visit(key, h)
		}
		return true
	})
	return into, complete, next, done
}

// between appends the first limit changes from revision low to high. All before the revision that it returns are
// among them.
func (h *history) between(key string, low, high int64, limit int, into []Change) ([]Change, int64) {
	if h.older != nil {
		older := *h.older
		for _, s := range older[sort.Search(len(older), func(i int) bool { return older[i].Main >= low }):] {
			if s.Main > high {
				return into, high + 1
			}
			if limit == 0 {
				return into, s.Main
			}
			into = append(into, Change{key, s})
			limit--
		}
	}
	switch {
	case h.newest.Main < low || h.newest.Main > high:
		return into, high + 1
	case limit == 0:
		return into, h.newest.Main
	}
	return append(into, Change{key, h.newest}), high + 1
}

// Compact removes what reads at rev or later cannot see from the next keys, from key from on, until it has looked
// at about budget keys and changes. It appends the revisions whose rows are no longer needed to dropped, those of
// one key oldest first. If done is false, next is where to go on.
func (x *Index) Compact(from string, rev int64, budget int, dropped []Revision) (next string, done bool, _ []Revision) {
	done = true
	var gone []string
	x.keys.Ascend(from, func(key string, h *history) bool {
		if budget <= 0 {
			next, done = key, false
			return false
		}
		n := h.obsolete(rev)
		if n > budget {
			dropped, _ = h.drop(budget, dropped)
			next, done = key, false
			return false
		}
		var left bool
		if dropped, left = h.drop(n, dropped); !left {
			gone = append(gone, key)
		}
		budget -= 1 + n
		return true
	})
	for _, key := range gone {
		x.keys.Delete(key)
	}
	return next, done, dropped
}

// Span is the keys that a request names: one, those from Start up to and without End, or all from Start on.
type Span struct {
	Start, End string
	Single     bool
	Unbounded  bool
}

// NewSpan reads key and range end as etcd does: no range end is the one key, "\x00" is all keys from key on. The
// span aliases both.
func NewSpan(key, rangeEnd []byte) Span {
	return Span{
		Start:     alias(key),
		End:       alias(rangeEnd),
		Single:    len(rangeEnd) == 0,
		Unbounded: len(rangeEnd) == 1 && rangeEnd[0] == 0,
	}
}

// Contains says whether a key is in the span.
func (s Span) Contains(key []byte) bool {
	k := alias(key)
	if s.Single {
		return k == s.Start
	}
	return k >= s.Start && (s.Unbounded || k < s.End)
}
