package fsm

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/bbolt"

	"kvd/fsm/mvcc"
	"kvd/snapshot"
)

// strayTTL is how many seconds a lease has that a backup's keys name, but no group knew any more when it was asked: it
// ended while the backup was taken. Its keys are in the backup, and would have gone with it.
const strayTTL = 60

// HomeLeases looks at max entries of the table with ids of at least from, ascending, and returns those of leases that
// this group has granted, as backups have them: without Groups and Keys. If more is true, others follow from next on.
// math.MinInt64 is the first from.
func (s *Store) HomeLeases(from int64, max int) (homes []LeaseInfo, next int64, more bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.leases.table.Ascend(from, func(id int64, l *lease) bool {
		if max == 0 {
			next, more = id, true
			return false
		}
		max--
		if l.home {
			homes = append(homes, LeaseInfo{ID: l.id, TTL: l.ttl, Remaining: l.remaining, Incarnation: l.incarnation, Home: true})
		}
		return true
	})
	return homes, next, more
}

// AppendLeases appends leases in the form that ParseLeases reads: for each its id (8), the size of its record
// (uvarint), and its record. Keys are left out.
func AppendLeases(b []byte, all []LeaseInfo) []byte {
	for _, info := range all {
		r := info.record()
		b = appendLeaseKey(b, r.id)
		b = binary.AppendUvarint(b, uint64(r.bytes()))
		b = r.append(b)
	}
	return b
}

// ParseLeases is the inverse of AppendLeases. It returns ErrMalformedRows for what is none.
func ParseLeases(b []byte) (all []LeaseInfo, err error) {
	for len(b) > 0 {
		size, n := binary.Uvarint(b[min(leaseKeyBytes, len(b)):])
		if n <= 0 || size > uint64(len(b)-leaseKeyBytes-n) {
			return nil, fmt.Errorf("%w: a lease is cut off", ErrMalformedRows)
		}
		end := leaseKeyBytes + n + int(size)
		r, err := parseLease(b[:leaseKeyBytes], b[leaseKeyBytes+n:end])
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformedRows, err)
		}
		all = append(all, (&lease{leaseRecord: r}).info())
		b = b[end:]
	}
	return all, nil
}

func (i LeaseInfo) record() leaseRecord {
	return leaseRecord{
		id: i.ID, ttl: i.TTL, remaining: i.Remaining, incarnation: i.Incarnation,
		home: i.Home, ending: i.Ending, groups: i.Groups,
	}
}

// AddLeases adds entries to the table of leases; one that is there already is replaced. A state whose keys name
// leases that are not in its table can only be restored.
func (b *Builder) AddLeases(entries []LeaseInfo) (err error) {
	if b.db == nil {
		return ErrClosed
	}
	if len(entries) == 0 {
		return nil
	}
	defer catchCorruption(&err)()
	return b.db.Update(func(tx *bbolt.Tx) error { return putLeases(tx, entries) })
}

// putLeases writes entries, and makes their buckets; the format is the caller's.
func putLeases(tx *bbolt.Tx, entries []LeaseInfo) error {
	table, _, err := createLeases(tx)
	if err != nil {
		return err
	}
	for _, info := range entries {
		r := info.record()
		if err := table.Put(appendLeaseKey(nil, r.id), r.append(nil)); err != nil {
			return err
		}
	}
	return nil
}

// RestoredLeases returns the leases of a backup, whose state file is at path, as a new cluster begins with them: none
// of them is ending, or known to other groups than its home. Their incarnation is the backup's revision, so that those
// of leases that are granted later are above it. It tells named which keys name which of them. A lease that keys name
// and the file does not know lives for another minute. The caller must know of the file what SplitFile must.
func RestoredLeases(ctx context.Context, path string, named func(key []byte, id int64)) (all []LeaseInfo, err error) {
	err = ViewFile(ctx, path, func(tx *bbolt.Tx, meta snapshot.Meta) (err error) {
		all, err = restoredLeases(ctx, tx, meta.Revision, named)
		return err
	})
	return all, err
}

func restoredLeases(ctx context.Context, tx *bbolt.Tx, revision int64, named func(key []byte, id int64)) ([]LeaseInfo, error) {
	if tx.Bucket(leaseBucket) == nil {
		return nil, nil
	}
	t, err := loadLeases(tx, rememberedDrops)
	if err != nil {
		return nil, err
	}
	keys, err := readKeyLeases(ctx, tx)
	if err != nil {
		return nil, err
	}
	all := map[int64]LeaseInfo{}
	t.table.Scan(func(id int64, l *lease) bool {
		if l.home {
			all[id] = LeaseInfo{ID: id, TTL: l.ttl, Remaining: l.remaining, Incarnation: max(1, revision), Home: true}
		}
		return true
	})
	for key, id := range keys {
		if _, known := all[id]; !known {
			all[id] = LeaseInfo{ID: id, TTL: strayTTL, Incarnation: max(1, revision), Home: true}
		}
		named([]byte(key), id)
	}
	return slices.SortedFunc(maps.Values(all), func(a, b LeaseInfo) int { return cmp.Compare(a.ID, b.ID) }), nil
}

// readKeyLeases reads which leases the newest values of the clients' keys name. It takes memory for those keys alone.
func readKeyLeases(ctx context.Context, tx *bbolt.Tx) (keyLeases, error) {
	keys, n := keyLeases{}, 0
	return keys, tx.Bucket(spaceBuckets[User]).ForEach(func(k, v []byte) error {
		if n++; n%hashBatch == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		r, tombstone, err := mvcc.ParseKey(k)
		var key []byte
		if err == nil {
			key, _, err = mvcc.DecodeStamp(v, r, tombstone)
		}
		var lease int64
		if err == nil {
			lease, err = mvcc.DecodeLease(v)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrCorruptState, err)
		}
		keys.row(key, lease)
		return nil
	})
}
