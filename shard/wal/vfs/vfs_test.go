package vfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, f FS, name string) File {
	t.Helper()
	file, err := f.Open(name, true)
	must(t, err)
	return file
}

func write(t testing.TB, f File, off int64, b []byte) {
	t.Helper()
	_, err := f.WriteAt(b, off)
	must(t, err)
}

// contentsOf is nil if there is no such file.
func contentsOf(t testing.TB, f FS, name string) []byte {
	t.Helper()
	file, err := f.Open(name, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	must(t, err)
	defer file.Close()
	size, err := file.Size()
	must(t, err)
	b := make([]byte, size)
	if _, err := file.ReadAt(b, 0); err != nil && (err != io.EOF || size > 0) {
		t.Fatal(err)
	}
	return b
}

// Both file systems do the same where nothing goes wrong.
func TestFS(t *testing.T) {
	t.Run("os", func(t *testing.T) { testFS(t, OS, t.TempDir()) })
	t.Run("memory", func(t *testing.T) { testFS(t, new(Memory), "/data") })
}

func testFS(t *testing.T, f FS, root string) {
	dir := filepath.Join(root, "a", "b")
	must(t, f.MkdirAll(dir))
	must(t, f.MkdirAll(dir))
	name := filepath.Join(dir, "one")
	if _, err := f.Open(name, false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open of a missing file: %v", err)
	}
	if _, err := f.Open(filepath.Join(root, "none", "x"), true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open in a missing directory: %v", err)
	}
	file := open(t, f, name)
	write(t, file, 10_000, []byte("hello"))
	must(t, file.Sync())
	b := make([]byte, 6)
	if n, err := file.ReadAt(b, 9_999); n != 6 || err != nil || string(b) != "\x00hello" {
		t.Errorf("read %d %v %q", n, err, b)
	}
	if n, err := file.ReadAt(b, 10_002); n != 3 || err != io.EOF {
		t.Errorf("read at the end: %d %v", n, err)
	}
	must(t, file.Preallocate(5)) // never shorter
	must(t, file.Preallocate(20_000))
	if size, err := file.Size(); size != 20_000 || err != nil {
		t.Errorf("size %d %v", size, err)
	}
	must(t, file.Truncate(10_002))
	must(t, file.Truncate(10_010))
	if got := contentsOf(t, f, name); !bytes.Equal(got[10_000:], []byte("he\x00\x00\x00\x00\x00\x00\x00\x00")) {
		t.Errorf("after truncate %q", got[10_000:])
	}
	testNames(t, f, dir, file)
}

func testNames(t *testing.T, f FS, dir string, one File) {
	two := filepath.Join(dir, "two")
	must(t, f.Rename(filepath.Join(dir, "one"), two))
	if err := f.Rename(filepath.Join(dir, "one"), two); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("rename of a missing file: %v", err)
	}
	if err := f.Rename(two, filepath.Join(filepath.Dir(dir), "two")); err == nil {
		t.Error("rename into another directory")
	}
	must(t, open(t, f, filepath.Join(dir, "three")).Close())
	must(t, f.SyncDir(dir))
	names, err := f.List(dir)
	if err != nil || !slices.Equal(names, []string{"three", "two"}) {
		t.Errorf("names %v %v", names, err)
	}
	must(t, f.Remove(two))
	if err := f.Remove(two); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("remove of a missing file: %v", err)
	}
	if n, err := one.ReadAt(make([]byte, 5), 10_000); n != 5 || err != nil {
		t.Errorf("read of a removed file: %d %v", n, err)
	}
	must(t, one.Close())
	if _, err := one.WriteAt([]byte("x"), 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
	lock, err := f.Lock(filepath.Join(dir, "lock"))
	must(t, err)
	if _, err := f.Lock(filepath.Join(dir, "lock")); !errors.Is(err, ErrLocked) {
		t.Errorf("second lock: %v", err)
	}
	must(t, lock.Close())
	lock, err = f.Lock(filepath.Join(dir, "lock"))
	must(t, err)
	must(t, lock.Close())
	if free, err := f.Free(dir); free == 0 || err != nil {
		t.Errorf("free %d %v", free, err)
	}
}

// image of one file after many crashes: how often each content was left.
func crashes(t *testing.T, m *Memory, name string) map[string]int {
	left := map[string]int{}
	for seed := range uint64(300) {
		b := contentsOf(t, m.Crash(seed), name)
		key := "missing"
		if b != nil {
			key = ""
			for i := 0; i < len(b); i += SectorBytes {
				key += string('a' + b[i]%26)
			}
		}
		left[key]++
	}
	return left
}

