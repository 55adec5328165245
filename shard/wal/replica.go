package wal

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/raft"

	"kvd/shard/entrycache"
)

// replica is what the log knows of one. Its contents change when a batch is durable, or while the log is read.
type replica struct {
	id       ID
	segments *segments

	turn    chan struct{} // capacity 1: held by whoever has the replica's records written
	request request       // of whoever has the turn

	mu          sync.RWMutex // never held during I/O
	first, last uint64       // 0 = empty
	index       index
	keys        []keyValue        // in order
	cache       *entrycache.Cache // of the open Store; nil = none is open
	gone        bool              // removed, or about to be: nobody opens it any more
}

type keyValue struct {
	key   string
	value []byte
}

func newReplica(id ID, s *segments) *replica {
	r := &replica{id: id, segments: s, turn: make(chan struct{}, 1)}
	r.request.wake = make(chan bool, 1)
	return r
}

// leave reports whether r may be removed, because its Store is not open, and keeps it from being opened. If the
// removal fails, nothing can be written any more.
func (r *replica) leave() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cache == nil {
		r.gone = true
	}
	return r.gone
}

func (r *replica) bounds() (first, last uint64) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.first, r.last
}

// The following change the contents. The caller holds r.mu, or nobody else knows r yet.

// put appends an entry, in place of all from its index on.
func (r *replica) put(i uint64, at spot) error {
	switch {
	case i == 0 || r.first != 0 && (i < r.first || i > r.last+1):
		return fmt.Errorf("%s: entry %d after %d to %d", r.id, i, r.first, r.last)
	case r.first == 0:
		r.first = i
	case i <= r.last:
		r.dropAfter(i - 1)
		if r.first == 0 {
			r.first = i
		}
	}
	r.last = i
	r.index.put(i, at)
	r.segments.count(at, 1)
	return nil
}

// move says where an entry is now.
func (r *replica) move(i uint64, at spot) error {
	if r.first == 0 || i < r.first || i > r.last {
		return fmt.Errorf("%s: entry %d copied, which is not in %d to %d", r.id, i, r.first, r.last)
	}
	r.segments.count(r.index.get(i), -1)
	r.index.put(i, at)
	r.segments.count(at, 1)
	return nil
}

func (r *replica) uncount(lo, hi uint64) {
	for i := lo; i <= hi && lo != 0; i++ {
		r.segments.count(r.index.get(i), -1)
	}
}

// dropBefore removes what is before i.
func (r *replica) dropBefore(i uint64) {
	if r.first == 0 || i <= r.first {
		return
	}
	if i > r.last {
		r.reset()
		return
	}
	r.uncount(r.first, i-1)
	r.index.dropBefore(i)
	r.first = i
	if r.cache != nil {
		r.cache.DropBefore(i)
	}
}

// dropAfter removes what is behind i.
func (r *replica) dropAfter(i uint64) {
	if r.first == 0 || i >= r.last {
		return
	}
	if i < r.first {
		r.reset()
		return
	}
	r.uncount(i+1, r.last)
	r.index.dropAfter(i)
	r.last = i
	if r.cache != nil {
		r.cache.DropAfter(i)
	}
}

// reset removes all entries.
func (r *replica) reset() {
	r.uncount(r.first, r.last)
	r.index.reset(0, 0)
	r.first, r.last = 0, 0
	if r.cache != nil {
		r.cache.Reset()
	}
}

func (r *replica) find(key []byte) (int, bool) {
	return slices.BinarySearchFunc(r.keys, key, func(kv keyValue, key []byte) int { return cmp.Compare(kv.key, string(key)) })
}

// set takes the value over.
func (r *replica) set(key, value []byte) {
	i, found := r.find(key)
	if !found {
		r.keys = slices.Insert(r.keys, i, keyValue{key: string(key)})
	}
	r.keys[i].value = value
}

// get returns the value of a stable key, which must not be changed.
func (r *replica) get(key []byte) ([]byte, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if i, found := r.find(key); found {
		return r.keys[i].value, nil
	}
	return nil, ErrKeyNotFound
}

// lookup copies an entry that is in the cache, or says where it is.
func (r *replica) lookup(i uint64, out *raft.Log) (at spot, cached bool, err error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	switch {
	case r.first == 0 || i < r.first || i > r.last:
		return spot{}, false, raft.ErrLogNotFound
	case r.cache != nil && r.cache.Get(i, out):
		return spot{}, true, nil
	}
	return r.index.get(i), false, nil
}

// apply does what a record that has been read says, and knows where it is.
func (r *replica) apply(rec *record, at spot) error {
	switch rec.kind {
	case kindEntry:
		return r.put(rec.index, at)
	case kindCopied:
		return r.move(rec.index, at)
	case kindFirst:
		if r.first == 0 || rec.index <= r.first || rec.index > r.last+1 {
			return fmt.Errorf("%s: beginning set to %d in %d to %d", r.id, rec.index, r.first, r.last)
		}
		r.dropBefore(rec.index)
	case kindLast:
		if r.first == 0 || rec.index >= r.last || rec.index+1 < r.first {
			return fmt.Errorf("%s: end set to %d in %d to %d", r.id, rec.index, r.first, r.last)
		}
		r.dropAfter(rec.index)
	case kindReset:
		r.reset()
	case kindKey:
		r.set(rec.key, bytes.Clone(rec.value))
	default:
		return fmt.Errorf("%s: kind %d", r.id, rec.kind)
	}
	return nil
}

// complete fails if an entry between the bounds has no place.
func (r *replica) complete() error {
	for i := r.first; i <= r.last && i != 0; i++ {
		if r.index.get(i).missing() {
			return fmt.Errorf("%s: entry %d of %d to %d is missing", r.id, i, r.first, r.last)
		}
	}
	return nil
}
