package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"
)

func TestSnapshotSave(t *testing.T) {
	f := startFake(t)
	f.backup = []byte("one|two|three")
	path := filepath.Join(t.TempDir(), "backup")
	code, out, errOut := kvd(t, "", "snapshot", "save", path, "--endpoints", f.addr)
	if want := "Snapshot saved at " + path + "\nServer version 3.7.0\n"; code != exitOK || out != want || errOut != "" {
		t.Fatalf("exit code %d, printed %q and %q", code, out, errOut)
	}
	sum := sha256.Sum256([]byte("onetwothree"))
	expectFiles(t, filepath.Dir(path), map[string]string{"backup": "onetwothree" + string(sum[:])})
}

// A save that fails leaves the older backup, and nothing else.
func TestFailedSaveLeavesTheOldFile(t *testing.T) {
	sum := sha256.Sum256([]byte("body"))
	for name, source := range map[string]io.Reader{
		"wrong digest":   bytes.NewReader(append([]byte("bodY"), sum[:]...)),
		"truncated":      bytes.NewReader(append([]byte("body"), sum[:31]...)),
		"empty":          bytes.NewReader(nil),
		"broken in half": io.MultiReader(bytes.NewReader([]byte("bo")), iotest.ErrReader(errTest)),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "backup")
			if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := saveFile(path, source, newProgress(io.Discard, "saving", 0)); err == nil {
				t.Error("it succeeded")
			}
			expectFiles(t, filepath.Dir(path), map[string]string{"backup": "old"})
		})
	}
}

func TestSaveReadsInSmallPieces(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789"), 100)
	sum := sha256.Sum256(body)
	path := filepath.Join(t.TempDir(), "backup")
	if err := saveFile(path, iotest.OneByteReader(bytes.NewReader(append(body, sum[:]...))), newProgress(io.Discard, "saving", 0)); err != nil {
		t.Fatal(err)
	}
}

func TestSaveToADirectoryThatIsNotThere(t *testing.T) {
	if err := saveFile("/nonexistent/backup", bytes.NewReader(nil), newProgress(io.Discard, "saving", 0)); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func expectFiles(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(want) {
		t.Errorf("the directory holds %v", entries)
	}
	for name, content := range want {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != content {
			t.Errorf("%s holds %q, %v; want %q", name, got, err, content)
		}
	}
}

func TestProgress(t *testing.T) {
	p := newProgress(new(bytes.Buffer), "saving", 4000)
	if p.out != nil {
		t.Error("it draws where nobody looks")
	}
	for _, step := range []struct {
		more int
		want string
	}{
		{0, "saving [..............................]   0% of 4.0 kB"},
		{2000, "saving [###############...............]  50% of 4.0 kB"},
		{2000, "saving [##############################] 100% of 4.0 kB"},
		{32, "saving [##############################] 100% of 4.0 kB"}, // the digest at the end
	} {
		p.Write(make([]byte, step.more))
		if got := p.line(); got != step.want {
			t.Errorf("after %d bytes: %q, want %q", p.doneBytes, got, step.want)
		}
	}
	p.totalBytes = 0
	if got, want := p.line(), "saving 4.0 kB"; got != want {
		t.Errorf("without a total: %q, want %q", got, want)
	}
}
