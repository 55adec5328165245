package ring

import "testing"

func BenchmarkBuild1000Nodes4096Shards(b *testing.B) {
	nodes := sameNodes("n", 1000)
	for b.Loop() {
		mustNew(b, Config{Shards: 4096, Replicas: 3}, nodes...)
	}
}

func BenchmarkBuild5Nodes64Shards(b *testing.B) {
	nodes := sameNodes("n", 5)
	for b.Loop() {
		mustNew(b, Config{Shards: 64, Replicas: 3}, nodes...)
	}
}

func BenchmarkOwnersOfKey(b *testing.B) {
	r := mustNew(b, Config{Shards: 4096, Replicas: 3}, sameNodes("n", 1000)...)
	key := []byte("{user42}/cart")
	b.ReportAllocs()
	for b.Loop() {
		r.OwnersOfKey(key)
	}
}

func BenchmarkShard(b *testing.B) {
	key := []byte("{user42}/cart")
	for b.Loop() {
		ShardOf(key, 4096)
	}
}
