package watches

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	"kvd/integration/linearizability"
)

// fault is something that watches do wrong, now and then.
type fault string

const (
	none          fault = ""
	gap           fault = "leaves an answer out"
	leftOut       fault = "leaves an event of a transaction out"
	duplicate     fault = "sends an answer twice"
	reordered     fault = "sends an answer after the next one"
	split         fault = "sends a transaction in two answers"
	shuffled      fault = "sends a transaction's events in another order"
	earlyProgress fault = "tells of progress ahead of an event"
	wrongPrev     fault = "sends the value before the one before"
	noPrev        fault = "sends no value from before"
	wrongValue    fault = "sends another value"
	foreign       fault = "sends an event of a key that is not watched"
	filterIgnored fault = "sends what is filtered"
	lateStart     fault = "begins after the revision that was asked for"
	phantom       fault = "sends an event of a change that never was"
	compacted     fault = "ends a watch for a compaction that never was"
	needless      fault = "ends a watch for a compaction of what it has told of"
	skipped       fault = "begins after a compaction without a word"
)

// fakeStore is a store with watches in one struct.
type fakeStore struct {
	linearizability.Service // for the methods that nobody calls
	fault                   fault

	mu      sync.Mutex
	random  *rand.Rand
	states  []map[string]*mvccpb.KeyValue // by revision
	events  []*mvccpb.Event               // with PrevKv, by revision and operation
	changed chan struct{}
	oldest  int64 // that can be read
	planted int
	history *linearizability.History
}

func newFakeStore(seed uint64, f fault, h *linearizability.History) *fakeStore {
	return &fakeStore{fault: f, random: rand.New(rand.NewPCG(seed, 1)), states: []map[string]*mvccpb.KeyValue{{}, {}},
		changed: make(chan struct{}), history: h}
}

// write changes keys at one revision: the value is put, or the keys are deleted if it is empty.
func (s *fakeStore) write(client int, value string, keys ...string) {
	call := s.history.Now()
	s.mu.Lock()
	revision := int64(len(s.states))
	now := maps.Clone(s.states[revision-1])
	var ops []linearizability.Op
	for _, key := range keys {
		prev := now[key]
		op := linearizability.Op{Client: client, Txn: revision, Call: call, Input: linearizability.Input{Key: key, Kind: linearizability.Put, Value: value},
			Output: linearizability.Output{Revision: revision, Deleted: true}}
		switch {
		case value == "" && prev == nil:
			continue
		case value == "":
			delete(now, key)
			op.Input.Kind = linearizability.Delete
			s.events = append(s.events, &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision}, PrevKv: prev})
		default:
			kv := &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), CreateRevision: revision, ModRevision: revision, Version: 1}
			if prev != nil {
				kv.CreateRevision, kv.Version = prev.CreateRevision, prev.Version+1
			}
			now[key] = kv
			s.events = append(s.events, &mvccpb.Event{Kv: kv, PrevKv: prev})
		}
		ops = append(ops, op)
	}
	if len(ops) > 0 {
		s.states = append(s.states, now)
		close(s.changed)
		s.changed = make(chan struct{})
	}
	s.mu.Unlock()
	for i := range ops {
		ops[i].Return = s.history.Now()
	}
	s.history.Add(ops...)
}

func (s *fakeStore) newest() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(len(s.states) - 1)
}

func (s *fakeStore) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case r.Revision < s.oldest:
		return nil, rpctypes.ErrGRPCCompacted
	case r.Revision >= int64(len(s.states)):
		return nil, rpctypes.ErrGRPCFutureRev
	}
	return &pb.RangeResponse{Kvs: slices.Collect(maps.Values(s.states[r.Revision]))}, nil
}

func (s *fakeStore) Compact(_ context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oldest = r.Revision
	return &pb.CompactionResponse{}, nil
}

