package fsm

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"go.etcd.io/bbolt"

	"kvd/fsm/mvcc"
)

// RowsPage is a part of the history of a key space, as it travels between nodes. Pages of one cut, which may be of
// different replicas of the group, go to a Builder.
type RowsPage struct {
	// Rows are changes, newest first: for each its stored key and its stored row, with their sizes (uvarint).
	Rows []byte

	// Cursor is where the next page begins; nil after the last page.
	Cursor []byte

	// Compacted is the oldest revision that the pages up to this one make readable; -1 if that is all.
	Compacted int64

	// Keys is how many keys live at the cut. Only the first page knows it; it is -1 in the others.
	Keys int64
}

// RowsPage returns changes of the space up to the revision upTo, the cut, from the newest one on: first those that
// fit into maxBytes, at least one, and then, given the last page's cursor, more of them. Whatever is applied between
// two pages, or has been compacted in one replica and not in another, all pages together are the history from the
// last page's Compacted to the cut. As for RangeAt, the caller must know that nothing at or below the cut is still to
// be applied. Errors: ErrCompacted if the cut itself has been compacted, ErrMalformedRows for a cursor of no page,
// ErrWitness, ctx's and its meter's.
func (s *Store) RowsPage(ctx context.Context, space Space, cursor []byte, upTo int64, maxBytes int) (RowsPage, error) {
	at := rowsCursor{before: mvcc.Revision{Main: min(upTo, math.MaxInt64-1) + 1}, compacted: -1}
	if cursor != nil {
		var err error
		if at, err = parseRowsCursor(cursor); err != nil {
			return RowsPage{}, err
		}
	}
	v, err := s.openView(ctx, space, upTo)
	if err != nil {
		return RowsPage{}, err
	}
	defer v.close()
	// Rows come newest first, and what is unreadable is left out by a compaction revision that does not fall from
	// page to page. So no page has a change without the later one that ended it.
	p := pager{view: v, before: at.before, judgeAt: max(at.compacted, v.compacted), left: maxBytes}
	if s.config.faults.unjudged {
		p.judgeAt = -1
	}
	if upTo < p.judgeAt {
		return RowsPage{}, ErrCompacted
	}
	page := RowsPage{Compacted: max(at.compacted, v.compacted), Keys: -1}
	if cursor == nil {
		if _, page.Keys, err = v.collect(ctx, mvcc.Span{Unbounded: true}, min(upTo, v.revision), countOnly, true); err != nil {
			return RowsPage{}, err
		}
	}
	if err := p.fill(ctx); err != nil {
		return RowsPage{}, err
	}
	page.Rows = p.rows
	if p.full {
		page.Cursor = rowsCursor{before: p.before, compacted: page.Compacted}.append(nil)
	}
	return page, nil
}

// pager collects the rows of one page.
type pager struct {
	view    *view
	before  mvcc.Revision // of the last row taken; the next ones are older
	judgeAt int64         // rows up to here are left out unless a read here sees them
	left    int
	full    bool
	rows    []byte
	old     []oldRow // rows up to judgeAt, to be judged together
}

// fill takes rows from memory, newest first, and then from the file.
func (p *pager) fill(ctx context.Context) error {
	s, sp := p.view.store, p.view.space
	if published := (mvcc.Revision{Main: p.view.revision + 1}); p.before.Compare(published) > 0 {
		p.before = published
	}
	s.mu.RLock()
	active, flushing := sp.active, sp.flushing
	s.mu.RUnlock()
	if hook := s.config.faults.paging; hook != nil {
		hook()
	}
	tx, err := s.begin()
	if err != nil {
		return err
	}
	defer rollback(tx)
	stored := p.before // of the file, only what is older than all in memory
	var key [mvcc.KeyBytes]byte
	for _, rows := range []mvcc.Rows{active, flushing} {
		if len(rows) > 0 && rows[0].Revision.Compare(stored) < 0 {
			stored = rows[0].Revision
		}
		end, _ := slices.BinarySearchFunc(rows, p.before, func(row mvcc.Row, r mvcc.Revision) int { return row.Revision.Compare(r) })
		for _, row := range slices.Backward(rows[:end]) {
			if err := p.row(row.Revision, row.Tombstone, row.Revision.AppendKey(key[:0], row.Tombstone), row.Data); err != nil || p.full {
				return err
			}
		}
	}
	if err := p.stored(ctx, tx.Bucket(sp.bucket), stored); err != nil || p.full {
		return err
	}
	return p.judge()
}

func (p *pager) stored(ctx context.Context, bucket *bbolt.Bucket, before mvcc.Revision) error {
	return descend(ctx, bucket, before, func(r mvcc.Revision, tombstone bool, key, data []byte) (bool, error) {
		err := p.row(r, tombstone, key, data)
		return !p.full, err
	})
}

// descend visits the rows of a bucket that are older than before, newest first, until visit returns false.
func descend(ctx context.Context, bucket *bbolt.Bucket, before mvcc.Revision, visit func(r mvcc.Revision, tombstone bool, key, data []byte) (bool, error)) error {
	cursor := bucket.Cursor()
	k, data := cursor.Seek(before.AppendKey(nil, false))
	if k == nil {
		k, data = cursor.Last()
	}
	for n := 0; k != nil; k, data = cursor.Prev() {
		r, tombstone, err := mvcc.ParseKey(k)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrCorruptState, err)
		}
		if r.Compare(before) >= 0 {
			continue
		}
		if n++; n%hashBatch == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if more, err := visit(r, tombstone, k, data); err != nil || !more {
			return err
		}
	}
	return nil
}

