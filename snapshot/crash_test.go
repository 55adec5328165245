package snapshot

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

var errCrashed = errors.New("the machine has crashed")

// crashingDisk works on a real directory and remembers what of it is durable: the content of a file since its
// last Sync, the names of files since the directory's last. Before its crashAt-th step everything stops; then
// settle leaves in the directory what a machine might find there after the crash.
type crashingDisk struct {
	dir     string
	rnd     *rand.Rand
	crashAt int
	step    int

	synced  map[string][]byte // durable content of the files in the directory, by present name
	durable map[string][]byte // what the directory held when it was last synced
	steps   []map[string][]byte

	skipSync, skipDirSync bool // planted faults
}

func newCrashingDisk(dir string, rnd *rand.Rand, crashAt int, old map[string][]byte) *crashingDisk {
	d := &crashingDisk{dir: dir, rnd: rnd, crashAt: crashAt, synced: map[string][]byte{}, durable: old}
	for name, b := range old {
		d.synced[name] = b
	}
	return d
}

func (d *crashingDisk) next() error {
	if d.step++; d.step > d.crashAt {
		return errCrashed
	}
	return nil
}

// moved notes a change of names: a crash may lose any number of the latest ones.
func (d *crashingDisk) moved() {
	now := map[string][]byte{}
	for name, b := range d.synced {
		now[name] = b
	}
	d.steps = append(d.steps, now)
}

func (d *crashingDisk) freeBytes(string) (uint64, error) { return 1 << 40, d.next() }

func (d *crashingDisk) create(dir string) (file, error) {
	if err := d.next(); err != nil {
		return nil, err
	}
	f, err := osOps{}.create(dir)
	if err != nil {
		return nil, err
	}
	d.synced[filepath.Base(f.Name())] = nil
	d.moved()
	return &crashingFile{file: f, disk: d}, nil
}

func (d *crashingDisk) rename(from, to string) error {
	if err := d.next(); err != nil {
		return err
	}
	d.synced[filepath.Base(to)] = d.synced[filepath.Base(from)]
	delete(d.synced, filepath.Base(from))
	d.moved()
	return os.Rename(from, to)
}

func (d *crashingDisk) remove(path string) error {
	if err := d.next(); err != nil {
		return err
	}
	delete(d.synced, filepath.Base(path))
	d.moved()
	return os.Remove(path)
}

func (d *crashingDisk) syncDir(string) error {
	if err := d.next(); err != nil || d.skipDirSync {
		return err
	}
	d.moved()
	d.durable, d.steps = d.steps[len(d.steps)-1], nil
	return nil
}

type crashingFile struct {
	file
	disk *crashingDisk
}

func (f *crashingFile) Write(b []byte) (int, error) {
	if err := f.disk.next(); err != nil {
		return 0, err
	}
	return f.file.Write(b)
}

func (f *crashingFile) Sync() error {
	if err := f.disk.next(); err != nil || f.disk.skipSync {
		return err
	}
	b, err := os.ReadFile(f.Name())
	f.disk.synced[filepath.Base(f.Name())] = b
	return err
}

func (f *crashingFile) Close() error {
	err := f.disk.next()
	return errors.Join(err, f.file.Close())
}

