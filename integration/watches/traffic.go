package watches

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/integration/linearizability"
)

// Traffic is a load of streams of watches of every kind.
type Traffic struct {
	Services []Service // one client each, which has one stream at a time
	Keys     []string  // what others write: watches are on keys, prefixes and ranges of them
	Bounds   Bounds    // the most that is watched; the zero value is all keys
	Seed     uint64    // of the clients' choices
	Life     time.Duration
	Rest     time.Duration            // the mean time between two compactions; 0 = 4 s
	History  *linearizability.History // for its clock
	Log      *Log

	// Newest returns a revision that some client was told of, for watches to begin in the past.
	Newest func() int64

	scout     scout
	forgotten atomic.Bool // a compaction was asked for, and nobody has begun a watch before it yet
	target    atomic.Int64
	watchers  []*watcher
	group     sync.WaitGroup
}

// defaultLife is the mean time that a stream lasts unless something ends it.
const defaultLife = 3 * time.Second

// Start opens watches until ctx is done or Finish lets them end.
func (t *Traffic) Start(ctx context.Context) {
	if t.Life == 0 {
		t.Life = defaultLife
	}
	for i := range t.Services {
		w := &watcher{Traffic: t, node: i, random: rand.New(rand.NewPCG(t.Seed, uint64(i)+1000)), done: make(chan struct{})}
		t.watchers = append(t.watchers, w)
		t.group.Go(func() { w.run(ctx) })
	}
	w := &watcher{Traffic: t, random: rand.New(rand.NewPCG(t.Seed, 999)), done: make(chan struct{}), isScout: true}
	t.watchers = append(t.watchers, w)
	t.group.Go(func() { w.run(ctx) })
}

// Finish lets every client go on until its watches have told everything up to a revision, and waits for that. An error
// says which didn't before ctx was done; the context of Start has to be cancelled then.
func (t *Traffic) Finish(ctx context.Context, revision int64) error {
	t.target.Store(revision)
	for _, w := range t.watchers {
		select {
		case <-w.done:
		case <-ctx.Done():
			return fmt.Errorf("watches: not told of everything up to revision %d: %s", revision, w.state())
		}
	}
	t.group.Wait()
	return nil
}

// Wait returns when all clients have ended.
func (t *Traffic) Wait() { t.group.Wait() }

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// watcher is one client.
type watcher struct {
	*Traffic
	node   int
	random *rand.Rand
	done   chan struct{} // closed when its watches have told of everything

	isScout bool // it has one watch of everything

	mu  sync.Mutex
	now *session // the stream it has; nil = none yet
	err error    // of the last attempt to open one
}

// state tells what a client that is stuck has.
func (w *watcher) state() string {
	w.mu.Lock()
	s, err, node := w.now, w.err, w.node
	w.mu.Unlock()
	if s == nil || err != nil {
		return fmt.Sprintf("client %d has no stream: %v", node, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	text := fmt.Sprintf("client %d, %d requests for progress:", node, s.asked)
	for _, x := range s.watches {
		text += fmt.Sprintf("\n  next %d: %v", x.next(), x)
	}
	return text
}

// run opens one stream after the other.
func (w *watcher) run(ctx context.Context) {
	var before []*Watch
	for ctx.Err() == nil {
		watches := w.choose(before)
		done := w.stream(ctx, watches)
		w.Log.add(slices.DeleteFunc(slices.Clone(watches), func(w *Watch) bool { return w.Answered == 0 && len(w.Answers) == 0 && w.Compacted == 0 })...)
		if done {
			close(w.done)
			return
		}
		before = watches
		pause(ctx, 50*time.Millisecond)
	}
}

// choose makes up the watches of the next stream. Most of those of the last one are resumed; when it is about to end, just
// those that have not told everything.
func (w *watcher) choose(before []*Watch) (watches []*Watch) {
	target := w.target.Load()
	if w.isScout {
		w.mu.Lock()
		w.node = w.random.IntN(len(w.Services)) // some may be down
		w.mu.Unlock()
		if from := w.scout.reached() + 1; target == 0 || from <= target {
			watches = append(watches, &Watch{Node: w.node, Key: w.Bounds.orAll().Key, End: w.Bounds.orAll().End, From: from, Resumed: len(before) > 0})
		}
		return watches
	}
	for _, b := range before {
		next := b.resume()
		if next == 0 || target == 0 && w.random.IntN(4) == 0 || target > 0 && next > target {
			continue
		}
		watches = append(watches, &Watch{Node: w.node, Key: b.Key, End: b.End, From: next, Prev: b.Prev, NoPut: b.NoPut, NoDelete: b.NoDelete, Resumed: true})
	}
	for n := 1 + w.random.IntN(3); target == 0 && len(watches) < n; {
		watches = append(watches, w.another())
	}
	return watches
}

// another makes up a watch.
func (w *watcher) another() *Watch {
	a, b := w.Keys[w.random.IntN(len(w.Keys))], w.Keys[w.random.IntN(len(w.Keys))]
	x := &Watch{Node: w.node, Key: []byte(a), Prev: w.random.IntN(2) == 0}
	switch w.random.IntN(6) {
	case 0: // everything
		x.Key, x.End = w.Bounds.orAll().Key, w.Bounds.orAll().End
	case 1: // from a key on
		x.End = w.Bounds.orAll().End
	case 2: // a range
		x.Key, x.End = []byte(min(a, b)), []byte(max(a, b)+"\x00")
	case 3, 4: // a prefix: of a tag, if there are any
		prefix := a[:1+w.random.IntN(len(a))]
		if len(w.Bounds.Key) > 0 { // a shorter one may go beyond
			prefix = a
		}
		if tag := strings.IndexByte(a, '}'); tag >= 0 {
			prefix = a[:tag+1]
		}
		x.Key, x.End = []byte(prefix), prefixEnd(prefix)
	}
	switch w.random.IntN(10) {
	case 0:
		x.NoPut = true
	case 1:
		x.NoDelete = true
	}
	oldest := w.Log.oldest()
	if newest := max(w.Newest(), oldest); newest > 1 && w.random.IntN(3) > 0 {
		x.From = oldest + w.random.Int64N(newest-oldest+1)
		if w.random.IntN(10) == 0 {
			x.From = newest + w.random.Int64N(20) // of the future
		}
	}
	if w.forgotten.CompareAndSwap(true, false) {
		x.From = 1
	}
	return x
}

func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return []byte{0}
}

// stream opens one stream and follows its watches for a while; until they have told everything, if it is to end. It
// reports whether they have.
func (w *watcher) stream(ctx context.Context, watches []*Watch) (done bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := w.Services[w.node].Watch(ctx)
	w.mu.Lock()
	w.err = err
	w.mu.Unlock()
	if err != nil {
		return false
	}
	s := &session{watcher: w, stream: stream, watches: watches, ended: make(chan struct{})}
	w.mu.Lock()
	w.now = s
	w.mu.Unlock()
	slow := w.random.IntN(3) == 0 && !w.isScout
	reader := rand.New(rand.NewPCG(w.random.Uint64(), 0))
	go func() {
		defer close(s.ended)
		defer cancel()
		s.receive(ctx, slow, reader)
	}()
	done = s.create() && s.ask(ctx)
	cancel()
	<-s.ended
	return done
}

func (w *Watch) request(id int64) *pb.WatchCreateRequest {
	r := &pb.WatchCreateRequest{Key: w.Key, RangeEnd: w.End, StartRevision: w.From, PrevKv: w.Prev, WatchId: id}
	if w.NoPut {
		r.Filters = append(r.Filters, pb.WatchCreateRequest_NOPUT)
	}
	if w.NoDelete {
		r.Filters = append(r.Filters, pb.WatchCreateRequest_NODELETE)
	}
	return r
}

// create asks for the watches.
func (s *session) create() bool {
	for i, w := range s.watches {
		request := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: w.request(int64(i + 1))}}
		if s.stream.Send(request) != nil {
			return false
		}
	}
	return true
}

