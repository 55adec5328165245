//go:build !linux

package local

import "syscall"

// childAttributes keep Ctrl-C away from a child.
func childAttributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
