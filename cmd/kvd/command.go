package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// lostGrace is how long a command that has lost what it was run for may take to end after SIGTERM.
const lostGrace = 5 * time.Second

// maxEnvironmentBytes is below what Linux allows for one variable.
const maxEnvironmentBytes = 64 << 10

// commandError says that a command that was run for the user failed. It has had its say; its exit code becomes kvd's.
type commandError struct{ code int }

func (e *commandError) Error() string {
	return fmt.Sprintf("the command ended with exit code %d", e.code)
}

// newCommand prepares a command that is run for another one, with its output and with more environment.
func newCommand(cmd *cobra.Command, argv, env []string) *exec.Cmd {
	run := exec.Command(argv[0], argv[1:]...)
	run.Env = append(os.Environ(), env...)
	run.Stdout, run.Stderr = cmd.OutOrStdout(), cmd.ErrOrStderr()
	return run
}

// runCommand runs a command to its end. SIGTERM tells it when ctx ends; and when lost is closed, which it may outlive
// by lostGrace only. Its failure is a commandError.
func runCommand(ctx context.Context, run *exec.Cmd, lost <-chan struct{}) error {
	if err := run.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- run.Wait() }()
	interrupted, kill := ctx.Done(), (<-chan time.Time)(nil)
	for {
		select {
		case err := <-ended:
			if run.ProcessState.Success() {
				return err
			}
			return &commandError{exitCodeOf(run.ProcessState)}
		case <-interrupted:
			interrupted = nil
			_ = run.Process.Signal(syscall.SIGTERM) // it may just have ended
		case <-lost:
			lost, kill = nil, time.After(lostGrace)
			_ = run.Process.Signal(syscall.SIGTERM)
		case <-kill:
			_ = run.Process.Kill()
		}
	}
}

// exitCodeOf is what a shell says of a process.
func exitCodeOf(state *os.ProcessState) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}