// settle rewrites the directory as after the crash. What was not synced is lost in full or in part.
func (d *crashingDisk) settle(t *testing.T) {
	names := d.durable
	if k := d.rnd.IntN(len(d.steps) + 1); k > 0 {
		names = d.steps[k-1]
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(d.dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range names {
		if err := os.WriteFile(filepath.Join(d.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// crashRun stages and commits stream over an old state, crashing before the given step. It reports how that
// went, and what is there afterwards. old and new are what that may be.
func crashRun(t *testing.T, stream, old []byte, crashAt int, seed uint64, fault func(*crashingDisk)) (committed bool, after contents, err error) {
	dir := t.TempDir()
	target := filepath.Join(dir, "state.db")
	if err := os.WriteFile(target, old, 0o600); err != nil {
		t.Fatal(err)
	}
	disk := newCrashingDisk(dir, newRand(seed), crashAt, map[string][]byte{"state.db": old})
	fault(disk)
	staged, err := stage(ctx, bytes.NewReader(stream), dir, disk)
	if err == nil {
		err = staged.Commit(target)
	}
	if err != nil && !errors.Is(err, errCrashed) {
		t.Fatal(err)
	}
	disk.settle(t)
	if err := Cleanup(dir); err != nil {
		t.Fatal(err)
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 1 || left[0].Name() != "state.db" {
		t.Fatalf("after the crash and Cleanup there is %v", left)
	}
	after, readErr := dumpFile(target)
	return err == nil, after, readErr
}

// crashEverywhere crashes at every step, with several outcomes of each, and says what went wrong.
func crashEverywhere(t *testing.T, fault func(*crashingDisk)) (wrong []string, commits int) {
	oldDB, newDB := newDB(t, newRand(20), 50), newDB(t, newRand(21), 1500)
	stream, fresh := newDB.stream(t)
	oldStream, stale := oldDB.stream(t)
	staged, err := Stage(ctx, bytes.NewReader(oldStream), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(staged.Path)
	if err != nil {
		t.Fatal(err)
	}
	for crashAt := 0; ; crashAt++ {
		done := false
		for seed := range uint64(6) {
			committed, after, err := crashRun(t, stream, old, crashAt, seed, fault)
			switch {
			case err != nil:
				wrong = append(wrong, "the state is damaged: "+err.Error())
			case reflect.DeepEqual(after, fresh):
			case committed:
				wrong = append(wrong, "a committed state is gone")
			case !reflect.DeepEqual(after, stale):
				wrong = append(wrong, "neither the old nor the new state")
			}
			done = committed
		}
		if done {
			return wrong, crashAt
		}
	}
}

func TestCrashLeavesOldOrNew(t *testing.T) {
	wrong, steps := crashEverywhere(t, func(*crashingDisk) {})
	if len(wrong) > 0 || steps < 6 {
		t.Errorf("%d steps: %s", steps, strings.Join(wrong, "; "))
	}
}

// The fsyncs are what that hangs on: without either one, the test above fails.
func TestMissingSyncsAreSeen(t *testing.T) {
	for name, fault := range map[string]func(*crashingDisk){
		"file":      func(d *crashingDisk) { d.skipSync = true },
		"directory": func(d *crashingDisk) { d.skipDirSync = true },
	} {
		if wrong, _ := crashEverywhere(t, fault); len(wrong) == 0 {
			t.Errorf("%s not synced: nothing seen", name)
		}
	}
}

// failingOps fails one step, and goes on working.
type failingOps struct {
	osOps
	fail string
	err  error
	free uint64

	noSync bool
}

func (o failingOps) step(name string) error {
	if o.fail == name {
		return o.err
	}
	return nil
}

func (o failingOps) freeBytes(dir string) (uint64, error) {
	if o.free > 0 {
		return o.free, nil
	}
	return 1 << 40, o.step("free")
}

func (o failingOps) create(dir string) (file, error) {
	if err := o.step("create"); err != nil {
		return nil, err
	}
	f, err := o.osOps.create(dir)
	return failingFile{f, o}, err
}

func (o failingOps) rename(from, to string) error {
	return errors.Join(o.step("rename"), o.osOps.rename(from, to))
}

type failingFile struct {
	file
	ops failingOps
}

func (f failingFile) Write(b []byte) (int, error) {
	if err := f.ops.step("write"); err != nil {
		return 0, err
	}
	return f.file.Write(b)
}
func (f failingFile) Sync() error {
	if f.ops.noSync {
		return nil
	}
	return errors.Join(f.ops.step("sync"), f.file.Sync())
}

func (f failingFile) Close() error { return errors.Join(f.ops.step("close"), f.file.Close()) }

func TestFailedStagingLeavesNothing(t *testing.T) {
	db := newDB(t, newRand(22), 100)
	stream, _ := db.stream(t)
	for _, fail := range []string{"free", "create", "write", "sync", "close"} {
		dir := t.TempDir()
		staged, err := stage(ctx, bytes.NewReader(stream), dir, failingOps{fail: fail, err: syscall.EIO})
		if staged != nil || !errors.Is(err, syscall.EIO) || errors.Is(err, ErrNoSpace) || refusal(err) != nil {
			t.Errorf("%s fails: %v", fail, err)
		}
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("%s fails: left behind %v", fail, left)
		}
	}
}

func TestFullDisk(t *testing.T) {
	db := newDB(t, newRand(23), 100)
	stream, _ := db.stream(t)
	dir := t.TempDir()
	for name, ops := range map[string]fileOps{
		"known before":     failingOps{free: reserveBytes},
		"while writing":    failingOps{fail: "write", err: syscall.ENOSPC},
		"while syncing":    failingOps{fail: "sync", err: syscall.ENOSPC},
		"creating a file":  failingOps{fail: "create", err: syscall.ENOSPC},
		"delayed to close": failingOps{fail: "close", err: syscall.ENOSPC},
	} {
		if _, err := stage(ctx, bytes.NewReader(stream), dir, ops); !errors.Is(err, ErrNoSpace) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("%s: left behind %v", name, left)
		}
	}
}

func TestStagedEndsOnce(t *testing.T) {
	db := newDB(t, newRand(24), 100)
	stream, _ := db.stream(t)
	dir := t.TempDir()
	target := filepath.Join(dir, "state.db")
	newStaged := func() *Staged {
		s, err := Stage(ctx, bytes.NewReader(stream), dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := newStaged()
	if err := s.Commit(filepath.Join(t.TempDir(), "state.db")); err == nil {
		t.Error("committed into another directory")
	}
	if err := s.Commit(target); err != nil {
		t.Error(err)
	}
	if err := s.Commit(target); err == nil {
		t.Error("committed twice")
	}
	if err := s.Discard(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(target); err != nil {
		t.Errorf("Discard after Commit: %v", err)
	}
	s = newStaged()
	if err := errors.Join(s.Discard(), s.Discard()); err != nil {
		t.Error(err)
	}
	if err := s.Commit(target); err == nil {
		t.Error("committed after Discard")
	}
}

func TestCleanupRemovesOnlyItsOwn(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"snapshot-123.tmp", "state.db", "raft.db", "snapshot-1.db", "other.tmp"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(Cleanup(dir), Cleanup(filepath.Join(dir, "no such directory"))); err != nil {
		t.Fatal(err)
	}
	var left []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{"other.tmp", "raft.db", "snapshot-1.db", "state.db"}; !reflect.DeepEqual(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
}
