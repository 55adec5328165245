package shard

import (
	"errors"
	"math"
	"sync"

	"github.com/hashicorp/raft"
)

// tail knows the sizes of the last entries of the log and decides when its
// beginning may go. Raft counts entries only, but one entry of kvd holds up to
// a mebibyte, so both the trigger and what is kept are bounded by bytes too.
type tail struct {
	limitEntries uint64
	limitBytes   int64
	keepEntries  uint64
	keepBytes    int64
	due          chan struct{} // capacity 1

	mu      sync.Mutex
	sizes   []uint32 // ring of the last keepEntries sizes; grows up to that
	next    int      // of the ring, once it is full
	entries uint64   // since the last truncation
	bytes   int64
}

func newTail(cfg Config) *tail {
	return &tail{
		limitEntries: cfg.SnapshotEntries, limitBytes: cfg.SnapshotBytes,
		keepEntries: cfg.TrailingEntries, keepBytes: cfg.TrailingBytes,
		due: make(chan struct{}, 1),
	}
}

func (t *tail) trigger() {
	select {
	case t.due <- struct{}{}:
	default:
	}
}

// sizeOf is what an entry takes in the log.
func sizeOf(entry *raft.Log) int64 { return int64(len(entry.Data)) + entryOverhead }

// entryOverhead is what an entry costs in the log besides its data, roughly.
const entryOverhead = 64

func (t *tail) add(entry *raft.Log) {
	size := sizeOf(entry)
	t.mu.Lock()
	defer t.mu.Unlock()
	if uint64(len(t.sizes)) < max(1, t.keepEntries) {
		t.sizes = append(t.sizes, uint32(min(size, math.MaxUint32)))
	} else {
		t.sizes[t.next] = uint32(min(size, math.MaxUint32))
		t.next = (t.next + 1) % len(t.sizes)
	}
	t.entries++
	t.bytes += size
	if t.entries >= t.limitEntries || t.bytes >= t.limitBytes {
		t.trigger()
	}
}

// restart begins a new count and returns how many entries to keep.
func (t *tail) restart() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.entries, t.bytes = 0, 0
	var kept uint64
	var sum int64
	for i := range t.sizes {
		size := int64(t.sizes[(t.next-1-i+2*len(t.sizes))%len(t.sizes)])
		if sum+size > t.keepBytes {
			break
		}
		sum += size
		kept++
	}
	return max(1, min(kept, t.keepEntries))
}

// watchTail truncates the log's beginning when enough has come behind it.
func (l *life) watchTail() {
	for {
		select {
		case <-l.tail.due:
		case <-l.done:
			return
		}
		kept := l.tail.restart()
		l.reload(func(c *raft.ReloadableConfig) { c.TrailingLogs = kept })
		// Fails while a configuration change is in flight; the next time that
		// enough has come tries again.
		err := l.raft.Snapshot().Error()
		if err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) && !errors.Is(err, raft.ErrRaftShutdown) {
			l.r.slog.Info("the log could not be truncated yet", "error", err)
		}
	}
}

// truncationGuard is the highest index that truncation of the log's beginning
// may delete: what the state machine has made durable (I9), and nothing that a
// snapshot under way still needs behind it, or that, on a witness, a data
// replica lacks.
func (r *Replica) truncationGuard() uint64 {
	l := r.life.Load()
	if l == nil {
		return 0
	}
	guard := l.snapshots.Guard()
	if r.Witness() {
		guard = min(guard, r.floor.Load())
	}
	return guard
}
