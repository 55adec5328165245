//go:build !linux

package vfs

import "os"

func datasync(f *os.File) error { return f.Sync() }

// preallocate makes f longer, but reserves nothing.
func preallocate(f *os.File, _, size int64) error { return f.Truncate(size) }
