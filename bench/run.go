package bench

import (
	"context"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	lookEach     = 100 * time.Millisecond // at requests that take too long, and for progress
	backoffFirst = time.Millisecond
	backoffMax   = 50 * time.Millisecond
	loadClients  = 128
)

// Run connects to all endpoints, writes keys where the workload reads, and puts the load on. It returns once every request
// has its answer. If ctx ends during the measured part, the error is ctx's and the result is of what was measured until
// then; with any other error there is no result. Requests that fail are no error of Run, but counted in the result.
// Errors: ErrOptions, *UnreachableError, ErrLoad, ErrNoWatch.
func Run(ctx context.Context, o Options) (*Result, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	conns, err := dial(ctx, o)
	if err != nil {
		return nil, err
	}
	defer closeAll(conns)
	r := &run{
		o: o, conns: conns, base: time.Now(), rate: progressRate{},
		keys: keyspace{o.Prefix, o.KeyBytes - len(o.Prefix)}, values: newValues(o.ValueBytes, o.Seed),
	}
	if o.Workload.Kind == Watch {
		return r.watch(ctx)
	}
	w := newWorkload(r)
	loaded, err := r.load(ctx, w)
	if err != nil {
		return nil, err
	}
	if o.Warmup > 0 {
		warmup := r.phase("warmup", w, 0, o.Warmup)
		if warmup.execute(ctx); ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	measured := r.phase("run", w, o.Total, o.Duration)
	measured.observe = o.Observe
	measured.execute(ctx)
	result := measured.result()
	result.Loaded = loaded
	return result, ctx.Err()
}

// run is what all phases share.
type run struct {
	o      Options
	conns  []*grpc.ClientConn
	base   time.Time
	keys   keyspace
	values values
	rate   progressRate
}

// now is a time in nanoseconds. It is monotonic.
func (r *run) now() int64 { return int64(time.Since(r.base)) }

// workload makes one operation after the other for clients, concurrently.
type workload interface {
	operations() []string
	// do makes one operation and says which.
	do(c *client) (operation int, o outcome)
	// chooser is what a client chooses keys by.
	chooser(seed uint64) chooser
}

// phase is a part of a run: load, warmup, or what is measured.
type phase struct {
	*run
	name     string
	workload workload
	clients  []*client
	rec      *recorder
	observe  func(Sample)

	rate     float64
	total    int64
	duration time.Duration

	drain func() // nil, or called after the last answer: waits for what else is to come

	start, end int64 // end: the last answer
	cpu        time.Duration
	issued     atomic.Int64 // numbers of requests given to clients
	sent       atomic.Int64
	lag        atomic.Int64
}

func (r *run) phase(name string, w workload, total int, duration time.Duration) *phase {
	return &phase{
		run: r, name: name, workload: w, rate: r.o.Rate, total: int64(total), duration: duration,
		rec: newRecorder(w.operations(), 2*runtime.GOMAXPROCS(0), r.o.Interval),
	}
}

// seeds of what differs between phases.
var phaseSeeds = map[string]uint64{"load": 1, "warmup": 2, "run": 3}

// execute makes all requests of the phase and waits for their answers.
func (p *phase) execute(ctx context.Context) {
	p.makeClients(ctx)
	p.start = p.now()
	cpu := processCPU()
	var clients sync.WaitGroup
	for _, c := range p.clients {
		clients.Go(func() {
			if p.rate > 0 {
				p.open(ctx, c)
			} else {
				p.closed(ctx, c)
			}
		})
	}
	stop := p.watchOver()
	clients.Wait()
	p.end = p.now()
	if p.drain != nil {
		p.drain()
	}
	p.cpu = processCPU() - cpu
	stop()
	for _, c := range p.clients {
		c.release()
	}
}

func (p *phase) makeClients(ctx context.Context) {
	for i := range p.o.Clients {
		seed := p.o.Seed<<2 | phaseSeeds[p.name]
		p.clients = append(p.clients, &client{
			run: p.run, shard: p.rec.shards[i%len(p.rec.shards)], parent: ctx,
			rng: rand.New(rand.NewPCG(seed, uint64(i))), keys: p.workload.chooser(seed),
			conns: p.conns, home: i % len(p.conns), conn: i % len(p.conns),
		})
	}
}

// watchOver gives up requests that take too long and reports progress, until the function it returns is called.
func (p *phase) watchOver() (stop func()) {
	done := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() {
		tick := time.NewTicker(lookEach)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			now := p.now()
			for _, c := range p.clients {
				c.expire(now - int64(p.o.Timeout))
			}
			p.rec.advance(now - p.start)
			p.progress(now)
		}
	})
	return func() {
		close(done)
		watcher.Wait()
	}
}

