// Package watches opens watches of every kind on an etcd v3 service, records what they deliver, and judges it against
// what the store held at every revision: invariant I7.
package watches

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Service is what watches are opened on: one node, as one client sees it.
type Service interface {
	Watch(ctx context.Context) (Stream, error)
	Compact(context.Context, *pb.CompactionRequest) (*pb.CompactionResponse, error)
}

// Stream is a client's side of a stream of watches. Send and Recv may be called beside each other.
type Stream interface {
	Send(*pb.WatchRequest) error
	Recv() (*pb.WatchResponse, error)
}

// Watch is one watch as its client saw it. Moments are readings of linearizability.History.Now.
type Watch struct {
	Node     int // the service it was opened on
	Key, End []byte
	From     int64 // the revision that was asked for; 0 = from now
	Prev     bool
	NoPut    bool
	NoDelete bool
	Resumed  bool // goes on where another one ended

	Answered  int64 // when the answer that created it came; 0 = never
	Created   int64 // that answer's revision
	Answers   []Answer
	Compacted int64  // > 0: the server ended it, for that compaction
	Closed    int64  // when it did
	Ended     string // why, if the client did not end it
}

// Answer is what came for a watch after it had been created.
type Answer struct {
	At       int64 // when it was received
	Time     time.Time
	Revision int64           // of the header
	Events   []*mvccpb.Event // none: progress
}

// resume is the revision from which a client goes on where the watch has ended.
func (w *Watch) resume() int64 { return max(w.next(), w.Compacted) }

// next is the first revision that the watch has not told of.
func (w *Watch) next() int64 {
	next := w.From
	if next == 0 && w.Created > 0 {
		next = w.Created + 1
	}
	for _, a := range w.Answers {
		next = max(next, a.reached()+1)
	}
	return next
}

// reached is the revision up to which the client has everything with this answer.
func (a Answer) reached() int64 {
	if len(a.Events) == 0 {
		return a.Revision
	}
	return a.Events[len(a.Events)-1].Kv.ModRevision
}

// covers reports whether the watch is to deliver a change of a key.
func (w *Watch) covers(c Change) bool {
	if c.KV == nil && w.NoDelete || c.KV != nil && w.NoPut {
		return false
	}
	key := []byte(c.Key)
	switch {
	case len(w.End) == 0:
		return bytes.Equal(key, w.Key)
	case bytes.Equal(w.End, []byte{0}):
		return bytes.Compare(key, w.Key) >= 0
	default:
		return bytes.Compare(key, w.Key) >= 0 && bytes.Compare(key, w.End) < 0
	}
}

// Log collects watches. The zero value is ready; all methods may be called concurrently.
type Log struct {
	mu          sync.Mutex
	watches     []*Watch
	compactions []Compaction
}

// Compaction is one that a client has asked for. It may take effect at any time after that, or never.
type Compaction struct {
	Revision int64
	Asked    int64 // the moment
}

func (l *Log) compacts(c Compaction) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.compactions = append(l.compactions, c)
}

// Compactions returns what has been asked for.
func (l *Log) Compactions() []Compaction {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.compactions)
}

// oldest is a revision that no compaction has made unreadable so far.
func (l *Log) oldest() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.compactions) == 0 {
		return 1
	}
	return l.compactions[len(l.compactions)-1].Revision
}

func (l *Log) add(watches ...*Watch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.watches = append(l.watches, watches...)
}

// Watches returns what has been recorded of watches that have ended.
func (l *Log) Watches() []*Watch {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.watches)
}

// Deletion is one that a watch told of.
type Deletion struct {
	Key      string
	Revision int64
	Time     time.Time // when it was received for the first time
}

// Deletions returns all that any watch told of, by revision and key.
func (l *Log) Deletions() []Deletion {
	type id struct {
		key      string
		revision int64
	}
	first := make(map[id]time.Time)
	for _, w := range l.Watches() {
		for _, a := range w.Answers {
			for _, e := range a.Events {
				at := id{string(e.Kv.Key), e.Kv.ModRevision}
				if known, ok := first[at]; e.Type == mvccpb.Event_DELETE && (!ok || a.Time.Before(known)) {
					first[at] = a.Time
				}
			}
		}
	}
	var all []Deletion
	for at, received := range first {
		all = append(all, Deletion{at.key, at.revision, received})
	}
	slices.SortFunc(all, func(a, b Deletion) int {
		return cmp.Or(cmp.Compare(a.Revision, b.Revision), cmp.Compare(a.Key, b.Key))
	})
	return all
}
