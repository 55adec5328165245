package sim

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvd/fsm"
	"kvd/integration/leases"
	"kvd/integration/linearizability"
	"kvd/integration/watches"
	"kvd/node"
	"kvd/ring"
	"kvd/server"
	"kvd/shard"
)

var (
	hours = flag.Float64("sim.hours", 0.5, "virtual hours of the simulation in all")
	seed  = flag.Uint64("sim.seed", 0, "seed of the first run; 0 = one from the clock")
)

// runFor is the virtual time of one run: a fresh cluster, one history.
const runFor = 5 * time.Minute

func firstSeed() uint64 {
	if *seed != 0 {
		return *seed
	}
	return uint64(time.Now().UnixNano())
}

// report is what one run showed.
type report struct {
	verdict error // of the checkers
	halted  []string
	summary linearizability.Summary
	faults  map[string]int
	chain   *chain // of a sharded cluster
	watched watches.Summary
	held    leases.Summary
}

// slow is a disk on which watches are overtaken while they read the past.
var slow = fsm.Faults{SlowHistory: 30 * time.Millisecond}

// full is three nodes that all hold every key.
func full(faults shard.Faults) shape {
	return shape{nodes: 3, strategy: node.StrategyFull, faults: faults, state: slow, think: 300 * time.Millisecond}
}

func lying(s shape) shape {
	s.lies = true
	return s
}

func handing(s shape) shape {
	s.hands = true
	return s
}

func serving(s shape, f server.Faults) shape {
	s.server = f
	return s
}

// few is a smaller cluster, for faults that need no more.
func few(s shape) shape {
	s.nodes, s.spare, s.shards, s.copies = 3, false, 3, 2
	return s
}

func gapped(s shape) shape {
	s.state.WatchGap = true
	return s
}

func cutting(s shape) shape {
	s.cuts = true
	return s
}

// sharded is five nodes, and a sixth that comes and goes, with eight shards of
// three copies.
func sharded(faults shard.Faults) shape {
	return shape{nodes: 5, spare: true, strategy: node.StrategyConsistent, shards: 8, copies: 3, faults: faults, state: slow, think: 300 * time.Millisecond}
}

// keys that clients meet at, in one shard: transactions have several. Requests
// of unknown outcome make the search for an order long, and moving replicas
// make more of them, so that there are more keys then.
func (s shape) keys() []string {
	if s.shards == 0 {
		return []string{"a", "b", "c"}
	}
	tag := s.tag()
	var keys []string
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		keys = append(keys, tag+name)
	}
	return keys
}

// tag is of a shard that the founder who gives up its leadership last leads, and
// one who is quick to stand for election has too: if both serve for a while,
// that shows.
func (s shape) tag() string {
	var nodes []ring.Node
	for i := range s.nodes {
		nodes = append(nodes, ring.Node{Name: fmt.Sprintf("n%d", i+1), Weight: 1})
	}
	r, err := ring.New(ring.Config{Shards: s.shards, Replicas: s.copies}, nodes...)
	if err != nil {
		panic(err)
	}
	for i := 0; ; i++ {
		tag := fmt.Sprintf("{t%d}", i)
		owners := r.OwnersOfKey([]byte(tag))
		if owners[0] == nodes[s.nodes-1].Name && (slices.Contains(owners, "n1") || slices.Contains(owners, "n2")) {
			return tag
		}
	}
}

// simulate runs one cluster for a while, from one seed, and searches for an
// order of what clients saw for at most the given real time.
func simulate(t *testing.T, s shape, seed uint64, duration, search time.Duration, logs *lockedBuffer) (r report) {
	var (
		ops       []linearizability.Op
		converged error
	)
	dir := fastDir(t)
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var mu sync.Mutex
		w := newWorld(s, dir, logs, func(node string, err error) {
			mu.Lock()
			defer mu.Unlock()
			r.halted = append(r.halted, fmt.Sprintf("%s: %v", node, err))
		})
		ctx, cancel := context.WithTimeout(context.Background(), duration)
		defer cancel()
		var history linearizability.History
		var windows []linearizability.Window
		r.faults = make(map[string]int)
		var running sync.WaitGroup
		j := w.summon(seed, s.keys(), &history)
		running.Go(func() { windows = w.nemesis(ctx, rng, &history, r.faults, j.leaseLog.Broke) })
		var services []linearizability.Service
		for i := range 6 {
			services = append(services, service{w.hosts[w.names[i%len(w.names)]]})
		}
		if s.shards > 0 {
			r.chain = newChain(2 * s.shards)
			running.Go(func() { r.chain.write(ctx, services) })
			running.Go(func() { r.chain.read(ctx, services[0], 400*time.Millisecond) })
			running.Go(func() { r.chain.read(ctx, services[1], 700*time.Millisecond) })
		}
		running.Go(func() { j.leases.Run(ctx) })
		running.Go(func() { j.watches.Compact(ctx, j.reader, j.known) })
		linearizability.Traffic{
			Services: services, Keys: s.keys(), Seed: seed, Think: s.think, Timeout: 5 * time.Second,
		}.Run(ctx, &history)
		running.Wait()
		w.network.HealAll()
		converged = w.converge()
		ops = history.Ops()
		converged = errors.Join(converged, j.judge(&r, ops))
		r.summary = linearizability.Summarize(ops, windows)
		w.stop()
	})
	// Not in virtual time, which stands still while the search works, so that
	// it would never give up.
	r.verdict = errors.Join(converged, linearizability.Check(ops, linearizability.Config{Timeout: search, OneOrder: true}))
	if r.chain != nil {
		r.verdict = errors.Join(r.verdict, r.chain.bad)
	}
	return r
}

