package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// readyLine is what a node logs when it serves.
const readyLine = "ready to serve client requests"

// portRaceTries bounds how often a node is started again because another process had taken its port.
const portRaceTries = 5

// ErrExited says that a node's process has ended by itself.
var ErrExited = errors.New("cluster: the node's process has exited")

// Node is one kvd process and its directory. All methods may be called concurrently.
type Node struct {
	Name string
	Dir  string // its --data-dir
	Log  *Log

	binary string
	args   func() []string

	mu                 sync.Mutex
	client, peer, http string // addresses
	process            *process
	starts             int
}

// process is one life of a node.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended and all its output is in the log
}

func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// ClientAddr, PeerAddr and HTTPAddr are the host:port that the node listens on.
func (n *Node) ClientAddr() string { n.mu.Lock(); defer n.mu.Unlock(); return n.client }
func (n *Node) PeerAddr() string   { n.mu.Lock(); defer n.mu.Unlock(); return n.peer }
func (n *Node) HTTPAddr() string   { n.mu.Lock(); defer n.mu.Unlock(); return n.http }

// Running reports whether the process is alive, paused or not.
func (n *Node) Running() bool { n.mu.Lock(); defer n.mu.Unlock(); return n.process.running() }

// Starts is how often the node has been started.
func (n *Node) Starts() int { n.mu.Lock(); defer n.mu.Unlock(); return n.starts }

// readdress gives the node new addresses, which it uses from its next start on.
func (n *Node) readdress() error {
	var addresses [3]string
	for i := range addresses {
		var err error
		if addresses[i], err = freeAddress(); err != nil {
			return err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.client, n.peer, n.http = addresses[0], addresses[1], addresses[2]
	return nil
}

// Start starts the process and does not wait until it serves.
func (n *Node) Start() error {
	args := n.args()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.process.running() {
		return fmt.Errorf("node %s is already running", n.Name)
	}
	cmd := exec.Command(n.binary, args...)
	cmd.Stdout, cmd.Stderr = n.Log, n.Log
	cmd.SysProcAttr = childAttributes()
	cmd.WaitDelay = 5 * time.Second
	n.Log.begin()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting node %s: %w", n.Name, err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() { // ends with the process, which Cluster.Close kills and waits for
		_ = cmd.Wait() // what it says is in ProcessState
		close(p.done)
	}()
	n.process, n.starts = p, n.starts+1
	return nil
}

// WaitLogged waits until the process has logged that it serves. It starts the process again if another one
// has taken one of its ports.
func (n *Node) WaitLogged(ctx context.Context) error {
	for try := 1; ; try++ {
		err := n.waitLine(ctx, readyLine)
		if !errors.Is(err, ErrExited) || try == portRaceTries || !n.Log.Contains("address already in use") {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
		if err := n.Start(); err != nil {
			return err
		}
	}
}

// waitLine waits for a line in the log or for the end of the process.
func (n *Node) waitLine(ctx context.Context, line string) error {
	n.mu.Lock()
	p := n.process
	n.mu.Unlock()
	if p == nil {
		return fmt.Errorf("node %s has not been started", n.Name)
	}
	err := n.Log.waitFor(ctx, p.done, line)
	if errors.Is(err, ErrExited) {
		return fmt.Errorf("node %s: %w: %v: %s", n.Name, err, p.cmd.ProcessState, n.LastLine())
	}
	if err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	return nil
}

// Exit waits until the process has ended and returns its exit code; -1 if a signal ended it.
func (n *Node) Exit(ctx context.Context) (int, error) {
	n.mu.Lock()
	p := n.process
	n.mu.Unlock()
	if p == nil {
		return 0, fmt.Errorf("node %s has not been started", n.Name)
	}
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("node %s has not exited: %w", n.Name, ctx.Err())
	}
}

// signal sends a signal to the process if it is alive.
func (n *Node) signal(s syscall.Signal) (*process, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.process.running() {
		return n.process, nil
	}
	if err := n.process.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return n.process, fmt.Errorf("node %s: %v: %w", n.Name, s, err)
	}
	return n.process, nil
}

// Kill ends the process with SIGKILL and waits for its end. It does nothing if there is none.
func (n *Node) Kill() error {
	p, err := n.signal(syscall.SIGKILL)
	if err == nil && p != nil {
		<-p.done
	}
	return err
}

// Stop asks the process to end (SIGTERM), and returns its exit code.
func (n *Node) Stop(ctx context.Context) (int, error) {
	if _, err := n.signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	return n.Exit(ctx)
}

// Pause stops the process as it stands (SIGSTOP); Resume lets it go on.
func (n *Node) Pause() error  { _, err := n.signal(syscall.SIGSTOP); return err }
func (n *Node) Resume() error { _, err := n.signal(syscall.SIGCONT); return err }

// Wipe removes the data directory of a node that is down.
func (n *Node) Wipe() error {
	if n.Running() {
		return fmt.Errorf("node %s is running", n.Name)
	}
	return os.RemoveAll(n.Dir)
}

// LastLine returns the last line that the node has written.
func (n *Node) LastLine() string { return strings.TrimSpace(n.Log.Tail(1)) }
