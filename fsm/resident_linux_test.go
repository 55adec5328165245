package fsm

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"testing"
)

// A file that was opened is not resident as a whole.
func TestOpenedFileIsNotResident(t *testing.T) {
	config := Config{Path: t.TempDir() + "/state.db", NoSync: true, InitialMmapBytes: 1 << 26}
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		big := put(fmt.Sprintf("key %d", i), string(bytes.Repeat([]byte{byte(i)}, 1<<20)))
		if _, err := s.Apply(uint64(i+1), 1, entryOf(t, big)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	before := fileResident(t)
	if s, err = Open(config); err != nil {
		t.Fatal(err)
	}
	if grown := fileResident(t) - before; grown > 8<<20 {
		t.Errorf("opening 20 MiB has made %d bytes resident", grown)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// fileResident is how much of files this process has mapped in memory.
func fileResident(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); string(f[0]) == "RssFile:" {
			n, err := strconv.Atoi(string(f[1]))
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no RssFile")
	return 0
}
