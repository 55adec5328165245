package wal

import (
	"errors"
	"fmt"
	"hash/crc64"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/raft"

	"kvd/shard/wal/vfs"
)

// world is what a log should hold, in the simplest form.
type world struct {
	logs    map[ID][]raft.Log
	terms   map[ID]uint64
	removed []ID
}

var table = crc64.MakeTable(crc64.ECMA)

func (w *world) String() string {
	var lines []string
	for id, log := range w.logs {
		lines = append(lines, describe(id, log, w.terms[id]))
	}
	for _, id := range w.removed {
		lines = append(lines, fmt.Sprintf("%s gone", id))
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

func describe(id ID, log []raft.Log, term uint64) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s term %d:", id, term)
	for _, e := range log {
		fmt.Fprintf(&b, " %d/%d/%x", e.Index, e.Term, crc64.Checksum(e.Data, table))
	}
	return b.String()
}

// read is what a log holds.
func read(l *Log) (string, error) {
	var lines []string
	for _, r := range l.Status().Replicas {
		s, err := l.Replica(r.ID, ReplicaOptions{CacheBytes: -1})
		if err != nil {
			return "", err
		}
		var log []raft.Log
		for i := r.First; i <= r.Last && i != 0; i++ {
			var e raft.Log
			if err := s.GetLog(i, &e); err != nil {
				return "", err
			}
			log = append(log, e)
		}
		lines = append(lines, describe(r.ID, log, r.VoteTerm))
		if err := s.Close(); err != nil {
			return "", err
		}
	}
	for id := range l.population.removed {
		lines = append(lines, fmt.Sprintf("%s gone", id))
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n"), nil
}

// writer changes a world and a log alike.
type writer struct {
	world  world
	rnd    *rand.Rand
	log    *Log
	stores map[ID]*Store
	last   uint64
}

func newWriter(tb testing.TB, l *Log, rnd *rand.Rand) *writer {
	w := &writer{world: world{logs: map[ID][]raft.Log{}, terms: map[ID]uint64{}}, rnd: rnd, log: l}
	w.reopen(tb, l)
	return w
}

func (w *writer) reopen(tb testing.TB, l *Log) {
	w.log, w.stores = l, map[ID]*Store{}
	for id := range w.world.logs {
		w.stores[id] = openReplica(tb, l, id, ReplicaOptions{CacheBytes: 2000})
	}
}

// choose makes the change in the world, and returns how to make it in the log.
func (w *writer) choose() func() error {
	ids := sortedIDs(w.world.logs)
	if len(ids) < 3 || w.rnd.IntN(60) == 0 {
		w.last++
		id := ID{Group: w.last % 2, Replica: w.last}
		w.world.logs[id] = nil
		return func() (err error) {
			if err = w.log.Create(id); err == nil {
				w.stores[id], err = w.log.Replica(id, ReplicaOptions{CacheBytes: 2000})
			}
			return err
		}
	}
	id := ids[min(w.rnd.IntN(len(ids)), w.rnd.IntN(len(ids)))] // some are written rarely
	s, log := w.stores[id], w.world.logs[id]
	switch n := w.rnd.IntN(24); {
	case n == 0 && len(ids) > 6:
		delete(w.world.logs, id)
		delete(w.world.terms, id)
		delete(w.stores, id)
		w.world.removed = append(w.world.removed, id)
		return func() error {
			if err := s.Close(); err != nil {
				return err
			}
			return w.log.Remove(id)
		}
	case n <= 2 && len(log) > 10:
		to := log[w.rnd.IntN(len(log)-1)].Index
		w.world.logs[id] = slices.Clone(log[to+1-log[0].Index:])
		return func() error { return s.DeleteRange(0, to) }
	case n == 3 && len(log) > 3:
		w.world.logs[id] = nil
		return s.Reset
	case n == 4:
		w.world.terms[id]++
		term := w.world.terms[id]
		return func() error {
			if err := s.SetUint64(keyVoteTerm, term); err != nil {
				return err
			}
			return s.Set(keyVoteCandidate, []byte("n1/1"))
		}
	}
	next := 1 + w.rnd.Uint64N(1000)
	if len(log) > 0 {
		next = log[len(log)-1].Index + 1
	}
	var entries []*raft.Log
	for range 1 + w.rnd.IntN(3) {
		data := make([]byte, w.rnd.IntN(3000))
		for i := range data {
			data[i] = byte(w.rnd.Uint32())
		}
		entries = append(entries, &raft.Log{Index: next, Term: w.world.terms[id], Data: data})
		next++
	}
	log = slices.Clip(log)
	for _, e := range entries {
		log = append(log, *e)
	}
	w.world.logs[id] = log
	return func() error { return s.StoreLogs(entries) }
}

// crashes takes a picture of what a power cut leaves, or a kill, at each change of the file system, and says
// between which steps that was.
type crashes struct {
	mu    sync.Mutex
	done  int // steps
	taken []crash
}

type crash struct {
	fs       *vfs.Memory
	from, to int // it has these steps, or any in between
	what     string
	faults   faults
}

func (c *crashes) watch(fs *vfs.Memory, seed uint64, every int) {
	n := uint64(0)
	fs.Inject(func(op vfs.Op) error {
		if !op.Kind.Changes() {
			return nil
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		n++
		if n%uint64(every) != 0 {
			return nil
		}
		left := fs.Crash(seed + n)
		if n%5 == 0 {
			left = fs.Kill()
		}
		c.taken = append(c.taken, crash{fs: left, from: c.done, to: c.done + 1, what: fmt.Sprintf("before %+v", op)})
		return nil
	})
}

func (c *crashes) step() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done++
}

// A crash at any change of the file system, also one that segments' coming and going makes, leaves what was
// acknowledged and perhaps what was being written, whole. So does a second crash while the log is opened again.
func TestCrashAnywhere(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	steps, every := 400, 1
	if testing.Short() {
		steps, every = 150, 3
	}
	taken, recycled, err := crashAnywhere(t, seed, steps, every, faults{})
	if err != nil {
		t.Fatal(err)
	}
	if taken < steps/every || recycled == 0 {
		t.Errorf("%d crashes, %d with a log that does not begin with its first segment", taken, recycled)
	}
}

func crashAnywhere(t *testing.T, seed uint64, steps, every int, f faults) (taken, recycled int, err error) {
	fs := new(vfs.Memory)
	o := memoryOptions(fs)
	o.faults = f
	var c crashes
	c.watch(fs, seed, every)
	l := open(t, o)
	w := newWriter(t, l, rand.New(rand.NewPCG(seed, 1)))
	worlds := []string{w.world.String()}
	for i := range steps {
		if i%100 == 99 {
			must(t, l.Close())
			if l, err = Open(o); err != nil {
				return 0, 0, err
			}
			w.reopen(t, l)
		}
		change := w.choose()
		worlds = append(worlds, w.world.String())
		must(t, change())
		c.step()
	}
	must(t, l.Close())
	fs.Inject(nil)
	for i, crash := range c.taken {
		crash.faults = f
		if err := crash.check(worlds, seed+uint64(i), &recycled); err != nil {
			return 0, 0, fmt.Errorf("crash %d, %s, in step %d: %w", i, crash.what, crash.from, err)
		}
	}
	return len(c.taken), recycled, nil
}

// What protects against crashes is needed: without it the test above fails.
func TestPlantedFaultsAreSeen(t *testing.T) {
	for name, f := range map[string]faults{
		"syncs are left out":               {skipSync: true},
		"a former life counts":             {ignoreSalt: true},
		"removals are forgotten":           {forgetBounds: true},
		"segments go before they are dead": {retireEarly: true},
	} {
		if _, _, err := crashAnywhere(t, rand.Uint64(), 250, 5, f); err == nil {
			t.Errorf("not seen: %s", name)
		}
	}
}

func (c *crash) check(worlds []string, seed uint64, recycled *int) error {
	o := memoryOptions(c.fs)
	o.faults = c.faults
	var again []*vfs.Memory
	n := uint64(0)
	c.fs.Inject(func(op vfs.Op) error {
		if n++; op.Kind.Changes() && (n+seed)%7 == 0 {
			again = append(again, c.fs.Crash(seed+n))
		}
		return nil
	})
	l, err := Open(o)
	if err != nil {
		return err
	}
	c.fs.Inject(nil)
	found, err := read(l)
	if err != nil {
		return err
	}
	if list := l.segments.all(); len(list) > 0 && list[0].number > 1 {
		*recycled++
	}
	at := slices.Index(worlds[c.from:min(c.to+1, len(worlds))], found)
	if at < 0 {
		return fmt.Errorf("found\n%s\nwant\n%s\nor the next", found, worlds[c.from])
	}
	if err := l.Close(); err != nil {
		return err
	}
	for _, fs := range again { // crashes while it was opened
		if second, err := reread(fs, c.faults); err != nil || !slices.Contains(worlds[c.from:min(c.to+1, len(worlds))], second) {
			return fmt.Errorf("after a crash while it was opened: %w\n%s", err, second)
		}
	}
	if second, err := reread(c.fs.Crash(seed), c.faults); err != nil || second != found {
		return fmt.Errorf("after it was closed: %w\n%s\nnot\n%s", err, second, found)
	}
	return nil
}

func reread(fs *vfs.Memory, f faults) (string, error) {
	o := memoryOptions(fs)
	o.faults = f
	l, err := Open(o)
	if err != nil {
		return "", err
	}
	found, err := read(l)
	return found, errors.Join(err, l.Close())
}
