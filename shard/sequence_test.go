package shard

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// counter is a sequencer that a test drives. Answers take delay on their way,
// so what is in them is that old.
type counter struct {
	mu     sync.Mutex
	last   int64
	delay  time.Duration
	script []int64 // answered first, one after the other
	err    error
	asked  int
	tries  int // failed ones, a second each, before every answer
}

func (c *counter) Reserve(ctx context.Context, count func() int) (int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := count()
	for range c.tries {
		c.mu.Unlock()
		time.Sleep(time.Second)
		c.mu.Lock()
		n = count()
	}
	if n == 0 || c.err != nil {
		return 0, c.err
	}
	c.asked++
	first, delay := c.last+1, c.delay
	if len(c.script) > 0 {
		first, c.script = c.script[0], c.script[1:]
	} else {
		c.last += int64(n)
	}
	c.mu.Unlock()
	defer c.mu.Lock()
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return first, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// set changes what is in a counter.
func (c *counter) set(edit func(*counter)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	edit(c)
}

func (c *counter) latest() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

// times is how often it was asked and could answer.
func (c *counter) times() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked
}

func newCounter(delay time.Duration) *counter { return &counter{last: 1, delay: delay} }

// sequenced runs a test of three voters with a sequencer.
func sequenced(t *testing.T, s *counter, faults Faults, test func(c *cluster)) {
	bubble(t, 3, func(cfg *Config) { cfg.Sequencer, cfg.Faults = s, faults }, test)
}

// putAt writes and returns the revision.
func putAt(ctx context.Context, r *Replica, key, value string) (int64, error) {
	result, err := r.Propose(ctx, putRequest(key, value))
	if err := errors.Join(err, result.Err); err != nil {
		return 0, err
	}
	return result.Response.(*pb.PutResponse).Header.Revision, nil
}

// value is a key's at a revision that the state may not have reached, in a
// state that has applied index.
func (c *cluster) value(r *Replica, key string, index uint64, at int64) string {
	c.t.Helper()
	ctx, cancel := within(10 * time.Second)
	defer cancel()
	state, release, err := r.AcquireState(ctx, index)
	if err != nil {
		c.t.Fatal(err)
	}
	defer release()
	at = min(at, state.Revision(fsm.User))
	if at == 0 {
		return ""
	}
	answer, err := state.Range(ctx, fsm.User, &pb.RangeRequest{Key: []byte(key), Revision: at})
	if err != nil {
		c.t.Fatal(err)
	}
	if len(answer.Kvs) == 0 {
		return ""
	}
	return string(answer.Kvs[0].Value)
}

func TestRevisionsComeFromTheSequencer(t *testing.T) {
	s := newCounter(time.Millisecond)
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		ctx, cancel := within(5 * time.Second)
		defer cancel()
		first, err := putAt(ctx, leader, "first", "x")
		if err != nil || first != 2 {
			t.Fatalf("the first write is at %d: %v", first, err)
		}
		s.set(func(s *counter) { s.last = 1000 }) // other groups have been busy
		var mu sync.Mutex
		seen := make(map[int64]string)
		var all sync.WaitGroup
		for i := range 300 {
			all.Go(func() {
				key := fmt.Sprint("k", i)
				revision, err := putAt(ctx, leader, key, "v")
				mu.Lock()
				defer mu.Unlock()
				if err != nil || revision <= 1000 || revision > s.latest() || seen[revision] != "" {
					t.Errorf("put %s at %d, with %q: %v", key, revision, seen[revision], err)
				}
				seen[revision] = key
			})
		}
		all.Wait()
		if asked := s.times(); asked > 20 {
			t.Errorf("asked %d times for 300 concurrent writes", asked)
		}
		index, err := leader.ReadIndex(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range c.replicas {
			for revision, key := range seen {
				if c.value(r, key, index, revision) != "v" || c.value(r, key, index, revision-1) != "" {
					t.Errorf("%s is not at %d on %s", key, revision, r.cfg.Replica)
				}
			}
		}
	})
}

