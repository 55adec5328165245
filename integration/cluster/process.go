package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// Process is a client command of kvd that runs beside a test. All methods may be called concurrently.
type Process struct {
	cmd   *exec.Cmd
	input io.Closer
	done  chan struct{} // closed when it has ended and its output is complete

	mu          sync.Mutex
	out, errOut bytes.Buffer
}

// output collects what a process prints.
type output struct {
	p    *Process
	into *bytes.Buffer
}

func (o output) Write(b []byte) (int, error) {
	o.p.mu.Lock()
	defer o.p.mu.Unlock()
	return o.into.Write(b)
}

// Begin starts a client command of kvd that knows the client addresses of some nodes; it and what it runs have them in
// KVD_ENDPOINTS. Its standard input is open until CloseInput. The end of the test kills it.
func (c *Cluster) Begin(tb testing.TB, nodes []string, args ...string) *Process {
	tb.Helper()
	var endpoints []string
	for _, name := range nodes {
		endpoints = append(endpoints, c.Node(name).ClientAddr())
	}
	p := &Process{cmd: exec.Command(c.binary, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), "KVD_ENDPOINTS="+strings.Join(endpoints, ","))
	p.cmd.Stdout, p.cmd.Stderr = output{p, &p.out}, output{p, &p.errOut}
	p.cmd.SysProcAttr = childAttributes()
	p.cmd.WaitDelay = 5 * time.Second
	input, err := p.cmd.StdinPipe()
	if err == nil {
		p.input = input
		err = p.cmd.Start()
	}
	if err != nil {
		tb.Fatalf("kvd %s: %v", strings.Join(args, " "), err)
	}
	go func() { // ends with the process, for which the end of the test waits
		_ = p.cmd.Wait() // what it says is in ProcessState
		close(p.done)
	}()
	tb.Cleanup(func() {
		p.CloseInput()
		_ = p.Signal(os.Kill)
		<-p.done
		if tb.Failed() {
			tb.Logf("%s", p)
		}
	})
	return p
}

// String is for people: the command, and what it has printed.
func (p *Process) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("%s: %s%s", strings.Join(p.cmd.Args[1:], " "), p.out.String(), p.errOut.String())
}

// Output is what it has printed on its standard output until now.
func (p *Process) Output() string { p.mu.Lock(); defer p.mu.Unlock(); return p.out.String() }

// CloseInput ends its standard input.
func (p *Process) CloseInput() { p.input.Close() }

// Signal sends it a signal if it is alive.
func (p *Process) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Wait waits until it has ended, and returns its exit code; -1 if a signal ended it.
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-ctx.Done():
		return 0, fmt.Errorf("%s: has not ended: %w", p, ctx.Err())
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), nil
	}
}

// Done tells whether it has ended.
func (p *Process) Done() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// WaitOutput waits until what it has printed is enough.
func (p *Process) WaitOutput(ctx context.Context, enough func(out string) bool) (string, error) {
	for {
		done := p.Done() // before its output is read
		out := p.Output()
		switch {
		case enough(out):
			return out, nil
		case done:
			return out, fmt.Errorf("%s: it has ended (%v)", p, p.cmd.ProcessState)
		}
		select {
		case <-ctx.Done():
			return out, fmt.Errorf("%s: %w", p, ctx.Err())
		case <-time.After(pollEvery / 5):
		}
	}
}

// Binary is the kvd that this cluster runs.
func (c *Cluster) Binary() string { return c.binary }
