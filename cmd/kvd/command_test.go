package main

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

func TestExitCodesOfCommands(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -KILL $$": 137} {
		err := runCommand(t.Context(), exec.Command("sh", "-c", script), nil)
		var failed *commandError
		if errors.As(err, &failed) != (want != 0) || failed != nil && failed.code != want {
			t.Errorf("%s: %v, want exit code %d", script, err, want)
		}
	}
	if err := runCommand(t.Context(), exec.Command("/nonexistent/command"), nil); err == nil || errors.As(err, new(*commandError)) {
		t.Errorf("a command that does not exist: %v", err)
	}
}

// signalled calls stop when its command has said that it is ready.
type signalled struct {
	out  bytes.Buffer
	stop func()
}

func (s *signalled) Write(b []byte) (int, error) {
	if strings.Contains(string(b), "ready") {
		s.stop()
	}
	return s.out.Write(b)
}

// A command may finish what it does, if it has not lost what it was run for.
func TestCommandsAreToldToEnd(t *testing.T) {
	const script = `trap 'echo cleaned up; exit 4' TERM; echo ready; while :; do sleep 0.01; done`
	run := func(ctx context.Context, stop func(), lost <-chan struct{}) {
		t.Helper()
		said := &signalled{stop: stop}
		cmd := exec.Command("sh", "-c", script)
		cmd.Stdout = said
		var failed *commandError
		if err := runCommand(ctx, cmd, lost); !errors.As(err, &failed) || failed.code != 4 || !strings.Contains(said.out.String(), "cleaned up") {
			t.Errorf("it ended with %v and printed %q", err, said.out.String())
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	run(ctx, cancel, nil)
	lost := make(chan struct{})
	run(t.Context(), func() { close(lost) }, lost)
}
