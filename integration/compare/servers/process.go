package servers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// process is a server of a cluster: its command, and the life of that command's last process.
type process struct {
	name, endpoint, peer, http string // http: where /metrics is
	dir, logPath               string
	argv                       []string
	cmd                        *exec.Cmd
	exited                     chan struct{} // closed once the process has been waited for
}

// start runs the command; the log of former lives stays. The goroutine keeps the thread that forked the process: the
// kernel kills the child when that thread ends, which is then when this program ends, however it does.
func (p *process) start() error {
	log, err := os.OpenFile(p.logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	cmd, exited := exec.Command(p.argv[0], p.argv[1:]...), make(chan struct{})
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = dieWithParent()
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer log.Close()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait() // how it exited is no news: mostly it was killed
			close(exited)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	p.cmd, p.exited = cmd, exited
	return nil
}

func (p *process) running() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// kill ends the process at once, if it runs.
func (p *process) kill() {
	if p.cmd != nil {
		p.cmd.Process.Signal(syscall.SIGKILL) // fails only for a process that has exited
		<-p.exited
	}
}

// waitReady returns when the node has answered a linearizable read of all keys, whatever shards they are in.
func (p *process) waitReady(ctx context.Context) error {
	conn, err := Dial(p.endpoint)
	if err != nil {
		return err
	}
	defer conn.Close()
	for {
		attempt, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := pb.NewKVClient(conn).Range(attempt, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return fmt.Errorf("exited while starting: %v", p.cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Kill ends a node with SIGKILL and returns when it is gone. Its data stays.
func (c *Cluster) Kill(node int) { c.nodes[node].kill() }

// terminateTimeout bounds an orderly end.
const terminateTimeout = 30 * time.Second

// Terminate ends a node with SIGTERM and returns when it is gone. Its data stays.
func (c *Cluster) Terminate(ctx context.Context, node int) error {
	p := c.nodes[node]
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(terminateTimeout):
		return fmt.Errorf("%s does not end within %v of SIGTERM", p.name, terminateTimeout)
	}
}

// Start starts nodes that were ended, with the data they had.
func (c *Cluster) Start(nodes ...int) error {
	for _, node := range nodes {
		if err := c.nodes[node].start(); err != nil {
			return fmt.Errorf("%s: %w", c.nodes[node].name, err)
		}
	}
	return nil
}

// WaitReady returns when every node that runs has answered a linearizable read of all keys.
func (c *Cluster) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for _, p := range c.nodes {
		if p.cmd == nil || !p.running() {
			continue
		}
		if err := p.waitReady(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// Logs returns the end of each node's log.
func (c *Cluster) Logs() string {
	var all strings.Builder
	for _, p := range c.nodes {
		text, err := os.ReadFile(p.logPath)
		if err != nil {
			text = []byte(err.Error())
		}
		const tailBytes = 4 << 10
		if len(text) > tailBytes {
			text = append([]byte("..."), text[len(text)-tailBytes:]...)
		}
		fmt.Fprintf(&all, "--- %s\n%s\n", p.name, bytes.TrimSpace(text))
	}
	return all.String()
}

// Disk returns the bytes that all nodes' directories take on the disk, as du counts them: files that are allocated
// ahead of their use, with what is allocated. A file that goes while it looks counts nothing.
func (c *Cluster) Disk() (int64, error) {
	var sum int64
	for _, p := range c.nodes {
		err := filepath.WalkDir(p.dir, func(path string, _ fs.DirEntry, err error) error {
			var info fs.FileInfo
			if err == nil {
				info, err = os.Lstat(path)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			sum += allocated(info)
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	return sum, nil
}
