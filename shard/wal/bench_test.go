//go:build unix

package wal

import (
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard/raftlog"
	"kvd/shard/wal/vfs"
)

// appender is what the benchmarks of both logs use.
type appender interface {
	raft.LogStore
	Close() error
}

// counting counts the syncs of files.
type counting struct {
	vfs.FS
	syncs atomic.Int64
}

func (c *counting) Open(name string, create bool) (vfs.File, error) {
	f, err := c.FS.Open(name, create)
	return countingFile{f, c}, err
}

type countingFile struct {
	vfs.File
	c *counting
}

func (f countingFile) Sync() error {
	f.c.syncs.Add(1)
	return f.File.Sync()
}

// BenchmarkAppend appends one entry at a time to each of some replicas, all at once: by the shared log, and by a
// bbolt file for each.
func BenchmarkAppend(b *testing.B) {
	for _, replicas := range []int{1, 16, 64} {
		for _, sizeBytes := range []int{300, 16 << 10} {
			shape := fmt.Sprintf("%dx%dB", replicas, sizeBytes)
			b.Run("shared/"+shape, func(b *testing.B) {
				fs := &counting{FS: vfs.OS}
				l := open(b, Options{Dir: filepath.Join(b.TempDir(), "log"), FS: fs, fill: true})
				defer l.Close()
				stores := make([]appender, replicas)
				for i := range stores {
					stores[i] = openReplica(b, l, ID{1, uint64(i + 1)}, ReplicaOptions{CacheBytes: 1 << 20})
				}
				before := fs.syncs.Load()
				benchmarkAppend(b, stores, sizeBytes)
				b.ReportMetric(float64(fs.syncs.Load()-before)/float64(b.N), "syncs/op")
			})
			b.Run("boltdb/"+shape, func(b *testing.B) {
				stores := make([]appender, replicas)
				for i := range stores {
					s, err := raftlog.Open(raftlog.Options{Path: filepath.Join(b.TempDir(), "raft.db"), CacheBytes: 1 << 20})
					must(b, err)
					defer s.Close()
					stores[i] = s
				}
				benchmarkAppend(b, stores, sizeBytes)
			})
		}
	}
}

// processorTime is what this process has used so far. It says more than the clock on a busy machine.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// benchmarkAppend shares b.N appends between the replicas. A log is cut off now and then, as raft does.
func benchmarkAppend(b *testing.B, stores []appender, sizeBytes int) {
	b.ReportAllocs()
	b.SetBytes(int64(sizeBytes))
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	used := processorTime(b)
	var wg sync.WaitGroup
	for _, s := range stores {
		wg.Go(func() {
			entry := &raft.Log{Term: 1, Data: make([]byte, sizeBytes), AppendedAt: time.Now()}
			entries := []*raft.Log{entry}
			for left.Add(-1) >= 0 {
				entry.Index++
				if err := s.StoreLogs(entries); err != nil {
					b.Error(err)
					return
				}
				if entry.Index%1000 == 0 {
					if err := s.DeleteRange(0, entry.Index-500); err != nil {
						b.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(processorTime(b)-used)/float64(b.N), "cpu-ns/op")
}

// BenchmarkReplay opens a log of entries of 256 bytes.
func BenchmarkReplay(b *testing.B) {
	const entries, batchEntries = 1 << 20, 64
	o := Options{Dir: filepath.Join(b.TempDir(), "log"), NoSync: true}
	l := open(b, o)
	s := openReplica(b, l, ID{1, 1}, ReplicaOptions{CacheBytes: -1})
	logs := make([]*raft.Log, batchEntries)
	data := make([]byte, 256)
	for i := uint64(0); i < entries; i += batchEntries {
		for j := range logs {
			logs[j] = &raft.Log{Index: i + uint64(j) + 1, Term: 1, Data: data}
		}
		must(b, s.StoreLogs(logs))
	}
	must(b, l.Close())
	b.ReportAllocs()
	b.ResetTimer()
	used := processorTime(b)
	for b.Loop() {
		must(b, open(b, o).Close())
	}
	b.ReportMetric(float64(processorTime(b)-used)/float64(b.N)/entries, "cpu-ns/entry")
	b.ReportMetric(float64(b.N)*entries/b.Elapsed().Seconds(), "entries/s")
}

func BenchmarkGetLog(b *testing.B) {
	for name, cacheBytes := range map[string]int{"cached": 0, "uncached": -1} {
		b.Run(name, func(b *testing.B) {
			l := open(b, Options{Dir: filepath.Join(b.TempDir(), "log"), NoSync: true})
			defer l.Close()
			s := openReplica(b, l, ID{1, 1}, ReplicaOptions{CacheBytes: cacheBytes})
			for i := range uint64(64) {
				must(b, s.StoreLog(&raft.Log{Index: i + 1, Data: make([]byte, 16<<10)}))
			}
			var entry raft.Log
			b.ReportAllocs()
			for i := uint64(0); b.Loop(); i++ {
				if err := s.GetLog(1+i%64, &entry); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAppendCPU leaves the disk out: what the log itself costs.
func BenchmarkAppendCPU(b *testing.B) {
	for _, replicas := range []int{1, 64} {
		b.Run(fmt.Sprint(replicas), func(b *testing.B) {
			l := open(b, Options{Dir: filepath.Join(b.TempDir(), "log"), NoSync: true})
			defer l.Close()
			stores := make([]appender, replicas)
			for i := range stores {
				stores[i] = openReplica(b, l, ID{1, uint64(i + 1)}, ReplicaOptions{CacheBytes: 1 << 20})
			}
			benchmarkAppend(b, stores, 300)
		})
	}
}

// BenchmarkIdleReplica says what a replica with a short log costs in memory.
func BenchmarkIdleReplica(b *testing.B) {
	l := open(b, Options{Dir: filepath.Join(b.TempDir(), "log"), NoSync: true})
	defer l.Close()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	n := uint64(0)
	var stores []*Store
	for b.Loop() {
		n++
		s := openReplica(b, l, ID{n, 1}, ReplicaOptions{CacheBytes: 1 << 20})
		must(b, s.SetUint64([]byte("CurrentTerm"), 3))
		must(b, s.SetUint64(keyVoteTerm, 3))
		must(b, s.Set(keyVoteCandidate, []byte("n1/1")))
		for i := range uint64(5) {
			must(b, s.StoreLog(&raft.Log{Index: i + 1, Term: 3, Data: []byte("x")}))
		}
		stores = append(stores, s)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "bytes/replica")
	runtime.KeepAlive(stores)
}
