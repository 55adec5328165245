package node

import (
	"testing"
	"time"

	"kvd/placement"
)

func TestHomesOfLeases(t *testing.T) {
	full, shards := newKeyspace(0, nil), newKeyspace(8, nil)
	seen := make(map[uint64]int)
	for id := range int64(8000) {
		if full.Lease(id) != group0 {
			t.Fatal("a lease of `full` is at home elsewhere")
		}
		seen[shards.Lease(id)]++
	}
	for n := range 8 {
		if leases := seen[placement.GroupOf(n)]; leases < 800 || leases > 1200 {
			t.Errorf("shard %d is the home of %d leases of 8000", n, leases)
		}
	}
	if len(seen) != 8 {
		t.Errorf("homes: %v", seen)
	}
	// Ids that look like a key with a tag are spread all the same.
	tagged := make(map[uint64]bool)
	for id := range int64(64) {
		tagged[shards.Lease(0x7b_61_7d<<40|id)] = true // {a}
	}
	if len(tagged) < 4 {
		t.Errorf("leases with a tag in their ids are at home in %d shards", len(tagged))
	}
}

func TestMinLeaseTTL(t *testing.T) {
	for election, want := range map[time.Duration]int64{time.Second: 2, 500 * time.Millisecond: 1, 10 * time.Second: 15, 1001 * time.Millisecond: 2} {
		if got := minLeaseTTL(election); got != want {
			t.Errorf("%v: %d s instead of %d", election, got, want)
		}
	}
}
