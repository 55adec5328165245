package vfs

import (
	"errors"
	"os"
	"syscall"
)

// datasync is fsync without what nobody reads, such as the time of the last write: a write into blocks that
// the file already has then costs no journal.
func datasync(f *os.File) error { return onFile(f, "fdatasync", syscall.Fdatasync) }

// preallocate makes f longer, from its present size. Where the file system cannot reserve it is sparse.
func preallocate(f *os.File, now, size int64) error {
	err := onFile(f, "fallocate", func(fd int) error { return syscall.Fallocate(fd, 0, now, size-now) })
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		return f.Truncate(size)
	}
	return err
}

func onFile(f *os.File, name string, call func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = call(int(fd))
		for errors.Is(failed, syscall.EINTR) {
			failed = call(int(fd))
		}
	})
	if failed != nil {
		return &os.PathError{Op: name, Path: f.Name(), Err: failed}
	}
	return err
}
