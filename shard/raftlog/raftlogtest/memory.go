package raftlogtest

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Memory is a log and votes in memory, for tests of what stands on them: every
// write is durable when it returns, it outlives the replica that uses it, and
// a test can hold its writes up. Its methods may be called concurrently.
type Memory struct {
	*raft.InmemStore

	mu    sync.Mutex
	guard func() uint64
	until time.Time // writes take as long as that
	since time.Time // when the running one began; zero: none runs
}

// NewMemory returns an empty one, whose beginning may not go before Guard.
func NewMemory() *Memory {
	return &Memory{InmemStore: raft.NewInmemStore(), guard: func() uint64 { return 0 }}
}

// Guard says up to where the log's beginning may be removed.
func (l *Memory) Guard(guard func() uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.guard = guard
}

// StallUntil makes every write that begins from now on last until t.
func (l *Memory) StallUntil(t time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.until = t
}

// Stall is StallUntil a while from now.
func (l *Memory) Stall(d time.Duration) { l.StallUntil(time.Now().Add(d)) }

// StoreLogs implements raft.LogStore. Raft's main loop waits for it.
func (l *Memory) StoreLogs(entries []*raft.Log) error {
	l.mu.Lock()
	until := l.until
	l.since = time.Now()
	l.mu.Unlock()
	time.Sleep(time.Until(until))
	l.mu.Lock()
	l.since = time.Time{}
	l.mu.Unlock()
	return l.InmemStore.StoreLogs(entries)
}

// StoreLog implements raft.LogStore.
func (l *Memory) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }

// DeleteRange implements raft.LogStore: it keeps what the guard protects when
// the log's beginning goes.
func (l *Memory) DeleteRange(first, last uint64) error {
	l.mu.Lock()
	guard := l.guard
	l.mu.Unlock()
	if end, _ := l.LastIndex(); last < end {
		last = min(last, guard())
	}
	if last < first {
		return nil
	}
	return l.InmemStore.DeleteRange(first, last)
}

// Reset empties the log and keeps term and vote.
func (l *Memory) Reset() error {
	first, _ := l.FirstIndex()
	last, _ := l.LastIndex()
	if last == 0 {
		return nil
	}
	return l.InmemStore.DeleteRange(first, last)
}

// WriteStalled is how long the running write has been.
func (l *Memory) WriteStalled() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.since.IsZero() {
		return 0
	}
	return time.Since(l.since)
}

// Err is nil: memory does not fail.
func (l *Memory) Err() error { return nil }

// Close does nothing.
func (l *Memory) Close() error { return nil }
