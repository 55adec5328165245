package fsm

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// watermark is a number that only grows and that others wait for.
type watermark struct {
	value atomic.Uint64

	mu      sync.Mutex
	waiters []waiter
	err     error
}

type waiter struct {
	value uint64
	done  chan struct{}
}

func (w *watermark) load() uint64 { return w.value.Load() }

// advance raises the mark and wakes those it has reached.
func (w *watermark) advance(value uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.value.Store(value)
	w.wake(func(waiting waiter) bool { return waiting.value <= value })
}

// fail ends all waiting, now and later, for values that have not been reached. The first error stays.
func (w *watermark) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.wake(func(waiter) bool { return true })
}

func (w *watermark) wake(due func(waiter) bool) {
	w.waiters = slices.DeleteFunc(w.waiters, func(waiting waiter) bool {
		if !due(waiting) {
			return false
		}
		close(waiting.done)
		return true
	})
}

// wait returns when the mark has reached value, with nil; or with the error of fail or of ctx.
func (w *watermark) wait(ctx context.Context, value uint64) error {
	if w.load() >= value {
		return nil
	}
	w.mu.Lock()
	if w.load() >= value || w.err != nil {
		err := w.err
		w.mu.Unlock()
		if w.load() >= value {
			return nil
		}
		return err
	}
	done := make(chan struct{})
	w.waiters = append(w.waiters, waiter{value, done})
	w.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
		w.mu.Lock()
		w.waiters = slices.DeleteFunc(w.waiters, func(waiting waiter) bool { return waiting.done == done })
		w.mu.Unlock()
		if w.load() >= value {
			return nil
		}
		return ctx.Err()
	}
	if w.load() >= value {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}
