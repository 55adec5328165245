package wal

import (
	"errors"
	"fmt"
	"io"

	"kvd/shard/wal/vfs"
)

// windowBytes is read at once of a file that is read from one end to the other.
const windowBytes = 1 << 20

// window is the part of a file that has been read last.
type window struct {
	file      vfs.File
	sizeBytes int64 // of the file
	ahead     int64 // what is read at once; 0: no more than what is asked for, into memory of its own

	buffer []byte
	from   int64
}

// read returns a part of the file, until the next call. Behind the file's end is io.ErrUnexpectedEOF.
func (w *window) read(offset, length int64) ([]byte, error) {
	if at := offset - w.from; at >= 0 && at+length <= int64(len(w.buffer)) {
		return w.buffer[at : at+length], nil
	}
	if offset < 0 || length < 0 || offset+length > w.sizeBytes {
		return nil, io.ErrUnexpectedEOF
	}
	want := length
	if w.ahead > 0 {
		want = min(max(length, w.ahead), w.sizeBytes-offset)
	}
	if int64(cap(w.buffer)) < want || w.ahead == 0 {
		w.buffer = make([]byte, want)
	}
	w.buffer, w.from = w.buffer[:want], offset
	if n, err := w.file.ReadAt(w.buffer, offset); n < len(w.buffer) {
		w.buffer = w.buffer[:0]
		if err == nil || errors.Is(err, io.EOF) {
			return nil, io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read %d bytes at %d: %w", want, offset, err)
	}
	return w.buffer[:length], nil
}
