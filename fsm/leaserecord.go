package fsm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/bbolt"
)

// A file that has ever had a lease has two more buckets (record.go), and says so by its format:
//
//	lease   the table: leaseRecord
//	drop    number of a drop -> drop; the numbers are consecutive, ascending with the log
//	meta    forgotten -> drops.forgotten; absent while it is 0
//
// Files of format 1 have none of it. They are read as what they are, states without leases, and stay readable for the
// versions of kvd that know nothing of leases until the first one is written; those versions refuse format 2, because
// they would lose the table. What the two buckets hold is versioned with the format of the whole file.
var (
	leaseBucket  = []byte("lease")
	dropBucket   = []byte("drop")
	forgottenKey = []byte("forgotten")
)

const (
	leaseKeyBytes    = 8
	leaseRecordBytes = 1 + 3*8
	leaseGroupBytes  = 8

	leaseIsHome   = 1
	leaseIsEnding = 2
)

// leaseRecord is the stored part of a lease: its id (8) -> flags (1), TTL (8), remaining TTL (8), incarnation (8), and
// each of the groups (8); big endian. Which keys it has is in their rows.
type leaseRecord struct {
	id, ttl, remaining, incarnation int64
	home, ending                    bool
	groups                          []uint64 // ascending; replaced, never changed
}

func appendLeaseKey(b []byte, id int64) []byte { return binary.BigEndian.AppendUint64(b, uint64(id)) }

func (r *leaseRecord) bytes() int { return leaseRecordBytes + leaseGroupBytes*len(r.groups) }

func (r *leaseRecord) append(b []byte) []byte {
	b = slices.Grow(b, r.bytes())
	var flags byte
	if r.home {
		flags |= leaseIsHome
	}
	if r.ending {
		flags |= leaseIsEnding
	}
	b = append(b, flags)
	for _, v := range []int64{r.ttl, r.remaining, r.incarnation} {
		b = binary.BigEndian.AppendUint64(b, uint64(v))
	}
	for _, g := range r.groups {
		b = binary.BigEndian.AppendUint64(b, g)
	}
	return b
}

func parseLease(k, v []byte) (r leaseRecord, err error) {
	if len(k) != leaseKeyBytes || len(v) < leaseRecordBytes || (len(v)-leaseRecordBytes)%leaseGroupBytes != 0 || v[0]&^(leaseIsHome|leaseIsEnding) != 0 {
		return r, fmt.Errorf("%w: lease %x with the record %x", ErrCorruptState, k, v[:min(len(v), leaseRecordBytes)])
	}
	integer := func(i int) int64 { return int64(binary.BigEndian.Uint64(v[1+8*i:])) }
	r = leaseRecord{
		id:  int64(binary.BigEndian.Uint64(k)),
		ttl: integer(0), remaining: integer(1), incarnation: integer(2),
		home: v[0]&leaseIsHome != 0, ending: v[0]&leaseIsEnding != 0,
	}
	for g := v[leaseRecordBytes:]; len(g) > 0; g = g[leaseGroupBytes:] {
		r.groups = append(r.groups, binary.BigEndian.Uint64(g))
	}
	if !slices.IsSorted(r.groups) || r.id == 0 {
		return r, fmt.Errorf("%w: lease %x in groups %d", ErrCorruptState, k, r.groups)
	}
	return r, nil
}

// drops remembers the latest of the LeaseDrops that were applied, so that no LeaseAttach that is late makes an entry
// that nobody would drop again. Of those it has forgotten it knows that none was at a revision above forgotten: an
// attachment that was registered later cannot belong to one of them.
type drops struct {
	latest    []drop // oldest first; at most one of an incarnation
	first     uint64 // number of latest[0]
	saved     uint64 // drops with smaller numbers have been taken by a flush
	dropped   map[int64]int64
	forgotten int64
}

type drop struct{ id, incarnation, revision int64 }

// rememberedDrops are remembered. All replicas must agree on it.
const rememberedDrops = 4096

const dropBytes = 3 * 8

// has says whether this incarnation of a lease, or a later one, is remembered.
func (d *drops) has(id, incarnation int64) bool {
	dropped, ok := d.dropped[id]
	return ok && dropped >= incarnation
}

// add remembers a drop, and then forgets the oldest beyond the limit.
func (d *drops) add(latest drop, limit int) {
	if d.dropped == nil {
		d.dropped = map[int64]int64{}
	}
	d.latest = append(d.latest, latest)
	d.dropped[latest.id] = latest.incarnation
	for len(d.latest) > limit {
		old := d.latest[0]
		d.latest, d.first = d.latest[1:], d.first+1
		if d.dropped[old.id] == old.incarnation {
			delete(d.dropped, old.id)
		}
		d.forgotten = max(d.forgotten, old.revision)
	}
}

func (d drop) append(b []byte) []byte {
	for _, v := range []int64{d.id, d.incarnation, d.revision} {
		b = binary.BigEndian.AppendUint64(b, uint64(v))
	}
	return b
}

func parseDrop(k, v []byte) (number uint64, d drop, err error) {
	if len(k) != 8 || len(v) != dropBytes {
		return 0, d, fmt.Errorf("%w: drop %x: %x", ErrCorruptState, k, v)
	}
	integer := func(i int) int64 { return int64(binary.BigEndian.Uint64(v[8*i:])) }
	return binary.BigEndian.Uint64(k), drop{integer(0), integer(1), integer(2)}, nil
}

