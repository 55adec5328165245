package linearizability

import (
	"cmp"
	"fmt"
	"slices"
)

// A wholeStore check needs no search: every change has a revision of its own, which is its place in the order of
// everything. It sees what a check of each key alone cannot: the order between keys, and transactions and
// snapshots over several keys.
type wholeStore struct {
	written   map[string][]change // per key, by ascending revision
	byValue   map[string]Op       // who wrote a value to a key: key + "\x00" + value
	open      map[string]int64    // per key, the earliest call of a deletion whose outcome is unknown
	revisions map[int64]int64     // of each Txn that is known to have taken effect
}

// change is a write that took effect.
type change struct {
	revision int64
	found    bool // false: a deletion
	value    string
}

// checkRevisions checks a history by the revisions of its answers: those of the store, or of its shards.
func checkRevisions(ops []Op, sharded bool) error {
	if !sharded {
		if err := checkRealTime(ops); err != nil {
			return err
		}
	}
	store, err := reconstruct(ops)
	if err != nil {
		return err
	}
	for _, op := range ops {
		if err := store.checkSeen(op); err != nil {
			return err
		}
	}
	return checkOrder(ops, store)
}

// checkRealTime checks that what begins after an answer is answered with no lower a revision, and a change
// with a higher one.
func checkRealTime(ops []Op) error {
	byReturn := slices.Clone(ops)
	slices.SortStableFunc(byReturn, func(a, b Op) int { return cmp.Compare(a.Return, b.Return) })
	var highest Op
	next := 0
	for _, op := range ops { // ascending by call
		for ; next < len(byReturn) && byReturn[next].Return < op.Call; next++ {
			if byReturn[next].Output.Revision > highest.Output.Revision {
				highest = byReturn[next]
			}
		}
		if op.Output.Unknown || op.Input.Kind == Stale {
			continue
		}
		floor := highest.Output.Revision
		if op.Output.Revision < floor || op.Changes() && op.Output.Revision == floor {
			return fmt.Errorf("%w: the revision went back in real time:\n  %v\n  %v", ErrViolation, highest, op)
		}
	}
	return nil
}

// reconstruct finds the revision of every change: from its own answer, or, where that is missing, from
// whoever saw its value.
func reconstruct(ops []Op) (*wholeStore, error) {
	txnRevision := make(map[int64]int64)
	s := &wholeStore{written: make(map[string][]change), byValue: make(map[string]Op), open: make(map[string]int64), revisions: txnRevision}
	revisionTxn := make(map[int64]Op)
	claim := func(op Op, revision int64) error {
		if known, ok := txnRevision[op.Txn]; ok && known != revision {
			return fmt.Errorf("%w: %v took effect at revision %d and at %d", ErrViolation, op, known, revision)
		}
		if other, ok := revisionTxn[revision]; ok && other.Txn != op.Txn {
			return fmt.Errorf("%w: two changes at revision %d:\n  %v\n  %v", ErrViolation, revision, other, op)
		}
		txnRevision[op.Txn], revisionTxn[revision] = revision, op
		return nil
	}
	for _, op := range ops {
		if op.Input.Kind == Put || op.Input.Kind == Swap {
			s.byValue[op.Input.Key+"\x00"+op.Input.Value] = op
		}
		if op.Input.Kind == Delete && op.Output.Unknown {
			if first, ok := s.open[op.Input.Key]; !ok || op.Call < first {
				s.open[op.Input.Key] = op.Call
			}
		}
		if op.Changes() {
			if err := claim(op, op.Output.Revision); err != nil {
				return nil, err
			}
		}
	}
	for _, op := range ops {
		if !op.observes() || !op.Output.Seen.Found {
			continue
		}
		writer, ok := s.byValue[op.Input.Key+"\x00"+op.Output.Seen.Value]
		if !ok || writer.Call > op.Return {
			return nil, fmt.Errorf("%w: a value that nobody had written: %v", ErrViolation, op)
		}
		if err := claim(writer, op.Output.Seen.Mod); err != nil {
			return nil, err
		}
	}
	for _, op := range ops {
		revision, ok := txnRevision[op.Txn]
		switch {
		case !ok || op.Input.Kind == Get || op.Input.Kind == Stale:
		case op.Changes() || op.Output.Unknown:
			s.written[op.Input.Key] = append(s.written[op.Input.Key],
				change{revision: revision, found: op.Input.Kind != Delete, value: op.Input.Value})
		default:
			return nil, fmt.Errorf("%w: %v took effect, at revision %d", ErrViolation, op, revision)
		}
	}
	for _, changes := range s.written {
		slices.SortFunc(changes, func(a, b change) int { return cmp.Compare(a.revision, b.revision) })
	}
	return s, nil
}

// at returns the latest known change of a key at a revision; the zero change if there is none.
func (s *wholeStore) at(key string, revision int64) change {
	changes := s.written[key]
	i, found := slices.BinarySearchFunc(changes, revision, func(c change, r int64) int { return cmp.Compare(c.revision, r) })
	if found {
		return changes[i]
	}
	if i == 0 {
		return change{}
	}
	return changes[i-1]
}

// checkSeen checks an observation against the store at the revision of its answer.
func (s *wholeStore) checkSeen(op Op) error {
	if !op.observes() {
		return nil
	}
	revision := op.Output.Revision
	if op.Changes() {
		revision-- // it says what was there before its own change
	}
	seen, want := op.Output.Seen, s.at(op.Input.Key, revision)
	deletedBySomebody := func() bool { call, ok := s.open[op.Input.Key]; return ok && call < op.Return }
	switch {
	case seen.Found && (seen.Mod > revision || seen.Mod != want.revision || seen.Value != want.value):
	case !seen.Found && want.found && !deletedBySomebody():
	default:
		return nil
	}
	return fmt.Errorf("%w: at revision %d the key's latest change is %+v, but %v", ErrViolation, revision, want, op)
}
