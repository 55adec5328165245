package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/bbolt"

	"kvd/snapshot/boltcheck"
)

const (
	stagedPrefix = "snapshot-"
	stagedSuffix = ".tmp"

	// reserveBytes stay free after staging: the raft log shares the disk.
	reserveBytes = 16 << 20
	// syncEveryBytes spreads the write-back of a large file, so that fsyncs of the raft log never wait
	// behind all of it.
	syncEveryBytes = 32 << 20
)

// ErrNoSpace: the file system of the directory has no room for the snapshot.
var ErrNoSpace = errors.New("not enough disk space for the snapshot")

// Staged is a snapshot that has been received whole: a bbolt file that was verified and fsynced, under a
// temporary name. It must end in Commit or Discard; Cleanup removes what a crash left. Not for concurrent use.
type Staged struct {
	Path string // of the temporary file
	Meta Meta
	Size int64 // bytes of the bbolt file

	ops  fileOps
	gone bool // committed or discarded
}

// Stage receives a stream from r, which must end where the stream ends, into a temporary file in dir. When it
// returns without error, the file is durable (not yet its name), the stream was whole and undamaged, every
// reachable page of the bbolt file in it has been checked (package boltcheck) and bbolt opens it. What the
// file's buckets mean is not checked. On any error nothing is left
// behind, unless the process dies.
//
// Memory is bounded by a chunk, a few pages, and a bit per page of the file. The declared size is checked
// against the free disk space before anything is written. Errors are those of Verify, ErrNoSpace, or the file
// system's. ctx is looked at between chunks and pages; a blocked r.Read is for the caller to end.
func Stage(ctx context.Context, r io.Reader, dir string) (*Staged, error) {
	return stage(ctx, r, dir, osOps{})
}

func stage(ctx context.Context, r io.Reader, dir string, ops fileOps) (_ *Staged, err error) {
	s := newStreamReader(r)
	if err := s.header(); err != nil {
		return nil, err
	}
	if err := checkSpace(ops, dir, s.bodyBytes); err != nil {
		return nil, err
	}
	f, err := ops.create(dir)
	if err != nil {
		return nil, spaceError(fmt.Errorf("stage snapshot: %w", err))
	}
	staged := &Staged{Path: f.Name(), Meta: s.meta, Size: s.bodyBytes, ops: ops}
	if err := receive(ctx, s, f); err != nil {
		if derr := staged.Discard(); derr != nil {
			err = errors.Join(err, derr)
		}
		return nil, err
	}
	return staged, nil
}

// receive fills f from the rest of the stream, makes it durable, closes it, and checks what is in it.
func receive(ctx context.Context, s *streamReader, f file) error {
	err := s.body(ctx, &syncingWriter{f: f})
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return spaceError(err)
	}
	if err := boltcheck.File(ctx, f.Name()); errors.Is(err, boltcheck.ErrCorrupt) {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	} else if err != nil {
		return err
	}
	return openOnce(f.Name())
}

// spaceError makes an ErrNoSpace of a full disk's error.
func spaceError(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

func checkSpace(ops fileOps, dir string, needBytes int64) error {
	free, err := ops.freeBytes(dir)
	if err != nil {
		return fmt.Errorf("stage snapshot: free space of %s: %w", dir, err)
	}
	if need := uint64(needBytes) + reserveBytes; free < need {
		return fmt.Errorf("%w: %s has %d MiB free, %d MiB are needed", ErrNoSpace, dir, free>>20, need>>20)
	}
	return nil
}

// openOnce proves that bbolt itself takes the file, so that nothing is left to fail after the swap.
func openOnce(path string) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return fmt.Errorf("open the staged snapshot: %w", err)
	}
	return db.Close()
}

// Commit gives the file the name target, which must be in the same directory, replacing what was there, and
// makes that durable. A crash at any point leaves the old file or the new one under that name, both whole; so
// does an error. Whoever has the old file open keeps it.
func (s *Staged) Commit(target string) error {
	dir := filepath.Dir(target)
	if s.gone {
		return errors.New("commit snapshot: it has already been committed or discarded")
	}
	if filepath.Clean(filepath.Dir(s.Path)) != filepath.Clean(dir) {
		return fmt.Errorf("commit snapshot: %s is not in the directory of %s", target, s.Path)
	}
	if err := s.ops.rename(s.Path, target); err != nil {
		return fmt.Errorf("commit snapshot: %w", err)
	}
	s.gone = true
	if err := s.ops.syncDir(dir); err != nil {
		return fmt.Errorf("commit snapshot: %w", err)
	}
	return nil
}

// Discard removes the file. It does nothing after Commit or another Discard.
func (s *Staged) Discard() error {
	if s.gone {
		return nil
	}
	if err := s.ops.remove(s.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("discard snapshot: %w", err)
	}
	s.gone = true
	return nil
}

// Cleanup removes the temporary files that a crash left in dir. Call it at start, before anything is staged
// there. A directory that does not exist is clean.
func Cleanup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clean up snapshots: %w", err)
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, stagedPrefix) && strings.HasSuffix(name, stagedSuffix) && e.Type().IsRegular() {
			errs = append(errs, os.Remove(filepath.Join(dir, name)))
		}
	}
	return errors.Join(errs...)
}

// syncingWriter syncs its file now and then.
type syncingWriter struct {
	f       file
	pending int
}

func (w *syncingWriter) Write(b []byte) (int, error) {
	n, err := w.f.Write(b)
	if w.pending += n; err != nil || w.pending < syncEveryBytes {
		return n, err
	}
	w.pending = 0
	return n, w.f.Sync()
}

// fileOps is everything that staging does to the disk; a test can fail or lose each step.
type fileOps interface {
	freeBytes(dir string) (uint64, error)
	create(dir string) (file, error)
	rename(from, to string) error
	remove(path string) error
	syncDir(dir string) error
}

type file interface {
	io.WriteCloser
	Name() string
	Sync() error
}

type osOps struct{}

func (osOps) freeBytes(dir string) (uint64, error) { return freeBytes(dir) }
func (osOps) create(dir string) (file, error) {
	return os.CreateTemp(dir, stagedPrefix+"*"+stagedSuffix)
}
func (osOps) rename(from, to string) error { return os.Rename(from, to) }
func (osOps) remove(path string) error     { return os.Remove(path) }

func (osOps) syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
