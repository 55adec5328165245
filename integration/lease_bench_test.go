package integration

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
)

// BenchmarkLeases grants 100,000 leases, every tenth with a key, renews all of them through one stream and through 64,
// and lets all end at once: run it with -benchtime 1x.
func BenchmarkLeases(b *testing.B) {
	const leases, ttl, workers = 100_000, 75, 256
	for name, config := range map[string]cluster.Config{"full": {Nodes: 3}, "consistent": sharded(3, 8, 2)} {
		b.Run(name, func(b *testing.B) {
			c := cluster.Run(b, config)
			cl, err := c.Client("n2")
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				ids := grantMany(b, cl, leases, ttl, workers)
				renewMany(b, c, ids, 1)
				renewMany(b, c, ids, 64)
				due := time.Now().Add(ttl * time.Second)
				time.Sleep(time.Until(due.Add(-2 * time.Second)))
				for left := leases; left > 0; time.Sleep(200 * time.Millisecond) { // to list them costs, too
					all, err := cl.Leases(b.Context())
					if err != nil {
						b.Fatal(err)
					}
					left = len(all.Leases)
				}
				b.ReportMetric(time.Since(due).Seconds(), "s-until-all-ended")
			}
		})
	}
}

func grantMany(b *testing.B, cl *clientv3.Client, leases int, ttl int64, workers int) []int64 {
	began := time.Now()
	ids := make([]int64, leases)
	var granting sync.WaitGroup
	for w := range workers {
		granting.Go(func() {
			for i := w; i < leases; i += workers {
				granted, err := cl.Grant(b.Context(), ttl)
				if err == nil && i%10 == 0 {
					_, err = cl.Put(b.Context(), fmt.Sprintf("leased/%d", i), "v", clientv3.WithLease(granted.ID))
				}
				if err != nil {
					b.Error(err)
					return
				}
				ids[i] = int64(granted.ID)
			}
		})
	}
	granting.Wait()
	b.ReportMetric(float64(leases)/time.Since(began).Seconds(), "grants/s")
	return ids
}

func renewMany(b *testing.B, c *cluster.Cluster, ids []int64, streams int) {
	began := time.Now()
	var renewing sync.WaitGroup
	for s := range streams {
		renewing.Go(func() {
			if err := renewStream(b.Context(), c, c.Names()[s%3], ids[s*len(ids)/streams:(s+1)*len(ids)/streams]); err != nil {
				b.Error(err)
			}
		})
	}
	renewing.Wait()
	b.ReportMetric(float64(len(ids))/time.Since(began).Seconds(), fmt.Sprintf("renewals/s-%d-streams", streams))
}

func renewStream(ctx context.Context, c *cluster.Cluster, node string, ids []int64) error {
	conn, err := c.Dial(node)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	stream, err := pb.NewLeaseClient(conn).LeaseKeepAlive(ctx)
	if err != nil {
		return err
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	sending.Go(func() {
		for _, id := range ids {
			if stream.Send(&pb.LeaseKeepAliveRequest{ID: id}) != nil {
				return // Recv tells why
			}
		}
	})
	for range ids {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		if answer.TTL <= 0 {
			return fmt.Errorf("lease %x is gone", answer.ID)
		}
	}
	return nil
}