func fill(sectors int, c byte) []byte { return bytes.Repeat([]byte{c}, sectors*SectorBytes) }

// wantCrashes checks that what is left is exactly one of want, and each of it now and then.
func wantCrashes(t *testing.T, m *Memory, name string, want ...string) {
	t.Helper()
	left := crashes(t, m, name)
	for _, w := range want {
		if left[w] == 0 {
			t.Errorf("never left: %q; left %v", w, left)
		}
		delete(left, w)
	}
	if len(left) > 0 {
		t.Errorf("left %v, want only %q", left, want)
	}
}

func durableFile(t *testing.T, m *Memory) File {
	t.Helper()
	must(t, m.MkdirAll("d"))
	must(t, m.SyncDir("."))
	f := open(t, m, "d/f")
	write(t, f, 0, fill(2, 0))
	must(t, f.Sync())
	must(t, m.SyncDir("d"))
	return f
}

func TestCrashKeepsWhatIsDurable(t *testing.T) {
	m := new(Memory)
	f := durableFile(t, m)
	wantCrashes(t, m, "d/f", "aa")
	write(t, f, 0, fill(2, 1))
	wantCrashes(t, m, "d/f", "aa", "ab", "ba", "bb")
	write(t, f, 0, fill(1, 2))
	wantCrashes(t, m, "d/f", "aa", "ab", "ba", "bb", "ca", "cb")
	must(t, f.Sync())
	wantCrashes(t, m, "d/f", "cb")
	if got := contentsOf(t, m.Kill(), "d/f"); !bytes.Equal(got, append(fill(1, 2), fill(1, 1)...)) {
		t.Error("a kill changed the file")
	}
}

func TestCrashOfSizes(t *testing.T) {
	m := new(Memory)
	f := durableFile(t, m)
	write(t, f, 2*SectorBytes, fill(1, 3))
	wantCrashes(t, m, "d/f", "aa", "aaa", "aad")
	must(t, f.Sync())
	must(t, f.Truncate(SectorBytes))
	wantCrashes(t, m, "d/f", "a", "aad", "aaa")
	must(t, f.Preallocate(3*SectorBytes))
	must(t, f.Sync())
	wantCrashes(t, m, "d/f", "aaa")
}

func TestCrashOfNames(t *testing.T) {
	m := new(Memory)
	f := durableFile(t, m)
	g := open(t, m, "d/g")
	write(t, g, 0, fill(1, 1))
	must(t, g.Sync())
	wantCrashes(t, m, "d/g", "missing", "b")
	must(t, m.Rename("d/g", "d/f")) // over it
	wantCrashes(t, m, "d/f", "aa", "b")
	wantCrashes(t, m, "d/g", "missing", "b")
	must(t, m.SyncDir("d"))
	wantCrashes(t, m, "d/f", "b")
	wantCrashes(t, m, "d/g", "missing")
	must(t, m.Remove("d/f"))
	wantCrashes(t, m, "d/f", "missing", "b")
	must(t, m.SyncDir("d"))
	wantCrashes(t, m, "d/f", "missing")

	must(t, m.MkdirAll("e"))
	must(t, open(t, m, "e/x").Close())
	must(t, m.SyncDir("e"))
	wantCrashes(t, m, "e/x", "missing", "")
	must(t, f.Close())
}

// What is left depends on the seed alone, and copies do not see each other's writes.
func TestCrashIsACopy(t *testing.T) {
	m := new(Memory)
	f := durableFile(t, m)
	write(t, f, 100, fill(40, 7))
	for seed := range uint64(20) {
		a, b := m.Crash(seed), m.Crash(seed)
		want := contentsOf(t, a, "d/f")
		write(t, open(t, b, "d/f"), 0, fill(60, 9))
		write(t, f, 0, fill(1, byte(seed)))
		if !bytes.Equal(contentsOf(t, a, "d/f"), want) {
			t.Fatalf("seed %d: a copy changed", seed)
		}
		write(t, f, 0, fill(1, 0))
	}
	kill := m.Kill()
	for seed := range uint64(20) {
		if !bytes.Equal(contentsOf(t, m.Crash(seed), "d/f"), contentsOf(t, kill.Crash(seed), "d/f")) {
			t.Fatalf("seed %d: another disk after a kill", seed)
		}
	}
}

