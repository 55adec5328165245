package fsm

import (
	"encoding/binary"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
)

// BenchmarkLeases is the life of 100,000 leases with one key each, in entries of 100 requests: per lease, flushing
// included, and what is written for each. Files are synced to disk in none of it.
func BenchmarkLeases(b *testing.B) {
	const n, perEntry = 100_000, 100
	entries := func(request func(id int64) proto.Message) (all [][]byte) {
		for i := 0; i < n; i += perEntry {
			var messages []proto.Message
			for j := range perEntry {
				id := uint64(i+j+1) * 0x9e3779b97f4a7c15 >> 1
				messages = append(messages, request(int64(id)))
			}
			all = append(all, entryOf(b, messages...))
		}
		return all
	}
	key := func(id int64) string { return string(binary.BigEndian.AppendUint64([]byte("service/"), uint64(id))) }
	grants := entries(func(id int64) proto.Message { return grant(id, 60) })
	puts := entries(func(id int64) proto.Message { return leased(key(id), id) })
	checkpoints := entries(func(id int64) proto.Message { return checkpoint(id, 30) })
	revokes := entries(func(id int64) proto.Message { return revoke(id) })
	took := map[string]time.Duration{}
	for b.Loop() {
		config := benchConfig(b)
		s := benchOpen(b, config)
		timed := func(name string, do func()) {
			start := time.Now()
			do()
			took[name] += time.Since(start)
		}
		timed("grant", func() { fill(b, s, grants) })
		if err := s.file.Load().db.View(func(tx *bbolt.Tx) error {
			stats := tx.Bucket(leaseBucket).Stats()
			b.ReportMetric(float64(stats.LeafAlloc+stats.BranchAlloc)/n, "table-bytes/lease")
			return nil
		}); err != nil {
			b.Fatal(err)
		}
		timed("put", func() { fill(b, s, puts) })
		before := s.file.Load().db.Stats().TxStats
		timed("checkpoint", func() { fill(b, s, checkpoints) })
		after := s.file.Load().db.Stats().TxStats
		b.ReportMetric(float64(after.GetPageAlloc()-before.GetPageAlloc())/n, "flushed-bytes/checkpoint")
		timed("list", func() { s.Leases() })
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		timed("load", func() { s = benchOpen(b, config) })
		timed("revoke", func() { fill(b, s, revokes) })
		if len(s.Leases()) != 0 || s.spaces[User].index.Live() != 0 {
			b.Fatal("something is left")
		}
	}
	for name, d := range took {
		b.ReportMetric(float64(d.Nanoseconds())/float64(b.N)/n, "ns/"+name)
	}
}
