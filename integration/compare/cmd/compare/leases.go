package main

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
)

const (
	leaseClients = 1000
	leaseStreams = 100
	leasePrefix  = "leased/"
	lastingTTL   = 3600            // seconds
	leastTTL     = 6               // a busy machine may stand still for a while
	leaseTimeout = 5 * time.Minute // until all have ended
)

func leaseRows() []row {
	return []row{
		{"lease-grant/rate", sectionLease, fmt.Sprintf("grants, %d clients", leaseClients), "1/s", 0},
		{"lease-grant/cpu", sectionLease, "processor time of all servers per grant", "µs", 1},
		{"lease-memory", sectionLease, "memory of all servers per lease", "KiB", 2},
		{"lease-renew/rate", sectionLease, fmt.Sprintf("keep-alives, %d streams", leaseStreams), "1/s", 0},
		{"lease-renew/cpu", sectionLease, "processor time of all servers per keep-alive", "µs", 1},
		{"lease-end/first", sectionLease, "many that end at once: the first key is gone after its lease's end", "s", 2},
		{"lease-end/last", sectionLease, "all keys are gone after the last lease's end", "s", 2},
		{"lease-end/cpu", sectionLease, "processor time of all servers per lease, from the last keep-alive on", "µs", 1},
	}
}

// leased is a lease and what is known of it.
type leased struct {
	id      int64
	ttl     time.Duration
	key     string    // "": none
	renewed time.Time // when the last keep-alive was sent, and so not before: it may not end within ttl
}

// leases measures many leases that last, then some that end at once while those are there.
func (t *trial) leases(ctx context.Context) error {
	conns, err := dialMany(t.cluster.Endpoints(), leaseStreams)
	if err != nil {
		return err
	}
	defer closeAll(conns)
	lasting, rate, err := t.lasting(ctx, conns)
	if err != nil {
		return err
	}
	t.tell()
	return t.ending(ctx, conns, lasting, rate)
}

// dialMany returns n connections to endpoints in turn.
func dialMany(endpoints []string, n int) ([]*grpc.ClientConn, error) {
	many := make([]string, n)
	for i := range many {
		many[i] = endpoints[i%len(endpoints)]
	}
	return dialAll(many)
}

// lasting grants leases and renews all of them once; it returns them, and how many of such requests a second takes.
func (t *trial) lasting(ctx context.Context, conns []*grpc.ClientConn) ([]leased, float64, error) {
	before, err := t.restingMemory(ctx)
	if err != nil {
		return nil, 0, err
	}
	all := make([]leased, t.o.leases)
	grants, err := t.timed("lease-grant", len(all), func() error { return grant(ctx, conns, all, lastingTTL) })
	if err != nil {
		return nil, 0, err
	}
	after, err := t.restingMemory(ctx)
	if err != nil {
		return nil, 0, err
	}
	t.note("lease-memory", float64(after-before)/1024/float64(len(all)))
	_, err = t.timed("lease-renew", len(all), func() error { return renew(ctx, conns, all) })
	if err == nil {
		err = listed(ctx, conns[0], all)
	}
	return all, grants, err
}

// timed notes how fast something is done n times, and what it takes.
func (t *trial) timed(part string, n int, f func() error) (perSecond float64, err error) {
	used, err := t.startUsage()
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, fmt.Errorf("%s: %w", part, err)
	}
	perSecond = float64(n) / time.Since(used.began).Seconds()
	seconds, err := used.end()
	if err != nil {
		return 0, err
	}
	t.note(part+"/rate", perSecond)
	t.note(part+"/cpu", seconds*1e6/float64(n))
	return perSecond, nil
}

// eachOf calls f for every lease, from many clients, until one fails.
func eachOf(conns []*grpc.ClientConn, all []leased, f func(conn *grpc.ClientConn, l *leased) error) error {
	var next atomic.Int64
	return parallel(min(leaseClients, len(all)), func(client int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(all) {
				return nil
			}
			if err := f(conns[client%len(conns)], &all[i]); err != nil {
				next.Store(math.MaxInt32)
				return err
			}
		}
	})
}

func grant(ctx context.Context, conns []*grpc.ClientConn, all []leased, ttl int64) error {
	return eachOf(conns, all, func(conn *grpc.ClientConn, l *leased) error {
		granted, err := pb.NewLeaseClient(conn).LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: ttl})
		if err != nil {
			return err
		}
		l.id, l.ttl = granted.ID, time.Duration(granted.TTL)*time.Second
		return nil
	})
}

// renew sends a keep-alive for each lease, a part of them on each connection, and takes as many answers.
func renew(ctx context.Context, conns []*grpc.ClientConn, all []leased) error {
	n := min(len(conns), len(all))
	return parallel(n, func(i int) error {
		return renewStream(ctx, conns[i], all[i*len(all)/n:(i+1)*len(all)/n])
	})
}

func renewStream(ctx context.Context, conn *grpc.ClientConn, some []leased) error {
	var sending sync.WaitGroup
	defer sending.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewLeaseClient(conn).LeaseKeepAlive(ctx)
	if err != nil {
		return err
	}
	open := make(map[int64]bool, len(some))
	for _, l := range some {
		open[l.id] = true
	}
	sending.Go(func() {
		for i := range some {
			some[i].renewed = time.Now()
			if stream.Send(&pb.LeaseKeepAliveRequest{ID: some[i].id}) != nil {
				return // Recv tells why
			}
		}
	})
	for range some {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		if !open[answer.ID] {
			return fmt.Errorf("%w: an answer for lease %x, which was not asked for, or twice", errWrong, answer.ID)
		}
		delete(open, answer.ID)
		if answer.TTL <= 0 {
			return fmt.Errorf("lease %x is gone", answer.ID)
		}
	}
	return nil
}

