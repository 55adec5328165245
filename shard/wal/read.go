package wal

import (
	"fmt"

	"github.com/hashicorp/raft"
)

// readRecord reads an entry's record and makes sure that it is that one.
func readRecord(w *window, at spot, id ID, i uint64) (r record, err error) {
	b, err := w.read(int64(at.offset), int64(at.sizeBytes))
	if err != nil {
		return r, err
	}
	r, err = splitRecord(b)
	switch {
	case err != nil:
		return r, fmt.Errorf("%w: %w", ErrCorrupt, err)
	case !r.sound():
		return r, fmt.Errorf("%w: the checksum does not match", ErrCorrupt)
	case r.kind != kindEntry && r.kind != kindCopied || r.id != id || r.index != i:
		return r, fmt.Errorf("%w: entry %d of %s is there", ErrCorrupt, r.index, r.id)
	}
	return r, nil
}

// read returns an entry that is not in the cache. While it reads, the entry may be removed or copied forward,
// and its segment overwritten: then it looks again.
func (l *Log) read(rep *replica, i uint64, out *raft.Log) error {
	at, cached, err := rep.lookup(i, out)
	for !cached && err == nil {
		r, failed := l.readAt(rep.id, i, at)
		if failed == nil {
			r.entry(out)
			return nil
		}
		was := at
		if at, cached, err = rep.lookup(i, out); err == nil && !cached && at == was {
			return fmt.Errorf("read %s, entry %d: %w", rep.id, i, failed)
		}
	}
	return err
}

func (l *Log) readAt(id ID, i uint64, at spot) (record, error) {
	seg := l.segments.find(at.segment)
	if seg == nil {
		return record{}, fmt.Errorf("%w: segment %d has gone", ErrCorrupt, at.segment)
	}
	w := window{file: seg.file, sizeBytes: seg.sizeBytes}
	r, err := readRecord(&w, at, id, i)
	if err != nil {
		return r, fmt.Errorf("%s at %d: %w", seg.path, at.offset, err)
	}
	return r, nil
}
