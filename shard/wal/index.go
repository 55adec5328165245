package wal

// chunkEntries is how many places are allocated at once.
const chunkEntries = 128

// spot is where an entry's record is. The zero value is nowhere.
type spot struct {
	segment, offset, sizeBytes uint32
}

func (s spot) missing() bool { return s.segment == 0 }

// index knows where the entries of one replica are. The owner knows its bounds.
type index struct {
	base   uint64 // the chunk of entry i is chunks[i/chunkEntries-base]
	chunks []*[chunkEntries]spot
}

func (x *index) get(i uint64) spot {
	if n := i/chunkEntries - x.base; n < uint64(len(x.chunks)) && x.chunks[n] != nil {
		return x.chunks[n][i%chunkEntries]
	}
	return spot{}
}

// put sets the place of i, which is not before the lowest that has ever been since reset.
func (x *index) put(i uint64, s spot) {
	c := i / chunkEntries
	if len(x.chunks) == 0 {
		x.base = c
	}
	for uint64(len(x.chunks)) <= c-x.base {
		x.chunks = append(x.chunks, nil)
	}
	if x.chunks[c-x.base] == nil {
		x.chunks[c-x.base] = new([chunkEntries]spot)
	}
	x.chunks[c-x.base][i%chunkEntries] = s
}

// reset makes room for first to last, of which none has a place.
func (x *index) reset(first, last uint64) {
	*x = index{}
	if first != 0 {
		x.base = first / chunkEntries
		x.chunks = make([]*[chunkEntries]spot, last/chunkEntries-x.base+1)
	}
}

// dropBefore lets go of chunks with nothing from i on.
func (x *index) dropBefore(i uint64) {
	for len(x.chunks) > 0 && x.base < i/chunkEntries {
		x.chunks[0] = nil
		x.chunks = x.chunks[1:]
		x.base++
	}
}

// dropAfter lets go of chunks with nothing up to i.
func (x *index) dropAfter(i uint64) {
	for n := len(x.chunks); n > 0 && x.base+uint64(n-1) > i/chunkEntries; n-- {
		x.chunks[n-1] = nil
		x.chunks = x.chunks[:n-1]
	}
}
