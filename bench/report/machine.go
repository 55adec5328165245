package report

import (
	"bufio"
	"bytes"
	"cmp"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Machine is where it was measured. What cannot be found out is empty or 0.
type Machine struct {
	System      string        `json:"system"`
	CPU         string        `json:"cpu"`
	Cores       int           `json:"cores"`
	MemoryBytes int64         `json:"memory_bytes"`
	Kernel      string        `json:"kernel"`
	FileSystem  string        `json:"file_system"` // of the nodes' data
	Sync        time.Duration `json:"sync_ns"`     // median of a 4 KiB write made durable
}

const (
	syncs     = 50
	syncBytes = 4096
)

// thisMachine looks around. dir is where the nodes' data will be.
func thisMachine(dir string) (Machine, error) {
	m := Machine{System: runtime.GOOS + "/" + runtime.GOARCH, Cores: runtime.NumCPU()}
	m.CPU = field("/proc/cpuinfo", "model name")
	if text, ok := strings.CutSuffix(field("/proc/meminfo", "MemTotal"), " kB"); ok {
		kib, _ := strconv.ParseInt(text, 10, 64) // 0: unknown
		m.MemoryBytes = kib << 10
	}
	if kernel, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = "Linux " + strings.TrimSpace(string(kernel))
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err == nil {
		m.FileSystem = fileSystem(mounts, dir)
	}
	var err error
	m.Sync, err = syncTime(dir)
	return m, err
}

// field is the value of a line "name : value" of a file; empty if there is none.
func field(path, name string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if key, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// fileSystem finds the type of the one that dir is on: that of the longest mount point above it, the last of equals.
func fileSystem(mounts []byte, dir string) (kind string) {
	if absolute, err := filepath.Abs(dir); err == nil {
		dir = absolute
	}
	longest := -1
	for line := range bytes.Lines(mounts) {
		fields := strings.Fields(string(line))
		if len(fields) < 3 {
			continue
		}
		point := strings.TrimSuffix(fields[1], "/")
		if len(point) >= longest && (dir == point || strings.HasPrefix(dir, point+"/")) {
			longest, kind = len(point), fields[2]
		}
	}
	return kind
}

// syncTime is how long the disk takes to make a write durable.
func syncTime(dir string) (time.Duration, error) {
	f, err := os.CreateTemp(dir, "sync-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	took := make([]time.Duration, syncs)
	data := make([]byte, syncBytes)
	for i := range took {
		begin := time.Now()
		if _, err := f.Write(data); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		took[i] = time.Since(begin)
	}
	slices.Sort(took)
	return took[syncs/2], nil
}

// complete fills in what the running program knows of itself.
func (p Program) complete() Program {
	p.Go = cmp.Or(p.Go, runtime.Version())
	info, ok := debug.ReadBuildInfo()
	if !ok || p.Revision != "" {
		return p
	}
	settings := make(map[string]string)
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	p.Revision = settings["vcs.revision"]
	if settings["vcs.modified"] == "true" && p.Revision != "" {
		p.Revision += " with changes"
	}
	return p
}
