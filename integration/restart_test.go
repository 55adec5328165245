package integration

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"kvd/integration/cluster"
)

// ledger holds what has been acknowledged.
type ledger struct {
	mu       sync.Mutex
	acked    []pair
	revision int64
}

func (l *ledger) add(p pair, revision int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acked = append(l.acked, p)
	l.revision = max(l.revision, revision)
}

func (l *ledger) count() int { l.mu.Lock(); defer l.mu.Unlock(); return len(l.acked) }

// load puts unique keys through all nodes until ctx is done, and enters what was acknowledged.
func load(ctx context.Context, t *testing.T, c *cluster.Cluster, l *ledger, prefix string) (wait func()) {
	return trickle(ctx, t, c, l, prefix, 0)
}

// trickle is load with a pause after each write.
func trickle(ctx context.Context, t *testing.T, c *cluster.Cluster, l *ledger, prefix string, pause time.Duration) (wait func()) {
	var group sync.WaitGroup
	for i := range 12 {
		names := c.Names()
		cl := client(t, c, names[i%len(names)])
		group.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				p := pair{fmt.Sprintf("%s/%d/%d", prefix, i, n), fmt.Sprintf("%s-%d-%d", prefix, i, n)}
				attempt, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				resp, err := cl.Put(attempt, p.key, p.value)
				cancel()
				if err == nil {
					l.add(p, resp.Header.Revision)
				}
				if pause > 0 {
					time.Sleep(pause)
				}
			}
		})
	}
	return group.Wait
}

// All nodes die at once under load: what was acknowledged is there when they are back.
func TestKillAllUnderLoad(t *testing.T) {
	t.Parallel()
	for _, kind := range raftLogs {
		args := append(shortLog, "--raft-log="+kind)
		for name, cfg := range map[string]cluster.Config{"full": {Args: args}, "consistent": sharded(3, 8, 3, args...)} {
			t.Run(name+" "+kind, func(t *testing.T) {
				t.Parallel()
				testKillAllUnderLoad(t, cfg)
			})
		}
	}
}

func testKillAllUnderLoad(t *testing.T, cfg cluster.Config) {
	c := cluster.Run(t, cfg)
	var l ledger
	for round := range 3 {
		ctx, cancel := context.WithCancel(liveness(t))
		before := l.count()
		wait := load(ctx, t, c, &l, fmt.Sprintf("round%d", round))
		eventually(t, "several hundred writes", func(context.Context) (bool, error) { return l.count() > before+500, nil })
		must(t, c.KillAll())
		cancel()
		wait()
		must(t, c.StartNodes(liveness(t), c.Names()...))
		verify(t, c, &l)
	}
	t.Logf("killed all nodes three times under load: all %d acknowledged writes are there", l.count())
}

// verify checks that every acknowledged write is there, and that revisions go on above them.
func verify(t *testing.T, c *cluster.Cluster, l *ledger) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	name := leader(t, c)
	got := readAll(t, c, name)
	for _, p := range l.acked {
		if got[p.key] != p.value {
			t.Fatalf("lost: %s was acknowledged as %q, and is %q", p.key, p.value, got[p.key])
		}
	}
	resp, err := client(t, c, name).Put(liveness(t), "verified", "x")
	must(t, err)
	if resp.Header.Revision <= l.revision {
		t.Fatalf("revision %d was acknowledged, and now comes %d", l.revision, resp.Header.Revision)
	}
}

// The whole cluster comes back on other addresses.
func TestRestartOnNewAddresses(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: quick})
	data := pairs("moved", 0, 50)
	write(t, c, "n1", data)
	old := make(map[string]bool)
	for _, name := range c.Names() {
		old[c.Node(name).ClientAddr()], old[c.Node(name).PeerAddr()] = true, true
	}
	must(t, c.RestartAll(liveness(t)))
	for _, name := range c.Names() {
		read(t, c, name, data)
	}
	write(t, c, "n2", pairs("moved", 50, 60))
	eventually(t, "members on the new addresses only", func(ctx context.Context) (bool, error) {
		resp, err := client(t, c, "n3").MemberList(ctx)
		if err != nil {
			return false, err
		}
		for _, m := range resp.Members {
			for _, url := range append(m.ClientURLs, m.PeerURLs...) {
				if old[strings.TrimPrefix(url, "http://")] {
					return false, fmt.Errorf("%s is still said to be at %s", m.Name, url)
				}
			}
			if len(m.ClientURLs) != 1 || len(m.PeerURLs) != 1 {
				return false, fmt.Errorf("addresses of %s: %v, %v", m.Name, m.ClientURLs, m.PeerURLs)
			}
		}
		return len(resp.Members) == 3, nil
	})
	t.Logf("moved three nodes to new addresses: %d pairs are there", len(data))
}
