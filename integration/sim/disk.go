// Package sim runs whole kvd nodes in virtual time over a network in memory,
// breaks them at random from one seed, and judges what their clients saw.
package sim

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"kvd/shard/wal/vfs"
)

// disk is what a node's machine has. The raft logs are in a file system in
// memory that loses in a power cut whatever was not synced; the states are in a
// real directory, because bbolt wants one, and lose nothing.
type disk struct {
	dir  string    // the node's data directory
	lies time.Time // from then on a sync does nothing and says that it has; zero: never

	mu      sync.Mutex
	logs    *vfs.Memory
	stalled time.Time
}

func newDisk(dir string, lies bool) *disk {
	d := &disk{dir: dir}
	if lies {
		d.lies = time.Now().Add(time.Minute) // there has to be something to lose
	}
	d.use(d.empty())
	return d
}

// empty is a file system with the data directory, which the other one has, too.
func (d *disk) empty() *vfs.Memory {
	logs := new(vfs.Memory)
	err := logs.MkdirAll(d.dir)
	for dir := d.dir; dir != filepath.Dir(dir); {
		dir = filepath.Dir(dir)
		err = errors.Join(err, logs.SyncDir(dir))
	}
	if err != nil {
		panic(err)
	}
	return logs
}

// use makes it the file system of the logs.
func (d *disk) use(logs *vfs.Memory) {
	logs.Inject(d.before)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.logs = logs
}

// logFS is the file system of the logs.
func (d *disk) logFS() *vfs.Memory {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.logs
}

// before comes before every operation on the logs.
func (d *disk) before(op vfs.Op) error {
	d.mu.Lock()
	until := d.stalled
	d.mu.Unlock()
	if op.Kind != vfs.OpWrite && op.Kind != vfs.OpSync {
		return nil
	}
	time.Sleep(time.Until(until))
	if op.Kind == vfs.OpSync && !d.lies.IsZero() && time.Now().After(d.lies) {
		return &vfs.Fault{}
	}
	return nil
}

// stall makes every write to the logs take until then.
func (d *disk) stall(until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stalled = until
}

// cut notes what the next process finds if the machine loses its power now, or,
// if kill, only the process ends. Nothing may write meanwhile. What runs now
// goes on with a disk of its own, which next replaces when it has ended.
func (d *disk) cut(seed uint64, kill bool) (next func() error, err error) {
	kept := d.dir + ".kept"
	if err := os.CopyFS(kept, os.DirFS(d.dir)); err != nil {
		return nil, err
	}
	logs := d.logFS()
	if kill {
		logs = logs.Kill()
	} else {
		logs = logs.Crash(seed)
	}
	return func() error {
		d.use(logs)
		return errors.Join(os.RemoveAll(d.dir), os.Rename(kept, d.dir))
	}, nil
}

// wipe makes it empty. Nothing may run on it.
func (d *disk) wipe() error {
	d.use(d.empty())
	return os.RemoveAll(d.dir)
}
