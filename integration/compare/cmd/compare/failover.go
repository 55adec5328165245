package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"kvd/integration/compare/servers"
)

const (
	kills           = 3                      // of leaders, in a trial
	failoverKeys    = 32                     // with 16 shards, most have one of them
	failoverTry     = 100 * time.Millisecond // until a put is tried again
	failoverTimeout = 30 * time.Second
)

// failover kills leaders, one after the other, and measures the time from the signal to the first successful put of a
// key that was led there, and until a put of every key has succeeded.
func (t *trial) failover(ctx context.Context) error {
	var first, every spread
	n := kills
	if t.o.quick {
		n = 1
	}
	for range n {
		one, all, err := t.killLeader(ctx)
		if err != nil {
			return err
		}
		first, every = append(first, one.Seconds()), append(every, all.Seconds())
	}
	t.note("failover", first.median())
	t.note("failover-all", every.median())
	return nil
}

func failoverKey(i int) string { return fmt.Sprintf("failover/%02d", i) }

func (t *trial) killLeader(ctx context.Context) (first, every time.Duration, err error) {
	conns, err := dialAll(t.cluster.Endpoints())
	if err != nil {
		return 0, 0, err
	}
	defer closeAll(conns)
	victim, err := t.steadyLeader(ctx, conns)
	if err != nil {
		return 0, 0, err
	}
	killed := time.Now()
	t.cluster.Kill(victim)
	took := make([]time.Duration, failoverKeys)
	if err := parallel(failoverKeys, func(i int) (err error) {
		took[i], err = firstPut(ctx, conns, failoverKey(i), killed)
		return err
	}); err != nil {
		return 0, 0, err
	}
	for _, d := range took {
		every = max(every, d)
	}
	if err := t.cluster.Start(victim); err != nil {
		return 0, 0, err
	}
	if err := t.cluster.WaitReady(ctx); err != nil {
		return 0, 0, err
	}
	return took[0], every, t.settle(ctx)
}

// steadyLeader returns the leader, once all clients have put all keys under the same one: those of a running cluster have
// their connections, and everything works.
func (t *trial) steadyLeader(ctx context.Context, conns []*grpc.ClientConn) (int, error) {
	const attempts = 10
	for range attempts {
		leader, err := t.leader(ctx, failoverKey(0))
		if err != nil {
			return 0, err
		}
		for i := range failoverKeys {
			for _, conn := range conns {
				if err := putUntil(ctx, conn, failoverKey(i), time.Now().Add(failoverTimeout)); err != nil {
					return 0, fmt.Errorf("put before the kill: %w", err)
				}
			}
		}
		if now, err := t.leader(ctx, failoverKey(0)); now == leader || err != nil {
			return leader, err
		}
	}
	return 0, errors.New("the leader changes again and again")
}

// firstPut tries to put a key through all nodes at the same time, again and again, and returns when it has worked once.
func firstPut(ctx context.Context, conns []*grpc.ClientConn, key string, since time.Time) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, len(conns))
	for _, conn := range conns {
		go func() { done <- putUntil(ctx, conn, key, since.Add(failoverTimeout)) }()
	}
	var err error
	for i := range conns {
		if err = <-done; err == nil {
			took := time.Since(since)
			cancel()
			for range len(conns) - i - 1 {
				<-done
			}
			return took, nil
		}
	}
	return 0, fmt.Errorf("no put of %q for %v: %w", key, failoverTimeout, err)
}

// putUntil tries to put a key until it works or the time is over.
func putUntil(ctx context.Context, conn *grpc.ClientConn, key string, end time.Time) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, failoverTry)
		_, err := pb.NewKVClient(conn).Put(attempt, &pb.PutRequest{Key: []byte(key), Value: make([]byte, valueBytes)})
		cancel()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return err
		}
		if wait := sleep(ctx, 5*time.Millisecond); wait != nil {
			return wait
		}
	}
}

func dialAll(endpoints []string) ([]*grpc.ClientConn, error) {
	var conns []*grpc.ClientConn
	for _, endpoint := range endpoints {
		conn, err := servers.Dial(endpoint)
		if err != nil {
			closeAll(conns)
			return nil, err
		}
		conns = append(conns, conn)
	}
	return conns, nil
}

func closeAll(conns []*grpc.ClientConn) {
	for _, conn := range conns {
		conn.Close()
	}
}
