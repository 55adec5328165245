package fsm

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"
)

// TestWatchModel lets a few feeds of one store, each with its own patience, follow random changes, flushes,
// compactions, and the replacement of the store, and compares what they get with a simple model.
func TestWatchModel(t *testing.T) {
	seeds(t, 20, func(t *testing.T, seed uint64) {
		l, dir, opened := newEventLog(seed), t.TempDir(), 0
		var s *Store
		feeds, sizes := make([]*followed, 3), make([]int64, 3)
		applying, taking := false, false
		grow := func() {
			applying = true
			defer func() { applying = false }()
			if _, err := s.Apply(s.AppliedIndex()+1, 1, l.entry(t)); err != nil {
				t.Fatal(err)
			}
		}
		take := func(f *followed) {
			taking = true
			_, err := f.take(t.Context(), l, 1+l.IntN(2000))
			if taking = false; err != nil {
				t.Fatal(err)
			}
		}
		watch := func(f *followed) {
			if err := f.watch(l); err != nil && !f.closed {
				t.Fatal(err)
			}
		}
		openNext := func() *Store {
			config := testConfig(filepath.Join(dir, fmt.Sprint(opened)))
			config.faults.catchingUp = func() { // others apply while a watch reads
				for !applying && l.oneIn(4) {
					grow()
				}
				if l.oneIn(10) {
					feeds[l.IntN(len(feeds))].cancel(l)
				}
			}
			config.faults.publishing = func() { // others take before what they see is published
				if !taking && l.oneIn(4) {
					take(feeds[l.IntN(len(feeds))])
				}
				if l.oneIn(10) {
					watch(feeds[l.IntN(len(feeds))])
				}
			}
			opened++
			s := open(t, config)
			s.hub.limits, s.hub.most = l.limits(), 1+l.IntN(40)
			return s
		}
		s = openNext()
		for i := range feeds {
			sizes[i] = []int64{400, 2000, 1 << 20}[i]
			feeds[i] = follow(s, sizes[i])
		}
		for range 400 {
			f := feeds[l.IntN(len(feeds))]
			switch n := l.IntN(24); {
			case n < 10:
				grow()
				if s.Revision(User) != l.revision || s.CompactRevision(User) != l.compacted {
					t.Fatalf("revision %d, compacted %d instead of %d, %d", s.Revision(User), s.CompactRevision(User), l.revision, l.compacted)
				}
			case n < 14:
				watch(f)
			case n < 15:
				f.cancel(l)
			case n < 20:
				take(f)
			case n < 21:
				taking = true
				if err := f.takeAll(t.Context(), l, 1+l.IntN(2000)); err != nil {
					t.Fatal(err)
				}
				taking = false
			case n < 22:
				if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
					t.Fatal(err)
				}
			case n < 23:
				if err := s.WaitCompacted(t.Context(), User, l.compacted); err != nil {
					t.Fatal(err)
				}
			case l.oneIn(3):
				if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
					t.Fatal(err)
				}
				copyFile(t, s, filepath.Join(dir, fmt.Sprint(opened)))
				s.Retire()
				old := s
				s = openNext()
				for i, f := range feeds {
					<-f.Done()
					feeds[i] = f.moveTo(t, l, s, sizes[i])
				}
				if err := old.Close(); err != nil {
					t.Fatal(err)
				}
			}
		}
		taking = true
		for _, f := range feeds {
			if err := f.takeAll(t.Context(), l, 1000); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
		if n := s.hub.watching.Load(); n != 0 || len(s.hub.keys) != 0 || s.hub.ranges.Len() != 0 {
			t.Fatalf("%d watches, %d keys and %d ranges are left", n, len(s.hub.keys), s.hub.ranges.Len())
		}
	})
}

// delivered is what a concurrent consumer has written down: a delivery, or the beginning of a watch.
type delivered struct {
	id    int64
	begin *follower
	Delivery
	progress int64 // what Progress said after this; 0 if it was not ok
}

// TestWatchConcurrently lets consumers watch, take and cancel while apply, the flusher and the compactor go on, and
// compares afterwards.
func TestWatchConcurrently(t *testing.T) {
	seeds(t, 4, func(t *testing.T, seed uint64) {
		const entries = 1500
		l := newEventLog(seed)
		s := open(t, testConfig(tempPath(t)))
		s.hub.limits, s.hub.most = l.limits(), 1+l.IntN(40)
		var lMu sync.Mutex // of l, for the revisions that consumers begin at
		var consumers sync.WaitGroup
		stop := make(chan struct{})
		logs := make([][]delivered, 4)
		for i := range logs {
			consumers.Go(func() { logs[i] = consumeRandomly(t, s, l, &lMu, stop, seed+uint64(i), int64(300)<<(3*i)) })
		}
		for range entries {
			lMu.Lock()
			entry := l.entry(t)
			lMu.Unlock()
			if _, err := s.Apply(s.AppliedIndex()+1, 1, entry); err != nil {
				t.Fatal(err)
			}
		}
		close(stop)
		consumers.Wait()
		for i, log := range logs {
			if err := verify(l, log); err != nil {
				t.Errorf("consumer %d: %v", i, err)
			}
		}
	})
}

