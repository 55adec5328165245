package main

import (
	"context"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

const (
	// slowRenewal is when a request gets another one beside it, also if the lease lasts long.
	slowRenewal = 2 * time.Second
	// renewalPause is before another try after one that failed.
	renewalPause = 100 * time.Millisecond
)

// renewer is the leases of a client, but it keeps them alive by way of whichever node answers. etcd's client has one
// stream for that; if its node is stopped or cut off, that takes longer to be noticed than many leases live.
type renewer struct {
	clientv3.Lease
	remote pb.LeaseClient
	first  time.Duration // how long a lease lasts, as far as is known before it is renewed
}

// steadyLeases has a client keep leases alive in that way.
func steadyLeases(c *clientv3.Client, first time.Duration) {
	c.Lease = renewer{c.Lease, pb.NewLeaseClient(c.ActiveConnection()), first}
}

// KeepAlive renews a lease until ctx ends. The channel is closed earlier if the lease has ended; or may have, because
// nobody has answered for as long as it lasts, counted from when the last renewal was asked for.
func (r renewer) KeepAlive(ctx context.Context, id clientv3.LeaseID) (<-chan *clientv3.LeaseKeepAliveResponse, error) {
	answers := make(chan *clientv3.LeaseKeepAliveResponse, 1)
	go func() {
		defer close(answers)
		ttl, until := r.first, time.Now().Add(r.first)
		for {
			last := r.renew(ctx, id, ttl, until)
			if last == nil || last.TTL <= 0 {
				return
			}
			ttl = time.Duration(last.TTL) * time.Second
			until = last.sent.Add(ttl)
			select {
			case answers <- &clientv3.LeaseKeepAliveResponse{ResponseHeader: last.Header, ID: id, TTL: last.TTL}:
			default: // whoever prints them is slow, and need not have them all
			}
			select {
			case <-time.After(ttl / 3):
			case <-ctx.Done():
				return
			}
		}
	}()
	return answers, nil
}

// renewal is a request and its answer, if there was one.
type renewal struct {
	*pb.LeaseKeepAliveResponse
	sent time.Time
}

// renew asks until there is an answer; it returns nil if none has come in time. A request that takes long is not given up, but gets
// others beside it.
func (r renewer) renew(ctx context.Context, id clientv3.LeaseID, ttl time.Duration, until time.Time) *renewal {
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	asked := make(chan *renewal)
	for {
		go func() {
			a := &renewal{sent: time.Now()}
			a.LeaseKeepAliveResponse, _ = r.ask(ctx, id)
			select {
			case asked <- a:
			case <-ctx.Done():
			}
		}()
		again := time.After(min(ttl/6, slowRenewal))
		for waiting := true; waiting; {
			select {
			case a := <-asked:
				if a.LeaseKeepAliveResponse != nil {
					return a
				}
				again = time.After(renewalPause)
			case <-again:
				waiting = false
			case <-ctx.Done():
				return nil
			}
		}
	}
}

func (r renewer) ask(ctx context.Context, id clientv3.LeaseID) (*pb.LeaseKeepAliveResponse, error) {
	stream, err := r.remote.LeaseKeepAlive(clientv3.WithRequireLeader(ctx), grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
		return nil, err
	}
	return stream.Recv()
}
