package ring

import (
	"slices"
	"testing"
)

// The checks of this package see the faults they are there for.

func TestAnIgnoredBoundIsCaught(t *testing.T) {
	r := mustNew(t, Config{Shards: 256, Replicas: 2}, sameNodes("n", 9)...)
	unbounded := *r
	unbounded.owners = place(r.points, slices.Repeat([]int{256}, 9), 256, 2, hashParts)
	if broken(r) != nil || broken(&unbounded) == nil {
		t.Fatalf("with bounds: %v; without: %v", broken(r), broken(&unbounded))
	}
}

func TestASharedNodeIsCaught(t *testing.T) {
	r := mustNew(t, Config{Shards: 16, Replicas: 2}, sameNodes("n", 4)...)
	r.owners[3][1] = r.owners[3][0]
	if broken(r) == nil {
		t.Fatal("a shard with both copies on one node passed")
	}
}

// crowded puts all points and shards on 16 positions, so that ties decide.
func crowded(kind byte, name string, number uint32) uint64 {
	return hashParts(kind, name, number) &^ (1<<60 - 1)
}

func TestAnOrderDependentTieBreakIsCaught(t *testing.T) {
	config := Config{Shards: 64, Replicas: 2, VirtualNodes: 16}
	nodes := sameNodes("n", 6)
	reversed := slices.Clone(nodes)
	slices.Reverse(reversed)
	sorted, unsorted := build(config, nodes, crowded), build(config, reversed, crowded)
	if err := broken(sorted); err != nil {
		t.Fatal(err)
	}
	same := true
	for shard := range config.Shards {
		same = same && slices.Equal(sorted.Owners(shard), unsorted.Owners(shard))
	}
	if same {
		t.Fatal("ties that the order of nodes decides passed")
	}
	requireSame(t, mustNew(t, config, nodes...), mustNew(t, config, reversed...))
}

// Few positions and bounds without slack: shards find no room on their way round.
func TestAShardThatFindsNoRoomSwaps(t *testing.T) {
	const shards, copies = 6, 2
	nodes := sameNodes("n", 3)
	for virtualNodes := 1; virtualNodes <= 8; virtualNodes++ {
		points := circle(nodes, virtualNodes, crowded)
		limits := []int{4, 4, 4}
		p := place(points, limits, shards, copies, crowded)
		load := make([]int, len(nodes))
		for shard, owners := range p {
			if len(owners) != copies || owners[0] == owners[1] {
				t.Fatalf("shard %d is on %v", shard, owners)
			}
			for _, n := range owners {
				load[n]++
			}
		}
		if !slices.Equal(load, limits) {
			t.Fatalf("load %v, want %v", load, limits)
		}
	}
}