// fakeStream serves one client.
type fakeStream struct {
	s        *fakeStore
	ctx      context.Context
	requests chan *pb.WatchRequest
	answers  chan *pb.WatchResponse
	dies     <-chan time.Time
	dead     chan struct{}
}

func (s *fakeStore) Watch(ctx context.Context) (Stream, error) {
	s.mu.Lock()
	life := time.Duration(500+s.random.IntN(4000)) * time.Millisecond
	s.mu.Unlock()
	f := &fakeStream{s: s, ctx: ctx, requests: make(chan *pb.WatchRequest), answers: make(chan *pb.WatchResponse), dies: time.After(life), dead: make(chan struct{})}
	go f.serve()
	return f, nil
}

func (f *fakeStream) Send(r *pb.WatchRequest) error {
	select {
	case f.requests <- r:
		return nil
	case <-f.ctx.Done():
		return io.EOF
	case <-f.dead:
		return io.EOF
	}
}

func (f *fakeStream) Recv() (*pb.WatchResponse, error) {
	select {
	case a, ok := <-f.answers:
		if !ok {
			return nil, errors.New("the server died")
		}
		return a, nil
	case <-f.ctx.Done():
		return nil, f.ctx.Err()
	}
}

type fakeWatch struct {
	*pb.WatchCreateRequest
	next int // of the store's events
}

// serve answers until the client or the server gives up.
func (f *fakeStream) serve() {
	defer close(f.answers)
	defer close(f.dead)
	var watches []*fakeWatch
	for {
		f.s.mu.Lock()
		changed := f.s.changed
		f.s.mu.Unlock()
		for _, w := range watches {
			if !f.deliver(w) {
				return
			}
		}
		select {
		case r := <-f.requests:
			if create := r.GetCreateRequest(); create != nil {
				w, answers := f.create(create)
				if w != nil {
					watches = append(watches, w)
				}
				if !f.send(answers...) {
					return
				}
			} else if !f.progress(watches) {
				return
			}
		case <-changed:
			time.Sleep(5 * time.Millisecond) // so that several changes come together
		case <-f.dies:
			return
		case <-f.ctx.Done():
			return
		}
	}
}

func (f *fakeStream) send(answers ...*pb.WatchResponse) bool {
	for _, a := range answers {
		select {
		case f.answers <- a:
		case <-f.ctx.Done():
			return false
		}
	}
	return true
}

// create returns no watch if what it needs is compacted.
func (f *fakeStream) create(r *pb.WatchCreateRequest) (*fakeWatch, []*pb.WatchResponse) {
	s := f.s
	s.mu.Lock()
	defer s.mu.Unlock()
	w := &fakeWatch{WatchCreateRequest: r}
	newest := int64(len(s.states) - 1)
	from := r.StartRevision
	if from == 0 {
		from = newest + 1
	}
	header := &pb.ResponseHeader{Revision: newest}
	created := &pb.WatchResponse{Header: header, WatchId: r.WatchId, Created: true}
	switch {
	case from < s.oldest && s.plant(skipped):
		from = s.oldest
	case from < s.oldest:
		return nil, []*pb.WatchResponse{created, {Header: header, WatchId: r.WatchId, Canceled: true, CompactRevision: s.oldest}}
	}
	if s.plant(lateStart) {
		from += 3
	}
	r.StartRevision = from
	w.next, _ = slices.BinarySearchFunc(s.events, from, func(e *mvccpb.Event, from int64) int { return int(e.Kv.ModRevision - from) })
	return w, []*pb.WatchResponse{created}
}

// plant reports whether the fault strikes now.
func (s *fakeStore) plant(f fault) bool {
	if s.fault != f || s.random.IntN(4) != 0 {
		return false
	}
	s.planted++
	return true
}

// deliver sends what is due, in one or more answers, and nothing worse than the fault.
func (f *fakeStream) deliver(w *fakeWatch) bool {
	f.s.mu.Lock()
	answers := f.s.answersOf(w)
	f.s.mu.Unlock()
	return f.send(answers...)
}

