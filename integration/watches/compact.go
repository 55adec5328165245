package watches

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// scout is what the one watch that follows everything has told so far. Where it has been, all is known to have been told
// that happened; what it was, the store says.
type scout struct {
	mu    sync.Mutex
	last  int64
	known []int64
}

// take is told of each answer.
func (s *scout) take(w *Watch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, w.next()-1)
	if len(w.Answers) == 0 {
		return
	}
	for _, events := range byRevision(w.Answers[len(w.Answers)-1].Events) {
		s.known = append(s.known, events[0].Kv.ModRevision)
	}
}

func (s *scout) reached() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// defaultRest is the mean time between two compactions.
const defaultRest = 4 * time.Second

// Compact compacts the store now and then until ctx is done. What that makes unreadable the reader has read before.
// known are revisions at which something happened; more of them than the traffic itself knows.
func (t *Traffic) Compact(ctx context.Context, reader *Reader, known func() []int64) {
	random := rand.New(rand.NewPCG(t.Seed, 998))
	rest := cmp.Or(t.Rest, defaultRest)
	for pause(ctx, rest/2+time.Duration(random.Int64N(int64(rest)))) {
		t.scout.mu.Lock()
		reached, told := t.scout.last, slices.Clone(t.scout.known)
		t.scout.mu.Unlock()
		before := reader.Ledger().Last
		if reached <= before || reader.To(ctx, reached, append(told, known()...)) != nil {
			continue // an error comes again when the reader is to read the rest
		}
		revision := reached
		if random.IntN(3) > 0 {
			revision -= random.Int64N(reached - before)
		}
		t.Log.compacts(Compaction{Revision: revision, Asked: t.History.Now()})
		request, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, _ = t.Services[random.IntN(len(t.Services))].Compact(request, &pb.CompactionRequest{Revision: revision, Physical: random.IntN(2) == 0})
		cancel()
		t.forgotten.Store(true)
	}
}
