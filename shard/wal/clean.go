package wal

import (
	"errors"
	"fmt"
	"slices"
	"sync"
)

const (
	// copyBytes bounds what is copied of one replica at a time, and copiers of how many: the writes of all wait
	// for the batch that these share. hurriedBytes is for a log that grows faster than that.
	copyBytes    = 64 << 10
	hurriedBytes = 1 << 20
	copiers      = 16

	// copyAhead is read at once: what belongs to one replica may lie far apart.
	copyAhead = 16 << 10
)

// clean lets the oldest segments go, as soon as nothing in them is needed, and copies what is left of them
// forward when that is little or the log is long.
func (l *Log) clean() {
	for {
		select {
		case <-l.cleaning:
		case <-l.done:
			return
		}
		for again := true; again && l.unusableNow() == nil; {
			var err error
			if again, err = l.cleanOldest(); err != nil {
				_ = l.fail(err)
			}
		}
	}
}

// cleanOldest does something about the oldest segment, if that makes sense now.
func (l *Log) cleanOldest() (again bool, err error) {
	list := l.segments.all()
	if len(list) < 2 { // the next one has the checkpoint without which the log cannot be read
		return false, nil
	}
	oldest := list[0]
	if oldest.live.Load() == 0 || l.options.faults.retireEarly {
		l.segments.pop()
		l.metrics.recycled.Inc()
		return true, l.retire(oldest)
	}
	if !worthCopying(oldest, len(list)) && !l.long() {
		return false, nil
	}
	if err := l.copyAll(oldest); err != nil {
		return false, err
	}
	if n := oldest.live.Load(); n != 0 && l.unusableNow() == nil {
		return false, fmt.Errorf("%w: %s: %d bytes of no replica", ErrCorrupt, oldest.path, n)
	}
	return true, nil
}

// worthCopying: an eighth of a segment is cheap to copy, and frees all of it.
func worthCopying(oldest *segment, count int) bool {
	return count > 2 && oldest.live.Load() <= oldest.sizeBytes/8
}

// long reports whether the log takes more than twice what is needed of it, besides what is just being written:
// then copying writes no more than appending does.
func (l *Log) long() bool {
	size, live := l.segments.sizes()
	return size > 2*live+2*l.options.SegmentBytes
}

func (l *Log) copyStep() int {
	if size, live := l.segments.sizes(); size > 4*live+4*l.options.SegmentBytes {
		return hurriedBytes
	}
	return copyBytes
}

func (l *Log) everybody() []*replica {
	l.mu.Lock()
	defer l.mu.Unlock()
	reps := make([]*replica, 0, len(l.population.replicas))
	for _, rep := range l.population.replicas {
		reps = append(reps, rep)
	}
	slices.SortFunc(reps, func(a, b *replica) int { return compareID(a.id, b.id) })
	return reps
}

// copyAll copies all that anybody needs of the oldest segment.
func (l *Log) copyAll(oldest *segment) error {
	work := make(chan *replica)
	errs := make(chan error, copiers)
	var tasks sync.WaitGroup
	for range copiers {
		tasks.Go(func() {
			var failed error
			for rep := range work {
				if failed == nil {
					failed = l.copyForward(rep, oldest)
				}
			}
			errs <- failed
		})
	}
	for _, rep := range l.everybody() {
		if rep.nextIn(oldest.number, 1) != 0 {
			work <- rep
		}
	}
	close(work)
	tasks.Wait()
	close(errs)
	var err error
	for e := range errs {
		err = errors.Join(err, e)
	}
	return err
}

// copyForward copies all that a replica needs of the oldest segment.
func (l *Log) copyForward(rep *replica, oldest *segment) error {
	w := window{file: oldest.file, sizeBytes: oldest.sizeBytes, ahead: copyAhead}
	for from := uint64(1); from != 0 && l.unusableNow() == nil; {
		var err error
		if from, err = l.copySome(rep, oldest, &w, from); err != nil {
			return err
		}
	}
	return nil
}

// copySome copies some entries from an index on, and returns where to go on; 0: nowhere. The turn keeps the
// entries from being removed or replaced meanwhile.
func (l *Log) copySome(rep *replica, oldest *segment, w *window, from uint64) (next uint64, err error) {
	if from = rep.nextIn(oldest.number, from); from == 0 {
		return 0, nil
	}
	rep.turn <- struct{}{}
	defer func() { <-rep.turn }()
	var b []byte
	records, step := 0, l.copyStep()
	for from = rep.nextIn(oldest.number, from); from != 0 && len(b) < step; from = rep.nextIn(oldest.number, from+1) {
		at := rep.at(from)
		r, err := readRecord(w, at, rep.id, from)
		if err != nil {
			return 0, fmt.Errorf("%s: entry %d at %d of %s: %w", rep.id, from, at.offset, oldest.path, err)
		}
		b = copyRecord(b, &r)
		records++
	}
	if records == 0 {
		return 0, nil
	}
	req := &rep.request
	*req = request{kind: kindCopied, rep: rep, copies: b, copied: records, wake: req.wake}
	return from, l.submit(req)
}

// nextIn returns the first entry from an index on that is in a segment, 0 if there is none.
func (r *replica) nextIn(number, from uint64) uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.first == 0 {
		return 0
	}
	for i := max(from, r.first); i <= r.last; i++ {
		if r.index.get(i).segment == uint32(number) {
			return i
		}
	}
	return 0
}

func (r *replica) at(i uint64) spot {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.index.get(i)
}