func (s *fakeStore) answersOf(w *fakeWatch) []*pb.WatchResponse {
	newest := int64(len(s.states) - 1)
	var events []*mvccpb.Event
	for ; w.next < len(s.events); w.next++ {
		if e := s.events[w.next]; e.Kv.ModRevision >= w.StartRevision && s.wants(w, e) {
			events = append(events, s.bend(w, e))
		}
	}
	if len(events) == 0 {
		return nil
	}
	answer := func(events ...*mvccpb.Event) *pb.WatchResponse {
		return &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: newest}, WatchId: w.WatchId, Events: events}
	}
	cut := byRevision(events)
	first := cut[0]
	switch {
	case len(first) > 1 && s.plant(leftOut):
		events = events[1:]
	case len(first) > 1 && s.plant(split):
		return []*pb.WatchResponse{answer(events[0]), answer(events[1:]...)}
	case len(first) > 1 && s.plant(shuffled):
		events[0], events[1] = events[1], events[0]
	case s.plant(gap):
		if events = events[len(first):]; len(events) == 0 {
			return nil
		}
	case s.plant(duplicate):
		return []*pb.WatchResponse{answer(events...), answer(events...)}
	case len(cut) > 1 && s.plant(reordered):
		return []*pb.WatchResponse{answer(events[len(first):]...), answer(first...)}
	case s.plant(earlyProgress):
		return []*pb.WatchResponse{answer(), answer(events...)}
	case s.plant(phantom):
		never := proto.Clone(events[0]).(*mvccpb.Event)
		never.Kv.ModRevision = newest + 1
		never.Kv.Value = []byte("never")
		a := answer(append(events, never)...)
		a.Header.Revision++
		return []*pb.WatchResponse{a}
	case s.plant(compacted):
		return []*pb.WatchResponse{{Header: &pb.ResponseHeader{Revision: newest}, WatchId: w.WatchId, Canceled: true, CompactRevision: s.oldest + 1}}
	case s.oldest > 0 && w.StartRevision >= s.oldest && s.plant(needless):
		return []*pb.WatchResponse{{Header: &pb.ResponseHeader{Revision: newest}, WatchId: w.WatchId, Canceled: true, CompactRevision: s.oldest}}
	}
	return []*pb.WatchResponse{answer(events...)}
}

// wants reports whether the watch is for an event.
func (s *fakeStore) wants(w *fakeWatch, e *mvccpb.Event) bool {
	c := Change{Key: string(e.Kv.Key), KV: e.Kv}
	if e.Type == mvccpb.Event_DELETE {
		c.KV = nil
	}
	x := &Watch{Key: w.Key, End: w.RangeEnd}
	covered := x.covers(c)
	x.NoPut, x.NoDelete = slices.Contains(w.Filters, pb.WatchCreateRequest_NOPUT), slices.Contains(w.Filters, pb.WatchCreateRequest_NODELETE)
	switch {
	case !covered:
		return s.plant(foreign)
	case !x.covers(c):
		return s.plant(filterIgnored)
	}
	return true
}

// bend makes the event as it is sent.
func (s *fakeStore) bend(w *fakeWatch, e *mvccpb.Event) *mvccpb.Event {
	out := proto.Clone(e).(*mvccpb.Event)
	if !w.PrevKv {
		out.PrevKv = nil
	}
	switch {
	case out.PrevKv != nil && (e.Kv.ModRevision <= s.oldest || s.plant(noPrev)):
		out.PrevKv = nil
	case out.PrevKv != nil && out.PrevKv.Version > 1 && s.plant(wrongPrev):
		out.PrevKv = s.states[out.PrevKv.ModRevision-1][string(e.Kv.Key)]
	case out.Type == mvccpb.Event_PUT && s.plant(wrongValue):
		out.Kv.Value = []byte("another")
	}
	return out
}

