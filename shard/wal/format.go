// Package wal is one durable log for the raft logs and votes of all replicas of a node: whatever they write at
// the same time shares one write and one fdatasync.
//
// # On disk
//
// A directory with these files. Numbers are little endian, checksums CRC-32C.
//
//	<number, 16 hex digits>.segment   part of the log, numbered without a gap
//	<number, 16 hex digits>.spare     room for a later segment; its contents mean nothing
//	closed                            the mark of a clean close: where the log ended
//	lock
//
// A segment is a header and then batches, each in blocks of 4 KiB of its own, so that a write never touches
// a block with something older in it (nor has to read it first):
//
//	segment header  magic, version, number, salt, size, crc
//	batch           header: magic, body bytes, sequence, salt, records, crc of the body, crc of the header
//	                body: records; zeros up to the next block
//	record          size, crc, kind, entry type, flags, extension bytes, group, replica, and what the kind needs
//
// A batch is what one write and one fdatasync make durable, all of it or nothing; the next one is written only
// after that. Batches are numbered (sequence) without a gap through all segments, for ever. The salt is chosen
// at random when a file becomes a segment: batches that a file holds from a former life have another one, and
// lower numbers. The header of a segment is durable before the file gets a segment's name.
//
// The first record of each segment is a checkpoint: for every replica its bounds and stable keys, and the
// replicas that have been removed, as of all batches before. So the log can be read from any segment on, and
// the oldest one may go as soon as no entry in it is part of a replica's log any more: it loses its name (it is
// renamed to a spare), and only when that is durable is it written to.
//
// # What the records do
//
//	entry       appends at an index: the end of the log, or any of its places, and then all from there on goes
//	copied      an entry of the log again, word for word: it stood in the oldest segment, which is to go
//	first       removes what is before an index (all of it if that is behind the last entry)
//	last        removes what is behind an index
//	reset       removes all entries
//	key         sets a stable key; a vote is one key with term and candidate
//	create, remove   of a replica. The number of a removed one is never used again
//	checkpoint  as above
//	seal        a batch of its own, the last of a segment: the log goes on in the next one, which has its name
//	            already
//
// # Reading it again
//
// The log ends where no batch follows that is sound and has the segment's salt and the next sequence. What is
// there instead is the rest of a former life, or of a write that a crash interrupted: nobody has been told
// that it is durable, since the next batch would have been written after that only. So it is corruption,
// and nothing is opened, if
//
//   - a sound batch of the segment's life follows in it, or in a later segment;
//   - a segment with batches does not follow one that is sealed, or begins with any other sequence than the
//     one behind the seal (so a segment before it is known to be whole), or with a checkpoint that is not
//     what reading up to there gives;
//   - a segment is missing between others, or behind one that is sealed, or has no valid header, or is shorter
//     than its header says;
//   - the mark of a clean close is there and the log does not end where it says. The mark is removed, durably,
//     before the log takes the first write;
//   - a record does not fit what is before it, or an entry between a replica's first and last is missing.
//
// The last batch may be only in the operating system's memory, after a sync that failed. It is written again,
// the same bytes to the same place, and synced, before anything is said about it.
//
// What cannot be told from an interrupted write is damage to exactly the last batch after a crash.
//
// # When the disk is full
//
// The next segment is prepared when a quarter of the last one is full: its space is reserved, and written once. If
// there is no room, what fits into the last segment is still written. Then the write that needs the next one
// fails, before anything of it is on the disk, and like any other failed write it is the last (ErrFailed):
// raft may have removed the end of a log for it already, and would go on counting on what was there.
package wal

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
)

