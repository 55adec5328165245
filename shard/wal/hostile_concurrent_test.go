package wal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard/wal/vfs"
)

// Many replicas write at once, while the power is cut at some of the moments: each has what it was told.
func TestConcurrentCrashes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const writers = 8
	w := newTrial(seeded(seed), writers, Options{SegmentBytes: hostileSegmentBytes})
	n := 0
	c := &crasher{w: w, crashes: 1, seed: seed, skip: func() bool { n++; return n%9 != 0 }}
	err := c.run(func(w *trial) error {
		errs := make([]error, writers)
		var group sync.WaitGroup
		for i, r := range w.replicas {
			group.Go(func() {
				part := *w
				part.choose, part.replicas, part.cache = seeded(seed+uint64(i)), []*modelReplica{r}, 5000*(i%2)-1
				errs[i] = part.oneReplica(r, 60**deepFlag)
			})
		}
		group.Wait()
		return errors.Join(errs...)
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d crashes", c.seen)
}

// oneReplica does what a replica may do beside others.
func (w *trial) oneReplica(r *modelReplica, steps int) error {
	if err := w.create(r); err != nil {
		return err
	}
	all := []func(*modelReplica) error{w.append, w.append, w.append, w.vote, w.key, w.beginning, w.end, w.all, w.burst, w.reset, w.misplaced}
	for range steps {
		if err := all[w.choose(len(all), "step")](r); err != nil {
			return w.failure(r.id.String(), err)
		}
	}
	return nil
}

// counted is a trial whose disk takes a millisecond for a sync, and counts.
func counted(t *testing.T, replicas int) (w *trial, count func(vfs.Kind) int) {
	w = newTrial(seeded(1), replicas, Options{})
	var mu sync.Mutex
	ops := map[vfs.Kind]int{}
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	for _, r := range w.replicas {
		if err := w.create(r); err != nil {
			t.Fatal(err)
		}
	}
	w.fs.Inject(func(op vfs.Op) error {
		if op.Kind == vfs.OpSync {
			time.Sleep(time.Millisecond)
		}
		mu.Lock()
		defer mu.Unlock()
		ops[op.Kind]++
		return nil
	})
	return w, func(kind vfs.Kind) int {
		mu.Lock()
		defer mu.Unlock()
		return ops[kind]
	}
}

// Replicas that write at the same time share their syncs, and nobody waits for more than the sync that runs and
// the next one.
func TestSyncsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const replicas, rounds = 64, 20
		w, count := counted(t, replicas)
		began := time.Now()
		var group sync.WaitGroup
		for _, r := range w.replicas {
			group.Go(func() {
				for i := range uint64(rounds) {
					if err := r.store.StoreLog(makeEntry(1+i, 1, 1, 100)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		if syncs := count(vfs.OpSync); syncs > 2*rounds+2 || syncs < rounds {
			t.Errorf("%d syncs for %d rounds of %d replicas", syncs, rounds, replicas)
		}
		if took := time.Since(began); took > (2*rounds+2)*time.Millisecond {
			t.Errorf("took %v", took)
		}
		if err := w.log.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A replica alone pays one write and one sync.
func TestAloneOneWriteOneSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, count := counted(t, 1)
		s := w.replicas[0].store
		for i := range uint64(10) {
			if err := s.StoreLogs([]*raft.Log{makeEntry(2*i+1, 1, 1, 100), makeEntry(2*i+2, 1, 1, 100)}); err != nil {
				t.Fatal(err)
			}
		}
		if writes, syncs := count(vfs.OpWrite), count(vfs.OpSync); writes != 10 || syncs != 10 {
			t.Errorf("%d writes, %d syncs", writes, syncs)
		}
		if err := w.log.Close(); err != nil {
			t.Error(err)
		}
	})
}

// While the disk stalls, what is there can be read, other replicas too, and the log says for how long it stalls.
func TestStalledDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := counted(t, 2)
		a, b := w.replicas[0].store, w.replicas[1].store
		if err := errors.Join(a.StoreLog(makeEntry(1, 1, 1, 100)), b.StoreLog(makeEntry(5, 1, 1, 100))); err != nil {
			t.Fatal(err)
		}
		w.fs.Inject(func(op vfs.Op) error {
			if op.Kind == vfs.OpSync {
				time.Sleep(time.Minute)
			}
			return nil
		})
		done := make(chan error, 2)
		began := time.Now()
		go func() { done <- a.StoreLog(makeEntry(2, 1, 1, 100)) }()
		time.Sleep(10 * time.Second)
		if err := readable(a, b); err != nil {
			t.Error(err)
		}
		if stalled := w.log.WriteStalled(); stalled < 9*time.Second || stalled > 11*time.Second || time.Since(began) != 10*time.Second {
			t.Errorf("stalled for %v after %v", stalled, time.Since(began))
		}
		if err := <-done; err != nil || w.log.WriteStalled() != 0 {
			t.Errorf("%v, stalled %v", err, w.log.WriteStalled())
		}
		if err := w.log.Close(); err != nil {
			t.Error(err)
		}
	})
}