// listed fails if the server does not have these leases and no others.
func listed(ctx context.Context, conn *grpc.ClientConn, all []leased) error {
	list, err := pb.NewLeaseClient(conn).LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
	if err != nil {
		return err
	}
	there := make(map[int64]bool, len(list.Leases))
	for _, l := range list.Leases {
		there[l.ID] = true
	}
	for _, l := range all {
		if !there[l.id] {
			return fmt.Errorf("%w: lease %x is not listed", errWrong, l.id)
		}
	}
	if len(list.Leases) != len(all) {
		return fmt.Errorf("%w: %d leases are listed of %d", errWrong, len(list.Leases), len(all))
	}
	return nil
}

// ending grants leases with a key each, renews all of them at once, and watches the keys go.
func (t *trial) ending(ctx context.Context, conns []*grpc.ClientConn, lasting []leased, rate float64) error {
	all := make([]leased, t.o.ending)
	ttl := max(leastTTL, int64(math.Ceil(6*float64(len(all))/rate))) // enough to grant, put and renew even if others do much
	if err := grant(ctx, conns, all, ttl); err != nil {
		return fmt.Errorf("grant: %w", err)
	}
	for i := range all {
		all[i].key = fmt.Sprintf("%s%08d", leasePrefix, i)
	}
	revision, err := putLeased(ctx, conns, all)
	if err != nil {
		return fmt.Errorf("put: %w", err)
	}
	watchCtx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	stream, err := watchDeletions(watchCtx, conns[0], revision)
	if err != nil {
		return err
	}
	if err := renew(ctx, conns, all); err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	used, err := t.startUsage()
	if err != nil {
		return err
	}
	gone, err := deletions(stream, len(all))
	if err != nil {
		return err
	}
	seconds, err := used.end()
	if err != nil {
		return err
	}
	first, last, err := lateness(all, gone)
	if err != nil {
		return err
	}
	if err := t.awaitListed(ctx, conns[0], lasting); err != nil {
		return err
	}
	t.note("lease-end/first", first.Seconds())
	t.note("lease-end/last", last.Seconds())
	t.note("lease-end/cpu", seconds*1e6/float64(len(all)))
	return nil
}

// putLeased puts the leases' keys and returns the last revision.
func putLeased(ctx context.Context, conns []*grpc.ClientConn, all []leased) (int64, error) {
	var mu sync.Mutex
	var last int64
	err := eachOf(conns, all, func(conn *grpc.ClientConn, l *leased) error {
		answer, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte(l.key), Value: []byte("v"), Lease: l.id})
		mu.Lock()
		defer mu.Unlock()
		last = max(last, answer.GetHeader().GetRevision())
		return err
	})
	return last, err
}

// watchDeletions watches what comes after the puts: the node itself may not have all of them yet.
func watchDeletions(ctx context.Context, conn *grpc.ClientConn, revision int64) (pb.Watch_WatchClient, error) {
	stream, err := pb.NewWatchClient(conn).Watch(ctx)
	if err != nil {
		return nil, err
	}
	request := &pb.WatchCreateRequest{Key: []byte(leasePrefix), RangeEnd: prefixEnd(leasePrefix), StartRevision: revision + 1}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: request}}); err != nil {
		return nil, err
	}
	answer, err := stream.Recv()
	if err == nil && (!answer.Created || answer.Canceled) {
		err = fmt.Errorf("the watch is not there: %s", answer.CancelReason)
	}
	return stream, err
}

// deletions returns when each of n keys was deleted.
func deletions(stream pb.Watch_WatchClient, n int) (map[string]time.Time, error) {
	gone := make(map[string]time.Time, n)
	for len(gone) < n {
		answer, err := stream.Recv()
		if err == nil && answer.Canceled {
			err = fmt.Errorf("the watch was ended: %s", answer.CancelReason)
		}
		if err != nil {
			return nil, fmt.Errorf("%d of %d leases have ended: %w", len(gone), n, err)
		}
		now := time.Now()
		for _, e := range answer.Events {
			key := string(e.Kv.Key)
			if _, twice := gone[key]; twice || e.Type != mvccpb.Event_DELETE {
				return nil, fmt.Errorf("%w: an event %v of %s, which is deleted: %v", errWrong, e.Type, key, twice)
			}
			gone[key] = now
		}
	}
	return gone, nil
}

// lateness tells how long after its lease's end the first key was deleted, and how long after the last lease's the last.
func lateness(all []leased, gone map[string]time.Time) (first, last time.Duration, err error) {
	var end, lastEnd, lastGone time.Time
	first = math.MaxInt64
	for _, l := range all {
		at, ok := gone[l.key]
		if !ok {
			return 0, 0, fmt.Errorf("%w: %s is not deleted", errWrong, l.key)
		}
		if end = l.renewed.Add(l.ttl); at.Before(end) {
			return 0, 0, fmt.Errorf("%w: lease %x, of %v, with key %s, ended %v before its time", errWrong, l.id, l.ttl, l.key, end.Sub(at))
		}
		first = min(first, at.Sub(end))
		if end.After(lastEnd) {
			lastEnd = end
		}
		if at.After(lastGone) {
			lastGone = at
		}
	}
	return first, lastGone.Sub(lastEnd), nil
}

// awaitListed returns when there are no leases but these. One may be there for a moment after its keys.
func (t *trial) awaitListed(ctx context.Context, conn *grpc.ClientConn, all []leased) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		err := listed(ctx, conn, all)
		if err == nil || sleep(ctx, 200*time.Millisecond) != nil {
			return err
		}
	}
}