// leaseBatch is the part of a flush that is about leases.
type leaseBatch struct {
	records   map[int64][]byte // nil for a lease that is gone
	drops     []drop           // new ones
	number    uint64           // of drops[0]
	first     uint64           // drops before it are forgotten
	forgotten int64
	count     int // of all leases
}

// take moves what is not saved into a batch.
func (t *leases) take() leaseBatch {
	d := &t.drops
	b := leaseBatch{number: max(d.saved, d.first), first: d.first, forgotten: d.forgotten, count: t.table.Len()}
	b.drops = slices.Clone(d.latest[b.number-d.first:])
	d.saved = d.first + uint64(len(d.latest))
	if len(t.unsaved) > 0 {
		b.records, t.unsaved = t.unsaved, map[int64][]byte{}
	}
	return b
}

func (b *leaseBatch) isEmpty() bool { return len(b.records) == 0 && len(b.drops) == 0 }

// write writes the batch as part of a flush's transaction.
func (b *leaseBatch) write(tx *bbolt.Tx) error {
	if b.isEmpty() {
		return nil
	}
	table, dropped, err := createLeases(tx)
	if err == nil {
		err = tx.Bucket(metaBucket).Put(formatKey, []byte{formatLeases})
	}
	if err != nil {
		return err
	}
	var key [leaseKeyBytes]byte
	for _, id := range slices.Sorted(maps.Keys(b.records)) {
		k, record := appendLeaseKey(key[:0], id), b.records[id]
		if record == nil {
			err = table.Delete(k)
		} else {
			err = table.Put(k, record)
		}
		if err != nil {
			return err
		}
	}
	if len(b.drops) == 0 {
		return nil
	}
	cursor := dropped.Cursor()
	for k, _ := cursor.First(); k != nil && binary.BigEndian.Uint64(k) < b.first; k, _ = cursor.First() {
		if err := cursor.Delete(); err != nil {
			return err
		}
	}
	for i, d := range b.drops {
		if err := dropped.Put(binary.BigEndian.AppendUint64(nil, b.number+uint64(i)), d.append(nil)); err != nil {
			return err
		}
	}
	if b.forgotten == 0 {
		return nil
	}
	return tx.Bucket(metaBucket).Put(forgottenKey, binary.BigEndian.AppendUint64(nil, uint64(b.forgotten)))
}

// createLeases makes the buckets of leases, if they are not there yet.
func createLeases(tx *bbolt.Tx) (table, dropped *bbolt.Bucket, err error) {
	if table, err = tx.CreateBucketIfNotExists(leaseBucket); err == nil {
		dropped, err = tx.CreateBucketIfNotExists(dropBucket)
	}
	return table, dropped, err
}

// resetLeases replaces all that a file has about leases.
func resetLeases(tx *bbolt.Tx, entries []LeaseInfo) error {
	if tx.Bucket(leaseBucket) == nil {
		return nil
	}
	if err := errors.Join(tx.DeleteBucket(leaseBucket), tx.DeleteBucket(dropBucket), tx.Bucket(metaBucket).Delete(forgottenKey)); err != nil {
		return err
	}
	return putLeases(tx, entries)
}

// loadLeases reads the table of a file; empty for one without leases.
func loadLeases(tx *bbolt.Tx, maxDrops int) (leases, error) {
	t := newLeases()
	table, dropped := tx.Bucket(leaseBucket), tx.Bucket(dropBucket)
	if table == nil {
		return t, nil
	}
	if dropped == nil {
		return t, fmt.Errorf("%w: no bucket %q", ErrCorruptState, dropBucket)
	}
	if err := table.ForEach(func(k, v []byte) error {
		r, err := parseLease(k, v)
		t.table.Set(r.id, &lease{leaseRecord: r})
		return err
	}); err != nil {
		return t, err
	}
	d := &t.drops
	if err := dropped.ForEach(func(k, v []byte) error {
		number, dropped, err := parseDrop(k, v)
		switch {
		case err != nil:
			return err
		case len(d.latest) == 0:
			d.first = number
		case number != d.first+uint64(len(d.latest)):
			return fmt.Errorf("%w: drop %d follows %d", ErrCorruptState, number, d.first+uint64(len(d.latest))-1)
		}
		d.add(dropped, maxDrops)
		return nil
	}); err != nil {
		return t, err
	}
	d.saved = d.first + uint64(len(d.latest))
	switch w := tx.Bucket(metaBucket).Get(forgottenKey); {
	case w == nil:
	case len(w) != 8:
		return t, fmt.Errorf("%w: forgotten drops %x", ErrCorruptState, w)
	default:
		d.forgotten = max(d.forgotten, int64(binary.BigEndian.Uint64(w)))
	}
	return t, nil
}

// keyLeases collects, row by row in ascending revision, which leases the newest values of keys name.
type keyLeases map[string]int64

func (k keyLeases) row(key []byte, lease int64) {
	if lease != 0 {
		k[string(key)] = lease
	} else if len(k) > 0 {
		delete(k, string(key))
	}
}

// attachAll attaches keys as they are in the file. Leases end with all of their keys, so an unknown one is a
// contradiction.
func (t *leases) attachAll(keys keyLeases) error {
	for key, id := range keys {
		l := t.get(id)
		if l == nil {
			return fmt.Errorf("%w: key %q has the lease %x, which is not known", ErrCorruptState, key, uint64(id))
		}
		l.keys.Insert(key)
		t.attached[key] = l
	}
	return nil
}
