package fsm

import (
	"slices"

	"github.com/tidwall/btree"
)

// LeaseInfo is what a group knows of a lease. A guest entry has an ID, an Incarnation and Keys only.
type LeaseInfo struct {
	ID          int64
	TTL         int64    // seconds, as granted
	Remaining   int64    // seconds, as of the last checkpoint; 0 = the whole TTL
	Incarnation int64    // tells the lease from earlier ones with its id, which are smaller
	Home        bool     // this group has granted it
	Ending      bool     // it has expired or is being revoked
	Groups      []uint64 // other groups that may have keys of it, ascending; not to be changed
	Keys        int      // in this group
}

// leases is the table of leases, and which keys are attached to them. Apply alone changes it, and under Store.mu;
// so apply may look at it without.
type leases struct {
	table    btree.Map[int64, *lease]
	attached map[string]*lease // a key whose newest value names a lease is attached to it, and no other key is
	drops    drops
	unsaved  map[int64][]byte // records that no flush has taken; nil for a lease that is gone
	changes  leaseChanges
	notify   chan struct{} // closed at the next change; nil if nobody waits
}

type lease struct {
	leaseRecord
	keys btree.Set[string]
}

func (l *lease) info() LeaseInfo {
	return LeaseInfo{
		ID: l.id, TTL: l.ttl, Remaining: l.remaining, Incarnation: l.incarnation,
		Home: l.home, Ending: l.ending, Groups: l.groups, Keys: l.keys.Len(),
	}
}

func newLeases() leases {
	return leases{attached: map[string]*lease{}, unsaved: map[int64][]byte{}, changes: leaseChanges{first: 1}}
}

// get returns nil if there is no entry.
func (t *leases) get(id int64) *lease {
	l, _ := t.table.Get(id)
	return l
}

// home returns the lease if this group has granted it, else nil.
func (t *leases) home(id int64) *lease {
	if l := t.get(id); l != nil && l.home {
		return l
	}
	return nil
}

// attach makes a key belong to one lease, or with id 0 to none.
func (t *leases) attach(key []byte, id int64) {
	old := t.attached[string(key)]
	if old == nil && id == 0 || old != nil && old.id == id {
		return
	}
	owned := string(key)
	t.detach(owned)
	if id != 0 {
		l := t.get(id)
		l.keys.Insert(owned)
		t.attached[owned] = l
	}
}

// detach makes a key belong to no lease.
func (t *leases) detach(key string) {
	if l := t.attached[key]; l != nil {
		l.keys.Delete(key)
		delete(t.attached, key)
	}
}

// Lease returns what this group knows of a lease; ok is false if it knows nothing.
func (s *Store) Lease(id int64) (info LeaseInfo, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	l := s.leases.get(id)
	if l == nil {
		return LeaseInfo{}, false
	}
	return l.info(), true
}

// LeaseKeys returns the first max of this group's keys that are attached to a lease, in ascending order; all of them
// if max is 0 or less. It stops apply for some 10 ns per key.
func (s *Store) LeaseKeys(id int64, max int) [][]byte {
	names := s.leaseKeys(id, max)
	keys := make([][]byte, len(names))
	for i, key := range names {
		keys[i] = []byte(key)
	}
	return keys
}

func (s *Store) leaseKeys(id int64, max int) (keys []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	l := s.leases.get(id)
	if l == nil {
		return nil
	}
	n := l.keys.Len()
	if max > 0 {
		n = min(n, max)
	}
	keys = make([]string, 0, n)
	l.keys.Scan(func(key string) bool {
		if len(keys) < n {
			keys = append(keys, key)
		}
		return len(keys) < n
	})
	return keys
}

// Leases returns all entries of the table, guests included, as of one moment, ids ascending. It stops apply for some
// 50 ns per entry.
func (s *Store) Leases() []LeaseInfo {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]LeaseInfo, 0, s.leases.table.Len())
	s.leases.table.Scan(func(_ int64, l *lease) bool {
		all = append(all, l.info())
		return true
	})
	return all
}

// leaseChanges remembers the ids of the latest changes of the table.
type leaseChanges struct {
	ids   []int64
	first uint64 // number of the change of ids[0]
}

// maxLeaseChanges are remembered.
const maxLeaseChanges = 1 << 16

func (c *leaseChanges) add(id int64) {
	if len(c.ids) == maxLeaseChanges {
		c.ids, c.first = c.ids[1:], c.first+1
	}
	c.ids = append(c.ids, id)
}

// LeaseChanges returns the ids of the leases of which something but their keys has changed since an earlier call
// returned since as next; some may be there twice. If all is true, too much has changed, or since is of no earlier
// call on this store, as 0 never is: look at every lease.
func (s *Store) LeaseChanges(since uint64) (ids []int64, next uint64, all bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c := &s.leases.changes
	next = c.first + uint64(len(c.ids))
	if since < c.first || since > next {
		return nil, next, true
	}
	return slices.Clone(c.ids[since-c.first:]), next, false
}

// LeaseNotify returns a channel that is closed at the next change that LeaseChanges would report. Take it before the
// call of LeaseChanges. A store that ends does not close it; Failed says so.
func (s *Store) LeaseNotify() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leases.notify == nil {
		s.leases.notify = make(chan struct{})
	}
	return s.leases.notify
}

// recordLease makes the present state of a lease that has changed part of the digest and of the next flush. It needs
// the lock.
func (s *Store) recordLease(l *lease) { s.recordLeaseAs(l.id, l.append(nil)) }

// removeLease takes a lease without keys out of the table. It needs the lock.
func (s *Store) removeLease(l *lease) {
	s.leases.table.Delete(l.id)
	s.recordLeaseAs(l.id, nil)
}

func (s *Store) recordLeaseAs(id int64, record []byte) {
	t := &s.leases
	var key [leaseKeyBytes]byte
	_, _ = s.hasher.Write(appendLeaseKey(key[:0], id))
	_, _ = s.hasher.Write(record)
	t.unsaved[id] = record
	s.addPending(len(record) + leaseKeyBytes)
	t.changes.add(id)
	if t.notify != nil {
		close(t.notify)
		t.notify = nil
	}
}
