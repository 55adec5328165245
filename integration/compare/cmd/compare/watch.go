package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"kvd/integration/compare/servers"
)

const (
	watchStreams = 100
	watchPrefix  = "watch/"
	watchSettle  = time.Second // before memory is looked at
)

// crowd is many watchers at once, and the puts that they are told of.
type crowd struct {
	part, title string
	alone       bool // each has a key of its own
	rate        int  // puts per second, to measure latency
	under       int  // puts, as many as go: so many whose events have not all come
}

var crowds = []crowd{
	{"watch-one", "watchers of one key", false, 5, 4},
	{"watch-own", "watchers of a key each", true, 1000, 100},
}

// solos are single watchers, and where they listen: so many nodes after the one that leads the key.
var solos = []struct {
	part, title string
	after       int
}{
	{"watch-leader", "1 watcher on the leader's node", 0},
	{"watch-follower", "1 watcher on another node", 1},
}

const soloRate = 200 // puts per second

func watchRows() (all []row) {
	for _, c := range crowds {
		steady, flood := fmt.Sprintf("%s, %d puts/s: ", c.title, c.rate), c.title+", as many puts as go: "
		all = append(all,
			row{c.part + "/p50", sectionWatch, steady + "put to event, median", "ms", 2},
			row{c.part + "/p99", sectionWatch, steady + "put to event, 99th percentile", "ms", 2},
			row{c.part + "/rate", sectionWatch, flood + "events", "1/s", 0},
			row{c.part + "/cpu", sectionWatch, flood + "processor time of all servers per event", "µs", 2},
			row{c.part + "/memory", sectionWatch, c.title + ": resident memory of all servers per watcher", "KiB", 2},
			row{c.part + "/heap", sectionWatch, c.title + ": heap and stacks in use, of all servers, per watcher", "KiB", 2})
	}
	for _, s := range solos {
		title := fmt.Sprintf("%s, %d puts/s: ", s.title, soloRate)
		all = append(all,
			row{s.part + "/p50", sectionWatch, title + "put to event, median", "ms", 2},
			row{s.part + "/p99", sectionWatch, title + "put to event, 99th percentile", "ms", 2},
			row{s.part + "/put", sectionWatch, title + "the puts themselves, median", "ms", 2})
	}
	return all
}

// watchOne measures watchers that share a key.
func (t *trial) watchOne(ctx context.Context) error { return t.crowd(ctx, crowds[0]) }

// watchOwn measures watchers that share none, and then single ones.
func (t *trial) watchOwn(ctx context.Context) error {
	if err := t.crowd(ctx, crowds[1]); err != nil {
		return err
	}
	t.tell()
	for _, s := range solos {
		key := watchPrefix + s.part
		leader, err := t.leader(ctx, key)
		if err != nil {
			return err
		}
		endpoints := t.cluster.Endpoints()
		node := (leader + s.after) % len(endpoints)
		if err := t.solo(ctx, s.part, key, endpoints[leader:leader+1], endpoints[node:node+1]); err != nil {
			return fmt.Errorf("%s: %w", s.part, err)
		}
	}
	return nil
}

func (t *trial) solo(ctx context.Context, part, key string, leader, node []string) (err error) {
	a, err := newAudience(ctx, node, 1, 1, func(int) string { return key })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.end()) }()
	s, err := newSender(a, leader, 1, 1)
	if err != nil {
		return err
	}
	defer s.close()
	if err := t.steady(ctx, s, part, soloRate); err != nil {
		return err
	}
	t.note(part+"/put", millis(percentile(s.took, 50)))
	return nil
}

func (t *trial) crowd(ctx context.Context, c crowd) error {
	keys, fan, key := 1, t.o.watchers, func(int) string { return watchPrefix }
	if c.alone {
		keys, fan, key = t.o.watchers, 1, func(i int) string { return fmt.Sprintf("%s%06d", watchPrefix, i) }
	}
	if err := t.crowdMemory(ctx, c, key); err != nil {
		return fmt.Errorf("%s: %w", c.part, err)
	}
	if err := t.crowdLoad(ctx, c, key, keys, fan); err != nil {
		return fmt.Errorf("%s: %w", c.part, err)
	}
	return nil
}

func (t *trial) gather(ctx context.Context, key func(int) string) (*audience, error) {
	return newAudience(ctx, t.cluster.Endpoints(), min(watchStreams, t.o.watchers), t.o.watchers, key)
}

// crowdMemory notes what watchers take that have not been told of anything yet. Garbage is not collected before all that
// is resident has been looked at: what is free afterwards would be used again.
func (t *trial) crowdMemory(ctx context.Context, c crowd, key func(int) string) error {
	before, err := t.restingMemory(ctx)
	if err != nil {
		return err
	}
	a, err := t.gather(ctx, key)
	if err != nil {
		return err
	}
	after, err := t.restingMemory(ctx)
	var with int64
	if err == nil {
		with, err = t.cluster.InUse(ctx)
	}
	if err := errors.Join(err, a.end()); err != nil {
		return err
	}
	if err := t.rest(ctx, watchSettle); err != nil {
		return err
	}
	without, err := t.cluster.InUse(ctx)
	if err != nil {
		return err
	}
	t.note(c.part+"/memory", float64(after-before)/1024/float64(t.o.watchers))
	t.note(c.part+"/heap", float64(with-without)/1024/float64(t.o.watchers))
	return nil
}