func (p *pager) row(r mvcc.Revision, tombstone bool, key, data []byte) error {
	if r.Main > p.judgeAt {
		return p.take(r, key, data)
	}
	if tombstone && r.Main < p.judgeAt {
		return nil
	}
	name, _, err := mvcc.DecodeStamp(data, r, tombstone)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCorruptState, err)
	}
	p.old = append(p.old, oldRow{r, tombstone, string(name), append([]byte(nil), key...), data})
	if len(p.old) == hashBatch {
		return p.judge()
	}
	return nil
}

// judge takes the old rows that can be seen at judgeAt, and tombstones of that revision, for watches from there.
func (p *pager) judge() error {
	s, sp := p.view.store, p.view.space
	s.mu.RLock()
	visible := p.old[:0]
	for _, row := range p.old {
		if stamp, ok := sp.index.Get(row.key, p.judgeAt); row.tombstone || ok && stamp.Revision() == row.revision {
			visible = append(visible, row)
		}
	}
	s.mu.RUnlock()
	p.old = p.old[:0]
	for _, row := range visible {
		if err := p.take(row.revision, row.storedKey, row.storedData); err != nil || p.full {
			return err
		}
	}
	return nil
}

// take adds a row to the page, if it fits.
func (p *pager) take(r mvcc.Revision, key, data []byte) error {
	n := rowBytes(key, data)
	if n > p.left && len(p.rows) > 0 {
		p.full = true
		return nil
	}
	if err := p.view.take(n); err != nil {
		return err
	}
	p.rows = appendRow(p.rows, key, data)
	p.left -= n
	p.before = r
	return nil
}

func rowBytes(key, data []byte) int { return len(key) + len(data) + 2*binary.MaxVarintLen32 }

func appendRow(b, key, data []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(key)))
	b = append(b, key...)
	b = binary.AppendUvarint(b, uint64(len(data)))
	return append(b, data...)
}

// rowOfPage is one of a page's rows. It aliases the page.
type rowOfPage struct {
	revision  mvcc.Revision
	tombstone bool
	storedKey []byte
	data      []byte
}

// nextRow decodes the first row and returns the others.
func nextRow(rows []byte) (row rowOfPage, rest []byte, err error) {
	field := func() []byte {
		size, n := binary.Uvarint(rows)
		if n <= 0 || size > uint64(len(rows)-n) {
			err = fmt.Errorf("%w: a row is cut off", ErrMalformedRows)
			return nil
		}
		b := rows[n:][:size]
		rows = rows[n+int(size):]
		return b
	}
	if row.storedKey = field(); err == nil {
		row.data = field()
	}
	if err == nil {
		if row.revision, row.tombstone, err = mvcc.ParseKey(row.storedKey); err == nil {
			_, _, err = mvcc.DecodeStamp(row.data, row.revision, row.tombstone)
		}
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrMalformedRows, err)
		}
	}
	return row, rows, err
}

// rowsCursor is where a page of rows ends.
type rowsCursor struct {
	before    mvcc.Revision
	compacted int64
}

const rowsCursorBytes = 8 + 4 + 8

func (c rowsCursor) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(c.before.Main))
	b = binary.BigEndian.AppendUint32(b, c.before.Sub)
	return binary.BigEndian.AppendUint64(b, uint64(c.compacted))
}

func parseRowsCursor(b []byte) (rowsCursor, error) {
	if len(b) != rowsCursorBytes {
		return rowsCursor{}, fmt.Errorf("%w: cursor of %d bytes", ErrMalformedRows, len(b))
	}
	c := rowsCursor{compacted: int64(binary.BigEndian.Uint64(b[12:]))}
	c.before = mvcc.Revision{Main: int64(binary.BigEndian.Uint64(b)), Sub: binary.BigEndian.Uint32(b[8:])}
	if c.before.Main < 0 || c.compacted < -1 {
		return rowsCursor{}, fmt.Errorf("%w: cursor %x", ErrMalformedRows, b)
	}
	return c, nil
}

// Append appends the page in the form that ParseRowsPage reads.
func (p RowsPage) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(p.Compacted))
	b = binary.BigEndian.AppendUint64(b, uint64(p.Keys))
	b = append(b, byte(len(p.Cursor)))
	b = append(b, p.Cursor...)
	return append(b, p.Rows...)
}

// ParseRowsPage is the inverse of Append. The page aliases b; its rows are looked at by whoever uses them.
func ParseRowsPage(b []byte) (RowsPage, error) {
	const fixed = 8 + 8 + 1
	if len(b) < fixed || len(b) < fixed+int(b[fixed-1]) {
		return RowsPage{}, fmt.Errorf("%w: page of %d bytes", ErrMalformedRows, len(b))
	}
	p := RowsPage{Compacted: int64(binary.BigEndian.Uint64(b)), Keys: int64(binary.BigEndian.Uint64(b[8:]))}
	b = b[fixed-1:]
	size := int(b[0])
	if size > 0 {
		if p.Cursor = b[1:][:size]; size != rowsCursorBytes {
			return RowsPage{}, fmt.Errorf("%w: cursor of %d bytes", ErrMalformedRows, size)
		}
	}
	p.Rows = b[1+size:]
	return p, nil
}
