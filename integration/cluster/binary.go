package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// Environment variables of the harness.
const (
	envBinary = "KVD_INTEGRATION_BINARY" // a kvd binary to use instead of building one
	envRace   = "KVD_INTEGRATION_RACE"   // non-empty: build it with the race detector
	envKeep   = "KVD_INTEGRATION_KEEP"   // non-empty: keep the directories of failed tests
)

var binary struct {
	once sync.Once
	path string
	dir  string // to be removed; "" if the binary was given
	err  error
}

// Binary returns the path of the kvd binary, which it builds at the first call.
func Binary() (string, error) {
	binary.once.Do(func() {
		if path := os.Getenv(envBinary); path != "" {
			binary.path, binary.err = filepath.Abs(path)
			return
		}
		binary.path, binary.dir, binary.err = build()
	})
	return binary.path, binary.err
}

// RemoveBinary removes what Binary built. TestMain calls it last.
func RemoveBinary() {
	if binary.dir != "" {
		os.RemoveAll(binary.dir)
	}
}

func build() (path, dir string, err error) {
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", "", fmt.Errorf("finding the module: %w", err)
	}
	if dir, err = os.MkdirTemp("", "kvd-binary-"); err != nil {
		return "", "", err
	}
	path = filepath.Join(dir, "kvd")
	args := []string{"build", "-o", path}
	if os.Getenv(envRace) != "" {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "./cmd/kvd")...)
	cmd.Dir = filepath.Dir(strings.TrimSpace(string(mod)))
	if out, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", "", fmt.Errorf("building kvd: %w\n%s", err, out)
	}
	return path, dir, nil
}
