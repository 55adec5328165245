package entrycache

import (
	"testing"

	"github.com/hashicorp/raft"
)

func TestCacheIsBounded(t *testing.T) {
	const limit = 100_000
	c := New(limit)
	for i := uint64(1); i < 5000; i++ {
		c.Push(&raft.Log{Index: i, Data: make([]byte, i%3000)})
		if c.sizeBytes > limit || c.count == 0 {
			t.Fatalf("%d entries, %d bytes", c.count, c.sizeBytes)
		}
		var entry raft.Log
		if !c.Get(i, &entry) || entry.Index != i || c.Get(i+1, &entry) || c.Get(c.first-1, &entry) {
			t.Fatalf("entry %d: wrong contents", i)
		}
	}
	c.Push(&raft.Log{Index: 5000, Data: make([]byte, limit)})
	if c.count != 0 || c.sizeBytes != 0 {
		t.Error("an entry above the bound stays")
	}
}
