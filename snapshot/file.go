package snapshot

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
)

// OpenFile opens a stream that was saved in a file, for Verify or Stage. The file may be one that an etcd
// client saved: such a client appends the SHA-256 of what it received, which shows by the size (a multiple of
// 512, and 32). The digest is checked when the end of the stream is read (ErrCorrupt), and is not part of it.
func OpenFile(path string) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: %w: not a regular file", path, ErrForeign)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	if info.Size()%padTo != sha256.Size {
		return f, nil
	}
	size := info.Size() - sha256.Size
	return &digestedFile{f: f, size: size, body: io.LimitReader(f, size), sum: sha256.New()}, nil
}

// digestedFile reads all of f but the digest of it that follows.
type digestedFile struct {
	f    *os.File
	size int64 // without the digest
	body io.Reader
	sum  hash.Hash
}

func (d *digestedFile) Read(b []byte) (int, error) {
	n, err := d.body.Read(b)
	d.sum.Write(b[:n])
	if !errors.Is(err, io.EOF) {
		return n, err
	}
	digest := make([]byte, sha256.Size)
	if _, err := d.f.ReadAt(digest, d.size); err != nil {
		return n, fmt.Errorf("%w: the digest at its end: %w", ErrTruncated, err)
	}
	if !bytes.Equal(digest, d.sum.Sum(nil)) {
		return n, fmt.Errorf("%w: the digest at its end does not match", ErrCorrupt)
	}
	return n, err
}

func (d *digestedFile) Close() error { return d.f.Close() }
