// Package sim runs whole kvd nodes in virtual time over a network in memory,
// breaks them at random from one seed, and judges what their clients saw.
package sim

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// disk is what survives a node's crash: its logs. The state files lie in a
// real directory, because bbolt wants one.
type disk struct {
	dir string

	mu      sync.Mutex
	logs    map[string]*memoryLog // by directory
	stalled time.Time
}

func newDisk(dir string) *disk { return &disk{dir: dir, logs: make(map[string]*memoryLog)} }

func (d *disk) log(dir string, guard func() uint64) *memoryLog {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.logs[dir]
	if l == nil {
		l = &memoryLog{InmemStore: raft.NewInmemStore(), disk: d}
		d.logs[dir] = l
	}
	l.guard = guard
	return l
}

// stall makes every write to the logs take until then.
func (d *disk) stall(until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stalled = until
}

func (d *disk) stalledUntil() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stalled
}

// memoryLog is a log whose every write is durable when it returns.
type memoryLog struct {
	*raft.InmemStore
	disk    *disk
	guard   func() uint64
	writing atomic.Pointer[time.Time] // since when
}

// StoreLogs waits as long as the disk is stalled, while raft's main loop waits
// for it.
func (l *memoryLog) StoreLogs(entries []*raft.Log) error {
	now := time.Now()
	l.writing.Store(&now)
	defer l.writing.Store(nil)
	time.Sleep(time.Until(l.disk.stalledUntil()))
	return l.InmemStore.StoreLogs(entries)
}

func (l *memoryLog) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }

// WriteStalled implements shard.LogStore.
func (l *memoryLog) WriteStalled() time.Duration {
	if since := l.writing.Load(); since != nil {
		return time.Since(*since)
	}
	return 0
}

// DeleteRange keeps what the guard protects when the log's beginning goes.
func (l *memoryLog) DeleteRange(first, last uint64) error {
	end, err := l.LastIndex()
	if err != nil {
		return err
	}
	if last < end {
		last = min(last, l.guard())
	}
	if last < first {
		return nil
	}
	return l.InmemStore.DeleteRange(first, last)
}

func (l *memoryLog) Reset() error {
	first, _ := l.FirstIndex()
	last, _ := l.LastIndex()
	if last == 0 {
		return nil
	}
	return l.InmemStore.DeleteRange(first, last)
}

func (l *memoryLog) Err() error   { return nil }
func (l *memoryLog) Close() error { return nil }
