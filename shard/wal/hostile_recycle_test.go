package wal

import (
	"testing"

	"github.com/hashicorp/raft"

	"kvd/shard/wal/vfs"
)

// monotone stores one entry of the same size again and again, so that batches of a segment's former life begin
// where those of its present one do.
func monotone(w *trial) error {
	r := w.replicas[0]
	if err := w.create(r); err != nil {
		return err
	}
	for i := range 180 {
		r.nonce++
		if err := w.store(r, []*raft.Log{makeEntry(w.next(r), 1, 5*r.nonce, 480)}); err != nil {
			return err
		}
		if i%24 == 23 {
			r.setGuard(r.durable.last() - 2)
			if err := w.delete(r, r.durable.first(), r.durable.last()-2); err != nil {
				return err
			}
		}
	}
	return nil
}

// What is left in a segment of its former life is never taken for what follows, wherever the power is cut.
func TestFormerLives(t *testing.T) {
	w := newTrial(seeded(0), 1, Options{SegmentBytes: hostileSegmentBytes})
	made, written := 0, int64(0)
	c := &crasher{w: w, crashes: 2, seed: 77, fault: func(op vfs.Op) error {
		switch op.Kind {
		case vfs.OpPreallocate:
			made++
		case vfs.OpWrite:
			written += op.Bytes
		}
		return nil
	}}
	if err := c.run(monotone); err != nil {
		t.Error(err)
	}
	if t.Logf("%d crashes, %d bytes in %d files", c.seen, written, made); written < int64(made)*hostileSegmentBytes*3/2 {
		t.Errorf("%d bytes in %d files: they are hardly used again", written, made)
	}
}
