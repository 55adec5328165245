package wal

import (
	"errors"
	"reflect"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"kvd/shard/raftlog/raftlogtest"
	"kvd/shard/wal/vfs"
)

func memoryOptions(fs vfs.FS) Options {
	return Options{Dir: "log", FS: fs, SegmentBytes: testSegmentBytes}
}

func TestPopulation(t *testing.T) {
	o := memoryOptions(new(vfs.Memory))
	a, b, c := ID{1, 1}, ID{1, 2}, ID{2, 1}
	l := open(t, o)
	for _, id := range []ID{b, c, a} {
		must(t, l.Create(id))
	}
	if err := l.Create(a); !errors.Is(err, ErrExists) {
		t.Errorf("created twice: %v", err)
	}
	s, err := l.Replica(b, ReplicaOptions{})
	must(t, err)
	must(t, s.StoreLogs(raftlogtest.Entries(1, 10, 1)))
	if _, err := l.Replica(b, ReplicaOptions{}); !errors.Is(err, ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	if err := l.Remove(b); !errors.Is(err, ErrInUse) {
		t.Errorf("removed while open: %v", err)
	}
	must(t, s.Close())
	must(t, l.Remove(b))
	for range 3 {
		if got, want := l.Replicas(), []ID{a, c}; !reflect.DeepEqual(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
		if err := l.Create(b); !errors.Is(err, ErrExists) {
			t.Errorf("created again: %v", err)
		}
		if _, err := l.Replica(b, ReplicaOptions{}); !errors.Is(err, ErrNoReplica) {
			t.Errorf("opened after its removal: %v", err)
		}
		if err := l.Remove(b); !errors.Is(err, ErrNoReplica) {
			t.Errorf("removed twice: %v", err)
		}
		must(t, l.Close())
		l = open(t, o)
		turnOver(t, l, c) // so that the record of the removal is no longer there
	}
	must(t, l.Close())
}

// turnOver writes until all files have been used again.
func turnOver(t *testing.T, l *Log, id ID) {
	t.Helper()
	s, err := l.Replica(id, ReplicaOptions{CacheBytes: -1})
	must(t, err)
	defer s.Close()
	must(t, s.Reset())
	for oldest, i := l.segments.all()[0].number, uint64(1); l.segments.all()[0].number < oldest+3; i++ {
		must(t, s.StoreLog(&raft.Log{Index: i, Data: make([]byte, 10_000)}))
		if i%3 == 0 {
			must(t, s.DeleteRange(0, i))
		}
	}
	must(t, s.Reset())
}

func TestLocked(t *testing.T) {
	for name, o := range map[string]Options{"memory": memoryOptions(new(vfs.Memory)), "os": {Dir: t.TempDir(), NoSync: true}} {
		l := open(t, o)
		if _, err := Open(o); !errors.Is(err, ErrLocked) {
			t.Errorf("%s: opened twice: %v", name, err)
		}
		must(t, l.Close())
		must(t, l.Close())
		must(t, open(t, o).Close())
	}
	if _, err := Open(Options{}); err == nil {
		t.Error("opened without a directory")
	}
	if _, err := Open(Options{Dir: "x", SegmentBytes: 10}); err == nil {
		t.Error("opened with tiny segments")
	}
}

func TestClosedLog(t *testing.T) {
	l := open(t, memoryOptions(new(vfs.Memory)))
	s := openReplica(t, l, ID{1, 1}, ReplicaOptions{})
	must(t, s.StoreLogs(raftlogtest.Entries(1, 3, 1)))
	must(t, l.Close())
	for name, call := range map[string]func() error{
		"StoreLogs": func() error { return s.StoreLogs(raftlogtest.Entries(4, 4, 1)) },
		"GetLog":    func() error { return s.GetLog(1, new(raft.Log)) },
		"Create":    func() error { return l.Create(ID{1, 2}) },
		"Remove":    func() error { _ = s.Close(); return l.Remove(ID{1, 1}) },
		"Replica":   func() error { _, err := l.Replica(ID{1, 1}, ReplicaOptions{}); return err },
	} {
		if err := call(); !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// changes counts what is done to the file system.
func changes(fs *vfs.Memory) (counts func() map[vfs.Kind]int) {
	var mu sync.Mutex
	seen := map[vfs.Kind]int{}
	fs.Inject(func(op vfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		if op.Kind.Changes() {
			seen[op.Kind]++
		}
		return nil
	})
	return func() map[vfs.Kind]int {
		mu.Lock()
		defer mu.Unlock()
		now := seen
		seen = map[vfs.Kind]int{}
		return now
	}
}

func TestOneWriteAndOneSync(t *testing.T) {
	fs := new(vfs.Memory)
	l := open(t, Options{Dir: "log", FS: fs})
	defer l.Close()
	s := openReplica(t, l, ID{1, 1}, ReplicaOptions{})
	counts := changes(fs)
	want := map[vfs.Kind]int{vfs.OpWrite: 1, vfs.OpSync: 1}
	for name, write := range map[string]func() error{
		"entries": func() error { return s.StoreLogs(raftlogtest.Entries(1, 100, 1)) },
		"vote":    func() error { return errors.Join(s.SetUint64(keyVoteTerm, 5), s.Set(keyVoteCandidate, []byte("n1/1"))) },
		"key":     func() error { return s.SetUint64([]byte("CurrentTerm"), 5) },
		"create":  func() error { return l.Create(ID{1, 2}) },
	} {
		if must(t, write()); !reflect.DeepEqual(counts(), want) {
			t.Errorf("%s: more than one write and one sync", name)
		}
	}
}

// While one replica's batch is synced, others gather, and share the next one.
func TestGroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := new(vfs.Memory)
		l := open(t, Options{Dir: "log", FS: fs})
		defer l.Close()
		var stores []*Store
		for i := range uint64(50) {
			stores = append(stores, openReplica(t, l, ID{i, 1}, ReplicaOptions{}))
		}
		var mu sync.Mutex
		syncs := 0
		fs.Inject(func(op vfs.Op) error {
			if op.Kind == vfs.OpSync {
				time.Sleep(time.Second) // in a bubble this lasts until all others wait
				mu.Lock()
				defer mu.Unlock()
				syncs++
			}
			return nil
		})
		var wg sync.WaitGroup
		for _, s := range stores {
			wg.Go(func() { must(t, s.StoreLogs(raftlogtest.Entries(1, 3, 1))) })
		}
		time.Sleep(1500 * time.Millisecond)
		if d := stores[7].WriteStalled(); d != 500*time.Millisecond {
			t.Errorf("stalled for %v", d)
		}
		wg.Wait()
		if syncs != 2 {
			t.Errorf("%d syncs", syncs)
		}
		if l.WriteStalled() != 0 {
			t.Error("still stalled")
		}
		fs.Inject(nil)
		for _, s := range stores {
			if last, err := s.LastIndex(); err != nil || last != 3 {
				t.Errorf("%d, %v", last, err)
			}
		}
	})
}

func TestAppendDoesNotAllocate(t *testing.T) {
	l := open(t, Options{Dir: t.TempDir(), NoSync: true})
	defer l.Close()
	s := openReplica(t, l, ID{1, 1}, ReplicaOptions{CacheBytes: 10_000})
	entries := raftlogtest.Entries(1, 8, 1)
	n := testing.AllocsPerRun(500, func() {
		if err := s.StoreLogs(entries); err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			e.Index += uint64(len(entries))
		}
	})
	if n > 0.5 { // a chunk of the index each 16 batches
		t.Errorf("%v allocations per batch", n)
	}
	var entry raft.Log
	if n := testing.AllocsPerRun(100, func() { _ = s.GetLog(entries[7].Index-9, &entry) }); n != 0 || entry.Index == 0 {
		t.Errorf("%v allocations per cached read", n)
	}
}

func TestMetricsAreRegisteredOnce(t *testing.T) {
	reg := prometheus.NewRegistry()
	for range 2 {
		o := memoryOptions(new(vfs.Memory))
		o.Registerer = reg
		l := open(t, o)
		s := openReplica(t, l, ID{1, 1}, ReplicaOptions{})
		must(t, s.StoreLogs(raftlogtest.Entries(1, 3, 1)))
		families, err := reg.Gather()
		must(t, err)
		seen := map[string]bool{}
		for _, f := range families {
			seen[f.GetName()] = true
			if f.GetName() == "kvd_wal_batch_records" && f.GetMetric()[0].GetHistogram().GetSampleSum() != 5 { // a checkpoint, create, entries
				t.Errorf("%v records", f.GetMetric()[0].GetHistogram().GetSampleSum())
			}
		}
		for _, name := range []string{"kvd_wal_fsync_seconds", "kvd_wal_batch_bytes", "kvd_wal_batch_replicas", "kvd_wal_segments", "kvd_wal_live_bytes", "kvd_wal_copied_bytes_total"} {
			if !seen[name] {
				t.Errorf("no %s", name)
			}
		}
		must(t, l.Close())
	}
}