// Without a sequencer nothing is written, definitely, and reads go on.
func TestWithoutRevisionsNothingIsWritten(t *testing.T) {
	for name, outage := range map[string]func(*counter){
		"fails":           func(s *counter) { s.err = errors.New("no quorum") },
		"does not answer": func(s *counter) { s.delay = 10 * time.Second },
	} {
		t.Run(name, func(t *testing.T) {
			s := newCounter(time.Millisecond)
			sequenced(t, s, Faults{}, func(c *cluster) {
				_, leader := c.leader()
				c.mustPut(leader, "k", "old")
				s.set(outage)
				written := make(chan error, 1)
				go func() { written <- put(leader, "k", "new") }() // takes 5 s
				time.Sleep(100 * time.Millisecond)
				for range 10 {
					ctx, cancel := within(maxAskPatience + 100*time.Millisecond)
					if _, err := leader.ReadIndex(ctx); err != nil {
						t.Errorf("a read: %v", err)
					}
					cancel()
				}
				if err := <-written; !errors.Is(err, ErrNotProposed) {
					t.Errorf("the write: %v", err)
				}
				s.set(func(s *counter) { s.delay, s.err = time.Millisecond, nil })
				time.Sleep(10 * time.Second)
				if got := c.get(leader, "k", 0); got != "old" {
					t.Errorf("k = %q", got)
				}
				c.mustPut(leader, "k", "next")
			})
		})
	}
}

func TestCallersLeaveWhileRevisionsAreAskedFor(t *testing.T) {
	s := newCounter(2 * time.Second)
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		before := leader.Status().LastLogIndex
		impatient := func(key string) {
			ctx, cancel := within(time.Second)
			defer cancel()
			if _, err := putAt(ctx, leader, key, "x"); !errors.Is(err, ErrNotProposed) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", key, err)
			}
		}
		// All of them leave: there is no entry.
		var all sync.WaitGroup
		for i := range 10 {
			all.Go(func() { impatient(fmt.Sprint("gone", i)) })
		}
		all.Wait()
		time.Sleep(5 * time.Second)
		if after := leader.Status().LastLogIndex; after != before {
			t.Errorf("%d entries of nobody", after-before)
		}
		// Some leave: the others' entry has revisions to spare.
		for i := range 10 {
			all.Go(func() { impatient(fmt.Sprint("gone", i)) })
			all.Go(func() { c.mustPut(leader, fmt.Sprint("stays", i), "x") })
		}
		all.Wait()
		for i := range 10 {
			if c.get(leader, fmt.Sprint("gone", i), 0) != "" || c.get(leader, fmt.Sprint("stays", i), 0) != "x" {
				t.Errorf("of the %dth pair, not just one was written", i)
			}
		}
	})
}

// A group that cannot write for long must not fill up with what nobody waits
// for.
func TestThoseWhoLeaveTakeTheirMemoryWithThem(t *testing.T) {
	s := newCounter(time.Hour)
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		p := leader.life.Load().proposer
		for range 10 {
			var all sync.WaitGroup
			for range 2000 {
				all.Go(func() {
					ctx, cancel := within(time.Second)
					defer cancel()
					_, _ = putAt(ctx, leader, "k", string(make([]byte, 1000)))
				})
			}
			all.Wait()
		}
		if got := p.queuedBytes(); got != 0 {
			t.Errorf("%d bytes are still queued", got)
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if got := len(p.queue) + len(p.held); got > 5000 {
			t.Errorf("%d of 20000 requests are still queued", got)
		}
	})
}

