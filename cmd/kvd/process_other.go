//go:build !linux

package main

import "syscall"

// childAttributes keep Ctrl-C away from a child.
func childAttributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
