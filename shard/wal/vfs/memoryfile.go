package vfs

import (
	"errors"
	"io"
	"io/fs"
	"syscall"
)

type memoryFile struct {
	m      *Memory
	n      *node
	closed bool // under m.mu
}

func (f *memoryFile) name() string {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.n.path
}

// check is called with the lock held.
func (f *memoryFile) check(op Kind, valid bool) error {
	switch {
	case f.closed:
		return pathError(op, f.n.path, fs.ErrClosed)
	case !valid:
		return pathError(op, f.n.path, syscall.EINVAL)
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (f *memoryFile) ReadAt(b []byte, off int64) (int, error) {
	err := f.m.begin(Op{Kind: OpRead, Name: f.name(), Offset: off, Bytes: int64(len(b))})
	defer f.m.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if err := f.check(OpRead, off >= 0); err != nil {
		return 0, err
	}
	n := int(min(int64(len(b)), max(0, f.n.contents.size-off)))
	f.n.contents.read(off, b[:n])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements io.WriterAt.
func (f *memoryFile) WriteAt(b []byte, off int64) (int, error) {
	injected := f.m.begin(Op{Kind: OpWrite, Name: f.name(), Offset: off, Bytes: int64(len(b))})
	defer f.m.mu.Unlock()
	if err := f.check(OpWrite, off >= 0); err != nil {
		return 0, err
	}
	if injected != nil {
		return f.writeFaulty(b, off, injected)
	}
	if err := f.m.room(off + int64(len(b)) - f.n.contents.size); err != nil {
		return 0, pathError(OpWrite, f.n.path, err)
	}
	f.n.contents.write(off, b)
	return len(b), nil
}

func (f *memoryFile) writeFaulty(b []byte, off int64, err error) (int, error) {
	var fault *Fault
	if !errors.As(err, &fault) {
		return 0, err
	}
	n := min(fault.Bytes, len(b))
	f.n.contents.write(off, b[:n])
	if fault.Flip > 0 && fault.Flip/8 < f.n.contents.size {
		f.n.contents.flip(fault.Flip)
	}
	if fault.Err == nil {
		return len(b), nil
	}
	return n, fault.Err
}

// Sync implements File.
func (f *memoryFile) Sync() error {
	injected := f.m.begin(Op{Kind: OpSync, Name: f.name()})
	defer f.m.mu.Unlock()
	if err := f.check(OpSync, true); err != nil {
		return err
	}
	switch {
	case injected == nil:
		f.n.contents.sync()
	case succeed(injected) != nil:
		f.n.contents.lose()
	}
	return succeed(injected)
}

// Size implements File.
func (f *memoryFile) Size() (int64, error) {
	err := f.m.begin(Op{Kind: OpSize, Name: f.name()})
	defer f.m.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return f.n.contents.size, f.check(OpSize, true)
}

// Truncate implements File.
func (f *memoryFile) Truncate(size int64) error {
	return f.resize(OpTruncate, size, func() { f.n.contents.truncate(size) })
}

// Preallocate implements File.
func (f *memoryFile) Preallocate(size int64) error {
	return f.resize(OpPreallocate, size, func() { f.n.contents.resize(max(size, f.n.contents.size)) })
}

func (f *memoryFile) resize(op Kind, size int64, change func()) error {
	err := f.m.begin(Op{Kind: op, Name: f.name(), Bytes: size})
	defer f.m.mu.Unlock()
	if err != nil {
		return succeed(err)
	}
	if err := f.check(op, size >= 0); err != nil {
		return err
	}
	if err := f.m.room(size - f.n.contents.size); err != nil {
		return pathError(op, f.n.path, err)
	}
	change()
	return nil
}

// Close implements io.Closer. It syncs nothing.
func (f *memoryFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return pathError("close", f.n.path, fs.ErrClosed)
	}
	f.closed = true
	return nil
}
