package fsm

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// benchConfig is the default one, except that it leaves out fsync.
func benchConfig(b *testing.B) Config {
	return Config{Path: filepath.Join(b.TempDir(), "state.db"), NoSync: true}
}

// benchKey is a 16-byte key.
func benchKey(i int) []byte {
	var k [16]byte
	binary.BigEndian.PutUint64(k[:], uint64(i)*0x9e3779b97f4a7c15)
	binary.BigEndian.PutUint64(k[8:], uint64(i))
	return k[:]
}

// benchPuts builds entries of 100 puts of 256 bytes, over n keys in random order.
func benchPuts(b *testing.B, n int) [][]byte {
	random := rand.New(rand.NewPCG(1, 1))
	value := make([]byte, 256)
	entries := make([][]byte, max(1, n/100))
	for i := range entries {
		var e EntryBuilder
		for j := range 100 {
			data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: benchKey((i*100 + j) % n), Value: value}})
			if err != nil {
				b.Fatal(err)
			}
			e.Add(Request{Data: data})
		}
		entries[i] = e.Bytes()
	}
	random.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
	return entries
}

func fill(b *testing.B, s *Store, entries [][]byte) {
	b.Helper()
	for _, e := range entries {
		if _, err := s.Apply(s.AppliedIndex()+1, 1, e); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Flush(b.Context(), s.AppliedIndex()); err != nil {
		b.Fatal(err)
	}
}

func benchOpen(b *testing.B, config Config) *Store {
	b.Helper()
	s, err := Open(config)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

// BenchmarkApplyPuts is per entry of 100 puts, flushing included.
func BenchmarkApplyPuts(b *testing.B) {
	for _, keys := range []int{10_000, 1_000_000} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			s := benchOpen(b, benchConfig(b))
			entries := benchPuts(b, keys)
			fill(b, s, entries)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := s.Apply(s.AppliedIndex()+1, 1, entries[i%len(entries)]); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/put")
		})
	}
}

func BenchmarkRange(b *testing.B) {
	s := benchOpen(b, benchConfig(b))
	fill(b, s, benchPuts(b, 100_000))
	for name, r := range map[string]*pb.RangeRequest{
		"one":         {},
		"hundred":     {RangeEnd: []byte{0}, Limit: 100},
		"keys":        {RangeEnd: []byte{0}, Limit: 100, KeysOnly: true},
		"count100000": {RangeEnd: []byte{0}, CountOnly: true},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			r.Key = benchKey(0)
			for i := 0; b.Loop(); i++ {
				if !r.CountOnly {
					r.Key = benchKey(i % 90_000)
				}
				if _, err := s.RangePage(b.Context(), User, r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkReopen opens a file of 1M keys.
func BenchmarkReopen(b *testing.B) {
	config := benchConfig(b)
	s := benchOpen(b, config)
	fill(b, s, benchPuts(b, 1_000_000))
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	s = nil
	for b.Loop() {
		before := heap()
		b.StartTimer()
		s, err := Open(config)
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(heap()-before)/float64(s.spaces[User].index.Len()), "bytes/key")
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
