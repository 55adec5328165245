package wal

import "github.com/hashicorp/raft"

// entryOverheadBytes is what an entry costs besides its Data and Extensions, about.
const entryOverheadBytes = 128

// cache is a ring of the most recent entries, without a hole, bounded by bytes. The owner locks it. Entries
// are copied, because raft embeds those it stores in larger things that must not be kept alive.
type cache struct {
	limitBytes int
	sizeBytes  int
	ring       []raft.Log // its length is a power of two, or 0; entry i is at i modulo that
	first      uint64     // index of the oldest entry, if there is one
	count      uint64
}

func entryBytes(entry *raft.Log) int { return len(entry.Data) + len(entry.Extensions) }

func (c *cache) at(index uint64) *raft.Log { return &c.ring[index&uint64(len(c.ring)-1)] }

func (c *cache) get(index uint64, out *raft.Log) bool {
	if c.count == 0 || index < c.first || index >= c.first+c.count {
		return false
	}
	*out = *c.at(index)
	return true
}

// push appends entry and lets go of the oldest ones beyond the bound, and of all if entry does not follow.
func (c *cache) push(entry *raft.Log) {
	if entryBytes(entry)+entryOverheadBytes > c.limitBytes {
		c.reset()
		return
	}
	if c.count > 0 && entry.Index != c.first+c.count {
		c.reset()
	}
	if c.count == 0 {
		c.first = entry.Index
	}
	if c.count == uint64(len(c.ring)) {
		c.grow()
	}
	*c.at(entry.Index) = *entry
	c.count++
	c.sizeBytes += entryBytes(entry) + entryOverheadBytes
	for c.sizeBytes > c.limitBytes {
		c.dropBefore(c.first + 1)
	}
}

func (c *cache) grow() {
	old := *c
	c.ring = make([]raft.Log, max(8, 2*len(old.ring)))
	for i := range old.count {
		*c.at(c.first + i) = *old.at(c.first + i)
	}
}

func (c *cache) drop(index uint64) {
	entry := c.at(index)
	c.sizeBytes -= entryBytes(entry) + entryOverheadBytes
	*entry = raft.Log{}
	c.count--
}

// dropBefore lets go of the entries below index.
func (c *cache) dropBefore(index uint64) {
	for c.count > 0 && c.first < index {
		c.drop(c.first)
		c.first++
	}
}

// dropAfter lets go of the entries above index.
func (c *cache) dropAfter(index uint64) {
	for c.count > 0 && c.first+c.count-1 > index {
		c.drop(c.first + c.count - 1)
	}
}

func (c *cache) reset() { *c = cache{limitBytes: c.limitBytes} }
