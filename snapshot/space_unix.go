//go:build linux || darwin

package snapshot

import "syscall"

// freeBytes returns what an unprivileged process may still write to dir's file system.
func freeBytes(dir string) (uint64, error) {
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return 0, err
	}
	return s.Bavail * uint64(s.Bsize), nil
}
