// Package sim runs whole kvd nodes in virtual time over a network in memory,
// breaks them at random from one seed, and judges what their clients saw.
package sim

import (
	"sync"
	"time"

	"kvd/shard/raftlog/raftlogtest"
)

// disk is what survives a node's crash: its logs. The state files lie in a
// real directory, because bbolt wants one.
type disk struct {
	dir string

	mu      sync.Mutex
	logs    map[string]*raftlogtest.Memory // by directory
	stalled time.Time
}

func newDisk(dir string) *disk { return &disk{dir: dir, logs: make(map[string]*raftlogtest.Memory)} }

func (d *disk) log(dir string, guard func() uint64) *raftlogtest.Memory {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.logs[dir]
	if l == nil {
		l = raftlogtest.NewMemory()
		l.StallUntil(d.stalled)
		d.logs[dir] = l
	}
	l.Guard(guard)
	return l
}

// stall makes every write to the logs take until then.
func (d *disk) stall(until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stalled = until
	for _, l := range d.logs {
		l.StallUntil(until)
	}
}