// closed sends a client's next request once the last is answered.
func (p *phase) closed(ctx context.Context, c *client) {
	begin := p.now()
	for ctx.Err() == nil {
		if p.total > 0 && p.issued.Add(1) > p.total || p.duration > 0 && begin-p.start >= int64(p.duration) {
			return
		}
		begin = p.one(ctx, c, begin)
		if c.failures > 1 {
			sleep(ctx, min(backoffFirst<<min(c.failures-2, 10), backoffMax))
			begin = p.now()
		}
	}
}

// open sends requests when they are due, or later if all clients were waiting then; their latency begins when they are due.
func (p *phase) open(ctx context.Context, c *client) {
	for ctx.Err() == nil {
		i := p.issued.Add(1) - 1
		due := p.due(i)
		if p.total > 0 && i >= p.total || p.duration > 0 && due-p.start >= int64(p.duration) {
			return
		}
		now := p.now()
		if due > now {
			sleep(ctx, time.Duration(due-now))
			now = p.now()
		}
		if ctx.Err() != nil || p.duration > 0 && now-p.start >= int64(p.duration) {
			return
		}
		p.sent.Add(1)
		for lag := p.lag.Load(); now-due > lag && !p.lag.CompareAndSwap(lag, now-due); lag = p.lag.Load() {
		}
		p.one(ctx, c, due)
	}
}

// due is when request number i is.
func (p *phase) due(i int64) int64 { return p.start + int64(float64(i)/p.rate*1e9) }

// unsent is how many requests of an open loop were due, but never sent.
func (p *phase) unsent() int64 {
	if p.rate == 0 {
		return 0
	}
	due := int64(math.MaxInt64)
	if p.duration > 0 {
		elapsed := min(p.end-p.start, int64(p.duration))
		due = int64(math.Ceil(float64(elapsed) / 1e9 * p.rate))
	}
	if p.total > 0 {
		due = min(due, p.total)
	}
	return max(0, due-p.sent.Load())
}

// one makes one operation that counts from begin, and returns when it ended.
func (p *phase) one(ctx context.Context, c *client, begin int64) int64 {
	c.begun = begin
	operation, o := p.workload.do(c)
	end := p.now()
	if o.err == nil {
		c.failures = 0
	} else if c.failures++; ctx.Err() != nil { // the request did not fail: nobody waits for it any more
		return end
	}
	c.shard.record(operation, end-p.start, end-begin, o)
	if p.observe != nil {
		p.observe(Sample{p.rec.kinds[operation], p.base.Add(time.Duration(begin)), p.base.Add(time.Duration(end)), o.err})
	}
	return end
}

func (p *phase) result() *Result {
	elapsed := time.Duration(p.end - p.start)
	operations, timeline := p.rec.finish(elapsed)
	return &Result{
		Options: p.o, Start: p.base.Add(time.Duration(p.start)), Elapsed: elapsed, Operations: operations, Timeline: timeline,
		ClientCPU: p.cpu, Unsent: p.unsent(), MaxLag: time.Duration(p.lag.Load()),
	}
}

// progressRate smooths the rate that is shown.
type progressRate struct {
	done int64
	at   int64
	rate float64
}

const rateWindow = int64(500 * time.Millisecond)

func (p *phase) progress(now int64) {
	if p.o.Progress == nil {
		return
	}
	done, rate := p.rec.done.Load(), &p.run.rate
	switch passed := now - max(rate.at, p.start); {
	case done < rate.done || rate.at < p.start:
		*rate = progressRate{at: p.start}
		fallthrough
	case passed >= rateWindow:
		*rate = progressRate{done, now, float64(done-rate.done) / (float64(max(passed, 1)) / 1e9)}
	}
	p.o.Progress(Progress{
		Phase: p.name, Done: done, Total: p.total, Elapsed: time.Duration(now - p.start), Duration: p.duration,
		PerSecond: rate.rate, Errors: p.rec.failed.Load(),
	})
}

// sleep waits, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// errMissing is what a read of a key that was written before is answered with if the key is not there.
var errMissing = status.Error(codes.NotFound, "a key that was loaded is not there")
