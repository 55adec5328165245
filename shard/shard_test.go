package shard

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func TestProposeIsAppliedOnEveryReplica(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		var all sync.WaitGroup
		for i := range 500 {
			all.Go(func() { c.mustPut(leader, fmt.Sprint("k", i), fmt.Sprint("v", i)) })
		}
		all.Wait()
		ctx, cancel := within(5 * time.Second)
		defer cancel()
		index, err := leader.ReadIndex(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_, follower := c.follower(name)
		for _, r := range []*Replica{leader, follower} {
			for i := range 500 {
				if got := c.get(r, fmt.Sprint("k", i), index); got != fmt.Sprint("v", i) {
					t.Fatalf("k%d = %q", i, got)
				}
			}
		}
		// 500 concurrent requests must share entries: that is the proposer's point.
		if entries := leader.Status().LastLogIndex; entries > 100 {
			t.Errorf("500 concurrent requests took %d log entries", entries)
		}
	})
}

func TestAFollowerRefusesDefinitely(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, _ := c.leader()
		_, follower := c.follower(name)
		if err := put(follower, "k", "v"); !errors.Is(err, ErrNotLeader) {
			t.Errorf("put on a follower: %v", err)
		}
		ctx, cancel := within(time.Second)
		defer cancel()
		if _, err := follower.ReadIndex(ctx); !errors.Is(err, ErrNotLeader) {
			t.Errorf("read index on a follower: %v", err)
		}
	})
}

// A leader cut off from its followers must answer no read, and call a write
// that it has in its log unknown, not failed.
func TestAnIsolatedLeaderConfirmsNothing(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "old")
		c.network.Isolate(name)
		c.logs[name+"/1"].Stall(20 * time.Second) // raft cannot even notice that its lease has run out
		write := make(chan error, 1)
		go func() {
			ctx, cancel := within(4 * time.Second)
			defer cancel()
			_, err := leader.Propose(ctx, putRequest("k", "lost"))
			write <- err
		}()
		_, next := c.leader(name)
		c.mustPut(next, "k", "new")
		ctx, cancel := within(3 * time.Second)
		defer cancel()
		if index, err := leader.ReadIndex(ctx); err == nil {
			t.Errorf("the isolated leader confirmed a read at %d: it would answer %q", index, c.get(leader, "k", 0))
		}
		if err := <-write; !errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("a write in an isolated leader's log: %v", err)
		}
		c.network.Rejoin(name)
		time.Sleep(30 * time.Second)
		if got := c.get(leader, "k", 0); got != "new" {
			t.Errorf("after healing the old leader has %q", got)
		}
	})
}

// The same situation with the confirmation switched off: the test above must
// be able to fail.
func TestWithoutConfirmationAnIsolatedLeaderIsStale(t *testing.T) {
	bubble(t, 3, func(c *Config) { c.Faults.ReadWithoutConfirmation = true }, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "old")
		c.network.Isolate(name)
		c.logs[name+"/1"].Stall(20 * time.Second)
		go func() { _ = put(leader, "k", "lost") }()
		_, next := c.leader(name)
		c.mustPut(next, "k", "new")
		ctx, cancel := within(3 * time.Second)
		defer cancel()
		index, err := leader.ReadIndex(ctx)
		if err != nil || c.get(leader, "k", index) != "old" {
			t.Errorf("the planted fault did not show: index %d, error %v", index, err)
		}
		c.network.Rejoin(name)
		time.Sleep(30 * time.Second)
	})
}

// Learners answer heartbeats like voters, and raft's VerifyLeader counts them.
func TestOnlyVotersConfirm(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		_, leader := c.leader()
		l := leader.life.Load()
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if _, err := leader.AddLearner(ctx, "n9/1", leader.Status().ConfigurationIndex); err != nil {
			t.Fatal(err)
		}
		term := l.role.Load().term
		now := time.Now()
		others := []raft.ServerID{}
		for _, m := range leader.Status().Members {
			if m.ID != leader.cfg.Replica && m.Voter {
				others = append(others, m.ID)
			}
		}
		for _, tc := range []struct {
			name string
			sent map[raft.ServerID]time.Time
			want bool
		}{
			{"nobody", nil, false},
			{"only a learner", map[raft.ServerID]time.Time{"n9/1": now}, false},
			{"one of two other voters", map[raft.ServerID]time.Time{others[0]: now}, true},
			{"an old answer", map[raft.ServerID]time.Time{others[0]: now.Add(-time.Hour)}, false},
		} {
			acked := func(peer raft.ServerID, _ uint64) time.Time { return tc.sent[peer] }
			if got := !l.confirmedAt(term, acked).Before(now); got != tc.want {
				t.Errorf("%s: confirmed = %v", tc.name, got)
			}
			if !l.confirmedAt(term+1, acked).IsZero() {
				t.Errorf("%s: confirmed for a term that this replica does not lead", tc.name)
			}
		}
	})
}

