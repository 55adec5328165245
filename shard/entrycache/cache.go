// Package entrycache keeps the most recent entries of a raft log in memory.
package entrycache

import "github.com/hashicorp/raft"

// entryOverheadBytes is what an entry costs besides its Data and Extensions, about.
const entryOverheadBytes = 128

// Cache is a ring of the most recent entries, without a hole, bounded by bytes. The owner locks it. Entries
// are copied, because raft embeds those it stores in larger things that must not be kept alive.
type Cache struct {
	limitBytes int
	sizeBytes  int
	ring       []raft.Log // its length is a power of two, or 0; entry i is at i modulo that
	first      uint64     // index of the oldest entry, if there is one
	count      uint64
}

// New makes an empty cache with a bound, in bytes; a negative one keeps nothing.
func New(limitBytes int) *Cache { return &Cache{limitBytes: limitBytes} }

// EntryBytes is the size of what an entry carries.
func EntryBytes(entry *raft.Log) int { return len(entry.Data) + len(entry.Extensions) }

func (c *Cache) at(index uint64) *raft.Log { return &c.ring[index&uint64(len(c.ring)-1)] }

// Get copies the entry at index into out, if it is there.
func (c *Cache) Get(index uint64, out *raft.Log) bool {
	if c.count == 0 || index < c.first || index >= c.first+c.count {
		return false
	}
	*out = *c.at(index)
	return true
}

// Push appends entry and lets go of the oldest ones beyond the bound, and of all if entry does not follow.
func (c *Cache) Push(entry *raft.Log) {
	if EntryBytes(entry)+entryOverheadBytes > c.limitBytes {
		c.Reset()
		return
	}
	if c.count > 0 && entry.Index != c.first+c.count {
		c.Reset()
	}
	if c.count == 0 {
		c.first = entry.Index
	}
	if c.count == uint64(len(c.ring)) {
		c.grow()
	}
	*c.at(entry.Index) = *entry
	c.count++
	c.sizeBytes += EntryBytes(entry) + entryOverheadBytes
	for c.sizeBytes > c.limitBytes {
		c.DropBefore(c.first + 1)
	}
}

func (c *Cache) grow() {
	old := *c
	c.ring = make([]raft.Log, max(8, 2*len(old.ring)))
	for i := range old.count {
		*c.at(c.first + i) = *old.at(c.first + i)
	}
}

func (c *Cache) drop(index uint64) {
	entry := c.at(index)
	c.sizeBytes -= EntryBytes(entry) + entryOverheadBytes
	*entry = raft.Log{}
	c.count--
}

// DropBefore lets go of the entries below index.
func (c *Cache) DropBefore(index uint64) {
	for c.count > 0 && c.first < index {
		c.drop(c.first)
		c.first++
	}
}

// DropAfter lets go of the entries above index.
func (c *Cache) DropAfter(index uint64) {
	for c.count > 0 && c.first+c.count-1 > index {
		c.drop(c.first + c.count - 1)
	}
}

// Reset lets go of all entries.
func (c *Cache) Reset() { *c = Cache{limitBytes: c.limitBytes} }