func consumeRandomly(t *testing.T, s *Store, l *eventLog, lMu *sync.Mutex, stop <-chan struct{}, seed uint64, maxBytes int64) (log []delivered) {
	random := newGenerator(seed)
	f := s.NewFeed(maxBytes)
	defer f.Close()
	var id int64
	var live []int64
	watch := func() {
		id++
		key, end := random.key(), random.rangeEnd()
		lMu.Lock()
		from := max(1, l.compacted) + random.Int64N(l.revision-max(1, l.compacted)+4)
		lMu.Unlock()
		if err := f.Watch(id, key, end, from); err != nil {
			return // compacted meanwhile
		}
		live = append(live, id)
		log = append(log, delivered{id: id, begin: newFollower(key, end, from)})
	}
	take := func() bool {
		all, err := f.Take(t.Context(), 1+random.IntN(5000), 1<<20)
		if err != nil {
			t.Error(err)
			return false
		}
		for _, d := range all {
			log = append(log, delivered{id: d.ID, Delivery: d})
		}
		if revision, ok := f.Progress(); ok && len(log) > 0 {
			log[len(log)-1].progress = revision
		}
		return len(all) > 0
	}
	for range 10 {
		watch()
	}
	for {
		select {
		case <-stop:
			for take() {
			}
			return log
		case <-f.Ready():
			take()
		}
		if random.oneIn(20) {
			watch()
		}
		if random.oneIn(40) {
			i := random.IntN(len(live))
			f.Cancel(live[i])
			log = append(log, delivered{id: live[i], begin: &follower{ended: true}})
		}
	}
}

// verify compares what a consumer has written down with all that has happened.
func verify(l *eventLog, log []delivered) error {
	watches := map[int64]*follower{}
	var progress int64
	for _, d := range log {
		switch {
		case d.begin != nil && d.begin.ended:
			delete(watches, d.id)
		case d.begin != nil:
			watches[d.id] = d.begin
		case watches[d.id] == nil:
			return fmt.Errorf("a delivery for watch %d, which is not there", d.id)
		default:
			if err := watches[d.id].check(l, d.Delivery); err != nil {
				return fmt.Errorf("watch %d: %w", d.id, err)
			}
			if watches[d.id].ended {
				delete(watches, d.id)
			}
		}
		if d.progress == 0 {
			continue
		}
		if d.progress < progress {
			return fmt.Errorf("progress falls from %d to %d", progress, d.progress)
		}
		progress = d.progress
		for id, w := range watches {
			if want := l.expected(w.span, w.next); len(want) > 0 && want[0].revision <= progress {
				return fmt.Errorf("progress %d, but watch %d has not seen %v", progress, id, want[0])
			}
		}
	}
	for id, w := range watches {
		if want := l.expected(w.span, w.next); len(want) > 0 {
			return fmt.Errorf("in the end watch %d has not seen %v", id, want[0])
		}
	}
	return nil
}

// TestIntervals compares the audiences of random keys with those found by looking at all.
func TestIntervals(t *testing.T) {
	seeds(t, 5, func(t *testing.T, seed uint64) {
		g := newGenerator(seed)
		s := open(t, testConfig(tempPath(t)))
		f := s.NewFeed(1 << 20)
		defer f.Close()
		name := func() []byte { return fmt.Append(nil, g.IntN(200)) }
		for id := range int64(2000) {
			end := name()
			if g.oneIn(10) {
				end = []byte{0}
			}
			if g.oneIn(10) {
				end = nil
			}
			if err := f.Watch(id, name(), end, 2); err != nil {
				t.Fatal(err)
			}
			f.Cancel(g.Int64N(id + 1))
			key := name()
			s.hub.find(key)
			found := map[*watch]bool{}
			for _, a := range s.hub.found {
				for _, w := range a.watches {
					if found[w] {
						t.Fatalf("watch %d was found twice", w.id)
					}
					found[w] = true
				}
			}
			for _, w := range f.watches {
				if found[w] != w.span.Contains(key) {
					t.Fatalf("%d watches: %q in %q..%q: %t", len(f.watches), key, w.span.Start, w.span.End, found[w])
				}
			}
		}
	})
}
