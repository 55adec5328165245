package cluster

import "syscall"

// childAttributes makes the kernel kill a child whose parent has died without cleaning up, as a test does
// that runs into its time limit.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
