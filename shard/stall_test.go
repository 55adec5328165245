package shard

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// Raft's followers vote on a VerifyLeader under a lock, and wait there for room
// in the channel to its main loop. If reads fill that channel while the main
// loop is stuck in a write, one voter waits with the lock held and the other
// for the lock; in virtual time that never ends.
func TestReadsDuringADiskStallDoNotFillRaftsChannel(t *testing.T) {
	loud := func(c *Config) { c.DiskStepDown, c.DiskFatal = time.Minute, 2*time.Minute }
	bubble(t, 3, loud, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "v")
		c.network.Isolate(name)
		time.Sleep(time.Millisecond)
		read := make(chan error, 1)
		go func() {
			ctx, cancel := within(time.Minute)
			defer cancel()
			_, err := leader.ReadIndex(ctx)
			read <- err
		}()
		time.Sleep(10 * time.Millisecond) // raft has asked for votes and gets none
		c.logs[name+"/1"].Stall(20 * time.Second)
		go func() { _ = put(leader, "k", "lost") }()
		time.Sleep(4 * time.Second)
		c.leader(name) // an election may need more than one attempt
		c.network.Rejoin(name)
		if err := <-read; !errors.Is(err, ErrNotLeader) {
			t.Errorf("a read on a leader that was replaced: %v", err)
		}
	})
}

// Raft forgets what lies in its channels when it shuts down. Closing waits until
// the main loop, here stuck in a write, has answered it all; nobody is left
// waiting.
func TestCloseDuringADiskStallAnswersEverything(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.logs[name+"/1"].Stall(20 * time.Second)
		answers := make(chan error, 20)
		for range cap(answers) {
			go func() { answers <- put(leader, "k", "v") }()
			time.Sleep(10 * time.Millisecond)
		}
		ctx, cancel := within(30 * time.Second)
		defer cancel()
		change := make(chan error, 1)
		go func() {
			_, err := leader.AddLearner(ctx, "n9/1", leader.Status().ConfigurationIndex)
			change <- err
		}()
		transfer := make(chan error, 1)
		go func() { transfer <- leader.TransferLeadership(ctx, "") }()
		read := make(chan error, 1)
		go func() {
			_, err := leader.ReadIndex(ctx)
			read <- err
		}()
		time.Sleep(time.Second)
		c.stop(name)
		for range cap(answers) {
			if err := <-answers; err == nil {
				t.Error("a write was acknowledged by a closed leader")
			}
		}
		if err := <-change; err == nil {
			t.Error("members were changed")
		}
		<-transfer // may have come about
		<-read     // may have been confirmed
	})
}

// Those who wait for a state must not keep a close from ending; in virtual time
// a lock that is held over the wait would.
func TestCloseWithReadersThatWait(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		_, release, err := leader.AcquireState(context.Background(), 0)
		if err != nil {
			t.Fatal(err)
		}
		waited := make(chan error, 1)
		go func() {
			_, _, err := leader.AcquireState(context.Background(), 1<<40)
			waited <- err
		}()
		time.Sleep(time.Millisecond)
		time.AfterFunc(5*time.Second, release)
		c.stop(name)
		if err := <-waited; !errors.Is(err, ErrClosed) {
			t.Errorf("a reader that waited for what never came: %v", err)
		}
	})
}

func TestLeadershipIsNotHandedToALaggingVoter(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		lagging, _ := c.follower(name)
		c.network.Isolate(lagging)
		for i := range maxTransferLag + 10 {
			c.mustPut(leader, "k", fmt.Sprint(i))
		}
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if err := leader.TransferLeadership(ctx, lagging); !errors.Is(err, ErrNoTarget) {
			t.Errorf("transfer to a voter that lags: %v", err)
		}
		if err := leader.TransferLeadership(ctx, ""); err != nil {
			t.Errorf("transfer to whoever can: %v", err)
		}
		if next, _ := c.leader(name); next == lagging {
			t.Error("the voter that lags leads")
		}
		c.network.Rejoin(lagging)
	})
}