// Answers that come out of order, as no good sequencer gives them: the state
// machine refuses the entry, and the requests in it are tried again and done
// once.
func TestAStaleFloorIsTriedAgain(t *testing.T) {
	s := newCounter(time.Millisecond)
	bubble(t, 3, func(cfg *Config) { cfg.Sequencer, cfg.PipelineRequests = s, 1 }, func(c *cluster) {
		name, leader := c.leader()
		s.set(func(s *counter) { s.script = []int64{100, 50, 120} })
		c.logs[name+"/1"].Stall(time.Second) // keeps the first in flight when the second is proposed
		var all sync.WaitGroup
		for i := range 2 {
			all.Go(func() { c.mustPut(leader, fmt.Sprint("k", i), "v") })
			time.Sleep(10 * time.Millisecond)
		}
		all.Wait()
		ctx, cancel := within(time.Second)
		defer cancel()
		state, release, err := leader.AcquireState(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		for key, want := range map[string]int64{"k0": 100, "k1": 120} {
			answer, err := state.Range(ctx, fsm.User, &pb.RangeRequest{Key: []byte(key)})
			if err != nil || len(answer.Kvs) != 1 || answer.Kvs[0].ModRevision != want || answer.Kvs[0].Version != 1 {
				t.Errorf("%s: %v, %v; want it at %d", key, answer, err, want)
			}
		}
		// Below what the state has, it is not even proposed.
		before := leader.Status().LastLogIndex
		s.set(func(s *counter) { s.script = []int64{60, 60, 60}; s.last = 200 })
		if revision, err := putAt(ctx, leader, "k2", "v"); err != nil || revision != 201 {
			t.Errorf("at %d: %v", revision, err)
		}
		if entries := leader.Status().LastLogIndex - before; entries != 1 {
			t.Errorf("one write took %d entries", entries)
		}
	})
}

// wrongTerm makes a leader put another term than its own into its entries,
// until the returned function is called: all of them are refused when they are
// applied.
func wrongTerm(l *life) (restore func()) {
	e := l.role.Load()
	wrong := &epoch{term: e.term - 1, serving: e.serving, over: e.over}
	l.role.Store(wrong)
	return func() { l.role.CompareAndSwap(wrong, e) }
}

func TestARefusedRequestIsNotTriedAgainWhenItsCallerHasLeft(t *testing.T) {
	s := newCounter(time.Millisecond)
	sequenced(t, s, Faults{}, func(c *cluster) {
		name, leader := c.leader()
		restore := wrongTerm(leader.life.Load())
		c.logs[name+"/1"].Stall(time.Second)
		short, cancel := within(500 * time.Millisecond)
		defer cancel()
		if _, err := putAt(short, leader, "k", "gone"); !errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("a write in flight: %v", err)
		}
		restore()
		time.Sleep(time.Second) // the entry is refused
		restore = wrongTerm(leader.life.Load())
		ctx, cancel := within(time.Second)
		defer cancel()
		if _, err := putAt(ctx, leader, "k", "gone"); !errors.Is(err, ErrNotProposed) && !errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("a write whose every entry was refused: %v", err)
		}
		if asked := s.times(); asked < 10 {
			t.Fatalf("it was tried %d times: this test proves nothing", asked)
		}
		written := make(chan error, 1)
		go func() { written <- put(leader, "other", "v") }()
		time.Sleep(100 * time.Millisecond)
		restore()
		if err := <-written; err != nil {
			t.Errorf("a write that was refused for a while: %v", err)
		}
		time.Sleep(time.Second)
		if c.get(leader, "k", 0) != "" || c.get(leader, "other", 0) != "v" {
			t.Error("what was given up was written, or what was not was lost")
		}
	})
}

func TestLeadershipLostWhileRevisionsAreAskedFor(t *testing.T) {
	s := newCounter(time.Hour)
	sequenced(t, s, Faults{}, func(c *cluster) {
		name, leader := c.leader()
		written := make(chan error, 1)
		go func() { written <- put(leader, "k", "lost") }()
		time.Sleep(100 * time.Millisecond)
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if err := leader.TransferLeadership(ctx, ""); err != nil {
			t.Fatal(err)
		}
		if err := <-written; !errors.Is(err, ErrNotLeader) {
			t.Errorf("the write: %v", err)
		}
		s.set(func(s *counter) { s.delay = time.Millisecond })
		_, next := c.leader(name)
		if err := next.TransferLeadership(ctx, name); err != nil {
			t.Fatal(err)
		}
		for !leader.Serving() {
			time.Sleep(time.Millisecond)
		}
		c.mustPut(leader, "other", "v") // nothing is stuck
		time.Sleep(time.Second)
		if got := c.get(leader, "k", 0); got != "" {
			t.Errorf("k = %q", got)
		}
	})
}

