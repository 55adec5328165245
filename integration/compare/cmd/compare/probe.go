package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

const (
	probeRate    = 500 // puts per second
	probeKeys    = 1000
	probeTimeout = 5 * time.Second
	probePrefix  = "probe/"
)

// probe puts at a fixed rate, whatever becomes of the puts before, and remembers each of them. A put's latency counts
// from when it was due: a server that stalls cannot hide it by holding up the client.
type probe struct {
	conns []*grpc.ClientConn
	stop  context.CancelFunc
	ended chan struct{}

	mu      sync.Mutex
	samples []sample
}

type sample struct {
	due     time.Time
	latency time.Duration
	err     error
}

func startProbe(ctx context.Context, endpoints []string) (*probe, error) {
	conns, err := dialAll(endpoints)
	if err != nil {
		return nil, err
	}
	p := &probe{conns: conns, ended: make(chan struct{})}
	ctx, p.stop = context.WithCancel(ctx)
	go p.run(ctx)
	return p, nil
}

func (p *probe) run(ctx context.Context) {
	defer close(p.ended)
	var puts sync.WaitGroup
	defer puts.Wait()
	start := time.Now()
	for i := 0; ; i++ {
		due := start.Add(time.Duration(i) * time.Second / probeRate)
		if sleep(ctx, time.Until(due)) != nil {
			return
		}
		puts.Go(func() {
			// A put that is under way when the probe is stopped is still waited for.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTimeout)
			defer cancel()
			key := fmt.Appendf(nil, "%s%04d", probePrefix, i%probeKeys)
			_, err := pb.NewKVClient(p.conns[i%len(p.conns)]).Put(ctx, &pb.PutRequest{Key: key, Value: valueOf(i, 0)})
			latency := time.Since(due)
			p.mu.Lock()
			p.samples = append(p.samples, sample{due, latency, err})
			p.mu.Unlock()
		})
	}
}

// end stops the probe and returns all its puts.
func (p *probe) end() []sample {
	p.stop()
	<-p.ended
	closeAll(p.conns)
	return p.samples
}

// p99 of the puts that were due in a window. One that failed counts as long as it took.
func p99(samples []sample, from, to time.Time) (time.Duration, error) {
	var latencies []time.Duration
	for _, s := range samples {
		if !s.due.Before(from) && s.due.Before(to) {
			latencies = append(latencies, s.latency)
		}
	}
	const enough = 100
	if len(latencies) < enough {
		return 0, fmt.Errorf("only %d puts in %v", len(latencies), to.Sub(from))
	}
	slices.Sort(latencies)
	return latencies[len(latencies)*99/100], nil
}

// disrupted measures the p99 of puts while something happens, over their p99 just before. What happens lasts as long as
// event does, but is looked at for at least a moment.
func (t *trial) disrupted(ctx context.Context, row string, endpoints []string, event func(ctx context.Context) error) error {
	warmUp, calm, atLeast := 500*time.Millisecond, 4*time.Second, time.Second
	if t.o.quick {
		warmUp, calm, atLeast = 0, 400*time.Millisecond, 400*time.Millisecond
	}
	p, err := startProbe(ctx, endpoints)
	if err != nil {
		return err
	}
	err = sleep(ctx, warmUp)
	before := time.Now()
	if err == nil {
		err = sleep(ctx, calm)
	}
	begin := time.Now()
	if err == nil {
		err = event(ctx)
	}
	took := time.Since(begin)
	if err == nil {
		err = sleep(ctx, atLeast-took)
	}
	end := time.Now()
	samples := p.end()
	if err != nil {
		return fmt.Errorf("%s: %w", row, err)
	}
	without, err1 := p99(samples, before, begin)
	with, err2 := p99(samples, begin, end)
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("%s: %w", row, err)
	}
	var failed []sample
	for _, s := range samples {
		if s.err != nil {
			failed = append(failed, s)
		}
	}
	t.probed.sent += len(samples)
	t.probed.failed += len(failed)
	if len(failed) > 0 {
		t.logf("%s: %d of %d puts failed, the first after %v: %v", row, len(failed), len(samples), failed[0].latency, failed[0].err)
	}
	t.note(row+"/without", millis(without))
	t.note(row+"/with", millis(with))
	t.note(row+"/ratio", float64(with)/float64(without))
	return nil
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
