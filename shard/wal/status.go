package wal

import "encoding/binary"

// Status is what a Log has.
type Status struct {
	Segments  int   // files with a part of the log
	SizeBytes int64 // of these files
	LiveBytes int64 // of that, what is part of a replica's log
	Spares    int   // files kept for later
	Removed   int   // replicas that were removed
	Replicas  []ReplicaStatus
}

// ReplicaStatus is what a Log has of one replica.
type ReplicaStatus struct {
	ID          ID
	First, Last uint64            // 0: no entries
	LiveBytes   int64             // of its entries
	Keys        map[string][]byte // stable keys, but for the vote

	VoteTerm uint64 // 0: no vote
	VotedFor string
}

// Status looks at everything. It reads memory only, but all of the index.
func (l *Log) Status() Status {
	s := Status{Segments: len(l.segments.all())}
	s.SizeBytes, s.LiveBytes = l.segments.sizes()
	for _, rep := range l.everybody() {
		s.Replicas = append(s.Replicas, rep.status())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s.Spares, s.Removed = len(l.spares), len(l.population.removed)
	return s
}

func (r *replica) status() ReplicaStatus {
	r.mu.RLock()
	defer r.mu.RUnlock()
	s := ReplicaStatus{ID: r.id, First: r.first, Last: r.last, Keys: make(map[string][]byte, len(r.keys))}
	for i := r.first; i <= r.last && i != 0; i++ {
		s.LiveBytes += int64(r.index.get(i).sizeBytes)
	}
	for _, kv := range r.keys {
		if kv.key == string(keyVote) && len(kv.value) >= 8 {
			s.VoteTerm, s.VotedFor = binary.BigEndian.Uint64(kv.value), string(kv.value[8:])
			continue
		}
		s.Keys[kv.key] = append([]byte{}, kv.value...)
	}
	return s
}
