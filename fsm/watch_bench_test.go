package fsm

import (
	"runtime"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// benchEntry puts 100 times, in n keys.
func benchEntry(b *testing.B, n, first int) []byte {
	var e EntryBuilder
	value := make([]byte, 256)
	for i := range 100 {
		data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: benchKey((first + i) % n), Value: value}})
		if err != nil {
			b.Fatal(err)
		}
		e.Add(Request{Data: data})
	}
	return e.Bytes()
}

// BenchmarkWatch is per entry of 100 puts, with all that it makes watches get taken.
func BenchmarkWatch(b *testing.B) {
	type shape struct{ watches, keys, feeds int }
	for name, of := range map[string]shape{
		"none":           {0, 10_000, 1},
		"others":         {10_000, 20_000, 1}, // nobody watches what changes
		"one":            {1, 1, 1},
		"onekey/feeds=1": {10_000, 1, 1}, "onekey/feeds=10000": {10_000, 1, 10_000},
		"keys/feeds=1": {10_000, 10_000, 1}, "keys/feeds=10000": {10_000, 10_000, 10_000},
	} {
		b.Run(name, func(b *testing.B) { benchWatch(b, of.watches, of.keys, of.feeds, nil) })
	}
	b.Run("ranges/feeds=1", func(b *testing.B) { benchWatch(b, 10_000, 10_000, 1, []byte{0}) })
}

// benchWatch watches one key or range each. ends makes them ranges: of the key alone, but the tree does not know.
func benchWatch(b *testing.B, watches, keys, feedCount int, ends []byte) {
	s := benchOpen(b, benchConfig(b))
	before := heapBytes()
	feeds := make([]*Feed, feedCount)
	for i := range feeds {
		feeds[i] = s.NewFeed(1 << 30)
	}
	for i := range watches {
		key := benchKey(i % keys)
		var end []byte
		if ends != nil {
			end = append(append(end, key...), ends...)
		}
		if err := feeds[i%feedCount].Watch(int64(i), key, end, 2); err != nil {
			b.Fatal(err)
		}
	}
	perWatch := float64(heapBytes()-before) / float64(max(1, watches))
	first := keys / 2 // of the keys that change; half of more than 10,000 are watched
	if keys <= 10_000 {
		first = 0
	}
	entries := make([][]byte, max(1, (keys-first)/100))
	for i := range entries {
		entries[i] = benchEntry(b, keys, first+i*100)
	}
	b.ReportAllocs()
	events, i := 0, 0
	for b.Loop() {
		if _, err := s.Apply(s.AppliedIndex()+1, 1, entries[i%len(entries)]); err != nil {
			b.Fatal(err)
		}
		i++
		for _, f := range feeds {
			for {
				select {
				case <-f.Ready():
				default:
				}
				all, err := f.Take(b.Context(), 1<<20, 1<<20)
				if err != nil {
					b.Fatal(err)
				}
				if all == nil {
					break
				}
				for _, d := range all {
					events += len(d.Events)
				}
			}
		}
	}
	if watches > 0 {
		b.ReportMetric(perWatch, "bytes/watch")
		b.ReportMetric(float64(events)/float64(i), "events/op")
	}
	b.ReportMetric(float64(events)/b.Elapsed().Seconds(), "events/s")
	for _, f := range feeds {
		f.Close()
	}
}

func heapBytes() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkHistory reads all changes of a span back, out of 100,000.
func BenchmarkHistory(b *testing.B) {
	s := benchOpen(b, benchConfig(b))
	fill(b, s, benchPuts(b, 100_000))
	for name, span := range map[string][2][]byte{
		"key": {benchKey(5), nil}, "fewkeys": {benchKey(5), append(benchKey(5), 0)}, "all": {{0}, {0}},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			events := 0
			for b.Loop() {
				f := s.NewFeed(1 << 20)
				if err := f.Watch(1, span[0], span[1], 2); err != nil {
					b.Fatal(err)
				}
				for {
					all, err := f.Take(b.Context(), 1<<20, 1<<20)
					if err != nil {
						b.Fatal(err)
					}
					if all == nil {
						break
					}
					for _, d := range all {
						events += len(d.Events)
					}
				}
				f.Close()
			}
			b.ReportMetric(float64(events)/b.Elapsed().Seconds(), "events/s")
			b.ReportMetric(float64(events)/float64(b.N), "events/op")
		})
	}
}