const (
	blockBytes = 4096
	version    = 1

	segmentMagic = 0x31676573_6c61772e // ".walseg1"
	batchMagic   = 0x6374_6162         // "batc"
	closedMagic  = 0x64736c63_6c61772e // ".walclsd"

	segmentHeaderBytes = 44
	batchHeaderBytes   = 40
	closedBytes        = 36

	segmentSuffix = ".segment"
	spareSuffix   = ".spare"
	closedName    = "closed"
	closedTemp    = "closed.tmp"
	lockName      = "lock"
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

func blocks(sizeBytes int64) int64 { return (sizeBytes + blockBytes - 1) / blockBytes * blockBytes }

func segmentName(number uint64) string { return fmt.Sprintf("%016x%s", number, segmentSuffix) }
func spareName(number uint64) string   { return fmt.Sprintf("%016x%s", number, spareSuffix) }

// parseName is the inverse of segmentName and spareName.
func parseName(name, suffix string) (number uint64, ok bool) {
	digits, ok := strings.CutSuffix(name, suffix)
	if !ok || len(digits) != 16 {
		return 0, false
	}
	number, err := strconv.ParseUint(digits, 16, 64)
	return number, err == nil && digits == strings.ToLower(digits)
}

// segmentHeader is what the first block of a segment says.
type segmentHeader struct {
	number, salt uint64
	sizeBytes    int64
}

// encode returns the whole block.
func (h segmentHeader) encode() []byte {
	b := make([]byte, blockBytes)
	le.PutUint64(b, segmentMagic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], blockBytes)
	le.PutUint64(b[16:], h.number)
	le.PutUint64(b[24:], h.salt)
	le.PutUint64(b[32:], uint64(h.sizeBytes))
	le.PutUint32(b[40:], checksum(b[:40]))
	return b
}

func decodeSegmentHeader(b []byte) (h segmentHeader, err error) {
	switch {
	case len(b) < segmentHeaderBytes:
		return h, fmt.Errorf("%d bytes are no header", len(b))
	case le.Uint64(b) != segmentMagic:
		return h, fmt.Errorf("not a segment of a log")
	case le.Uint32(b[40:]) != checksum(b[:40]):
		return h, fmt.Errorf("the header's checksum does not match")
	case le.Uint32(b[8:]) != version || le.Uint32(b[12:]) != blockBytes:
		return h, fmt.Errorf("%w: version %d with blocks of %d, not %d with %d", ErrVersion, le.Uint32(b[8:]), le.Uint32(b[12:]), version, blockBytes)
	}
	return segmentHeader{number: le.Uint64(b[16:]), salt: le.Uint64(b[24:]), sizeBytes: int64(le.Uint64(b[32:]))}, nil
}

// batchHeader is the beginning of a batch.
type batchHeader struct {
	bodyBytes, records uint32
	sequence, salt     uint64
	bodyChecksum       uint32
}

// encodeBatchHeader writes the header of the batch in b, whose body is there already.
func encodeBatchHeader(b []byte, sequence, salt uint64, records int) {
	le.PutUint32(b, batchMagic)
	le.PutUint32(b[4:], uint32(len(b)-batchHeaderBytes))
	le.PutUint64(b[8:], sequence)
	le.PutUint64(b[16:], salt)
	le.PutUint32(b[24:], uint32(records))
	le.PutUint32(b[28:], 0)
	le.PutUint32(b[32:], checksum(b[batchHeaderBytes:]))
	le.PutUint32(b[36:], checksum(b[:36]))
}

// decodeBatchHeader reports whether b begins with a sound header, of whatever life.
func decodeBatchHeader(b []byte) (h batchHeader, ok bool) {
	if len(b) < batchHeaderBytes || le.Uint32(b) != batchMagic || le.Uint32(b[36:]) != checksum(b[:36]) {
		return h, false
	}
	return batchHeader{
		bodyBytes: le.Uint32(b[4:]), sequence: le.Uint64(b[8:]), salt: le.Uint64(b[16:]),
		records: le.Uint32(b[24:]), bodyChecksum: le.Uint32(b[32:]),
	}, true
}

// place is where a batch ends: the segment's number, the offset there, and the batch's sequence.
type place struct {
	segment  uint64
	offset   int64
	sequence uint64
}

func (p place) encode() []byte {
	b := make([]byte, closedBytes)
	le.PutUint64(b, closedMagic)
	le.PutUint64(b[8:], p.segment)
	le.PutUint64(b[16:], uint64(p.offset))
	le.PutUint64(b[24:], p.sequence)
	le.PutUint32(b[32:], checksum(b[:32]))
	return b
}

func decodePlace(b []byte) (p place, ok bool) {
	if len(b) != closedBytes || le.Uint64(b) != closedMagic || le.Uint32(b[32:]) != checksum(b[:32]) {
		return p, false
	}
	return place{segment: le.Uint64(b[8:]), offset: int64(le.Uint64(b[16:])), sequence: le.Uint64(b[24:])}, true
}
