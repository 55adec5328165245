package shard

import (
	"errors"
	"testing"
	"time"
)

// Raft's followers vote on a VerifyLeader under a lock, and wait there for room
// in the channel to its main loop. If reads fill that channel while the main
// loop is stuck in a write, one voter waits with the lock held and the other
// for the lock; in virtual time that never ends.
func TestReadsDuringADiskStallDoNotFillRaftsChannel(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "v")
		c.network.Isolate(name)
		time.Sleep(time.Millisecond)
		read := make(chan error, 1)
		go func() {
			ctx, cancel := within(20 * time.Second)
			defer cancel()
			_, err := leader.ReadIndex(ctx)
			read <- err
		}()
		time.Sleep(10 * time.Millisecond) // raft has asked for votes and gets none
		c.logs[name+"/1"].stall(4900 * time.Millisecond)
		go func() { _ = put(leader, "k", "lost") }()
		time.Sleep(4 * time.Second)
		c.network.Rejoin(name)
		if err := <-read; !errors.Is(err, ErrNotLeader) {
			t.Errorf("a read on a leader that was replaced: %v", err)
		}
	})
}
