package wal

import (
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

type kind uint8

const (
	kindEntry kind = 1 + iota
	kindCopied
	kindFirst
	kindLast
	kindReset
	kindKey
	kindCreate
	kindRemove
	kindCheckpoint
	kindSeal
)

const (
	// size u32, crc u32 of what follows it, kind u8, entry type u8, flags u16, extension bytes u32, group u64,
	// replica u64
	recordHeaderBytes = 32
	// The same, then index u64, term u64, seconds i64, nanoseconds u32, nothing u32. Data and extensions follow.
	entryHeaderBytes = recordHeaderBytes + 32

	flagTime = 1 // the entry has a time of appending
)

// entryRecordBytes is the size of an entry's record.
func entryRecordBytes(e *raft.Log) int { return entryHeaderBytes + len(e.Data) + len(e.Extensions) }

// appendHeader adds a record's first 32 bytes, but for what finish fills in.
func appendHeader(b []byte, k kind, id ID) []byte {
	b = append(b, make([]byte, recordHeaderBytes)...)
	h := b[len(b)-recordHeaderBytes:]
	h[8] = byte(k)
	le.PutUint64(h[16:], id.Group)
	le.PutUint64(h[24:], id.Replica)
	return b
}

// finish fills in size and checksum of the record that begins at start and ends with b.
func finish(b []byte, start int) []byte {
	record := b[start:]
	le.PutUint32(record, uint32(len(record)))
	le.PutUint32(record[4:], checksum(record[8:]))
	return b
}

func appendEntry(b []byte, id ID, e *raft.Log) []byte {
	start := len(b)
	b = append(b, make([]byte, entryHeaderBytes)...)
	h := b[start:]
	h[8], h[9] = byte(kindEntry), byte(e.Type)
	le.PutUint32(h[12:], uint32(len(e.Extensions)))
	le.PutUint64(h[16:], id.Group)
	le.PutUint64(h[24:], id.Replica)
	le.PutUint64(h[32:], e.Index)
	le.PutUint64(h[40:], e.Term)
	if !e.AppendedAt.IsZero() {
		le.PutUint16(h[10:], flagTime)
		le.PutUint64(h[48:], uint64(e.AppendedAt.Unix()))
		le.PutUint32(h[56:], uint32(e.AppendedAt.Nanosecond()))
	}
	b = append(b, e.Data...)
	b = append(b, e.Extensions...)
	return finish(b, start)
}

// appendIndex adds a first or last record.
func appendIndex(b []byte, k kind, id ID, index uint64) []byte {
	start := len(b)
	b = appendHeader(b, k, id)
	return finish(le.AppendUint64(b, index), start)
}

func appendPlain(b []byte, k kind, id ID) []byte { return finish(appendHeader(b, k, id), len(b)) }

func appendKey(b []byte, id ID, key, value []byte) []byte {
	start := len(b)
	b = appendHeader(b, kindKey, id)
	b = le.AppendUint32(b, uint32(len(key)))
	b = append(b, key...)
	return finish(append(b, value...), start)
}

// record is one that has been read. Its slices are parts of what it was read from.
type record struct {
	kind   kind
	id     ID
	bytes  []byte // all of it
	rest   []byte // behind the header that all kinds have
	index  uint64 // of an entry, or of first and last
	key    []byte
	value  []byte
	extras uint32
}

// splitRecord returns the first record in b. Its checksum is the caller's to check, or that of the batch.
func splitRecord(b []byte) (r record, err error) {
	if len(b) < recordHeaderBytes {
		return r, fmt.Errorf("%d bytes are no record", len(b))
	}
	size := le.Uint32(b)
	if size < recordHeaderBytes || uint64(size) > uint64(len(b)) {
		return r, fmt.Errorf("a record of %d bytes in %d", size, len(b))
	}
	b = b[:size:size]
	r = record{kind: kind(b[8]), bytes: b, rest: b[recordHeaderBytes:], extras: le.Uint32(b[12:])}
	r.id = ID{Group: le.Uint64(b[16:]), Replica: le.Uint64(b[24:])}
	return r, r.decode()
}

// decode reads what the kind needs.
func (r *record) decode() error {
	switch r.kind {
	case kindEntry, kindCopied:
		if len(r.bytes) < entryHeaderBytes || uint64(r.extras) > uint64(len(r.bytes)-entryHeaderBytes) {
			return fmt.Errorf("an entry of %d bytes", len(r.bytes))
		}
		r.index = le.Uint64(r.rest)
	case kindFirst, kindLast:
		if len(r.rest) != 8 {
			return fmt.Errorf("an index of %d bytes", len(r.rest))
		}
		r.index = le.Uint64(r.rest)
	case kindKey:
		if len(r.rest) < 4 || uint64(le.Uint32(r.rest)) > uint64(len(r.rest)-4) {
			return fmt.Errorf("a key of %d bytes", len(r.rest))
		}
		n := le.Uint32(r.rest)
		r.key, r.value = r.rest[4:4+n], r.rest[4+n:]
	case kindReset, kindCreate, kindRemove, kindSeal:
		if len(r.rest) != 0 {
			return fmt.Errorf("%d bytes too many", len(r.rest))
		}
	case kindCheckpoint:
	default:
		return fmt.Errorf("kind %d is unknown", r.kind)
	}
	return nil
}

func (r *record) sound() bool { return le.Uint32(r.bytes[4:]) == checksum(r.bytes[8:]) }

// entry decodes an entry. Data and extensions are parts of the record.
func (r *record) entry(out *raft.Log) {
	b := r.bytes
	data := b[entryHeaderBytes : len(b)-int(r.extras) : len(b)-int(r.extras)]
	*out = raft.Log{Index: r.index, Term: le.Uint64(b[40:]), Type: raft.LogType(b[9])}
	if len(data) > 0 {
		out.Data = data
	}
	if r.extras > 0 {
		out.Extensions = b[len(b)-int(r.extras):]
	}
	if le.Uint16(b[10:])&flagTime != 0 {
		out.AppendedAt = time.Unix(int64(le.Uint64(b[48:])), int64(le.Uint32(b[56:])))
	}
}

// copyRecord adds r as one that is copied forward.
func copyRecord(b []byte, r *record) []byte {
	start := len(b)
	b = append(b, r.bytes...)
	b[start+8] = byte(kindCopied)
	return finish(b, start)
}
