package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"kvd/integration/compare/servers"
)

// machine is where, when and with what something was measured.
type machine struct {
	Date       time.Time
	CPU        string
	CPUs       int
	MemoryMiB  int64
	Kernel     string
	FileSystem string        // of the data
	Fdatasync  time.Duration // median of writing and syncing 4 KiB there
	Go         string
	Etcd       string
	KVD        string
	Load       string // of the last minutes, when it began
}

func describeMachine(ctx context.Context, binaries map[string]string, dir string) (machine, error) {
	m := machine{
		Date: time.Now().UTC().Truncate(time.Second), CPUs: runtime.NumCPU(),
		CPU: cmp.Or(procLine("/proc/cpuinfo", "model name"), runtime.GOARCH), Go: runtime.Version(),
		Kernel: firstWord(output(ctx, "", "uname", "-sr")), FileSystem: fileSystem(ctx, dir),
	}
	kib, _ := strconv.ParseInt(strings.TrimSuffix(procLine("/proc/meminfo", "MemTotal"), " kB"), 10, 64)
	m.MemoryMiB = kib >> 10
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(load))[:3], " ")
	}
	m.Etcd = strings.TrimPrefix(firstWord(output(ctx, "", binaries[servers.Etcd], "--version")), "etcd Version: ")
	m.KVD = strings.TrimPrefix(firstWord(output(ctx, "", binaries[servers.KVD], "version")), "kvd version: ")
	if commit := output(ctx, "", "git", "describe", "--always", "--dirty", "--abbrev=12"); commit != "" {
		m.KVD += " at " + commit
	}
	var err error
	m.Fdatasync, err = timeFdatasync(dir)
	return m, errors.Join(ctx.Err(), err)
}

// output of a command, or nothing.
func output(ctx context.Context, dir, name string, args ...string) string {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

func firstWord(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// procLine returns what follows "name:" in a file, or nothing.
func procLine(path, name string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(text) {
		if key, value, ok := strings.Cut(string(line), ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func fileSystem(ctx context.Context, dir string) string {
	lines := strings.Split(output(ctx, dir, "df", "--output=fstype", "."), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// timeFdatasync appends to a file in dir, as a log does.
func timeFdatasync(dir string) (time.Duration, error) {
	f, err := os.Create(filepath.Join(dir, "fdatasync"))
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	const writes = 200
	var took []time.Duration
	for range writes {
		start := time.Now()
		if _, err := f.Write(make([]byte, 4<<10)); err != nil {
			return 0, err
		}
		if err := fdatasync(f); err != nil {
			return 0, err
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took[writes/2], nil
}

func (m machine) String() string {
	return fmt.Sprintf("%s; %d × %s, %.0f GiB; %s; data on %s, 4 KiB written and synced in %.2f ms; %s; etcd %s; kvd %s; load when it began %s",
		m.Date.Format("2006-01-02 15:04 UTC"), m.CPUs, m.CPU, float64(m.MemoryMiB)/1024, m.Kernel, m.FileSystem,
		millis(m.Fdatasync), m.Go, m.Etcd, m.KVD, m.Load)
}
