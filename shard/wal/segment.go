package wal

import (
	"sync/atomic"

	"kvd/shard/wal/vfs"
)

// segment is a file of the log.
type segment struct {
	file      vfs.File
	path      string
	number    uint64
	salt      uint64
	sizeBytes int64

	end    int64        // behind the last batch; of whoever writes or replays
	sealed bool         // the last batch says so; likewise
	live   atomic.Int64 // bytes of records that are entries of some replica's log
}

// segments are those with batches, in order and without a gap. The last one is written to. Anybody may look;
// whoever writes appends to them, whoever cleans takes the first one away.
type segments struct {
	list atomic.Pointer[[]*segment]
}

func (s *segments) all() []*segment {
	if list := s.list.Load(); list != nil {
		return *list
	}
	return nil
}

// change replaces the list, even if somebody else does so at the same time.
func (s *segments) change(next func([]*segment) []*segment) {
	for {
		old := s.list.Load()
		var list []*segment
		if old != nil {
			list = *old
		}
		list = next(list)
		if s.list.CompareAndSwap(old, &list) {
			return
		}
	}
}

func (s *segments) push(seg *segment) {
	s.change(func(list []*segment) []*segment { return append(list[:len(list):len(list)], seg) })
}

func (s *segments) pop() {
	s.change(func(list []*segment) []*segment { return list[1:] })
}

// find returns nil for a segment that has gone.
func (s *segments) find(number uint32) *segment {
	list := s.all()
	if len(list) == 0 {
		return nil
	}
	if i := uint64(number) - list[0].number; i < uint64(len(list)) {
		return list[i]
	}
	return nil
}

// count adds an entry's record to the live bytes, or takes it away.
func (s *segments) count(at spot, sign int64) {
	if at.missing() {
		return
	}
	if seg := s.find(at.segment); seg != nil {
		seg.live.Add(sign * int64(at.sizeBytes))
	}
}

// sizes returns what the segments take, and what of that is needed.
func (s *segments) sizes() (sizeBytes, liveBytes int64) {
	for _, seg := range s.all() {
		sizeBytes += seg.sizeBytes
		liveBytes += seg.live.Load()
	}
	return sizeBytes, liveBytes
}
