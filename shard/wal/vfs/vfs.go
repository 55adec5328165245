// Package vfs is the part of a file system that a log needs: the operating system's, and one in memory that
// knows what a power cut leaves.
package vfs

import (
	"errors"
	"io"
)

// ErrLocked: another holder has the lock.
var ErrLocked = errors.New("file is locked")

// FS is a file system. Names are paths with the operating system's separators. All methods may be called
// concurrently. A file that does not exist is fs.ErrNotExist.
//
// Names and contents are durable separately: Sync of a file does not keep its name, and SyncDir does not keep
// what is in the files.
type FS interface {
	// MkdirAll makes a directory and its parents, where they do not exist. None of them is durable before
	// SyncDir of its parent.
	MkdirAll(dir string) error

	// Open opens a file for reading and writing. If it does not exist it is made, if create says so; its
	// name is durable after SyncDir.
	Open(name string, create bool) (File, error)

	// List returns the names in a directory, without its path, in order.
	List(dir string) ([]string, error)

	// Rename gives a file another name in the same directory, and takes that from the file that had it.
	// After a crash before SyncDir either both names are as before or both as after.
	Rename(from, to string) error

	// Remove removes a file, for good after SyncDir. Those who have it open keep its contents.
	Remove(name string) error

	// SyncDir makes the names in a directory durable, and what has been removed stays removed.
	SyncDir(dir string) error

	// Lock makes the file if it does not exist and holds it until the result is closed or the process ends.
	// ErrLocked if it is held already, be it by this process.
	Lock(name string) (io.Closer, error)

	// Free returns how many bytes the file system of a directory has left.
	Free(dir string) (uint64, error)
}

// File is an open file. All methods may be called concurrently. Nothing is durable before Sync returns nil:
// until then a power cut leaves any of it, in units of sectors. After a Sync that failed, what had been
// written since the last one may be lost although it can be read, and although a later Sync succeeds.
type File interface {
	io.ReaderAt
	io.WriterAt

	// Sync makes the contents and the size durable.
	Sync() error

	Size() (int64, error)

	// Truncate sets the size. What it adds reads as zeros.
	Truncate(size int64) error

	// Preallocate makes the file at least so long, and reserves the space for it where the file system can.
	// What it adds reads as zeros.
	Preallocate(size int64) error

	io.Closer
}
