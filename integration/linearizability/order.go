package linearizability

import (
	"cmp"
	"fmt"
	"math"
	"slices"
)

// checkOrder checks that the order of revisions explains a history of a store of shards, in which every change
// has a revision of its own but answers carry the revision of their shard: there must be a place for every
// operation among the revisions, at which it did and saw what its answer says, and never before the place of an
// operation that had been answered when it began. A change is at its revision, a snapshot at its own, and a read of
// one key anywhere from its shard's revision on until the key changes. Each operation is put as far to the front as
// what was before it allows, so that no other choice could do better: no search is needed.
func checkOrder(ops []Op, s *wholeStore) error {
	byReturn := make([]int, 0, len(ops))
	for i, op := range ops {
		if !op.Output.Unknown && op.Input.Kind != Stale {
			byReturn = append(byReturn, i)
		}
	}
	slices.SortStableFunc(byReturn, func(a, b int) int { return cmp.Compare(ops[a].Return, ops[b].Return) })
	places := make([]int64, len(ops))
	floor, because, next := int64(0), -1, 0
	for i, op := range ops { // ascending by call: what returned before it has its place already
		for ; next < len(byReturn) && ops[byReturn[next]].Return < op.Call; next++ {
			if place := places[byReturn[next]]; place > floor {
				floor, because = place, byReturn[next]
			}
		}
		if op.Input.Kind == Stale {
			continue
		}
		first, last := s.span(op)
		if op.Changes() {
			first = max(first, floor+1) // nothing else can be where it is
		}
		if places[i] = max(first, floor); places[i] > last {
			before := "the beginning"
			if because >= 0 {
				before = ops[because].String()
			}
			return fmt.Errorf("%w: the latest place at which this could be is revision %d, but it began when that of another was %d:\n  %v\n  %s",
				ErrViolation, last, floor, op, before)
		}
	}
	return nil
}

// span returns the first and the last revision at which an operation can have taken place.
func (s *wholeStore) span(op Op) (first, last int64) {
	revision := op.Output.Revision
	switch {
	case op.Output.Unknown:
		if known, ok := s.revisions[op.Txn]; ok && op.Input.Kind != Get { // somebody saw what it wrote
			return known, known
		}
		return 0, math.MaxInt64
	case op.Changes() || op.Input.Snapshot:
		return revision, revision
	}
	return revision, s.nextChange(op.Input.Key, revision) - 1
}

// nextChange returns the revision of the first known change of a key after a revision.
func (s *wholeStore) nextChange(key string, revision int64) int64 {
	changes := s.written[key]
	i, _ := slices.BinarySearchFunc(changes, revision+1, func(c change, r int64) int { return cmp.Compare(c.revision, r) })
	if i == len(changes) {
		return math.MaxInt64
	}
	return changes[i].revision
}
