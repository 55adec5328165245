package raftlog

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

func batch(from uint64, entries, sizeBytes int) []*raft.Log {
	b := make([]*raft.Log, entries)
	for i := range b {
		b[i] = &raft.Log{Index: from + uint64(i), Term: 1, Data: make([]byte, sizeBytes), AppendedAt: time.Now()}
	}
	return b
}

func BenchmarkStoreLogs(b *testing.B) {
	for _, shape := range []struct{ entries, sizeBytes int }{{1, 1 << 10}, {1, 64 << 10}, {64, 1 << 10}, {1, 1 << 20}} {
		for _, noSync := range []bool{false, true} {
			b.Run(fmt.Sprintf("%dx%dKiB/nosync=%v", shape.entries, shape.sizeBytes>>10, noSync), func(b *testing.B) {
				s, err := Open(Options{Path: filepath.Join(b.TempDir(), "raft.db"), NoSync: noSync})
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
				logs := batch(1, shape.entries, shape.sizeBytes)
				b.SetBytes(int64(shape.entries * shape.sizeBytes))
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if err := s.StoreLogs(logs); err != nil {
						b.Fatal(err)
					}
					for _, l := range logs {
						l.Index += uint64(len(logs))
					}
					if last := logs[0].Index - 1; i%256 == 255 { // a log that raft truncates now and then
						if err := s.DeleteRange(0, last-1); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

func BenchmarkGetLog(b *testing.B) {
	for name, cacheBytes := range map[string]int{"cached": 0, "uncached": -1} {
		b.Run(name, func(b *testing.B) {
			s := newStore(b, Options{CacheBytes: cacheBytes})
			must(b, s.StoreLogs(batch(1, 64, 16<<10)))
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

// What a reopening costs: most of it is the check of the pages.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "raft.db")
	s, err := Open(Options{Path: path, NoSync: true})
	must(b, err)
	for i := range uint64(256) {
		must(b, s.StoreLogs(batch(1+64*i, 64, 16<<10)))
	}
	must(b, s.Close())
	for b.Loop() {
		s, err := Open(Options{Path: path, NoSync: true})
		must(b, err)
		must(b, s.Close())
	}
}

// The pause that the removal of a beginning makes for an append: one step.
func BenchmarkDeleteRangeStep(b *testing.B) {
	path := filepath.Join(b.TempDir(), "raft.db")
	s, err := Open(Options{Path: path})
	must(b, err)
	defer s.Close()
	next := uint64(1)
	for b.Loop() {
		b.StopTimer()
		for range 8 {
			must(b, s.StoreLogs(batch(next, prefixStep/8, 4<<10)))
			next += prefixStep / 8
		}
		b.StartTimer()
		must(b, s.DeleteRange(0, next-2))
	}
}
