package ring

import (
	"bytes"
	"encoding/binary"

	"github.com/cespare/xxhash/v2"
)

// Tag returns the part of the key that chooses its shard: what is between the
// first '{' and the next '}' if that is not empty, else the whole key. So
// {user42}/cart and {user42}/name share a shard. The result aliases key.
func Tag(key []byte) []byte {
	_, rest, found := bytes.Cut(key, []byte("{"))
	if !found {
		return key
	}
	tag, _, found := bytes.Cut(rest, []byte("}"))
	if !found || len(tag) == 0 {
		return key
	}
	return tag
}

// ShardOf returns the key's shard, 0..shards-1: it depends on nothing but the
// key's tag and the number of shards, which must be positive.
func ShardOf(key []byte, shards int) int {
	return int(xxhash.Sum64(Tag(key)) % uint64(shards))
}

// Shard returns the key's shard.
func (r *Ring) Shard(key []byte) int { return ShardOf(key, r.config.Shards) }

// ShardOfLease returns the shard that is a lease's home: it depends on nothing
// but all eight bytes of the id and the number of shards, which must be positive.
func ShardOfLease(id int64, shards int) int {
	return int(xxhash.Sum64(binary.BigEndian.AppendUint64(nil, uint64(id))) % uint64(shards))
}
