package fsm

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// workAtPaces lets one worker per pace do 50 steps of 2 ms and returns how long all took together.
func workAtPaces(t *testing.T, newPaces func() []*Pace) (passed time.Duration) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var workers sync.WaitGroup
		for _, p := range newPaces() {
			workers.Go(func() {
				for range 50 {
					p.begin() <- struct{}{}
					time.Sleep(2 * time.Millisecond)
					p.end(2 * time.Millisecond)
				}
			})
		}
		workers.Wait()
		passed = time.Since(start)
		time.Sleep(time.Second) // the last turns are given back
	})
	return passed
}

func TestPaceIsOneShareForAll(t *testing.T) {
	shared := func() []*Pace {
		p := NewPace(3)
		return []*Pace{p, p}
	}
	// 100 steps, and after each but the last three times as long.
	if took, want := workAtPaces(t, shared), (100*8-6)*time.Millisecond; took != want {
		t.Errorf("two stores that share a pace took %v, want %v", took, want)
	}
	// The fault that this is to find: each store has a pace of its own.
	apart := func() []*Pace { return []*Pace{NewPace(3), NewPace(3)} }
	if took, want := workAtPaces(t, apart), (50*8-6)*time.Millisecond; took != want {
		t.Errorf("two stores with paces of their own took %v, want %v", took, want)
	}
}

// A step that took an hour, because the process was stopped meanwhile, does not keep the others waiting for hours.
func TestPaceRestsForABoundedTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPace(8)
		p.begin() <- struct{}{}
		p.end(time.Hour)
		start := time.Now()
		p.begin() <- struct{}{}
		if waited := time.Since(start); waited != maxRest {
			t.Errorf("the next turn came after %v, want %v", waited, maxRest)
		}
		p.end(0)
		synctest.Wait()
	})
}

// A compaction waits for the turns of its pace, in memory and in the file.
func TestCompactionWaitsForItsTurn(t *testing.T) {
	config := testConfig(tempPath(t))
	config.Pace = NewPace(0)
	s := open(t, config)
	for range 10 {
		apply(t, s, put("a", "1"))
	}
	config.Pace.begin() <- struct{}{} // another store's
	apply(t, s, &pb.CompactionRequest{Revision: 10})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.WaitCompacted(ctx, User, 10); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("compacted while another store had the turn: %v", err)
	}
	config.Pace.end(0)
	if err := s.WaitCompacted(t.Context(), User, 10); err != nil {
		t.Error(err)
	}
	if rows, _ := stored(t, s); len(rows) != 2 {
		t.Errorf("left %v", rows)
	}
}
