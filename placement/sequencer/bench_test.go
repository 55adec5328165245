package sequencer

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kvd/shard"
)

// BenchmarkPut writes to the leaders of three groups on three nodes, over a
// network and logs in memory: what the sequencer costs, and not what disks do.
func BenchmarkPut(b *testing.B) {
	for _, clients := range []int{1, 64, 1024} {
		for _, without := range []bool{true, false} {
			name := fmt.Sprintf("clients=%d/sequencer=%v", clients, !without)
			b.Run(name, func(b *testing.B) {
				c := &cluster{t: b, dir: b.TempDir(), groups: 3, without: without}
				c.run(func(c *cluster) { benchmarkPut(b, c, clients) })
			})
		}
	}
}

// spread has each group led by another node, as placement wants it.
func (c *cluster) spread() []*shard.Replica {
	leaders := []*shard.Replica{}
	for g := range c.groups {
		leaders = append(leaders, c.lead(g+1, names[g%len(names)]))
	}
	return leaders
}

func benchmarkPut(b *testing.B, c *cluster, clients int) {
	leaders := c.spread()
	value := string(make([]byte, 100))
	ctx, cancel := within(5 * time.Minute)
	defer cancel()
	for _, leader := range leaders {
		if _, err := put(ctx, leader, "first", value); err != nil {
			b.Fatal(err)
		}
	}
	before, used := entries(leaders), processTime(b)
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := put(ctx, leaders[i%len(leaders)], fmt.Sprintf("k%d", rand.IntN(10_000)), value); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "puts/s")
	b.ReportMetric(float64((processTime(b)-used).Nanoseconds())/float64(b.N), "cpu-ns/put")
	b.ReportMetric(float64(b.N)/float64(entries(leaders)-before), "puts/entry")
}

// processTime is how long this process has used a processor, which others on the
// machine do not change much.
func processTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func entries(leaders []*shard.Replica) (sum uint64) {
	for _, r := range leaders {
		sum += r.Status().LastLogIndex
	}
	return sum
}

// BenchmarkReserve is what revisions cost a node that has many shards.
func BenchmarkReserve(b *testing.B) {
	for _, waiting := range []int{1, 64} {
		b.Run(fmt.Sprintf("at a time=%d", waiting), func(b *testing.B) {
			c := &cluster{t: b, dir: b.TempDir()}
			c.run(func(c *cluster) {
				leader, _ := c.leader(0)
				n := c.up()[0]
				if n == leader {
					n = c.up()[1]
				}
				ctx, cancel := within(5 * time.Minute)
				defer cancel()
				var left atomic.Int64
				left.Store(int64(b.N))
				b.ResetTimer()
				var all sync.WaitGroup
				for range waiting {
					all.Go(func() {
						for left.Add(-1) >= 0 {
							if _, err := n.client.Reserve(ctx, func() int { return 10 }); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				all.Wait()
			})
		})
	}
}