func TestCloseWhileRevisionsAreAskedFor(t *testing.T) {
	s := newCounter(time.Hour)
	sequenced(t, s, Faults{}, func(c *cluster) {
		name, leader := c.leader()
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() {
				if err := put(leader, fmt.Sprint("k", i), "v"); !errors.Is(err, ErrNotLeader) {
					t.Errorf("a write: %v", err)
				}
			})
			all.Go(func() {
				ctx, cancel := within(5 * time.Second)
				defer cancel()
				if _, err := leader.ReadIndex(ctx); err != nil && !errors.Is(err, ErrNotLeader) {
					t.Errorf("a read: %v", err)
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		c.stop(name)
		all.Wait()
	})
}

// Rule 6: a read that begins while an entry is in flight with revisions that
// others may have passed comes after that entry.
func TestReadsWaitForEntriesInFlight(t *testing.T) {
	for _, fault := range []bool{false, true} {
		s := newCounter(time.Millisecond)
		sequenced(t, s, Faults{ReadBeforeReserved: fault}, func(c *cluster) {
			name, leader := c.leader()
			c.mustPut(leader, "k", "old")
			c.logs[name+"/1"].Stall(time.Second)
			var all sync.WaitGroup
			all.Go(func() { c.mustPut(leader, "k", "new") })
			time.Sleep(100 * time.Millisecond)
			ctx, cancel := within(5 * time.Second)
			defer cancel()
			index, err := leader.ReadIndex(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if seen := c.get(leader, "k", index) == "new"; seen == fault {
				t.Errorf("with the fault %v planted, a read saw the write in flight: %v", fault, seen)
			}
			all.Wait()
		})
	}
}

// A read drops the question for revisions that nobody answers, and the answer
// is not used when it comes.
func TestReadsDropAnUnansweredQuestion(t *testing.T) {
	s := newCounter(time.Second)
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		var revision int64
		var all sync.WaitGroup
		all.Go(func() {
			ctx, cancel := within(5 * time.Second)
			defer cancel()
			var err error
			if revision, err = putAt(ctx, leader, "k", "v"); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(50 * time.Millisecond)
		before := s.latest()
		if before == 1 {
			t.Fatal("nothing has been handed out yet")
		}
		ctx, cancel := within(askPatience)
		defer cancel()
		if _, err := leader.ReadIndex(ctx); err != nil {
			t.Errorf("the read: %v", err)
		}
		all.Wait()
		if revision <= before {
			t.Errorf("the write is at %d, and %d had been handed out before the read", revision, before)
		}
	})
}

// A sequencer that was not reached is asked again: what counts for reads is
// the last time, and what has come meanwhile is part of the entry.
func TestAnAskThatIsRepeatedIsANewOne(t *testing.T) {
	s := newCounter(time.Millisecond)
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		s.set(func(s *counter) { s.tries = 1 })
		p := leader.life.Load().proposer
		before := leader.Status().LastLogIndex
		var all sync.WaitGroup
		all.Go(func() { c.mustPut(leader, "k", "v") })
		time.Sleep(900 * time.Millisecond)
		all.Go(func() { c.mustPut(leader, "l", "v") })
		first := p.unsettled()
		time.Sleep(100*time.Millisecond + time.Microsecond)
		second := p.unsettled()
		if len(first) != 1 || len(second) != 1 || first[0] == second[0] {
			t.Errorf("asks: %v, %v", first, second)
		}
		all.Wait()
		if got := p.unsettled(); len(got) != 0 {
			t.Errorf("%d asks have not been settled", len(got))
		}
		if entries := leader.Status().LastLogIndex - before; entries != 1 {
			t.Errorf("%d entries", entries)
		}
	})
}

func TestReadsDoNotStarveWrites(t *testing.T) {
	s := newCounter(3 * askPatience) // longer than a read waits at first
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		ctx, cancel := within(time.Minute)
		defer cancel()
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() {
				for ctx.Err() == nil {
					_, _ = leader.ReadIndex(ctx)
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		for i := range 5 {
			c.mustPut(leader, fmt.Sprint("k", i), "v")
		}
		cancel()
		all.Wait()
	})
}

// Snapshot reads elsewhere in the cluster, whose revisions reach this group
// faster than its own do, always raise the gate before an entry can pass.
func TestSnapshotsDoNotStarveWrites(t *testing.T) {
	s := newCounter(100 * time.Millisecond)
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		ctx, cancel := within(time.Minute)
		defer cancel()
		var all sync.WaitGroup
		all.Go(func() {
			for ctx.Err() == nil {
				all.Go(func() { _, _ = leader.ReadIndexAt(ctx, s.latest()) })
				time.Sleep(10 * time.Millisecond)
			}
		})
		for i := range 5 {
			c.mustPut(leader, fmt.Sprint("k", i), "v")
		}
		cancel()
		all.Wait()
	})
}

