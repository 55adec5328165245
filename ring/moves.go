package ring

import (
	"fmt"
	"slices"
)

// Move is one replica that changes its node. From is empty where a shard gains
// a replica, To where it loses one: there are more or fewer nodes than Replicas.
type Move struct {
	Shard    int
	From, To string
}

// Moves returns what turns one placement into another, by shard. Nodes that own
// a shard in both are not named, even if their order differs. Rings of different
// numbers of shards are an error that wraps ErrConfig.
func Moves(from, to *Ring) ([]Move, error) {
	if from.config.Shards != to.config.Shards {
		return nil, fmt.Errorf("%w: moves from %d shards to %d", ErrConfig, from.config.Shards, to.config.Shards)
	}
	var moves []Move
	for shard := range from.config.Shards {
		before, after := from.Owners(shard), to.Owners(shard)
		lost, gained := without(before, after), without(after, before)
		for i := range max(len(lost), len(gained)) {
			moves = append(moves, Move{Shard: shard, From: at(lost, i), To: at(gained, i)})
		}
	}
	return moves, nil
}

func without(names, unwanted []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return slices.Contains(unwanted, n) })
}

func at(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return ""
}