// session is one stream.
type session struct {
	*watcher
	stream  Stream
	watches []*Watch
	ended   chan struct{}

	mu    sync.Mutex // of what is in watches
	asked int
}

// ask asks for progress now and then, until the stream has had its time.
func (s *session) ask(ctx context.Context) (done bool) {
	life := time.After(time.Duration(s.random.ExpFloat64() * float64(s.Life)))
	for {
		wait := time.Duration(s.random.ExpFloat64() * float64(s.Life) / 8)
		if s.target.Load() > 0 {
			life, wait = nil, 100*time.Millisecond
			if s.ahead() {
				return false
			}
		}
		select {
		case <-s.ended:
			return s.settled()
		case <-ctx.Done():
			return false
		case <-life:
			return false
		case <-time.After(min(wait, s.Life)):
		}
		if s.settled() {
			return true
		}
		request := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}
		if s.stream.Send(request) != nil {
			<-s.ended
			return s.settled()
		}
		s.mu.Lock()
		s.asked++
		s.mu.Unlock()
	}
}

// ahead reports whether a watch begins after all that it should tell of: as long as that is to come, no progress is told
// of on its stream.
func (s *session) ahead() bool {
	target := s.target.Load()
	return slices.ContainsFunc(s.watches, func(w *Watch) bool { return w.From > target })
}

// settled reports whether every watch has told everything that was asked for.
func (s *session) settled() bool {
	target := s.target.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	return target > 0 && !slices.ContainsFunc(s.watches, func(w *Watch) bool { return w.Answered == 0 || w.next() <= target })
}

// receive records what comes until the stream ends, or one of its watches does.
func (s *session) receive(ctx context.Context, slow bool, random *rand.Rand) {
	for {
		if slow && random.IntN(3) == 0 {
			pause(ctx, time.Duration(random.IntN(200))*time.Millisecond)
		}
		answer, err := s.stream.Recv()
		now, received := s.History.Now(), time.Now()
		s.mu.Lock()
		if err != nil {
			for _, w := range s.watches {
				if w.Ended == "" && ctx.Err() == nil {
					w.Ended = err.Error()
				}
			}
			s.mu.Unlock()
			return
		}
		for i, w := range s.watches {
			if id := int64(i + 1); answer.WatchId == id || answer.WatchId == -1 && !answer.Canceled && w.Answered > 0 && w.Ended == "" {
				w.take(answer, now, received)
				if s.isScout {
					s.scout.take(w)
				}
			}
		}
		s.mu.Unlock()
		if answer.Canceled {
			return
		}
	}
}

// take records an answer.
func (w *Watch) take(answer *pb.WatchResponse, now int64, received time.Time) {
	switch {
	case answer.Canceled:
		w.Compacted, w.Closed, w.Ended = answer.CompactRevision, now, "cancelled: "+answer.CancelReason
	case answer.Created:
		w.Answered, w.Created = now, answer.Header.Revision
	default:
		w.Answers = append(w.Answers, Answer{At: now, Time: received, Revision: answer.Header.Revision, Events: answer.Events})
	}
}
