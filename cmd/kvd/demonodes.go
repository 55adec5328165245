package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// demoNode is a node that runs as a child process.
type demoNode struct {
	name, client, peer, http string
	dir                      string // of its data; its log is dir.log
	process                  *exec.Cmd
	exited                   chan struct{} // closed when process has ended; nil if there never was one
}

// newDemoNodes plans n nodes on free loopback ports, with their data under dir.
func newDemoNodes(n int, dir string) ([]*demoNode, error) {
	addresses, err := freeAddresses(3 * n)
	if err != nil {
		return nil, err
	}
	nodes := make([]*demoNode, n)
	for i := range nodes {
		name := fmt.Sprintf("n%d", i+1)
		nodes[i] = &demoNode{
			name: name, client: addresses[3*i], peer: addresses[3*i+1], http: addresses[3*i+2], dir: filepath.Join(dir, name+".kvd"),
		}
	}
	return nodes, nil
}

// freeAddresses finds n loopback addresses that nobody listens on. They are below the range that the kernel hands out
// for outgoing connections: nobody's connection takes the port of a node that is down for a moment.
func freeAddresses(n int) (addresses []string, err error) {
	const firstPort, ports, attempts = 10000, 22000, 100
	for failed := 0; len(addresses) < n; {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(ports)))
		if err == nil {
			defer l.Close() // held until all are found, so that they differ
			addresses = append(addresses, l.Addr().String())
		} else if failed++; failed == attempts {
			return nil, fmt.Errorf("find a free port: %w", err)
		}
	}
	return addresses, nil
}

// start runs the node as a child of this process, with this program and these flags besides its own.
func (n *demoNode) start(flags ...string) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(n.log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own
	n.process = exec.Command(program, "start", "--name", n.name, "--data-dir", n.dir,
		"--listen-client", n.client, "--listen-peer", n.peer, "--listen-http", n.http)
	n.process.Args = append(n.process.Args, flags...)
	n.process.Env = withoutSettings(os.Environ())
	n.process.Stdout, n.process.Stderr = log, log
	n.process.SysProcAttr = childAttributes()
	if err := n.process.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n.name, err)
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

func (n *demoNode) log() string { return n.dir + ".log" }

func (n *demoNode) running() bool {
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

// kill ends the node with SIGKILL.
func (n *demoNode) kill() {
	if n.running() {
		_ = n.process.Process.Kill() // it can only have ended already
		<-n.exited
	}
}

// terminate asks the node to stop, without waiting.
func (n *demoNode) terminate() {
	if n.running() {
		_ = n.process.Process.Signal(syscall.SIGTERM)
	}
}

// await waits for the node's end, and kills it if it takes too long.
func (n *demoNode) await(limit time.Duration) {
	if n.exited == nil {
		return
	}
	select {
	case <-n.exited:
	case <-time.After(limit):
		n.kill()
	}
}

// lastWords is an error with the last line of the node's log, if it has ended.
func (n *demoNode) lastWords() error {
	if n.running() {
		return nil
	}
	log, err := os.ReadFile(n.log())
	if err != nil {
		return err
	}
	lines := bytes.Split(bytes.TrimSpace(log), []byte("\n"))
	return errors.New(n.name + " ended: " + string(lines[len(lines)-1]))
}
