package fsm

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"

	"go.etcd.io/bbolt"

	"kvd/fsm/mvcc"
	"kvd/snapshot"
)

// Builder writes a new state file from the rows of others' client key spaces, to merge states or to take one apart.
// It keeps about 1 MiB of rows in memory. It is not safe for concurrent use. It must end in Finish or
// Discard.
type Builder struct {
	path   string
	db     *bbolt.DB // nil after the end
	rows   []rowOfPage
	arena  mvcc.Arena
	bytes  int
	oldest mvcc.Revision // added so far
	newest int64
	limit  int                   // of bytes
	leased bool                  // rows name leases
	lose   func(key []byte) bool // a fault: this row is not written
}

const builderBytes = 1 << 20

// NewBuilder creates the file at path, which must not exist. A crash before Finish leaves a file that no store takes.
func NewBuilder(path string) (*Builder, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	b := &Builder{path: path, oldest: mvcc.Revision{Main: math.MaxInt64}, limit: builderBytes}
	b.db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: 1, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType, NoSync: true, NoGrowSync: true,
	})
	if err == nil {
		err = b.db.Update(func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket(spaceBuckets[User])
			return err
		})
	}
	if err != nil {
		return nil, errors.Join(err, b.Discard())
	}
	return b, nil
}

// Discard removes the file. It does nothing after Finish or another Discard.
func (b *Builder) Discard() error {
	if b.db == nil {
		return nil
	}
	err := b.db.Close()
	b.db = nil
	return errors.Join(err, os.Remove(b.path))
}

// Add adds rows of a page. Over all calls they must come newest first, each once; others are refused with
// ErrRowOrder, and what is no page's with ErrMalformedRows.
func (b *Builder) Add(rows []byte) error {
	for len(rows) > 0 {
		row, rest, err := nextRow(rows)
		if err != nil {
			return err
		}
		if err := b.add(row); err != nil {
			return err
		}
		rows = rest
	}
	return nil
}

func (b *Builder) add(row rowOfPage) error {
	if row.revision.Compare(b.oldest) >= 0 {
		return fmt.Errorf("%w: %d.%d after %d.%d", ErrRowOrder, row.revision.Main, row.revision.Sub, b.oldest.Main, b.oldest.Sub)
	}
	if lease, err := mvcc.DecodeLease(row.data); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformedRows, err)
	} else if lease != 0 {
		b.leased = true
	}
	b.oldest, b.newest = row.revision, max(b.newest, row.revision.Main)
	row.storedKey = append(b.arena.Take(len(row.storedKey)), row.storedKey...)
	row.data = append(b.arena.Take(len(row.data)), row.data...)
	b.rows = append(b.rows, row)
	b.bytes += len(row.storedKey) + len(row.data) + rowOverheadBytes
	if b.bytes < b.limit {
		return nil
	}
	return b.write()
}

// write puts the rows in memory before all that are in the file.
func (b *Builder) write() (err error) {
	defer catchCorruption(&err)()
	err = b.db.Update(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket(spaceBuckets[User])
		bucket.FillPercent = 0.9
		for _, row := range slices.Backward(b.rows) {
			if b.lose != nil && b.lose(row.storedKey) {
				continue
			}
			if err := bucket.Put(row.storedKey, row.data); err != nil {
				return err
			}
		}
		return nil
	})
	clear(b.rows)
	b.rows, b.bytes, b.arena = b.rows[:0], 0, mvcc.Arena{}
	return err
}

// Finish makes the file a whole state, described by meta, and durable. Its revision may be above that of any row, and
// Index must not be 0, because a state at 0 is none. What a compaction at CompactRevision makes unreadable may be
// among the rows; the first store that opens the file removes it. Keys must be right, or -1: then they are counted,
// which takes as much memory as opening the file does. On an error the builder must still be discarded.
func (b *Builder) Finish(meta snapshot.Meta) error {
	switch {
	case b.db == nil:
		return ErrClosed
	case meta.Index == 0 || meta.Revision < max(1, b.newest) || meta.CompactRevision < -1 || meta.CompactRevision > meta.Revision:
		return fmt.Errorf("fsm: no state has index %d, revision %d, compact revision %d and a row at %d",
			meta.Index, meta.Revision, meta.CompactRevision, b.newest)
	}
	if err := b.write(); err != nil {
		return err
	}
	if err := b.db.Update(func(tx *bbolt.Tx) error { return describe(tx, meta, b.leased) }); err != nil {
		return err
	}
	if err := b.db.Sync(); err != nil {
		return err
	}
	if err := b.db.Close(); err != nil {
		return err
	}
	b.db = nil
	return syncDir(filepath.Dir(b.path))
}

// describe writes all but the rows and the leases.
func describe(tx *bbolt.Tx, meta snapshot.Meta, leased bool) error {
	format := byte(formatVersion)
	if leased || tx.Bucket(leaseBucket) != nil {
		format = formatLeases
		if _, _, err := createLeases(tx); err != nil {
			return err
		}
	}
	s := emptyState()
	s.index, s.term, s.configurationIndex = meta.Index, meta.Term, meta.ConfigurationIndex
	s.spaces[User] = spaceState{revision: meta.Revision, compacted: meta.CompactRevision, finished: -1, keys: meta.Keys}
	if meta.Keys < 0 {
		counting := keyspace{bucket: spaceBuckets[User], revision: meta.Revision}
		if err := counting.rebuild(tx.Bucket(spaceBuckets[User]), nil); err != nil {
			return err
		}
		s.spaces[User].keys = int64(counting.index.Live())
	}
	if _, err := tx.CreateBucket(spaceBuckets[System]); err != nil {
		return err
	}
	bucket, err := tx.CreateBucket(metaBucket)
	if err != nil {
		return err
	}
	return errors.Join(
		bucket.Put(formatKey, []byte{format}),
		putIdentity(tx, meta.Group, meta.ClusterID),
		bucket.Put(stateKey, appendState(nil, s)),
		bucket.Put(configurationKey, appendConfiguration(nil, meta.Configuration)),
	)
}
