package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"go.etcd.io/bbolt"
)

// The stream, version 1. All integers are big endian; CRC is CRC32C.
//
//	header   magic [8], version u32, metadata length u32, body bytes u64, metadata, CRC u32 of all these
//	chunk    sequence u64 (from 0), length u32, CRC u32 of both and of the data, data
//	         ... every chunk has chunkBytes of data but the last, which has the rest
//	trailer  magic [8], chunks u64, body bytes u64, SHA-256 of everything before it
//	padding  zeros up to a multiple of 512 bytes
//
// The body is a bbolt file: the pages that one read transaction sees. The same transaction and metadata
// always give the same bytes, and a reader accepts no others. The total is a multiple of 512 because an etcd
// client tells by the size whether what it saved ends with a digest (see OpenFile).
const (
	streamVersion = 1
	chunkBytes    = 256 << 10
	padTo         = 512

	headerFixedBytes = 8 + 4 + 4 + 8
	crcBytes         = 4
	chunkHeadBytes   = 8 + 4 + crcBytes
	trailerBytes     = 8 + 8 + 8 + sha256.Size

	// maxBodyBytes keeps sums of sizes far from overflow; no file system holds such a file.
	maxBodyBytes = 1 << 56
)

var (
	headerMagic  = [8]byte{'k', 'v', 'd', '-', 's', 'n', 'a', 'p'}
	trailerMagic = [8]byte{'k', 'v', 'd', '-', 'e', 'n', 'd', '.'}

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// What can be wrong with a stream. Every error of this package that comes from the content of a stream
// matches exactly one of these with errors.Is.
var (
	// ErrForeign: the stream does not begin like a kvd snapshot.
	ErrForeign = errors.New("not a kvd snapshot")

	// ErrVersion: it is a kvd snapshot of a version that this program does not know.
	ErrVersion = errors.New("unknown snapshot version")

	// ErrTruncated: the stream ends before the snapshot does.
	ErrTruncated = errors.New("snapshot is truncated")

	// ErrCorrupt: a checksum, the order, a total or the content is wrong, or data follows the end.
	ErrCorrupt = errors.New("snapshot is corrupt")
)

// StreamSize returns how many bytes WriteStream will write for the same transaction and metadata. It is
// always a multiple of 512, and 0 for metadata that WriteStream refuses.
func StreamSize(tx *bbolt.Tx, meta Meta) int64 {
	m, err := encodeMeta(meta)
	if err != nil {
		return 0
	}
	return streamSize(int64(len(m)), tx.Size())
}

func streamSize(metaBytes, bodyBytes int64) int64 {
	n := headerFixedBytes + metaBytes + crcBytes + chunkCount(bodyBytes)*chunkHeadBytes + bodyBytes + trailerBytes
	return n + paddingBytes(n)
}

func chunkCount(bodyBytes int64) int64 { return (bodyBytes + chunkBytes - 1) / chunkBytes }
func paddingBytes(n int64) int64       { return (padTo - n%padTo) % padTo }

// WriteStream writes the file that tx sees, described by meta, to w, and returns how many bytes it wrote.
// tx must be a read transaction, and meta must have been read inside it. It holds no locks and one chunk of
// memory. It stops with ctx's error between two writes once ctx is done; a blocked w.Write is for the caller
// to end (close the connection).
//
// An open read transaction keeps bbolt from reusing pages, so the file grows while a slow w is written to.
func WriteStream(ctx context.Context, w io.Writer, tx *bbolt.Tx, meta Meta) (n int64, err error) {
	m, err := encodeMeta(meta)
	if err != nil {
		return 0, err
	}
	body := tx.Size()
	s := &streamWriter{ctx: ctx, w: w, sum: sha256.New(), buf: make([]byte, chunkHeadBytes, chunkHeadBytes+chunkBytes)}
	if err := s.write(appendHeader(nil, m, body)); err != nil {
		return s.n, err
	}
	copied, err := tx.WriteTo(s)
	if err == nil && copied != body {
		err = fmt.Errorf("snapshot: copied %d bytes of a file of %d", copied, body)
	}
	if err == nil {
		err = s.finish(body)
	}
	return s.n, err
}

func appendHeader(b, meta []byte, bodyBytes int64) []byte {
	start := len(b)
	b = append(b, headerMagic[:]...)
	b = binary.BigEndian.AppendUint32(b, streamVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(len(meta)))
	b = binary.BigEndian.AppendUint64(b, uint64(bodyBytes))
	b = append(b, meta...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// chunkCRC covers the head before the CRC field and the data.
func chunkCRC(head, data []byte) uint32 {
	return crc32.Update(crc32.Checksum(head[:chunkHeadBytes-crcBytes], castagnoli), castagnoli, data)
}

// streamWriter cuts what is written to it into chunks.
type streamWriter struct {
	ctx context.Context // of one WriteStream call, which this lives no longer than
	w   io.Writer
	sum hash.Hash
	buf []byte // the chunk being filled, with room for its head
	seq uint64
	n   int64
}

func (s *streamWriter) write(b []byte) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	s.sum.Write(b)
	n, err := s.w.Write(b)
	s.n += int64(n)
	return err
}

func (s *streamWriter) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		n := copy(s.buf[len(s.buf):cap(s.buf)], b)
		s.buf, b = s.buf[:len(s.buf)+n], b[n:]
		if err := s.flushFull(); err != nil {
			return total - len(b), err
		}
	}
	return total, nil
}

// ReadFrom spares io.Copy, through which bbolt copies its pages, a buffer of its own.
func (s *streamWriter) ReadFrom(r io.Reader) (n int64, err error) {
	for {
		k, err := r.Read(s.buf[len(s.buf):cap(s.buf)])
		s.buf, n = s.buf[:len(s.buf)+k], n+int64(k)
		if ferr := s.flushFull(); ferr != nil {
			return n, ferr
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

func (s *streamWriter) flushFull() error {
	if len(s.buf) < cap(s.buf) {
		return nil
	}
	return s.flush()
}

func (s *streamWriter) flush() error {
	if len(s.buf) == chunkHeadBytes {
		return nil
	}
	binary.BigEndian.PutUint64(s.buf, s.seq)
	binary.BigEndian.PutUint32(s.buf[8:], uint32(len(s.buf)-chunkHeadBytes))
	binary.BigEndian.PutUint32(s.buf[12:], chunkCRC(s.buf, s.buf[chunkHeadBytes:]))
	err := s.write(s.buf)
	s.buf = s.buf[:chunkHeadBytes]
	s.seq++
	return err
}

func (s *streamWriter) finish(body int64) error {
	if err := s.flush(); err != nil {
		return err
	}
	b := append(make([]byte, 0, trailerBytes+padTo), trailerMagic[:]...)
	b = binary.BigEndian.AppendUint64(b, s.seq)
	b = binary.BigEndian.AppendUint64(b, uint64(body))
	s.sum.Write(b)
	b = s.sum.Sum(b)
	b = append(b, make([]byte, paddingBytes(s.n+int64(len(b))))...)
	return s.write(b)
}
