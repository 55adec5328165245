//go:build !linux

package main

import "syscall"

// endWithParent would have a command be told to end when this process dies; here nobody tells it.
func endWithParent() *syscall.SysProcAttr { return nil }
