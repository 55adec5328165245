// Package mvcc holds the pure parts of a multi-version key space: revisions, the stored form of a row, rows not
// yet on disk, and the index from key to revisions. Nothing in it locks, waits or does I/O.
package mvcc

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// ErrMalformed is returned for stored bytes that no version of this package has written.
var ErrMalformed = errors.New("mvcc: malformed row")

// Revision names one change: the transaction it was part of and its place in that transaction. The stored form is
// etcd's, so that rows sort by revision and hashes of the state agree with etcd's.
type Revision struct {
	Main int64
	Sub  uint32
}

// Compare orders revisions by time.
func (r Revision) Compare(o Revision) int {
	if c := cmp.Compare(r.Main, o.Main); c != 0 {
		return c
	}
	return cmp.Compare(r.Sub, o.Sub)
}

const (
	revisionBytes = 8 + 1 + 8
	separator     = '_'
	tombstoneMark = 't'

	// KeyBytes is the size of the longest stored key.
	KeyBytes = revisionBytes + 1
)

// AppendKey appends the key under which the row of r is stored.
func (r Revision) AppendKey(b []byte, tombstone bool) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(r.Main))
	b = append(b, separator)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Sub))
	if tombstone {
		b = append(b, tombstoneMark)
	}
	return b
}

// ParseKey is the inverse of AppendKey.
func ParseKey(b []byte) (r Revision, tombstone bool, err error) {
	switch {
	case len(b) == revisionBytes:
	case len(b) == KeyBytes && b[revisionBytes] == tombstoneMark:
		tombstone = true
	default:
		return Revision{}, false, fmt.Errorf("%w: key of %d bytes", ErrMalformed, len(b))
	}
	main, sub := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[9:])
	if b[8] != separator || main > math.MaxInt64 || sub > math.MaxUint32 {
		return Revision{}, false, fmt.Errorf("%w: key %x", ErrMalformed, b)
	}
	return Revision{Main: int64(main), Sub: uint32(sub)}, tombstone, nil
}
