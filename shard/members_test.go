package shard

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Raft forgets the answer of a learner that comes before it counts the learner
// as a voter; then only another entry commits the change that made it one.
func TestAChangeThatOnlyAnotherEntryCommitsIsPushed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		entry, failed := make(chan struct{}, maxPushes), errors.New("leadership lost")
		l := &life{}
		for _, want := range []error{nil, failed} {
			began := time.Now()
			got := l.pushed(func() error { <-entry; return want }, func() { entry <- struct{}{} })
			if !errors.Is(got, want) || time.Since(began) != firstPush {
				t.Errorf("%v after %v", got, time.Since(began))
			}
		}
		pushes := 0
		if err := l.pushed(func() error { return nil }, func() { pushes++ }); err != nil || pushes > 0 {
			t.Errorf("%v after %d pushes of a change that commits at once", err, pushes)
		}
		l.tasks.Wait()
	})
}

// A group that has lost its quorum is not pushed for ever.
func TestPushesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pushes, lost := 0, make(chan struct{})
		l := &life{}
		time.AfterFunc(time.Hour, func() { close(lost) })
		if err := l.pushed(func() error { <-lost; return errors.New("lost") }, func() { pushes++ }); err == nil || pushes != maxPushes {
			t.Errorf("%v after %d pushes", err, pushes)
		}
		l.tasks.Wait()
	})
}
