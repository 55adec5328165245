package servers

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// startFloor starts two floor servers, gives them something to do, and returns them.
func startFloor(t *testing.T) *Cluster {
	t.Helper()
	binary, err := Build(t.Context(), Floor, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c, err := StartCommand(t.Context(), binary, t.TempDir(), 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	for _, endpoint := range c.Endpoints() {
		conn, err := Dial(endpoint)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for range 2000 {
			if _, err := pb.NewKVClient(conn).Put(t.Context(), &pb.PutRequest{Key: []byte("k")}); err != nil {
				t.Fatal(err)
			}
		}
	}
	return c
}

// TestProcessorTimeIsTheKernels compares with what the kernel says of each process when it has ended.
func TestProcessorTimeIsTheKernels(t *testing.T) {
	c := startFloor(t)
	used, err := c.CPU()
	if err != nil {
		t.Skip(err) // not on this system
	}
	before, err := MachineCPU()
	if err != nil {
		t.Fatal(err)
	}
	var want time.Duration
	for i, p := range c.nodes {
		c.Kill(i)
		want += p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
	}
	const steps = 50 * time.Millisecond // of 10 ms, of two times for each of two processes, and their end
	if used < want-steps || used > want+steps || used == 0 {
		t.Errorf("the processes used %v, the kernel says %v", used, want)
	}
	if before < used {
		t.Errorf("the machine used %v, two of its processes %v", before, used)
	}
	if now, err := c.CPU(); now != 0 || err != nil {
		t.Errorf("processes that have ended use %v, %v", now, err)
	}
}

// TestMemoryIsTheKernels compares with the sum of all mappings of each process.
func TestMemoryIsTheKernels(t *testing.T) {
	c := startFloor(t)
	memory, err := c.Memory()
	if err != nil {
		t.Skip(err) // not on this system
	}
	var resident, anonymous int64
	for _, p := range c.nodes {
		rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for name, to := range map[string]*int64{"Rss": &resident, "Anonymous": &anonymous} {
			kib, err := statusField(rollup, name)
			if err != nil {
				t.Fatal(err)
			}
			*to += kib << 10
		}
	}
	const near = 2 << 20 // the kernel counts pages per processor, and sums up late
	if d := memory.Resident - resident; d < -near || d > near || resident == 0 {
		t.Errorf("%d bytes are resident, all mappings have %d", memory.Resident, resident)
	}
	if d := memory.Anonymous - anonymous; d < -near || d > near || anonymous == 0 {
		t.Errorf("%d bytes are anonymous, all mappings have %d", memory.Anonymous, anonymous)
	}
	if memory.Peak+near < memory.Resident {
		t.Errorf("the peak of %d bytes is below the %d now", memory.Peak, memory.Resident)
	}
}

// TestDiskIsThatOfDu: with a file that has holes, and one that was allocated ahead.
func TestDiskIsThatOfDu(t *testing.T) {
	dir := t.TempDir()
	c := &Cluster{nodes: []*process{newProcess(dir, "a", "", ""), newProcess(dir, "b", "", "")}}
	want := int64(0)
	for i, p := range c.nodes {
		if err := os.MkdirAll(filepath.Join(p.dir, "below"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p.dir, "below", "full"), bytes.Repeat([]byte("x"), 100_000*(i+1)), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(p.dir, "below", "full"), 10<<20); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("du", "-s", "--block-size=1", p.dir).Output()
		if err != nil {
			t.Skip(err) // no GNU du
		}
		size, err := strconv.ParseInt(strings.Fields(string(out))[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		want += size
	}
	if got, err := c.Disk(); got != want || err != nil {
		t.Errorf("%d bytes, du says %d; %v", got, want, err)
	}
}

func TestNodesThatEndAreStartedAgain(t *testing.T) {
	c := startFloor(t)
	if err := c.Terminate(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	c.Kill(1)
	if err := c.Start(0, 1); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.nodes[0].waitReady(ctx); err == nil {
		t.Error("a server that was closed answers")
	}
}

// TestAddressesAreHeld: an address is not found again, by whatever process, though nobody listens there.
func TestAddressesAreHeld(t *testing.T) {
	addresses, err := FreeAddresses(9)
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range addresses {
		if hold(address) {
			t.Errorf("%s is found again", address)
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Errorf("a server cannot have it: %v", err)
			continue
		}
		l.Close()
	}
}

// TestTakenPortsAreNoFailure lets another server have the port of a node, at first.
func TestTakenPortsAreNoFailure(t *testing.T) {
	binary, err := Build(t.Context(), Floor, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	dir, starts := t.TempDir(), 0
	c, err := anew(func() (*Cluster, error) {
		addresses, err := FreeAddresses(2)
		if err != nil {
			return nil, err
		}
		if starts++; starts == 1 {
			addresses[1] = other.Addr().String()
		}
		c := &Cluster{}
		for i, address := range addresses {
			p := newProcess(dir, fmt.Sprintf("p%d", i+1), address, "")
			p.argv = []string{binary, address}
			c.nodes = append(c.nodes, p)
		}
		return c, c.start(t.Context())
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if starts == 1 || !c.nodes[0].running() || !c.nodes[1].running() {
		t.Errorf("after %d starts these run: %t, %t", starts, c.nodes[0].running(), c.nodes[1].running())
	}
}
