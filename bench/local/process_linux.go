package local

import "syscall"

// childAttributes keep Ctrl-C away from a child, and end it with its parent.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
