package local

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Node is a node that runs as a child process, or is to. One goroutine at a time starts and ends it; the others may ask
// whether it runs.
type Node struct {
	Name, Client, Peer, HTTP string // its addresses are host:port
	Dir                      string // of its data; its log is Dir.log

	process *exec.Cmd
	exited  chan struct{} // closed when process has ended; nil if there never was one
}

// Given is a node that somebody else runs: it counts as running, and is never ended.
func Given(name, client string) *Node {
	return &Node{Name: name, Client: client, exited: make(chan struct{})}
}

// start runs the node as a child of this process, with these flags besides its own.
func (n *Node) start(program string, flags ...string) error {
	log, err := os.OpenFile(n.Log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own
	n.process = exec.Command(program, "start", "--name", n.Name, "--data-dir", n.Dir,
		"--listen-client", n.Client, "--listen-peer", n.Peer, "--listen-http", n.HTTP)
	n.process.Args = append(n.process.Args, flags...)
	n.process.Env = withoutSettings(os.Environ())
	n.process.Stdout, n.process.Stderr = log, log
	n.process.SysProcAttr = childAttributes()
	if err := n.process.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	exited := make(chan struct{})
	n.exited = exited
	process := n.process
	go func() {
		_ = process.Wait() // how it ended is in its log
		close(exited)
	}()
	return nil
}

// withoutSettings drops the KVD_ variables: they are meant for the caller's nodes.
func withoutSettings(environment []string) (rest []string) {
	for _, v := range environment {
		if !strings.HasPrefix(v, "KVD_") {
			rest = append(rest, v)
		}
	}
	return rest
}

// Log is the file of the node's log.
func (n *Node) Log() string { return n.Dir + ".log" }

// Pid is the process id of the latest start; 0 if there was none.
func (n *Node) Pid() int {
	if n.process == nil {
		return 0
	}
	return n.process.Process.Pid
}

// Running tells whether the process lives.
func (n *Node) Running() bool {
	if n.exited == nil {
		return false
	}
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

// mine tells whether there is a process to be signalled.
func (n *Node) mine() bool { return n.process != nil && n.Running() }

// Kill ends the node with SIGKILL and waits until it is gone.
func (n *Node) Kill() {
	if n.mine() {
		_ = n.process.Process.Kill() // it can only have ended already
		<-n.exited
	}
}

// Pause stops the node with SIGSTOP: of nodes that are paused first and killed then, none outlives the others.
func (n *Node) Pause() error {
	if !n.mine() {
		return nil
	}
	return n.process.Process.Signal(syscall.SIGSTOP)
}

// Terminate asks the node to stop, without waiting.
func (n *Node) Terminate() {
	if n.mine() {
		_ = n.process.Process.Signal(syscall.SIGTERM)
	}
}

// Await waits for the node's end, and kills it if it takes too long.
func (n *Node) Await(limit time.Duration) {
	if !n.mine() {
		return
	}
	select {
	case <-n.exited:
	case <-time.After(limit):
		n.Kill()
	}
}

// LastWords is an error with the last line of the node's log, if it has ended; else nil.
func (n *Node) LastWords() error {
	if n.Running() {
		return nil
	}
	log, err := os.ReadFile(n.Log())
	if err != nil {
		return err
	}
	lines := bytes.Split(bytes.TrimSpace(log), []byte("\n"))
	return errors.New(n.Name + " ended: " + string(lines[len(lines)-1]))
}
