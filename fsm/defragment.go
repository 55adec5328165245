package fsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"
)

// defragment is a request to the flusher.
type defragment struct {
	ctx  context.Context
	done chan error
}

// defragmentSuffix names the new file while it is being written. A crash leaves it behind; it is never read.
const defragmentSuffix = ".defragment.tmp"

// Defragment rewrites the file without its free pages. Reads and writes go on; what is applied meanwhile waits in
// memory, so that apply stalls if it goes beyond MaxLagBytes. On an error the old file stays in use. Close ends it.
func (s *Store) Defragment(ctx context.Context) error {
	d := &defragment{ctx: ctx, done: make(chan error, 1)}
	select {
	case s.defragments <- d:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stop.Done():
		return ErrClosed
	case <-s.failed:
		return s.failure
	}
	return <-d.done
}

func (s *Store) defragment(ctx context.Context) (err error) {
	defer catchCorruption(&err)()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.stop, func() { cancel(ErrClosed) })()
	s.pathMu.Lock()
	target := s.path
	s.pathMu.Unlock()
	old, path := s.file.Load(), target+defragmentSuffix
	if at, err := os.Stat(target); err != nil {
		return err
	} else if !os.SameFile(at, old.identity) {
		return fmt.Errorf("defragment: %s is not this store's file any more", target)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := openFile(s.config, path)
	if err != nil {
		return err
	}
	if hook := s.config.faults.copying; hook != nil {
		hook()
	}
	err = copyDB(ctx, f.db, old.db)
	if err == nil {
		err = f.db.Sync()
	}
	if err == nil {
		err = s.rename(path, target)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("defragment: %w", err), f.db.Close(), os.Remove(path))
	}
	s.file.Store(f)
	// Closing waits for reads that still use the old file; Close of the store waits for this.
	s.background.Go(func() {
		if err := old.db.Close(); err != nil {
			s.config.Logger.Warn("cannot close the file from before defragmentation", "error", err)
		}
	})
	if err := s.syncName(target); err != nil { // a crash may bring the old file back: nothing may be written to this one
		s.failFlush(err)
		return err
	}
	return nil
}

func (s *Store) syncName(path string) error {
	if f := s.config.faults.nameNotSynced; f != nil {
		return f()
	}
	return syncDir(filepath.Dir(path))
}

// rename gives the new file the name target, unless that is not this store's
// any more.
func (s *Store) rename(path, target string) error {
	s.pathMu.Lock()
	defer s.pathMu.Unlock()
	if s.path != target {
		return fmt.Errorf("%s is not this store's file any more", target)
	}
	return os.Rename(path, target)
}

// copyDB copies all buckets, in transactions of a bounded size, in the order in which rows append.
func copyDB(ctx context.Context, to, from *bbolt.DB) error {
	source, err := from.Begin(false)
	if err != nil {
		return err
	}
	defer rollback(source)
	for _, name := range [][]byte{metaBucket, spaceBuckets[User], spaceBuckets[System], leaseBucket, dropBucket} {
		bucket := source.Bucket(name)
		if bucket == nil { // of leases
			continue
		}
		cursor := bucket.Cursor()
		for k, v := cursor.First(); ; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			err := to.Update(func(tx *bbolt.Tx) error {
				bucket, err := tx.CreateBucketIfNotExists(name)
				if err != nil {
					return err
				}
				bucket.FillPercent = 0.9
				for size := 0; k != nil && size < 4<<20; k, v = cursor.Next() {
					if err := bucket.Put(k, v); err != nil {
						return err
					}
					size += len(k) + len(v)
				}
				return nil
			})
			if err != nil {
				return err
			}
			if k == nil {
				break
			}
		}
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
