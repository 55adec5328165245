//go:build unix

package bench

import (
	"syscall"
	"time"
)

// processCPU is the processor time that this process has used; 0 if it can't be known.
func processCPU() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