func TestMembersChangeOneStepAtATime(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		_, leader := c.leader()
		ctx, cancel := within(30 * time.Second)
		defer cancel()
		if _, err := leader.AddLearner(ctx, "n4/1", 0); err == nil {
			t.Error("a change without a configuration index was accepted: raft would not check it")
		}
		before := leader.Status().ConfigurationIndex
		index, err := leader.AddLearner(ctx, "n4/1", before)
		if err != nil {
			t.Fatal(err)
		}
		// The state machine learns configurations through ApplyBatch.
		if got := leader.Status().ConfigurationIndex; got != index {
			t.Errorf("the state has configuration %d, raft %d", got, index)
		}
		if _, err := leader.Promote(ctx, "n4/1", before); err == nil {
			t.Error("a step planned on an old configuration was accepted")
		}
		c.members = append(c.members, "n4")
		c.start("n4", 1, nil)
		for leader.Match("n4/1") < leader.Status().CommitIndex {
			time.Sleep(100 * time.Millisecond)
		}
		if _, err := leader.Promote(ctx, "n4/1", index); err != nil {
			t.Fatal(err)
		}
		voters := 0
		for _, m := range leader.Status().Members {
			if m.Voter {
				voters++
			}
		}
		if voters != 4 {
			t.Errorf("%d voters", voters)
		}
	})
}

func TestLeadershipIsHandedOver(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		to, _ := c.follower(name)
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if err := leader.TransferLeadership(ctx, "n9"); !errors.Is(err, ErrNoTarget) {
			t.Errorf("transfer to a stranger: %v", err)
		}
		if err := leader.TransferLeadership(ctx, to); err != nil {
			t.Fatal(err)
		}
		if got, _ := c.leader(name); got != to {
			t.Errorf("%s leads, not %s", got, to)
		}
	})
}

func TestErrorsOfRaftAreClassified(t *testing.T) {
	for err, want := range map[error]error{
		raft.ErrNotLeader:                    ErrNotLeader,
		raft.ErrLeadershipTransferInProgress: ErrNotLeader,
		raft.ErrLeadershipLost:               ErrUnknownOutcome,
		raft.ErrRaftShutdown:                 ErrUnknownOutcome, // raft gives it for committed entries too
		raft.ErrAbortedByRestore:             ErrUnknownOutcome,
		errors.New("disk"):                   ErrUnknownOutcome,
		nil:                                  ErrUnknownOutcome,
	} {
		if got := classify(err); !errors.Is(got, want) {
			t.Errorf("%v is classified as %v", err, got)
		}
	}
}

func TestOverloadSheds(t *testing.T) {
	bubble(t, 3, func(c *Config) { c.MaxQueueBytes = 4 << 10; c.MaxBatchBytes = 1 << 10 }, func(c *cluster) {
		name, leader := c.leader()
		c.logs[name+"/1"].Stall(3 * time.Second)
		var mu sync.Mutex
		got := make(map[error]int)
		var all sync.WaitGroup
		for i := range 200 {
			all.Go(func() {
				err := put(leader, fmt.Sprint("k", i), string(make([]byte, 200)))
				mu.Lock()
				defer mu.Unlock()
				if errors.Is(err, ErrOverloaded) {
					err = ErrOverloaded
				}
				got[err]++
			})
		}
		all.Wait()
		if got[nil] == 0 || got[ErrOverloaded] == 0 || got[nil]+got[ErrOverloaded] != 200 {
			t.Errorf("answers: %v", got)
		}
		if err := put(leader, "k", string(make([]byte, 2<<10))); !errors.Is(err, ErrTooLarge) {
			t.Errorf("a request over the limit: %v", err)
		}
	})
}

