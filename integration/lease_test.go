package integration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"kvd/integration/cluster"
)

// Leases of real processes in both strategies: whoever is killed or paused, a lease that is renewed lives, and one that
// is not ends. Many leases at a time are at home in many shards, so that the victim leads some of them.

func inBothStrategies(t *testing.T, test func(t *testing.T, c *cluster.Cluster)) {
	t.Parallel()
	for name, config := range map[string]cluster.Config{"full": {Nodes: 3, Args: quick}, "consistent": sharded(3, 8, 2, quick...)} {
		config.Links = true
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, cluster.Run(t, config))
		})
	}
}

// A lease lives for much longer than an election takes on a busy machine, so that only the nodes can lose one.
const (
	holders  = 12
	leaseTTL = 12 * time.Second
)

// holder renews a lease with a key by way of whichever node answers.
type holder struct {
	c     *cluster.Cluster
	lease clientv3.LeaseID
	key   string

	mu    sync.Mutex
	until time.Time // it was told to have the lease until then
	fault error     // the lease ended before
}

// hold begins to renew leases; stop ends that and fails the test if one of them was lost.
func hold(t *testing.T, c *cluster.Cluster) (all []*holder, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(liveness(t))
	var renewing sync.WaitGroup
	for i := range holders {
		h := &holder{c: c, key: fmt.Sprintf("held/%d", i)}
		cl := client(t, c, c.Names()[i%3])
		must(t, cluster.Until(ctx, func(ctx context.Context) error {
			began := time.Now()
			granted, err := cl.Grant(ctx, int64(leaseTTL/time.Second))
			if err != nil {
				return err
			}
			h.lease, h.until = granted.ID, began.Add(leaseTTL)
			_, err = cl.Put(ctx, h.key, "held", clientv3.WithLease(h.lease))
			return err
		}))
		all = append(all, h)
		renewing.Go(func() { h.renew(ctx, i) })
	}
	return all, func() {
		t.Helper()
		cancel()
		renewing.Wait()
		for _, h := range all {
			must(t, h.fault)
		}
	}
}

func (h *holder) renew(ctx context.Context, first int) {
	for i := first; ctx.Err() == nil; i++ {
		cl, err := h.c.Client(h.c.Names()[i%3])
		if err != nil {
			continue
		}
		sent := time.Now()
		attempt, cancel := context.WithTimeout(ctx, leaseTTL/12)
		_, err = cl.KeepAliveOnce(attempt, h.lease)
		cancel()
		if err == nil {
			h.mu.Lock()
			h.until = sent.Add(leaseTTL)
			h.mu.Unlock()
		}
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			h.lost(time.Now(), "a keep-alive says so")
			return
		}
		if err == nil {
			select {
			case <-time.After(leaseTTL / 5):
			case <-ctx.Done():
			}
		}
	}
}

// lost notes when a lease was seen to be gone.
func (h *holder) lost(at time.Time, why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if at.Before(h.until) && h.fault == nil {
		h.fault = fmt.Errorf("lease %x ended %v too early: %s", h.lease, h.until.Sub(at), why)
	}
}

// look asks a node for the leases' keys, and returns how many there are.
func look(t *testing.T, c *cluster.Cluster, name string, all []*holder) int {
	t.Helper()
	ctx, found := liveness(t), 0
	for _, h := range all {
		var resp *clientv3.GetResponse
		must(t, cluster.Until(ctx, func(ctx context.Context) (err error) {
			resp, err = client(t, c, name).Get(ctx, h.key)
			return err
		}))
		if found += len(resp.Kvs); len(resp.Kvs) == 0 {
			h.lost(time.Now(), "its key is gone")
		}
	}
	return found
}

// watchOver looks at the leases for a time.
func watchOver(t *testing.T, c *cluster.Cluster, name string, all []*holder, d time.Duration) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		if n := look(t, c, name, all); n != holders {
			t.Fatalf("%d of %d leases have their keys", n, holders)
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// awaitTheEnd waits until all leases that nobody renews any more have ended, and their keys with them.
func awaitTheEnd(t *testing.T, c *cluster.Cluster, name string, all []*holder) {
	t.Helper()
	eventually(t, "all leases have ended", func(context.Context) (bool, error) { return look(t, c, name, all) == 0, nil })
	for _, h := range all {
		must(t, h.fault)
	}
	eventually(t, "no lease is left without its key", func(ctx context.Context) (bool, error) {
		left, err := client(t, c, name).Leases(ctx)
		return err == nil && len(left.Leases) == 0, err
	})
}

func TestLeasesOutliveTheirLeader(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, c *cluster.Cluster) {
		all, stop := hold(t, c)
		victim := leader(t, c)
		survivor := others(c, victim)[0]
		must(t, c.Node(victim).Kill())
		watchOver(t, c, survivor, all, leaseTTL+2*time.Second)
		stop()
		awaitTheEnd(t, c, survivor, all)
	})
}

// A leader that is paused for longer than its leases live must not end them when it goes on.
func TestLeasesOutliveAPause(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, c *cluster.Cluster) {
		all, stop := hold(t, c)
		victim := leader(t, c)
		survivor := others(c, victim)[0]
		must(t, c.Node(victim).Pause())
		watchOver(t, c, survivor, all, leaseTTL+time.Second)
		must(t, c.Node(victim).Resume())
		watchOver(t, c, victim, all, 2*time.Second)
		stop()
		awaitTheEnd(t, c, victim, all)
	})
}

// A leader that is cut off, and does not notice at once, neither renews leases nor ends them.
func TestLeasesOutliveAPartition(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, c *cluster.Cluster) {
		all, stop := hold(t, c)
		victim := leader(t, c)
		for _, other := range others(c, victim) {
			c.Link(victim, other).Freeze()
			c.Link(other, victim).Freeze()
		}
		watchOver(t, c, others(c, victim)[0], all, leaseTTL+time.Second)
		c.HealAll()
		watchOver(t, c, victim, all, 2*time.Second)
		stop()
		awaitTheEnd(t, c, victim, all)
	})
}

// The client's sessions: who goes without a word loses the lock when the lease ends, and not before.
func TestSessionsPassTheLockOn(t *testing.T) {
	inBothStrategies(t, func(t *testing.T, c *cluster.Cluster) {
		ctx := liveness(t)
		session := func(name string, ttl int) *concurrency.Session {
			s, err := concurrency.NewSession(client(t, c, name), concurrency.WithTTL(ttl))
			must(t, err)
			return s
		}
		first, second := session("n1", 3), session("n2", 60)
		lock, next := concurrency.NewMutex(first, "{lock}"), concurrency.NewMutex(second, "{lock}") // all keys in one shard
		must(t, lock.Lock(ctx))
		if err := next.TryLock(ctx); !errors.Is(err, concurrency.ErrLocked) {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Second) // the session is kept alive
		if err := next.TryLock(ctx); !errors.Is(err, concurrency.ErrLocked) {
			t.Fatal("the lock of a session that is kept alive was lost:", err)
		}
		first.Orphan()
		eventually(t, "the lock is free", func(ctx context.Context) (bool, error) {
			err := next.TryLock(ctx)
			return err == nil, err
		})
		must(t, next.Unlock(ctx))
		must(t, second.Close())
	})
}
