package wal

import "github.com/hashicorp/raft"

// publish makes known what is durable, to those that read and to the next checkpoint.
func (l *Log) publish(group *request, at int64) error {
	for r := group; r != nil; r = r.next {
		if err := l.publishOne(r, spot{segment: uint32(l.active.number), offset: uint32(at)}); err != nil {
			return err
		}
		at += r.sizeBytes
	}
	return nil
}

func (l *Log) publishOne(r *request, at spot) error {
	rep := r.rep
	switch r.kind {
	case kindCreate:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.population.replicas[rep.id] = rep
		return nil
	case kindRemove:
		defer l.removed(rep.id) // its entries are gone by then, or whoever cleans would find them to be nobody's
	}
	if r.kind != kindEntry && r.kind != kindKey {
		defer l.kick()
	}
	rep.mu.Lock()
	defer rep.mu.Unlock()
	switch r.kind {
	case kindEntry:
		return rep.publish(r.entries, at)
	case kindCopied:
		return l.publishCopies(r, at)
	case kindFirst:
		rep.dropBefore(r.index)
	case kindLast:
		rep.dropAfter(r.index)
	case kindReset:
		rep.reset()
	case kindKey:
		rep.set(r.key, r.value)
	case kindRemove:
		rep.reset()
		rep.keys = nil
	}
	return nil
}

func (l *Log) removed(id ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.population.replicas, id)
	l.population.removed[id] = true
}

func (r *replica) publish(entries []*raft.Log, at spot) error {
	for _, e := range entries {
		at.sizeBytes = uint32(entryRecordBytes(e))
		if err := r.put(e.Index, at); err != nil {
			return err
		}
		if r.cache != nil {
			r.cache.Push(e)
		}
		at.offset += at.sizeBytes
	}
	return nil
}

func (l *Log) publishCopies(r *request, at spot) error {
	for b := r.copies; len(b) > 0; b = b[at.sizeBytes:] {
		rec, err := splitRecord(b)
		if err != nil {
			return err
		}
		at.sizeBytes = uint32(len(rec.bytes))
		if err := r.rep.move(rec.index, at); err != nil {
			return err
		}
		at.offset += at.sizeBytes
	}
	l.metrics.copied.Add(float64(len(r.copies)))
	return nil
}