// The gate keeps out what comes later, and what is already in flight is waited
// for. What a snapshot read was answered never changes.
func TestSnapshotsAreComplete(t *testing.T) {
	for _, tc := range []struct {
		name     string
		faults   Faults
		complete bool // the entry in flight is in the snapshot
		stable   bool // the entry that is not proposed yet stays out
	}{
		{"as it is", Faults{}, true, true},
		{"not waiting for entries in flight", Faults{SnapshotBeforeInFlight: true}, false, true},
		{"without the gate", Faults{SnapshotWithoutGate: true, ReadBeforeReserved: true}, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newCounter(time.Millisecond)
			tune := func(cfg *Config) { cfg.Sequencer, cfg.Faults, cfg.PipelineRequests = s, tc.faults, 1 }
			bubble(t, 3, tune, func(c *cluster) {
				name, leader := c.leader()
				c.mustPut(leader, "k", "old")
				c.mustPut(leader, "l", "old")
				c.logs[name+"/1"].Stall(time.Second)
				var all sync.WaitGroup
				all.Go(func() { c.mustPut(leader, "k", "new") }) // in flight
				time.Sleep(10 * time.Millisecond)
				s.set(func(s *counter) { s.delay = 100 * time.Millisecond })
				all.Go(func() { c.mustPut(leader, "l", "new") }) // its revision is on the way
				time.Sleep(10 * time.Millisecond)
				at := s.latest()
				ctx, cancel := within(5 * time.Second)
				defer cancel()
				index, err := leader.ReadIndexAt(ctx, at)
				if err != nil {
					t.Fatal(err)
				}
				k, l := c.value(leader, "k", index, at), c.value(leader, "l", index, at)
				if (k == "new") != tc.complete {
					t.Errorf("the entry in flight: k = %q at %d", k, at)
				}
				all.Wait()
				if got := c.value(leader, "l", 0, at); (got == l) != tc.stable {
					t.Errorf("l = %q at %d, and later %q", l, at, got)
				}
			})
		})
	}
}

// A leader that has been replaced must not answer: its successor may have
// written at or below the revision before it was handed out to the read.
func TestAnIsolatedLeaderAnswersNoSnapshot(t *testing.T) {
	s := newCounter(time.Millisecond)
	sequenced(t, s, Faults{}, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "old")
		c.network.Isolate(name)
		c.logs[name+"/1"].Stall(20 * time.Second)
		go func() { _ = put(leader, "k", "lost") }()
		_, next := c.leader(name)
		c.mustPut(next, "k", "new")
		ctx, cancel := within(3 * time.Second)
		defer cancel()
		at := s.latest()
		if index, err := leader.ReadIndexAt(ctx, at); err == nil {
			t.Errorf("the isolated leader answered at %d: it has %q", at, c.value(leader, "k", index, at))
		}
		c.network.Rejoin(name)
		time.Sleep(30 * time.Second)
	})
}

// An entry whose outcome the leader does not learn may be applied later, so a
// snapshot that it belongs into, and a read that waits for it, get no answer.
// Raft tells of such entries before it tells that the leadership is lost.
func TestAnUnknownOutcomeAnswersNobody(t *testing.T) {
	for _, unknown := range []bool{false, true} {
		sequenced(t, newCounter(time.Millisecond), Faults{}, func(c *cluster) {
			_, leader := c.leader()
			p := leader.life.Load().proposer
			a := &ask{floor: 5, settled: make(chan struct{})}
			p.mu.Lock()
			p.sequence.asks = append(p.sequence.asks, a)
			p.mu.Unlock()
			ctx, cancel := within(10 * time.Second)
			defer cancel()
			var all sync.WaitGroup
			for name, read := range map[string]func() (uint64, error){
				"read":     func() (uint64, error) { return leader.ReadIndex(ctx) },
				"snapshot": func() (uint64, error) { return leader.ReadIndexAt(ctx, 5) },
			} {
				all.Go(func() {
					if _, err := read(); errors.Is(err, ErrNotLeader) != unknown {
						t.Errorf("unknown %v, %s: %v", unknown, name, err)
					}
				})
			}
			time.Sleep(time.Second) // the leadership is confirmed
			p.settled(a, unknown)
			all.Wait()
		})
	}
}

// Requests of all kinds go into entries with floors.
func TestCompactionTakesARevision(t *testing.T) {
	s := newCounter(time.Millisecond)
	sequenced(t, s, Faults{}, func(c *cluster) {
		_, leader := c.leader()
		c.mustPut(leader, "k", "v")
		s.set(func(s *counter) { s.last = 500 })
		data, err := proto.Marshal(&pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: 400}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := within(5 * time.Second)
		defer cancel()
		result, err := leader.Propose(ctx, fsm.Request{Data: data})
		if err != nil || result.Err != nil {
			t.Fatalf("compaction at a revision of another group: %v, %v", err, result.Err)
		}
		if revision, err := putAt(ctx, leader, "k", "v"); err != nil || revision != 502 {
			t.Errorf("the next write is at %d: %v", revision, err)
		}
	})
}
