package wal

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/raft"

	"kvd/shard/raftlog/raftlogtest"
	"kvd/shard/wal/vfs"
)

// Many replicas append, vote and truncate at once, some often, some rarely, and the log is closed and opened again and
// again. Segments go, and what is left in them is copied: nothing is lost, and the log stays short.
func TestChurn(t *testing.T) { synctest.Test(t, churn) }

func churn(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	fs := new(vfs.Memory)
	o := Options{Dir: "log", FS: fs, SegmentBytes: testSegmentBytes}
	const replicas = 12
	models := make([]*churner, replicas)
	for i := range models {
		models[i] = &churner{id: ID{Group: uint64(i % 4), Replica: uint64(i + 1)}, rnd: rand.New(rand.NewPCG(seed, uint64(i))), next: 1}
	}
	var copied, recycled float64
	for range 6 {
		l := open(t, o)
		var wg sync.WaitGroup
		for i := range models {
			wg.Go(func() { models[i].run(t, l, 30+i*20) })
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		synctest.Wait() // until nothing is left to clean
		size, live := l.segments.sizes()
		if limit := 2*live + 4*testSegmentBytes; size > limit {
			t.Errorf("%d bytes, %d live", size, live)
		}
		copied += value(t, l.metrics.copied)
		recycled += value(t, l.metrics.recycled)
		must(t, l.Close())
	}
	if copied == 0 || recycled == 0 {
		t.Errorf("%v bytes copied, %v segments recycled", copied, recycled)
	}
	l := open(t, o)
	defer l.Close()
	for i := range models {
		models[i].check(t, l)
	}
}

type churner struct {
	id   ID
	rnd  *rand.Rand
	log  []*raft.Log
	next uint64
	term uint64

	guard atomic.Uint64
}

func (c *churner) run(t *testing.T, l *Log, steps int) {
	s := openReplica(t, l, c.id, ReplicaOptions{CacheBytes: 4000, Guard: c.guard.Load})
	defer s.Close()
	for range steps {
		if err := c.step(s); err != nil {
			t.Errorf("%s: %v", c.id, err)
			return
		}
	}
	c.compare(t, s)
}

func (c *churner) check(t *testing.T, l *Log) {
	s, err := l.Replica(c.id, ReplicaOptions{CacheBytes: -1})
	must(t, err)
	defer s.Close()
	c.compare(t, s)
}

func (c *churner) step(s *Store) error {
	switch n := c.rnd.IntN(20); {
	case n == 0 && len(c.log) > 20:
		keep := c.rnd.IntN(20)
		last := c.log[len(c.log)-1-keep].Index
		c.log = c.log[len(c.log)-keep:]
		c.guard.Store(last)
		return s.DeleteRange(0, last)
	case n == 1 && len(c.log) > 5:
		from := c.log[len(c.log)-3].Index
		c.log = c.log[:len(c.log)-3]
		c.next = from
		return s.DeleteRange(from, from+2)
	case n == 2:
		c.term++
		if err := s.SetUint64(keyVoteTerm, c.term); err != nil {
			return err
		}
		return s.Set(keyVoteCandidate, fmt.Appendf(nil, "candidate of %d", c.term))
	default:
		entries := raftlogtest.Entries(c.next, c.next+c.rnd.Uint64N(5), c.term)
		for _, e := range entries {
			e.Data = append(e.Data, make([]byte, c.rnd.IntN(600))...)
		}
		c.next += uint64(len(entries))
		c.log = append(c.log, entries...)
		return s.StoreLogs(entries)
	}
}

func (c *churner) compare(t *testing.T, s *Store) {
	t.Helper()
	for _, want := range c.log {
		var got raft.Log
		if err := s.GetLog(want.Index, &got); err != nil || got.Term != want.Term || string(got.Data) != string(want.Data) {
			t.Errorf("%s: entry %d: %v", c.id, want.Index, err)
			return
		}
	}
	first, last := s.rep.bounds()
	if len(c.log) > 0 && (first != c.log[0].Index || last != c.next-1) {
		t.Errorf("%s: %d to %d, want %d to %d", c.id, first, last, c.log[0].Index, c.next-1)
	}
	if term, err := s.GetUint64(keyVoteTerm); c.term > 0 && (err != nil || term != c.term) {
		t.Errorf("%s: term %d, %v", c.id, term, err)
	}
}
