//go:build !linux

package servers

import (
	"errors"
	"io/fs"
	"syscall"
	"time"
)

func dieWithParent() *syscall.SysProcAttr { return nil }

func allocated(info fs.FileInfo) int64 { return info.Size() }

// CPU is known on Linux only.
func (c *Cluster) CPU() (time.Duration, error) { return 0, errors.ErrUnsupported }

// OwnCPU is known on Linux only.
func OwnCPU() (time.Duration, error) { return 0, errors.ErrUnsupported }

// MachineCPU is known on Linux only.
func MachineCPU() (time.Duration, error) { return 0, errors.ErrUnsupported }

// Memory is known on Linux only.
func (c *Cluster) Memory() (Memory, error) { return Memory{}, errors.ErrUnsupported }
