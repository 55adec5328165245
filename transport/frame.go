package transport

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync/atomic"
)

// A frame on the wire, integers little endian:
//
//	0  uint32 length of what follows the checksum
//	4  uint32 CRC32C of what follows
//	8  uint8  kind
//	9  uint8  flags: first and last fragment of a message
//	10 uint64 id: pairs an answer with its request
//	18 payload; that of a first fragment which is not the last starts with the uint64 message length
//
// The layout of frames and of the hello is the same in every protocol version; all else is negotiated.
const (
	headerBytes   = 18
	prefixBytes   = 8        // length and checksum
	maxFrameBytes = 16 << 20 // receivers refuse longer frames
	// fragmentBytes is the payload that a sender puts in one frame. It bounds how long a small
	// message waits behind a large one, and what a receiver allocates on a length's mere word.
	fragmentBytes = 256 << 10
)

type kind uint8

const (
	kindHello kind = 1 + iota
	kindHelloReply
	kindPing
	kindPong
	kindRaftRequest
	kindRaftResponse
	kindCall
	kindCallReply
	kindCancel
	kindStreamData
	kindStreamEnd
)

const (
	flagFirst = 1 << iota
	flagLast
	flagWhole = flagFirst | flagLast
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// message is a whole message, reassembled if it was fragmented. The payload belongs to the receiver.
type message struct {
	kind    kind
	id      uint64
	payload []byte
}

// putHeader fills in the first headerBytes of frame, whose payload is in place.
func putHeader(frame []byte, k kind, flags uint8, id uint64) {
	frame[8], frame[9] = byte(k), flags
	binary.LittleEndian.PutUint64(frame[10:], id)
	binary.LittleEndian.PutUint32(frame[0:], uint32(len(frame)-prefixBytes))
	binary.LittleEndian.PutUint32(frame[4:], crc32.Checksum(frame[prefixBytes:], castagnoli))
}

// appendFrame appends one unfragmented frame.
func appendFrame(b []byte, k kind, id uint64, payload []byte) []byte {
	return appendFragment(b, k, flagWhole, id, 0, payload)
}

func appendFragment(b []byte, k kind, flags uint8, id uint64, total int, payload []byte) []byte {
	start := len(b)
	b = append(b, make([]byte, headerBytes)...)
	if flags == flagFirst {
		b = binary.LittleEndian.AppendUint64(b, uint64(total))
	}
	b = append(b, payload...)
	putHeader(b[start:], k, flags, id)
	return b
}

// frameReader reads messages of at most limit bytes. At most one fragmented message is under way at a
// time, unfragmented ones may come between its fragments. Memory grows only with the bytes received.
type frameReader struct {
	r      *bufio.Reader
	limit  int
	frames uint64 // read so far
	head   [headerBytes]byte

	partial *message // the fragmented message under way
	total   int      // its length
	budget  *budget  // for messages under way that are longer than a fragment; nil = unbounded
	held    int      // taken from it
}

// budget bounds what messages that have not arrived whole take in sum.
type budget struct {
	max  int64
	used atomic.Int64
}

var errPartialBytes = errors.New("too many bytes of unfinished messages from all peers")

func (r *frameReader) take(n int) error {
	if r.budget == nil || n == 0 {
		return nil
	}
	if used := r.budget.used.Add(int64(n)); used > r.budget.max {
		r.budget.used.Add(-int64(n))
		return fmt.Errorf("%w: %d would be over %d", errPartialBytes, used, r.budget.max)
	}
	r.held += n
	return nil
}

// give returns n bytes to the budget.
func (r *frameReader) give(n int) {
	if r.budget != nil && n > 0 {
		r.budget.used.Add(-int64(n))
		r.held -= n
	}
}

// drop forgets the message under way, and must be called in the end. Nothing can be read after it.
func (r *frameReader) drop() {
	r.partial = nil
	r.give(r.held)
}

// budgeted is how much of a buffer counts: small ones are bounded by the number of connections, and stay
// possible when the budget is used up.
func budgeted(size int) int {
	if size <= fragmentBytes+8 {
		return 0
	}
	return size
}

func newFrameReader(r io.Reader, limit int) *frameReader {
	return &frameReader{r: bufio.NewReaderSize(r, 64<<10), limit: limit}
}

// next returns the next whole message. io.EOF means the end of the stream between two frames; an error
// that is errMalformed means the stream is outside the protocol. After an error the reader is done.
func (r *frameReader) next() (message, error) {
	for {
		m, whole, err := r.frame()
		if err == nil && !whole {
			continue
		}
		switch {
		case err != nil:
		case r.partial == nil:
			r.give(r.held)
		default: // m came between two fragments
			r.give(budgeted(cap(m.payload)))
		}
		return m, err
	}
}

// frame reads one frame; whole is false while it only adds to a fragmented message.
func (r *frameReader) frame() (m message, whole bool, err error) {
	if _, err := io.ReadFull(r.r, r.head[:1]); err != nil {
		return m, false, err
	}
	if err := r.full(r.head[1:]); err != nil {
		return m, false, err
	}
	length := int64(binary.LittleEndian.Uint32(r.head[0:]))
	if length < headerBytes-prefixBytes || length > maxFrameBytes {
		return m, false, fmt.Errorf("%w: length %d", errMalformed, length)
	}
	n := int(length) - (headerBytes - prefixBytes)
	m = message{kind: kind(r.head[8]), id: binary.LittleEndian.Uint64(r.head[10:])}
	switch flags := r.head[9]; flags {
	case flagWhole:
		if n > r.limit {
			return m, false, fmt.Errorf("%w: message of %d bytes, the limit is %d", errMalformed, n, r.limit)
		}
		m.payload, err = r.body(nil, n, n)
		whole = true
	case flagFirst:
		err = r.first(m, n)
	case 0, flagLast:
		m, whole, err = r.more(m, n, flags == flagLast)
	default:
		err = fmt.Errorf("%w: flags %#x", errMalformed, flags)
	}
	if err == nil {
		r.frames++
	}
	return m, whole, err
}

func (r *frameReader) first(m message, n int) error {
	if r.partial != nil {
		return fmt.Errorf("%w: a second fragmented message begins", errMalformed)
	}
	if n <= 8 || n-8 > r.limit {
		return fmt.Errorf("%w: first fragment of %d bytes", errMalformed, n)
	}
	b, err := r.body(nil, n, n)
	if err != nil {
		return err
	}
	total := binary.LittleEndian.Uint64(b)
	if total > uint64(r.limit) || total <= uint64(n-8) {
		return fmt.Errorf("%w: fragmented message of %d bytes, the limit is %d", errMalformed, total, r.limit)
	}
	m.payload = b[8:]
	r.partial, r.total = &m, int(total)
	return nil
}

func (r *frameReader) more(m message, n int, last bool) (message, bool, error) {
	p := r.partial
	if p == nil || p.kind != m.kind || p.id != m.id {
		return m, false, fmt.Errorf("%w: fragment of no message", errMalformed)
	}
	end := len(p.payload) + n
	if n == 0 || end > r.total || last != (end == r.total) {
		return m, false, fmt.Errorf("%w: fragments of %d bytes for a message of %d", errMalformed, end, r.total)
	}
	var err error
	if p.payload, err = r.body(p.payload, n, r.total); err != nil || !last {
		return m, false, err
	}
	r.partial = nil
	return *p, true, nil
}

// body appends the n payload bytes of the current frame to dst, which will hold total bytes in the end,
// and checks the frame's checksum. It allocates at most fragmentBytes or four times what has arrived.
func (r *frameReader) body(dst []byte, n, total int) ([]byte, error) {
	crc := crc32.Checksum(r.head[prefixBytes:], castagnoli)
	for n > 0 {
		step := min(n, fragmentBytes+8)
		have := len(dst)
		if cap(dst)-have < step {
			size := max(have+step, min(4*have, total))
			if err := r.take(budgeted(size) - budgeted(cap(dst))); err != nil {
				return nil, err
			}
			bigger := make([]byte, have, size)
			copy(bigger, dst)
			dst = bigger
		}
		dst = dst[:have+step]
		if err := r.full(dst[have:]); err != nil {
			return nil, err
		}
		crc = crc32.Update(crc, castagnoli, dst[have:])
		n -= step
	}
	if crc != binary.LittleEndian.Uint32(r.head[4:]) {
		return nil, fmt.Errorf("%w: checksum", errMalformed)
	}
	return dst, nil
}

// full reads all of b; the stream must not end within a frame.
func (r *frameReader) full(b []byte) error {
	_, err := io.ReadFull(r.r, b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}
