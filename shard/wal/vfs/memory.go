package vfs

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// Memory is a file system in memory that remembers what of it is durable. The zero value is empty and ready.
// All methods may be called concurrently; nothing waits while it holds a lock, so it may be used in
// testing/synctest bubbles.
//
// It is as bad as a disk may be: the names in a directory are lost without SyncDir, one without the other;
// of what was written since the last Sync each sector is on the disk or not; sizes likewise; and a Sync that
// fails takes what it should have written for written.
type Memory struct {
	mu       sync.Mutex
	root     *node
	locks    map[string]bool
	capacity int64
	inject   func(Op) error
}

var _ FS = (*Memory)(nil)

// Inject has hook called before every operation, with no lock held, so that it may use m, wait, or count. An
// error from it is the operation's, which does nothing then; a Sync's also forgets what it had to write, as
// Linux does. A Fault says more precisely what is to happen. nil ends it.
func (m *Memory) Inject(hook func(Op) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.inject = hook
}

// SetCapacity bounds the sum of the files' sizes: what goes beyond it fails with ENOSPC. 0 is no bound.
func (m *Memory) SetCapacity(sizeBytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = sizeBytes
}

// begin asks the hook, and returns with the lock held.
func (m *Memory) begin(op Op) error {
	m.mu.Lock()
	hook := m.inject
	m.mu.Unlock()
	var err error
	if hook != nil {
		err = hook(op)
	}
	m.mu.Lock()
	if m.root == nil {
		m.root = newDir()
	}
	return err
}

func split(name string) []string {
	name = strings.TrimPrefix(filepath.ToSlash(filepath.Clean(name)), "/")
	if name == "." || name == "" {
		return nil
	}
	return strings.Split(name, "/")
}

func pathError(op Kind, name string, err error) error {
	return &fs.PathError{Op: string(op), Path: name, Err: err}
}

// lookup returns what has the name, nil if nothing has.
func (m *Memory) lookup(name string) *node {
	at := m.root
	for _, part := range split(name) {
		if at == nil || at.dir == nil {
			return nil
		}
		at = at.dir.names[part]
	}
	return at
}

// parent returns the directory of a file that exists or is to be made.
func (m *Memory) parent(op Kind, name string) (*directory, error) {
	at := m.lookup(filepath.Dir(name))
	if at == nil {
		return nil, pathError(op, name, fs.ErrNotExist)
	}
	if at.dir == nil {
		return nil, pathError(op, name, syscall.ENOTDIR)
	}
	return at.dir, nil
}

// MkdirAll implements FS.
func (m *Memory) MkdirAll(dir string) error {
	err := m.begin(Op{Kind: OpMkdir, Name: dir})
	defer m.mu.Unlock()
	if err != nil {
		return succeed(err)
	}
	at := m.root
	for _, part := range split(dir) {
		if at.dir.names[part] == nil {
			at.dir.set(part, newDir())
		}
		if at = at.dir.names[part]; at.dir == nil {
			return pathError(OpMkdir, dir, syscall.ENOTDIR)
		}
	}
	return nil
}

