package wal

import (
	"cmp"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
)

// population is the replicas that exist, and those that have.
type population struct {
	replicas map[ID]*replica
	removed  map[ID]bool
}

func newPopulation() population {
	return population{replicas: map[ID]*replica{}, removed: map[ID]bool{}}
}

func compareID(a, b ID) int {
	return cmp.Or(cmp.Compare(a.Group, b.Group), cmp.Compare(a.Replica, b.Replica))
}

func sortedIDs[V any](m map[ID]V) []ID { return slices.SortedFunc(maps.Keys(m), compareID) }

// appendCheckpoint adds the record of the small state of all. There is one way only to say the same.
func (p population) appendCheckpoint(b []byte) []byte {
	start := len(b)
	b = appendHeader(b, kindCheckpoint, ID{})
	b = binary.AppendUvarint(b, uint64(len(p.removed)))
	for _, id := range sortedIDs(p.removed) {
		b = appendID(b, id)
	}
	b = binary.AppendUvarint(b, uint64(len(p.replicas)))
	for _, id := range sortedIDs(p.replicas) {
		r := p.replicas[id]
		b = appendID(b, id)
		b = binary.AppendUvarint(b, r.first)
		b = binary.AppendUvarint(b, r.last)
		b = binary.AppendUvarint(b, uint64(len(r.keys)))
		for _, kv := range r.keys {
			b = appendBytes(b, []byte(kv.key))
			b = appendBytes(b, kv.value)
		}
	}
	return finish(b, start)
}

func appendID(b []byte, id ID) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, id.Group), id.Replica)
}

func appendBytes(b, value []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(value))), value...)
}

// maxReplayEntries bounds what a damaged checkpoint can make a replay allocate.
const maxReplayEntries = 1 << 28

var errCheckpoint = errors.New("a checkpoint that cannot be read")

// readCheckpoint returns the population that a checkpoint describes. The places of all entries are missing.
func readCheckpoint(r *record, s *segments) (population, error) {
	p, in := newPopulation(), reader{b: r.rest}
	for n := in.uvarint(); n > 0 && !in.failed; n-- {
		p.removed[in.id()] = true
	}
	for n := in.uvarint(); n > 0 && !in.failed; n-- {
		rep := newReplica(in.id(), s)
		rep.first, rep.last = in.uvarint(), in.uvarint()
		if rep.first > rep.last || rep.first == 0 && rep.last != 0 || rep.last-rep.first >= maxReplayEntries {
			return p, errCheckpoint
		}
		for n := in.uvarint(); n > 0 && !in.failed; n-- {
			rep.set(in.bytes(), in.bytes())
		}
		rep.index.reset(rep.first, rep.last)
		p.replicas[rep.id] = rep
	}
	if in.failed || len(in.b) > 0 {
		return p, errCheckpoint
	}
	return p, nil
}

type reader struct {
	b      []byte
	failed bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.b, r.failed = nil, true
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) id() ID { return ID{Group: r.uvarint(), Replica: r.uvarint()} }

func (r *reader) bytes() []byte {
	n := r.uvarint()
	if n > uint64(len(r.b)) {
		r.b, r.failed = nil, true
		return nil
	}
	value := slices.Clone(r.b[:n])
	r.b = r.b[n:]
	return value
}