// readable checks that the two stores have their first entries, and that the one under way is not among them.
func readable(a, b *Store) error {
	last, err := a.LastIndex()
	if err != nil || last != 1 {
		return fmt.Errorf("last %d, %w", last, err)
	}
	if err := a.GetLog(2, new(raft.Log)); err != raft.ErrLogNotFound {
		return fmt.Errorf("an entry is read before it is durable: %w", err)
	}
	_, err = b.Get([]byte("other"))
	if !errors.Is(err, ErrKeyNotFound) {
		return err
	}
	return errors.Join(a.GetLog(1, new(raft.Log)), b.GetLog(5, new(raft.Log)))
}

// Reads go on beside writes and truncations, and see whole entries or none.
func TestReadsBesideWrites(t *testing.T) {
	w := newTrial(seeded(2), 1, Options{SegmentBytes: hostileSegmentBytes})
	w.cache = 2000
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	r := w.replicas[0]
	if err := w.create(r); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := readAll(r.store); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range uint64(400) {
		entries := []*raft.Log{makeEntry(2*i+1, 1, 2*i+1, 300), makeEntry(2*i+2, 1, 2*i+2, 30)}
		if err := r.store.StoreLogs(entries); err != nil {
			t.Fatal(err)
		}
		if r.setGuard(2 * i); i%7 == 6 {
			if err := r.store.DeleteRange(1, 2*i-4); err != nil {
				t.Fatal(err)
			}
		}
	}
	close(done)
	group.Wait()
	if err := w.log.Close(); err != nil {
		t.Error(err)
	}
}

func readAll(s *Store) error {
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	for index := max(first, 1); index <= last; index++ {
		var got raft.Log
		err := s.GetLog(index, &got)
		if err == raft.ErrLogNotFound {
			if now, err := s.FirstIndex(); err != nil || now <= index {
				return fmt.Errorf("entry %d is not there, but the first one is %d: %w", index, now, err)
			}
			continue
		}
		if err != nil {
			return err
		}
		if want := makeEntry(index, 1, index, 300-270*int((index+1)%2)); !sameEntry(&got, want) {
			return fmt.Errorf("entry %d is damaged", index)
		}
	}
	return nil
}

// Whoever is refused because the log closes has not written, and everybody else has.
func TestCloseBesideWrites(t *testing.T) {
	w := newTrial(seeded(3), 8, Options{SegmentBytes: hostileSegmentBytes})
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	for _, r := range w.replicas {
		if err := w.create(r); err != nil {
			t.Fatal(err)
		}
	}
	var enough, group sync.WaitGroup
	enough.Add(len(w.replicas))
	for _, r := range w.replicas {
		group.Go(func() {
			for n := 0; ; n++ {
				if n == 20 {
					enough.Done()
				}
				entry := makeEntry(r.durable.last()+1, 1, uint64(n), 200)
				err := r.store.StoreLog(entry)
				if errors.Is(err, ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				r.durable = r.durable.with(append(r.durable.entries, entry))
			}
		})
	}
	enough.Wait()
	if err := w.log.Close(); err != nil {
		t.Error(err)
	}
	group.Wait()
	log, _, err := inspect(w.fs.Crash(1), w.options, w.allowed())
	if err := errors.Join(err, closeLog(log)); err != nil {
		t.Error(err)
	}
}