// progress answers for all watches of the stream.
func (f *fakeStream) progress(watches []*fakeWatch) bool {
	for _, w := range watches {
		if !f.deliver(w) {
			return false
		}
	}
	f.s.mu.Lock()
	synced := true
	for _, w := range watches {
		synced = synced && w.next == len(f.s.events)
	}
	a := &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: int64(len(f.s.states) - 1)}, WatchId: -1}
	f.s.mu.Unlock()
	return !synced || f.send(a)
}

// watchFake runs some seconds of virtual time over a store with a planted fault, and returns the verdict.
func watchFake(t *testing.T, seed uint64, f fault) (s Summary, planted int, verdict error) {
	synctest.Test(t, func(t *testing.T) {
		var history linearizability.History
		store := newFakeStore(seed, f, &history)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		keys := []string{"a", "b", "{t}a", "{t}b", "{u}a"}
		var log Log
		traffic := Traffic{Services: []Service{store, store, store}, Keys: keys, Seed: seed, History: &history, Log: &log, Newest: store.newest, Rest: 300 * time.Millisecond}
		traffic.Start(ctx)
		services := []linearizability.Service{store}
		reader := NewReader(services, Bounds{})
		known := func() []int64 { return Known(history.Ops(), log.Watches()) }
		busy, end := context.WithCancel(ctx)
		var compacting sync.WaitGroup
		compacting.Go(func() { traffic.Compact(busy, reader, known) })
		random := rand.New(rand.NewPCG(seed, 2))
		for i := range 600 {
			a, b := keys[random.IntN(len(keys))], keys[random.IntN(len(keys))]
			switch {
			case random.IntN(4) == 0:
				store.write(0, "", a)
			case a != b && random.IntN(2) == 0:
				store.write(0, fmt.Sprint(i), a, b)
			default:
				store.write(0, fmt.Sprint(i), a)
			}
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
		}
		end()
		compacting.Wait()
		store.mu.Lock()
		planted, store.fault = store.planted, none
		store.mu.Unlock()
		finish, end := context.WithTimeout(ctx, time.Minute)
		defer end()
		stuck := traffic.Finish(finish, store.newest())
		cancel()
		traffic.Wait()
		if verdict = errors.Join(stuck, reader.To(t.Context(), store.newest(), known())); verdict == nil {
			s, verdict = Summarize(log.Watches()), Check(log.Watches(), reader.Ledger(), history.Ops(), log.Compactions())
		}
	})
	return s, planted, verdict
}

func TestRightWatchesPass(t *testing.T) {
	var total Summary
	for range 5 {
		seed := rand.Uint64()
		summary, _, err := watchFake(t, seed, none)
		if err != nil {
			t.Fatalf("seed %d: %v: %+v", seed, err, summary)
		}
		total.Add(summary)
	}
	if err := total.Vacuous(); err != nil {
		t.Fatalf("%v: %+v", err, total)
	}
}

func TestPlantedFaultsAreCaught(t *testing.T) {
	for _, f := range []fault{
		gap, leftOut, duplicate, reordered, split, shuffled, earlyProgress, wrongPrev, noPrev, wrongValue, foreign, filterIgnored, lateStart, phantom, compacted, needless, skipped,
	} {
		t.Run(string(f), func(t *testing.T) {
			seed := rand.Uint64()
			summary, planted, err := watchFake(t, seed, f)
			for i := 0; !errors.Is(err, linearizability.ErrViolation) && i < 100; i++ { // there was no occasion to see it
				seed++
				summary, planted, err = watchFake(t, seed, f)
			}
			if !errors.Is(err, linearizability.ErrViolation) || planted == 0 {
				t.Fatalf("seed %d: %d planted: %v: %+v", seed, planted, err, summary)
			}
			line, _, _ := strings.Cut(err.Error(), "\n")
			t.Log(line)
		})
	}
}
