package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/shard"
)

// readTraffic runs many reads on a follower against a leader whose commit index
// moves on between its answers, and reports the first read that got an index
// taken before it arrived. Such a read could miss a write that was acknowledged
// before it began.
func readTraffic(t *testing.T, seed uint64, edit func(*Config)) (rounds, reads int64, stale error) {
	t.Helper()
	s, _, theirs, _ := follower(t, edit)
	var acknowledged atomic.Uint64
	var asked atomic.Int64
	theirs.onReadIndex = func(context.Context) (uint64, error) {
		asked.Add(1)
		index := acknowledged.Load() // taken as the request arrives
		time.Sleep(time.Millisecond) // the confirmation, and the way back
		return index, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	var writer, readers sync.WaitGroup
	writer.Go(func() {
		for ctx.Err() == nil {
			acknowledged.Add(1)
			time.Sleep(70 * time.Microsecond)
		}
	})
	var once sync.Once
	var count atomic.Int64
	for reader := range uint64(20) {
		readers.Go(func() {
			random := rand.New(rand.NewPCG(seed, reader))
			for range 100 {
				time.Sleep(time.Duration(random.IntN(1500)) * time.Microsecond)
				least := acknowledged.Load()
				index, err := s.router.readIndex(ctx, userGroup)
				count.Add(1)
				if err == nil && index < least {
					err = fmt.Errorf("read index %d is below %d, which was acknowledged before the read", index, least)
				}
				if err != nil {
					once.Do(func() { stale = err })
				}
			}
		})
	}
	readers.Wait()
	cancel()
	writer.Wait()
	return asked.Load(), count.Load(), stale
}

func TestRoundsAreShared(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		rounds, reads, stale := readTraffic(t, seed, nil)
		if stale != nil {
			t.Fatal(stale)
		}
		if reads != 2000 || rounds > reads/3 {
			t.Fatalf("%d rounds for %d reads", rounds, reads)
		}
	})
}

// The test above must see reads that join a round under way.
func TestJoiningASentRoundIsCaught(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		_, _, stale := readTraffic(t, seed, func(c *Config) { c.faults.joinSentRound = true })
		if stale == nil {
			t.Fatal("the fault does not show")
		}
	})
}

// One request is under way and one round gathers, however many reads there are.
func TestOneRoundAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, theirs, _ := follower(t, nil)
		var running, most atomic.Int64
		theirs.onReadIndex = func(context.Context) (uint64, error) {
			most.Store(max(most.Load(), running.Add(1)))
			time.Sleep(time.Second)
			running.Add(-1)
			return 1, nil
		}
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				if _, err := s.router.readIndex(t.Context(), userGroup); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if most.Load() != 1 || time.Since(start) != 2*time.Second {
			t.Fatalf("%d requests at once, %v in all", most.Load(), time.Since(start))
		}
		if len(theirs.advanced) != 2 || theirs.advanced[0] != "n1" {
			t.Fatalf("the leader hurried its index to %q", theirs.advanced)
		}
	})
}

// Reads change nothing: whatever goes wrong, they try again until their
// deadline.
func TestReadsAreRetried(t *testing.T) {
	for name, failure := range map[string]error{
		"not leader": shard.ErrNotLeader,
		"unknown":    shard.ErrUnknownOutcome,
		"lost":       errors.New("connection lost"),
		"never sent": errNeverSent,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, _, theirs, peers := follower(t, nil)
				var calls atomic.Int64
				theirs.onReadIndex = func(context.Context) (uint64, error) { return 5, nil }
				good := peers.handlers["n2"][methodReadIndex]
				peers.serve("n2", methodReadIndex, func(ctx context.Context, from string, payload []byte) ([]byte, error) {
					if calls.Add(1) < 4 {
						if errors.Is(failure, shard.ErrNotLeader) {
							return answer(codeNotLeader), nil
						}
						return nil, failure
					}
					return good(ctx, from, payload)
				})
				if index, err := s.router.readIndex(t.Context(), userGroup); index != 5 || err != nil {
					t.Fatalf("%d, %v", index, err)
				}
				calls.Store(-1 << 20)
				start := time.Now()
				_, _, err := s.router.acquire(t.Context(), userGroup, false)
				sameStatus(t, err, rpctypes.ErrGRPCTimeout)
				if took := time.Since(start); took != 5*time.Second {
					t.Fatalf("gave up after %v", took)
				}
			})
		})
	}
}

// A leader that neither answers nor disconnects holds reads up only until there
// is another one.
func TestReadsLeaveAPausedLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, mine, _, peers := follower(t, nil)
		paused := func(ctx context.Context, _ string, _ []byte) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		peers.serve("n2", methodReadIndex, paused)
		third := newFakeReplica(nil, shard.Leader{Node: "n3", Self: true})
		third.onReadIndex = func(context.Context) (uint64, error) { return 9, nil }
		cfg := testConfig(third, peers)
		cfg.Node = "n3"
		peers.serve("n3", methodReadIndex, newTestServer(t, cfg).Handlers()[methodReadIndex])
		start := time.Now()
		time.AfterFunc(300*time.Millisecond, func() { mine.elect("n3", false) })
		index, err := s.router.readIndex(t.Context(), userGroup)
		if err != nil || index != 9 {
			t.Fatalf("%d, %v", index, err)
		}
		if took := time.Since(start); took > 350*time.Millisecond {
			t.Fatalf("took %v", took)
		}
	})
}

// Without another leader, a round that hangs is given up and asked again.
func TestHangingRoundIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, theirs, _ := follower(t, nil)
		var calls atomic.Int64
		theirs.onReadIndex = func(ctx context.Context) (uint64, error) {
			if calls.Add(1) == 1 {
				<-ctx.Done()
				return 0, fmt.Errorf("%w: %w", shard.ErrNotProposed, ctx.Err())
			}
			return 3, nil
		}
		start := time.Now()
		index, err := s.router.readIndex(t.Context(), userGroup)
		if err != nil || index != 3 || calls.Load() != 2 {
			t.Fatalf("%d, %v after %d calls", index, err, calls.Load())
		}
		if took := time.Since(start); took > roundTimeout+maxBackoff {
			t.Fatalf("took %v", took)
		}
	})
}

// A read whose client leaves does not disturb the round it shares.
func TestCancelledReadLeavesRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, theirs, _ := follower(t, nil)
		release := make(chan struct{})
		theirs.onReadIndex = func(context.Context) (uint64, error) {
			<-release
			return 4, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _, err := s.router.acquire(ctx, userGroup, false)
			sameStatus(t, err, rpctypes.ErrGRPCCanceled)
		})
		wg.Go(func() {
			if index, err := s.router.readIndex(t.Context(), userGroup); index != 4 || err != nil {
				t.Errorf("%d, %v", index, err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(release)
		wg.Wait()
	})
}

func TestReadsEndWithTheRouter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, theirs, _ := follower(t, nil)
		theirs.onReadIndex = func(ctx context.Context) (uint64, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _, err := s.router.acquire(t.Context(), userGroup, false)
			sameStatus(t, err, rpctypes.ErrGRPCStopped)
		})
		synctest.Wait()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
	})
}