// fastDir is a directory in memory where there is one: the simulation's state
// files need no disk.
func fastDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "kvd-sim-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// lockedBuffer keeps the last part of the nodes' logs.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.b.Len() > 4<<20 {
		l.b.Next(2 << 20)
	}
	return l.b.Write(p)
}

func (l *lockedBuffer) save(t *testing.T) string {
	f, err := os.CreateTemp("", "kvd-sim-*.log")
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := f.Write(l.b.Bytes()); err != nil {
		t.Log(err)
	}
	return f.Name()
}

// TestSimulation is half an hour of three nodes that crash, lose their power and what
// they have not synced with it, are cut off, and see slow links, while six
// clients work. Every history must be linearizable and
// every replica must end in the same state.
func TestSimulation(t *testing.T) { campaign(t, full(shard.Faults{})) }

// TestShardedSimulation is half an hour of the same with five nodes that have the
// keys in shards: nodes go down and come back, and replicas move. Reads across
// shards must show one moment.
func TestShardedSimulation(t *testing.T) { campaign(t, sharded(shard.Faults{})) }

func campaign(t *testing.T, s shape) {
	first := firstSeed()
	runs := max(1, int(*hours*float64(time.Hour)/float64(runFor)))
	total := linearizability.Summary{ChangesDuring: make(map[string]int)}
	faults := make(map[string]int)
	reads, moved := 0, 0
	var watched watches.Summary
	var held leases.Summary
	var mu sync.Mutex
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i := range runs {
		seed := first + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			var logs lockedBuffer
			r := simulate(t, s, seed, runFor, time.Minute, &logs)
			if r.verdict != nil || len(r.halted) > 0 {
				t.Errorf("repeat with -test.run=%s -sim.seed=%d -sim.hours=0.01: %v; nodes that halted: %q; logs: %s", t.Name(), seed, r.verdict, r.halted, logs.save(t))
			}
			mu.Lock()
			defer mu.Unlock()
			add(&total, r.summary)
			watched.Add(r.watched)
			held.Add(r.held)
			for fault, n := range r.faults {
				faults[fault] += n
			}
			if r.chain != nil {
				reads += r.chain.reads
				moved += r.chain.moved
			}
		})
	}
	t.Cleanup(func() {
		t.Logf("%d runs of %v from seed %d: %+v, faults %v, %d reads across shards, %d of them in the middle of a change; watches %+v; leases %+v", runs, runFor, first, total, faults, reads, moved, watched, held)
		if err := errors.Join(total.Vacuous(), watched.Vacuous(), held.Vacuous()); err != nil && runs > 3 {
			t.Error(err)
		}
		if s.shards > 0 && runs > 3 && (moved == 0 || moved == reads) {
			t.Errorf("of %d reads across shards %d saw a change", reads, moved)
		}
	})
}

func add(total *linearizability.Summary, s linearizability.Summary) {
	total.Operations += s.Operations
	total.Unknown += s.Unknown
	total.Puts += s.Puts
	total.Swaps += s.Swaps
	total.RefusedSwaps += s.RefusedSwaps
	total.Deletes += s.Deletes
	total.Reads += s.Reads
	total.Overlaps += s.Overlaps
	for fault, n := range s.ChangesDuring {
		total.ChangesDuring[fault] += n
	}
}

// TestPlantedFaultsAreCaught runs the same simulation over nodes with a bug,
// and fails if no seed shows it.
func TestPlantedFaultsAreCaught(t *testing.T) {
	for name, s := range map[string]shape{
		"reads without confirmation":            full(shard.Faults{ReadWithoutConfirmation: true}),
		"acknowledged before commit":            full(shard.Faults{AcknowledgeBeforeCommit: true}),
		"disks that lose what they have synced": lying(full(shard.Faults{})),
		// One that was cut off answers as if nobody else did.
		"a witness answers reads":                        few(sharded(shard.Faults{WitnessServes: true})),
		"a shard is served by its old and its new owner": cutting(sharded(shard.Faults{ReadWithoutConfirmation: true})),
		"leases have the time of an earlier leader":      handing(serving(full(shard.Faults{}), server.Faults{KeepReigns: true})),
		"leases of shards have it":                       handing(serving(few(sharded(shard.Faults{})), server.Faults{KeepReigns: true})),
		"progress is ahead of events":                    serving(full(shard.Faults{}), server.Faults{ProgressAhead: true}),
		"progress over shards is ahead":                  serving(few(sharded(shard.Faults{})), server.Faults{ProgressAhead: true}),
		"watches have a gap":                             gapped(full(shard.Faults{})),
		"watches over shards have a gap":                 gapped(few(sharded(shard.Faults{}))),
	} {
		t.Run(name, func(t *testing.T) {
			first := firstSeed()
			for seed := first; seed < first+60; seed++ {
				var logs lockedBuffer
				r := simulate(t, s, seed, 2*time.Minute, 5*time.Second, &logs)
				if errors.Is(r.verdict, linearizability.ErrViolation) || errors.Is(r.verdict, errTorn) {
					t.Logf("caught with seed %d, run %d: %v", seed, seed-first+1, firstLine(r.verdict))
					return
				}
				if s.lies && len(r.halted) > 0 { // a log with a hole
					t.Logf("caught with seed %d, run %d: %s", seed, seed-first+1, r.halted[0])
					return
				}
			}
			t.Errorf("60 runs from seed %d saw nothing wrong", first)
		})
	}
}

func firstLine(err error) string {
	text := []byte(err.Error())
	if i := slices.Index(text, '\n'); i >= 0 {
		text = text[:i]
	}
	return string(text)
}