// A caller that gives up while its request is queued must hear that it is not
// in the log, and it must not get there later.
func TestAnAbandonedRequestIsNotProposed(t *testing.T) {
	bubble(t, 3, func(c *Config) { c.MaxInflight = 1 }, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "first")
		c.logs[name+"/1"].Stall(3 * time.Second)
		go func() { _ = put(leader, "other", "x") }() // takes the only slot
		time.Sleep(100 * time.Millisecond)
		ctx, cancel := within(time.Second)
		defer cancel()
		_, err := leader.Propose(ctx, putRequest("k", "abandoned"))
		if !errors.Is(err, ErrNotProposed) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an abandoned request: %v", err)
		}
		time.Sleep(10 * time.Second)
		_, leader = c.leader()
		c.mustPut(leader, "last", "x")
		if got := c.get(leader, "k", 0); got != "first" {
			t.Errorf("k = %q", got)
		}
	})
}

func TestAStalledDiskSilencesTheLeader(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.logs[name+"/1"].Stall(15 * time.Second)
		go func() { _ = put(leader, "k", "v") }()
		_, next := c.leader(name)
		c.mustPut(next, "k", "next")
		time.Sleep(20 * time.Second)
		if c.fatal.Load() != nil {
			t.Error("a stall below the limit ended the process")
		}
	})
}

func TestADiskStalledForGoodEndsTheProcess(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.logs[name+"/1"].Stall(45 * time.Second)
		go func() { _ = put(leader, "k", "v") }()
		time.Sleep(50 * time.Second)
		if c.fatal.Swap(nil) == nil {
			t.Error("the replica goes on")
		}
	})
}

func TestAFailedLogEndsTheProcess(t *testing.T) {
	bubble(t, 1, nil, func(c *cluster) {
		name, _ := c.leader()
		log := c.logs[name+"/1"]
		log.mu.Lock()
		log.failWith = errors.New("input/output error")
		log.mu.Unlock()
		time.Sleep(2 * time.Second)
		if c.fatal.Swap(nil) == nil {
			t.Error("the replica goes on")
		}
	})
}

// An entry that the state machine does not know must halt the replica: one
// that skipped it would differ from the others.
func TestAnUnknownEntryHaltsTheReplica(t *testing.T) {
	bubble(t, 1, nil, func(c *cluster) {
		_, leader := c.leader()
		index := leader.Status().AppliedIndex
		f := leader.life.Load().raft.Apply([]byte("\xff not an entry"), time.Second)
		if err := f.Error(); err != nil {
			t.Fatal(err)
		}
		if c.fatal.Swap(nil) == nil {
			t.Error("the replica goes on")
		}
		if err := put(leader, "k", "v"); !errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("a write after the halt: %v", err)
		}
		if got := leader.Status().AppliedIndex; got != index {
			t.Errorf("applied %d after the halt at %d", got, index)
		}
	})
}

func TestCloseAnswersEverything(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		for _, other := range c.members {
			if other != name {
				c.network.Isolate(other)
			}
		}
		var all sync.WaitGroup
		for i := range 50 {
			all.Go(func() {
				if err := put(leader, fmt.Sprint("k", i), "v"); err == nil {
					t.Error("a write was acknowledged without a quorum")
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		c.stop(name)
		all.Wait()
		if err := put(leader, "k", "v"); !errors.Is(err, ErrNotLeader) {
			t.Errorf("after close: %v", err)
		}
		if _, _, err := leader.AcquireState(t.Context(), 0); !errors.Is(err, ErrClosed) {
			t.Errorf("state after close: %v", err)
		}
	})
}

func TestTheTailIsBoundedByBytes(t *testing.T) {
	tail := newTail(Config{SnapshotEntries: 100, SnapshotBytes: 10_000, TrailingEntries: 50, TrailingBytes: 5000})
	due := func() bool {
		select {
		case <-tail.due:
			return true
		default:
			return false
		}
	}
	for range 99 {
		tail.add(&raft.Log{})
	}
	if due() {
		t.Error("due before its time")
	}
	tail.add(&raft.Log{})
	if !due() {
		t.Error("not due after 100 entries")
	}
	if keep := tail.restart(); keep != 50 {
		t.Errorf("keeps %d small entries", keep)
	}
	for range 10 {
		tail.add(&raft.Log{Data: make([]byte, 1000)})
	}
	if !due() {
		t.Error("not due after 10,000 bytes")
	}
	if keep := tail.restart(); keep != 4 {
		t.Errorf("keeps %d large entries", keep)
	}
}
