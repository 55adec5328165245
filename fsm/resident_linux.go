package fsm

import (
	"fmt"
	"syscall"

	"go.etcd.io/bbolt"
)

// unload takes the pages of the file out of the process's resident memory. They stay in the system's cache, from which
// reads map them again one by one.
func unload(db *bbolt.DB) error {
	var size int64
	if err := db.View(func(tx *bbolt.Tx) error { size = tx.Size(); return nil }); err != nil {
		return err
	}
	info := db.Info() // the mapping is at least as large as the file, and read-only
	if _, _, errno := syscall.Syscall(syscall.SYS_MADVISE, info.Data, uintptr(size), syscall.MADV_DONTNEED); errno != 0 {
		return fmt.Errorf("unload %d bytes: %w", size, errno)
	}
	return nil
}
