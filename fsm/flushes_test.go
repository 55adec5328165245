package fsm

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
)

// mostFlushes lets many stores write, and returns how many have written at the same time.
func mostFlushes(t *testing.T, turns int, fault bool) (most int) {
	t.Helper()
	var mu sync.Mutex
	now := 0
	synctest.Test(t, func(t *testing.T) {
		limiter, dir := NewFlushes(turns), t.TempDir()
		gate := make(chan struct{}) // no write ends while others can begin
		var stores []*Store
		for i := range 8 {
			config := testConfig(filepath.Join(dir, fmt.Sprint(i)))
			config.Flushes, config.faults.unlimited = limiter, fault
			config.faults.flushFails = func() error {
				mu.Lock()
				now++
				most = max(most, now)
				mu.Unlock()
				<-gate
				mu.Lock()
				now--
				mu.Unlock()
				return nil
			}
			s := open(t, config)
			apply(t, s, put("a", "1"))
			stores = append(stores, s)
		}
		var flushes sync.WaitGroup
		for _, s := range stores {
			flushes.Go(func() {
				if err := s.Flush(t.Context(), 1); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		apply(t, stores[0], put("a", "2")) // nobody who waits for a turn holds up apply or reads
		if get(t, stores[7], "a") != "1" || get(t, stores[0], "a") != "2" {
			t.Error("what was applied cannot be read")
		}
		close(gate)
		flushes.Wait()
		for _, s := range stores {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return most
}

func TestFlushesAreLimited(t *testing.T) {
	for _, turns := range []int{1, 3} {
		if most := mostFlushes(t, turns, false); most != turns {
			t.Errorf("%d flushes at a time, want %d", most, turns)
		}
	}
	if most := mostFlushes(t, 3, true); most <= 3 {
		t.Errorf("the fault was not noticed: %d flushes at a time", most)
	}
}
