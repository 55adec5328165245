package shard

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// diskTime makes every write to the log take so long.
func (c *cluster) diskTime(d time.Duration) {
	for _, log := range c.logs {
		log.mu.Lock()
		log.takes = d
		log.mu.Unlock()
	}
}

// The leader and its followers write an entry at the same time, so that a put takes as long as one write and not two.
// The planted fault sends when the leader has written.
func TestAPutTakesOneWriteToDisk(t *testing.T) {
	const write = 10 * time.Millisecond
	for _, late := range []bool{false, true} {
		bubble(t, 3, func(cfg *Config) { cfg.Faults.sendLate = late }, func(c *cluster) {
			_, leader := c.leader()
			c.mustPut(leader, "k", "v")
			time.Sleep(5 * time.Second)
			c.diskTime(write)
			for i := range 10 {
				begun := time.Now()
				c.mustPut(leader, "k", "w")
				took := time.Since(begun)
				if i > 0 && (took < 2*write) == late {
					t.Errorf("late %v: put %d took %v with writes of %v", late, i, took, write)
				}
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
}

// The followers have an entry that the leader's disk refused. Its outcome is unknown, and they agree on it.
func TestADiskThatFailsAfterTheEntryWasSent(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "v")
		time.Sleep(5 * time.Second)
		log := c.logs[name+"/1"]
		log.mu.Lock()
		log.refuse = errors.New("input/output error")
		log.mu.Unlock()
		if err := put(leader, "k", "in doubt"); !errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("put: %v", err)
		}
		_, next := c.leader(name)
		c.mustPut(next, "other", "v")
		values := map[string]bool{}
		for other, r := range c.replicas {
			if other != name {
				values[c.get(r, "k", next.Status().CommitIndex)] = true
			}
		}
		if len(values) != 1 {
			t.Errorf("the replicas differ: %v", values)
		}
		log.mu.Lock()
		log.refuse = nil
		log.mu.Unlock()
		time.Sleep(5 * time.Second)
		if v := c.get(leader, "k", next.Status().CommitIndex); !values[v] {
			t.Errorf("the old leader has %q, the others %v", v, values)
		}
	})
}

// A leader whose disk stalls falls silent, though its entries have left: others lead.
func TestALeaderThatStallsAfterItSentIsReplaced(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "v")
		time.Sleep(5 * time.Second)
		c.logs[name+"/1"].Stall(20 * time.Second)
		done := make(chan error, 1)
		go func() { done <- put(leader, "k", "w") }()
		begun := time.Now()
		_, next := c.leader(name)
		if d := time.Since(begun); d < 4*time.Second || d > 10*time.Second {
			t.Errorf("another one led after %v", d)
		}
		c.mustPut(next, "k", "x")
		if err := <-done; err == nil {
			t.Error("a put was acknowledged by a leader whose disk has not taken it")
		}
	})
}

// Nothing is committed by followers alone while the leader's own write goes on, and nothing is acknowledged.
func TestNothingIsCommittedBeforeTheLeaderHasIt(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "v")
		time.Sleep(5 * time.Second)
		before, _ := c.logs[name+"/1"].LastIndex()
		c.logs[name+"/1"].Stall(2 * time.Second)
		done := make(chan error, 1)
		go func() { done <- put(leader, "k", "w") }()
		time.Sleep(time.Second)
		ahead := 0
		for _, log := range c.logs {
			if last, _ := log.LastIndex(); last > before {
				ahead++
			}
		}
		if ahead != 2 {
			t.Errorf("%d followers have the entry that the leader is writing", ahead)
		}
		if commit := leader.Status().CommitIndex; commit > before {
			t.Errorf("%d is committed, and the leader has %d", commit, before)
		}
		if len(done) > 0 {
			t.Error("acknowledged")
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// StoreLogs implements raft.LogStore.
func (l *testLog) StoreLogs(entries []*raft.Log) error {
	l.mu.Lock()
	takes, refuse := l.takes, l.refuse
	l.mu.Unlock()
	time.Sleep(takes)
	if refuse != nil {
		return refuse
	}
	return l.Memory.StoreLogs(entries)
}

// StoreLog implements raft.LogStore.
func (l *testLog) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }
