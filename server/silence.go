package server

import (
	"sync"
	"time"
)

// silences remembers which nodes, or groups' replicas, have not answered, so
// that others are asked for a while. The zero value is ready for use.
type silences[K comparable] struct {
	mu     sync.Mutex
	silent map[K]silent
}

type silent struct {
	since time.Time
	times int // in succession
}

// silence is how long one that has not answered is left alone, as far as
// others may know better; twice and four times as long if it goes on.
const silence = time.Second

// answered keeps track of who answers.
func (q *silences[K]) answered(who K, did bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if did {
		delete(q.silent, who)
		return
	}
	if q.silent == nil || len(q.silent) > maxSilent {
		q.silent = make(map[K]silent)
	}
	s := q.silent[who]
	if !s.now() { // calls at the same time count once
		s.times++
	}
	s.since = time.Now()
	q.silent[who] = s
}

// maxSilent is more than there are nodes: hints may hold any name.
const maxSilent = 1 << 10

func (q *silences[K]) isSilent(who K) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.silent[who].now()
}

func (s silent) now() bool {
	return s.times > 0 && time.Since(s.since) < silence<<min(s.times-1, 2)
}
