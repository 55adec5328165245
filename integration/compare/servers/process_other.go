//go:build !linux

package servers

import (
	"errors"
	"syscall"
	"time"
)

func dieWithParent() *syscall.SysProcAttr { return nil }

// CPU is known on Linux only.
func (c *Cluster) CPU() (time.Duration, error) { return 0, errors.ErrUnsupported }
