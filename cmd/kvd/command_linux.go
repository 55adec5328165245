package main

import "syscall"

// endWithParent has a command be told to end by SIGTERM when this process dies without having told it.
func endWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM} }
