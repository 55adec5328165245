package snapshot

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
)

// Verify reads r to its end and says what it is, if it is exactly one whole, undamaged stream. The pages
// inside are covered by checksums but not looked at: Stage does that. It uses one chunk of memory whatever r
// claims. Errors are those of ErrForeign, ErrVersion, ErrTruncated and ErrCorrupt, of ctx, or of r itself.
// ctx is looked at between chunks; a blocked r.Read is for the caller to end.
func Verify(ctx context.Context, r io.Reader) (Meta, error) {
	s := newStreamReader(r)
	if err := s.header(); err != nil {
		return Meta{}, err
	}
	if err := s.body(ctx, io.Discard); err != nil {
		return Meta{}, err
	}
	return s.meta, nil
}

// streamReader takes a stream apart. Everything it accepts is exactly what WriteStream would have written.
type streamReader struct {
	r         *bufio.Reader
	sum       hash.Hash
	n         int64 // bytes read
	meta      Meta
	bodyBytes int64
}

func newStreamReader(r io.Reader) *streamReader {
	return &streamReader{r: bufio.NewReaderSize(r, 32<<10), sum: sha256.New()}
}

// read fills b from the stream. The end of r is ErrTruncated, any other error r's own.
func (s *streamReader) read(b []byte, what string) error {
	n, err := io.ReadFull(s.r, b)
	s.n += int64(n)
	s.sum.Write(b[:n])
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: ends at byte %d, inside the %s", ErrTruncated, s.n, what)
	}
	if err != nil {
		return fmt.Errorf("read the snapshot's %s: %w", what, err)
	}
	return nil
}

func (s *streamReader) header() error {
	b := make([]byte, headerFixedBytes, headerFixedBytes+256)
	if err := s.read(b, "header"); err != nil {
		return err
	}
	if [8]byte(b) != headerMagic {
		return ErrForeign
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != streamVersion {
		return fmt.Errorf("%w: %d, this program knows %d", ErrVersion, v, streamVersion)
	}
	metaBytes, bodyBytes := binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint64(b[16:])
	if metaBytes > maxMetaBytes {
		return fmt.Errorf("%w: metadata of %d bytes", ErrCorrupt, metaBytes)
	}
	b = append(b, make([]byte, metaBytes+crcBytes)...)
	if err := s.read(b[headerFixedBytes:], "header"); err != nil {
		return err
	}
	covered := b[:len(b)-crcBytes]
	if crc32.Checksum(covered, castagnoli) != binary.BigEndian.Uint32(b[len(covered):]) {
		return fmt.Errorf("%w: wrong checksum of the header", ErrCorrupt)
	}
	if bodyBytes == 0 || bodyBytes > maxBodyBytes {
		return fmt.Errorf("%w: a body of %d bytes", ErrCorrupt, bodyBytes)
	}
	meta, err := decodeMeta(covered[headerFixedBytes:])
	if err != nil {
		return err
	}
	s.meta, s.bodyBytes = meta, int64(bodyBytes)
	return nil
}

// body copies the content of all chunks to w, then checks the trailer, the padding and that r ends there.
func (s *streamReader) body(ctx context.Context, w io.Writer) error {
	buf := make([]byte, chunkHeadBytes+min(chunkBytes, s.bodyBytes))
	chunks := chunkCount(s.bodyBytes)
	for seq, rest := int64(0), s.bodyBytes; seq < chunks; seq++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := s.chunk(buf, uint64(seq), min(chunkBytes, rest))
		if err != nil {
			return err
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
		rest -= int64(len(data))
	}
	return s.end(chunks)
}

func (s *streamReader) chunk(buf []byte, seq uint64, length int64) ([]byte, error) {
	head, data := buf[:chunkHeadBytes], buf[chunkHeadBytes:chunkHeadBytes+length]
	if err := s.read(head, "chunk"); err != nil {
		return nil, err
	}
	if n := binary.BigEndian.Uint64(head); n != seq {
		return nil, fmt.Errorf("%w: chunk %d where chunk %d belongs", ErrCorrupt, n, seq)
	}
	if n := binary.BigEndian.Uint32(head[8:]); int64(n) != length {
		return nil, fmt.Errorf("%w: chunk %d has %d bytes instead of %d", ErrCorrupt, seq, n, length)
	}
	if err := s.read(data, "chunk"); err != nil {
		return nil, err
	}
	if chunkCRC(head, data) != binary.BigEndian.Uint32(head[12:]) {
		return nil, fmt.Errorf("%w: wrong checksum of chunk %d", ErrCorrupt, seq)
	}
	return data, nil
}

func (s *streamReader) end(chunks int64) error {
	b := make([]byte, trailerBytes, trailerBytes+padTo)
	totals, digest := b[:trailerBytes-sha256.Size], b[trailerBytes-sha256.Size:]
	if err := s.read(totals, "trailer"); err != nil {
		return err
	}
	want := s.sum.Sum(nil)
	if err := s.read(digest, "trailer"); err != nil {
		return err
	}
	if [8]byte(totals) != trailerMagic ||
		binary.BigEndian.Uint64(totals[8:]) != uint64(chunks) ||
		binary.BigEndian.Uint64(totals[16:]) != uint64(s.bodyBytes) {
		return fmt.Errorf("%w: wrong totals in the trailer", ErrCorrupt)
	}
	if !bytes.Equal(want, digest) {
		return fmt.Errorf("%w: wrong digest of the whole", ErrCorrupt)
	}
	padding := b[trailerBytes : trailerBytes+paddingBytes(s.n)]
	if err := s.read(padding, "padding"); err != nil {
		return err
	}
	for _, c := range padding {
		if c != 0 {
			return fmt.Errorf("%w: padding is not zero", ErrCorrupt)
		}
	}
	return s.expectEOF()
}

func (s *streamReader) expectEOF() error {
	_, err := s.r.ReadByte()
	if err == nil {
		return fmt.Errorf("%w: data after its end", ErrCorrupt)
	}
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the snapshot's end: %w", err)
	}
	return nil
}