// failOnce fails the next operation of a kind.
func failOnce(m *Memory, kind Kind, err error) {
	m.Inject(func(op Op) error {
		if op.Kind != kind {
			return nil
		}
		m.Inject(nil)
		return err
	})
}

// A sync that fails is not made good by the next one.
func TestFailedSync(t *testing.T) {
	m := new(Memory)
	f := durableFile(t, m)
	write(t, f, 0, fill(1, 1))
	failOnce(m, OpSync, syscall.EIO)
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	must(t, f.Sync())
	wantCrashes(t, m, "d/f", "aa", "ba")
	dropped := m.Kill()
	dropped.DropCaches()
	if got := contentsOf(t, dropped, "d/f"); got[0] != 0 {
		t.Error("what was dropped is still read")
	}
	write(t, f, 1, fill(1, 1)[1:])
	must(t, f.Sync())
	wantCrashes(t, m, "d/f", "ba")
}

func TestFaults(t *testing.T) {
	m := new(Memory)
	f := durableFile(t, m)
	failOnce(m, OpWrite, &Fault{Err: syscall.ENOSPC, Bytes: SectorBytes})
	if n, err := f.WriteAt(fill(2, 1), 0); n != SectorBytes || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("short write: %d %v", n, err)
	}
	failOnce(m, OpSync, &Fault{})
	must(t, f.Sync())
	wantCrashes(t, m, "d/f", "aa", "ba")
	failOnce(m, OpWrite, &Fault{Bytes: SectorBytes, Flip: 8 * SectorBytes})
	write(t, f, 0, fill(1, 2))
	must(t, f.Sync())
	wantCrashes(t, m, "d/f", "cb")
	must(t, m.Flip("d/f", 1))
	wantCrashes(t, m, "d/f", "ab")
	if m.Flip("d/f", 16*SectorBytes) == nil || m.Flip("d/none", 0) == nil {
		t.Error("flipped a bit that is not there")
	}
	for _, kind := range []Kind{OpOpen, OpRename, OpRemove, OpSyncDir, OpMkdir, OpList, OpLock, OpFree} {
		failOnce(m, kind, syscall.EIO)
		if err := anyOf(m, kind); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v", kind, err)
		}
		must(t, anyOf(m, OpOpen))
	}
}

func anyOf(m *Memory, kind Kind) (err error) {
	switch kind {
	case OpOpen:
		_, err = m.Open("d/f", false)
	case OpRename:
		err = m.Rename("d/f", "d/g")
	case OpRemove:
		err = m.Remove("d/f")
	case OpSyncDir:
		err = m.SyncDir("d")
	case OpMkdir:
		err = m.MkdirAll("e")
	case OpList:
		_, err = m.List("d")
	case OpLock:
		_, err = m.Lock("d/f")
	case OpFree:
		_, err = m.Free("d")
	default:
		err = fmt.Errorf("what is %s", kind)
	}
	return err
}

func TestCapacity(t *testing.T) {
	m := new(Memory)
	f := durableFile(t, m)
	m.SetCapacity(3 * SectorBytes)
	write(t, f, SectorBytes, fill(2, 1))
	if err := f.Preallocate(3*SectorBytes + 1); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("preallocate: %v", err)
	}
	if _, err := f.WriteAt(fill(1, 1), 3*SectorBytes); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write: %v", err)
	}
	if free, err := m.Free("d"); free != 0 || err != nil {
		t.Errorf("free %d %v", free, err)
	}
	must(t, f.Truncate(SectorBytes))
	if free, err := m.Free("d"); free != 2*SectorBytes || err != nil {
		t.Errorf("free %d %v", free, err)
	}
}

// A disk that stalls holds nobody up but who waits for it.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := new(Memory)
		f := durableFile(t, m)
		m.Inject(func(op Op) error {
			if op.Kind == OpSync {
				time.Sleep(time.Hour)
			}
			return nil
		})
		began := time.Now()
		done := make(chan error)
		go func() { done <- f.Sync() }()
		synctest.Wait()
		write(t, f, 0, []byte("x"))
		if time.Since(began) != 0 {
			t.Error("a write waited for a sync")
		}
		if err := <-done; err != nil || time.Since(began) != time.Hour {
			t.Errorf("sync took %v: %v", time.Since(began), err)
		}
	})
}
