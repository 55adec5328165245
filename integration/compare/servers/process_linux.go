package servers

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"
	"time"
)

// dieWithParent makes the kernel kill the child when the thread that started it ends.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}

// allocated is what a file takes on the disk.
func allocated(info fs.FileInfo) int64 {
	const blockBytes = 512 // the unit of st_blocks, whatever the file system's is
	return info.Sys().(*syscall.Stat_t).Blocks * blockBytes
}

// ticksPerSecond is the unit of the times in /proc/<pid>/stat: USER_HZ, which is 100 on every Linux that Go supports.
const ticksPerSecond = 100

// CPU returns the processor time, user and system, that the nodes have used since they started, in steps of 10 ms each.
// Nodes that do not run count nothing.
func (c *Cluster) CPU() (time.Duration, error) {
	var sum time.Duration
	for _, p := range c.nodes {
		if !p.running() {
			continue
		}
		used, err := processCPU(p.cmd.Process.Pid)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", p.name, err)
		}
		sum += used
	}
	return sum, nil
}

func processCPU(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// After the command in parentheses, fields 12 and 13 are utime and stime (proc(5) counts them 14 and 15).
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	return ticks(fields[11:13])
}

// OwnCPU returns the processor time that this program has used.
func OwnCPU() (time.Duration, error) { return processCPU(os.Getpid()) }

// MachineCPU returns the processor time that everything on this machine has used since it started.
func MachineCPU() (time.Duration, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(stat, []byte("\n"))
	fields := bytes.Fields(line) // cpu user nice system idle iowait irq softirq steal ...
	if len(fields) < 9 {
		return 0, fmt.Errorf("/proc/stat: %q", line)
	}
	return ticks([][]byte{fields[1], fields[2], fields[3], fields[6], fields[7], fields[8]})
}

func ticks(fields [][]byte) (time.Duration, error) {
	var sum time.Duration
	for _, field := range fields {
		n, err := strconv.ParseInt(string(field), 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(n) * time.Second / ticksPerSecond
	}
	return sum, nil
}

// Memory returns the memory of the nodes that run.
func (c *Cluster) Memory() (Memory, error) {
	var sum Memory
	for _, p := range c.nodes {
		if !p.running() {
			continue
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
		if err != nil {
			return Memory{}, fmt.Errorf("%s: %w", p.name, err)
		}
		for field, to := range map[string]*int64{"VmRSS": &sum.Resident, "RssAnon": &sum.Anonymous, "VmHWM": &sum.Peak} {
			kib, err := statusField(status, field)
			if err != nil {
				return Memory{}, fmt.Errorf("%s: %w", p.name, err)
			}
			*to += kib << 10
		}
	}
	return sum, nil
}

// statusField reads a line like "VmRSS:	  1234 kB" of /proc/<pid>/status.
func statusField(status []byte, name string) (kib int64, err error) {
	for line := range bytes.Lines(status) {
		if rest, ok := bytes.CutPrefix(line, []byte(name+":")); ok {
			return strconv.ParseInt(string(bytes.TrimSpace(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte("kB")))), 10, 64)
		}
	}
	return 0, fmt.Errorf("no %s in the status of the process", name)
}
