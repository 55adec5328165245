package ring

import (
	"math"
	"testing"
)

// Leases are at home where they always were.
func TestHomesOfLeasesStay(t *testing.T) {
	for id, want := range map[int64]int{1: 26, -1: 9, 7587862094217184418: 8, math.MaxInt64: 20} {
		if got := ShardOfLease(id, 64); got != want {
			t.Errorf("lease %d: shard %d instead of %d", id, got, want)
		}
	}
}
