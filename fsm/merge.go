package fsm

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"kvd/fsm/mvcc"
	"kvd/snapshot"
)

// RowsSource returns the page of a state's rows that begins at cursor; the first page for nil.
type RowsSource func(ctx context.Context, cursor []byte) (RowsPage, error)

// Merge adds all rows of states that have no revision in common. It returns the oldest revision at which all of them
// can be read, -1 if that is every one, and how many keys live at their cut: what Finish wants to know. It holds one
// page of each source in memory. Errors are those of the sources and of Add.
func (b *Builder) Merge(ctx context.Context, sources []RowsSource) (compacted, keys int64, err error) {
	compacted = -1
	m := make(merge, 0, len(sources))
	for _, source := range sources {
		o := &origin{source: source}
		if err := o.fetch(ctx, nil); err != nil {
			return 0, 0, err
		}
		if o.page.Keys < 0 {
			return 0, 0, fmt.Errorf("%w: the first one does not count keys", ErrMalformedRows)
		}
		keys += o.page.Keys
		compacted = max(compacted, o.page.Compacted)
		if !o.done {
			m = append(m, o)
		}
	}
	heap.Init(&m)
	var last *origin // of the row added last
	for len(m) > 0 {
		o := m[0]
		if o.row.revision.Main == b.oldest.Main && last != nil && o != last {
			return 0, 0, fmt.Errorf("%w: two states have changes at %d", ErrRowOrder, b.oldest.Main)
		}
		if err := b.add(o.row); err != nil {
			return 0, 0, err
		}
		last = o
		if err := o.next(ctx); err != nil {
			return 0, 0, err
		}
		compacted = max(compacted, o.page.Compacted)
		if o.done {
			heap.Pop(&m)
		} else {
			heap.Fix(&m, 0)
		}
	}
	return compacted, keys, nil
}

// origin is a state that is being merged.
type origin struct {
	source RowsSource
	page   RowsPage
	rest   []byte // of the page's rows
	row    rowOfPage
	done   bool
}

// next goes on to the origin's next row, if it has one.
func (o *origin) next(ctx context.Context) (err error) {
	switch {
	case len(o.rest) > 0:
		o.row, o.rest, err = nextRow(o.rest)
		return err
	case o.page.Cursor == nil:
		o.done = true
		return nil
	}
	return o.fetch(ctx, o.page.Cursor)
}

func (o *origin) fetch(ctx context.Context, cursor []byte) (err error) {
	if o.page, err = o.source(ctx, cursor); err != nil {
		return err
	}
	if o.rest = o.page.Rows; len(o.rest) == 0 && o.page.Cursor != nil {
		return fmt.Errorf("%w: a page without rows is not the last", ErrMalformedRows)
	}
	return o.next(ctx)
}

// merge is a heap of origins, that with the newest row on top.
type merge []*origin

func (m merge) Len() int           { return len(m) }
func (m merge) Less(i, j int) bool { return m[i].row.revision.Compare(m[j].row.revision) > 0 }
func (m merge) Swap(i, j int)      { m[i], m[j] = m[j], m[i] }
func (m *merge) Push(o any)        { *m = append(*m, o.(*origin)) }
func (m *merge) Pop() any {
	last := len(*m) - 1
	o := (*m)[last]
	(*m)[last] = nil
	*m = (*m)[:last]
	return o
}

// SplitFile gives each row of the clients' keys in the state file at path to the builder that pick names for its key;
// nil leaves the row out. It returns what the file says about itself. No store may have the file open for writing,
// and its pages must have been checked, as snapshot.Stage does.
func SplitFile(ctx context.Context, path string, pick func(key []byte) *Builder) (meta snapshot.Meta, err error) {
	err = ViewFile(ctx, path, func(tx *bbolt.Tx, of snapshot.Meta) error {
		meta = of
		newest := mvcc.Revision{Main: math.MaxInt64}
		return descend(ctx, tx.Bucket(spaceBuckets[User]), newest, func(r mvcc.Revision, tombstone bool, key, data []byte) (bool, error) {
			name, _, err := mvcc.DecodeStamp(data, r, tombstone)
			if err != nil {
				return false, fmt.Errorf("%w: %w", ErrCorruptState, err)
			}
			if b := pick(name); b != nil {
				err = b.add(rowOfPage{r, tombstone, key, data})
			}
			return true, err
		})
	})
	return meta, err
}

// ViewFile is ViewSnapshot for a state file that no store has open.
func ViewFile(ctx context.Context, path string, fn func(tx *bbolt.Tx, meta snapshot.Meta) error) (err error) {
	defer catchCorruption(&err)()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Nanosecond})
	if errors.Is(err, berrors.ErrTimeout) {
		err = ErrLocked
	}
	if err != nil {
		return fmt.Errorf("view %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return db.View(func(tx *bbolt.Tx) error {
		m, err := readStored(tx)
		switch {
		case err != nil:
			return err
		case m.witness:
			return ErrWitness
		case m.state.index == 0:
			return errNothingDurable
		case ctx.Err() != nil:
			return ctx.Err()
		}
		return fn(tx, snapshotMeta(m.group, m.clusterID, m.state, m.configuration))
	})
}