func (t *trial) crowdLoad(ctx context.Context, c crowd, key func(int) string, keys, fan int) (err error) {
	a, err := t.gather(ctx, key)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.end()) }()
	s, err := newSender(a, t.cluster.Endpoints(), keys, fan)
	if err != nil {
		return err
	}
	defer s.close()
	if err := t.steady(ctx, s, c.part, c.rate); err != nil {
		return err
	}
	return t.flood(ctx, s, c)
}

// restingMemory is what is resident when what went on is over.
func (t *trial) restingMemory(ctx context.Context) (int64, error) {
	if err := t.rest(ctx, watchSettle); err != nil {
		return 0, err
	}
	memory, err := t.cluster.Memory()
	return memory.Resident, err
}

// steady notes latencies at a rate that both servers can keep.
func (t *trial) steady(ctx context.Context, s *sender, part string, rate int) error {
	if err := s.atRate(ctx, rate, t.o.duration); err != nil {
		return err
	}
	latencies, _ := s.taken()
	t.note(part+"/p50", millis(percentile(latencies, 50)))
	t.note(part+"/p99", millis(percentile(latencies, 99)))
	return nil
}

// flood notes what goes at most.
func (t *trial) flood(ctx context.Context, s *sender, c crowd) error {
	used, err := t.startUsage()
	if err != nil {
		return err
	}
	if err := s.asManyAsGo(ctx, c.under, t.o.duration); err != nil {
		return err
	}
	seconds, err := used.end()
	if err != nil {
		return err
	}
	latencies, last := s.taken()
	events := float64(len(latencies))
	t.note(c.part+"/rate", events/last.Sub(used.began).Seconds())
	t.note(c.part+"/cpu", seconds*1e6/events)
	return nil
}

// percentile of latencies, of which there are some. It sorts them.
func percentile(latencies []time.Duration, percent int) time.Duration {
	slices.Sort(latencies)
	return latencies[min(len(latencies)*percent/100, len(latencies)-1)]
}

// sender puts what an audience watches.
type sender struct {
	*audience
	conns     []*grpc.ClientConn
	keys, fan int // events per put
	sent      int

	mu   sync.Mutex
	took []time.Duration // each put
	err  error           // the first
}

func newSender(a *audience, endpoints []string, keys, fan int) (*sender, error) {
	conns, err := dialAll(slices.Repeat(endpoints, max(1, maxConns/10/len(endpoints))))
	return &sender{audience: a, conns: conns, keys: keys, fan: fan}, err
}

func (s *sender) close() { closeAll(s.conns) }

// atRate puts at a fixed rate, whatever becomes of the puts before, and returns when all events have come.
func (s *sender) atRate(ctx context.Context, rate int, duration time.Duration) error {
	begun := time.Now()
	return s.send(ctx, func(i int) error {
		due := time.Duration(i) * time.Second / time.Duration(rate)
		if i > 0 && due >= duration {
			return errEnough
		}
		return sleep(ctx, time.Until(begun.Add(due)))
	})
}

// asManyAsGo puts when all but so many events of puts before have come, and returns when all have.
func (s *sender) asManyAsGo(ctx context.Context, under int, duration time.Duration) error {
	begun := time.Now()
	return s.send(ctx, func(i int) error {
		if i > 0 && time.Since(begun) >= duration {
			return errEnough
		}
		return s.awaitPuts(s.sent - under + 1)
	})
}

func (s *sender) awaitPuts(n int) error {
	return s.await(&s.received, int64(n)*int64(s.fan), "events are there")
}

var errEnough = errors.New("no more puts")

// send puts one random key after the other until next, which may wait, says that it is enough.
func (s *sender) send(ctx context.Context, next func(i int) error) error {
	var puts sync.WaitGroup
	var err error
	for i := 0; err == nil; i++ {
		if err = next(i); err == nil {
			s.sent++
			puts.Go(func() { s.put(ctx, i) })
			err = s.failure()
		}
	}
	puts.Wait()
	if err = errors.Join(s.failure(), ignoreEnough(err)); err != nil {
		return err
	}
	return s.awaitPuts(s.sent)
}

func ignoreEnough(err error) error {
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

func (s *sender) put(ctx context.Context, i int) {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	key := s.key(rand.IntN(s.keys))
	begun := time.Now()
	_, err := pb.NewKVClient(s.conns[i%len(s.conns)]).Put(ctx, &pb.PutRequest{Key: []byte(key), Value: s.value(i)})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.took = append(s.took, time.Since(begun))
	if err != nil && s.err == nil {
		s.err = fmt.Errorf("put: %w", err)
	}
}

func (s *sender) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// usage is what processors do from a moment on.
type usage struct {
	*trial
	began                 time.Time
	servers, machine, own time.Duration
}

func (t *trial) startUsage() (*usage, error) {
	u := &usage{trial: t, began: time.Now()}
	var err error
	u.servers, u.machine, u.own, err = t.times()
	return u, err
}

func (t *trial) times() (cluster, machine, own time.Duration, err error) {
	cluster, machine, err = t.processorTimes()
	if err == nil {
		own, err = servers.OwnCPU()
	}
	return cluster, machine, own, err
}

// end returns the seconds that the servers have used, and notes what was neither theirs nor this client's.
func (u *usage) end() (seconds float64, err error) {
	cluster, machine, own, err := u.times()
	if err != nil {
		return 0, err
	}
	used := cluster - u.servers
	others := (machine - u.machine) - used - (own - u.own)
	u.others = append(u.others, max(0, others.Seconds())/time.Since(u.began).Seconds())
	return used.Seconds(), nil
}