// Open implements FS.
func (m *Memory) Open(name string, create bool) (File, error) {
	err := m.begin(Op{Kind: OpOpen, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	n, err := m.open(name, create)
	if err != nil {
		return nil, err
	}
	return &memoryFile{m: m, n: n}, nil
}

func (m *Memory) open(name string, create bool) (*node, error) {
	dir, err := m.parent(OpOpen, name)
	if err != nil {
		return nil, err
	}
	n := dir.names[filepath.Base(name)]
	switch {
	case n == nil && !create:
		return nil, pathError(OpOpen, name, fs.ErrNotExist)
	case n == nil:
		n = &node{contents: newContents(), path: name}
		dir.set(filepath.Base(name), n)
	case n.dir != nil:
		return nil, pathError(OpOpen, name, syscall.EISDIR)
	}
	n.path = name // a crash may have brought another one back
	return n, nil
}

// List implements FS.
func (m *Memory) List(dir string) ([]string, error) {
	err := m.begin(Op{Kind: OpList, Name: dir})
	defer m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	d, err := m.parent(OpList, filepath.Join(dir, "any"))
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(d.names)), nil
}

// Rename implements FS.
func (m *Memory) Rename(from, to string) error {
	err := m.begin(Op{Kind: OpRename, Name: to, From: from})
	defer m.mu.Unlock()
	if err != nil {
		return succeed(err)
	}
	dir, err := m.parent(OpRename, from)
	if err != nil {
		return err
	}
	n := dir.names[filepath.Base(from)]
	switch {
	case filepath.Clean(filepath.Dir(from)) != filepath.Clean(filepath.Dir(to)):
		return pathError(OpRename, from, syscall.EXDEV)
	case n == nil:
		return pathError(OpRename, from, fs.ErrNotExist)
	}
	n.path = to
	dir.rename(filepath.Base(from), filepath.Base(to), n)
	return nil
}

// Remove implements FS.
func (m *Memory) Remove(name string) error {
	err := m.begin(Op{Kind: OpRemove, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return succeed(err)
	}
	dir, err := m.parent(OpRemove, name)
	if err != nil {
		return err
	}
	n := dir.names[filepath.Base(name)]
	switch {
	case n == nil:
		return pathError(OpRemove, name, fs.ErrNotExist)
	case n.dir != nil && len(n.dir.names) > 0:
		return pathError(OpRemove, name, syscall.ENOTEMPTY)
	}
	dir.set(filepath.Base(name), nil)
	return nil
}

// SyncDir implements FS.
func (m *Memory) SyncDir(dir string) error {
	err := m.begin(Op{Kind: OpSyncDir, Name: dir})
	defer m.mu.Unlock()
	if err != nil {
		return succeed(err)
	}
	d, err := m.parent(OpSyncDir, filepath.Join(dir, "any"))
	if err != nil {
		return err
	}
	d.sync()
	return nil
}

// Lock implements FS.
func (m *Memory) Lock(name string) (io.Closer, error) {
	name = filepath.Clean(name)
	err := m.begin(Op{Kind: OpLock, Name: name})
	defer m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if m.locks[name] {
		return nil, pathError(OpLock, name, ErrLocked)
	}
	if _, err := m.open(name, true); err != nil {
		return nil, err
	}
	if m.locks == nil {
		m.locks = map[string]bool{}
	}
	m.locks[name] = true
	return &memoryLock{m: m, name: name}, nil
}

type memoryLock struct {
	m    *Memory
	name string
	once sync.Once
}

func (l *memoryLock) Close() error {
	l.once.Do(func() {
		l.m.mu.Lock()
		defer l.m.mu.Unlock()
		delete(l.m.locks, l.name)
	})
	return nil
}

// Free implements FS.
func (m *Memory) Free(dir string) (uint64, error) {
	err := m.begin(Op{Kind: OpFree, Name: dir})
	defer m.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if _, err := m.parent(OpFree, filepath.Join(dir, "any")); err != nil {
		return 0, err
	}
	if m.capacity == 0 {
		return math.MaxInt64, nil
	}
	return uint64(max(0, m.capacity-m.root.sizeBytes())), nil
}

// room says whether a file may grow by so many bytes.
func (m *Memory) room(growth int64) error {
	if m.capacity > 0 && growth > 0 && m.root.sizeBytes()+growth > m.capacity {
		return syscall.ENOSPC
	}
	return nil
}

// Flip changes one bit of a file, on the disk and for readers.
func (m *Memory) Flip(name string, bit int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.root == nil {
		m.root = newDir()
	}
	n, err := m.open(name, false)
	if err != nil {
		return err
	}
	if bit < 0 || bit/8 >= n.contents.size {
		return fmt.Errorf("flip bit %d of %s: it has %d bytes", bit, name, n.contents.size)
	}
	n.contents.flip(bit)
	return nil
}
