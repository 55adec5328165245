package server

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// changes are every change of all keys, in the order of revisions, as the groups'
// logs have it.
func (w *world) changes() []*mvccpb.Event {
	w.t.Helper()
	var all []*mvccpb.Event
	for _, group := range w.groups {
		s := w.shards[group]
		store := openShardStore(w.t, group)
		feed := store.NewFeed(1 << 30)
		if err := feed.Watch(1, []byte{0}, []byte{0}, 2); err != nil { // from now on: a group may begin with a compaction
			w.t.Fatal(err)
		}
		for i, entry := range s.log {
			if _, err := store.Apply(uint64(i)+1, entry.term, entry.data); err != nil {
				w.t.Fatal(err)
			}
			taken, err := feed.Take(w.t.Context(), 1<<20, 1<<30)
			if err != nil {
				w.t.Fatal(err)
			}
			for _, d := range taken {
				all = append(all, d.Events...)
			}
		}
		feed.Close()
	}
	slices.SortStableFunc(all, func(a, b *mvccpb.Event) int { return cmp.Compare(a.Kv.ModRevision, b.Kv.ModRevision) })
	return all
}

// of are the events that a watch is to see.
func (s *watchSpec) of(history []*mvccpb.Event, upTo int64) (events []*mvccpb.Event) {
	before := make(map[string]*mvccpb.KeyValue)
	asks := asked{key: s.key, end: s.end}
	for _, e := range history {
		if s.from <= e.Kv.ModRevision && e.Kv.ModRevision <= upTo && asks.has(e.Kv.Key) {
			e = &mvccpb.Event{Type: e.Type, Kv: e.Kv}
			if s.prevKV {
				e.PrevKv = before[string(e.Kv.Key)]
			}
			events = append(events, e)
		}
		if before[string(e.Kv.Key)] = e.Kv; e.Type == mvccpb.Event_DELETE {
			delete(before, string(e.Kv.Key))
		}
	}
	return events
}

// observer is what one client has seen of one watch, over several streams.
type observer struct {
	id   int64
	spec watchSpec

	mu     sync.Mutex
	began  bool
	events []*mvccpb.Event
	next   int64 // where it goes on
	told   []told
	wrong  error
	holes  [][2]int64 // revisions that were compacted before it got them
	// compacts: what a key was before may have been compacted when it was looked up.
	compacts bool
	ended    bool // the present watch
}

// told: when it was told of a progress, it had got so many events.
type told struct {
	revision int64
	events   int
}

func (o *observer) deliver(ctx context.Context, d watchDelivery) {
	if d.aside != nil && !d.read(ctx, 700) {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case d.err != nil:
		o.wrong = cmp.Or(o.wrong, d.err)
	case d.compacted > 0 && d.compacted <= o.next:
		o.wrong = cmp.Or(o.wrong, fmt.Errorf("compacted up to %d when it needs %d", d.compacted, o.next))
	case d.compacted > 0:
		o.holes = append(o.holes, [2]int64{o.next, d.compacted})
		o.next, o.ended = d.compacted, true
		return
	}
	for i, e := range d.events {
		switch revision := e.Kv.ModRevision; {
		case revision < o.next:
			o.wrong = cmp.Or(o.wrong, fmt.Errorf("%q at revision %d after everything before %d", e.Kv.Key, revision, o.next))
		case i > 0 && revision < d.events[i-1].Kv.ModRevision:
			o.wrong = cmp.Or(o.wrong, fmt.Errorf("revision %d after %d", revision, d.events[i-1].Kv.ModRevision))
		}
	}
	o.events = append(o.events, d.events...)
	if n := len(d.events); n > 0 {
		o.next = d.events[n-1].Kv.ModRevision + 1
	}
}

// read reads what is aside, as deliver has to; false if it could not be read.
func (d *watchDelivery) read(ctx context.Context, maxBytes int) bool {
	ctx, cancel := d.aside.within(ctx)
	defer cancel()
	var all []*mvccpb.Event
	for from, more := uint32(0), true; more; more = from > 0 {
		events, next, err := d.aside.read(ctx, from, maxBytes)
		if d.aside.compacted = compactedBy(err); err != nil {
			return false
		}
		all, from = append(all, events...), next
	}
	d.events = all
	return true
}

// begins follows from where the observer is.
func (o *observer) begins(w *watches) error {
	o.mu.Lock()
	s := o.spec
	if o.began {
		s.from = o.next
	} else if s.from > 0 {
		o.began, o.next = true, s.from
	}
	o.ended = false
	o.mu.Unlock()
	revision, err := w.add(o.id, s)
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.began {
		o.began = true
		o.spec.from = revision + 1
		o.next = max(o.next, o.spec.from)
	}
	return nil
}

func (o *observer) progressed(revision int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.ended {
		o.told = append(o.told, told{revision, len(o.events)})
		o.next = max(o.next, revision+1)
	}
}

// check holds all that was seen against the history.
func (o *observer) check(history []*mvccpb.Event, upTo int64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	want := o.wanted(history, upTo)
	if o.wrong != nil {
		return fmt.Errorf("watch %d of %q: %w", o.id, o.spec.key, o.wrong)
	}
	for _, t := range o.told {
		if n := len(o.wanted(history, t.revision)); n > t.events {
			return fmt.Errorf("watch %d of %q from %d: progress at %d when it had got %d events of %d; %d in the end of %d", o.id, o.spec.key, o.spec.from, t.revision, t.events, n, len(o.events), len(want))
		}
	}
	for i, e := range want {
		if i < len(o.events) && o.compacts && o.events[i].PrevKv == nil {
			e.PrevKv = nil // compacted
		}
		if i == len(o.events) || !proto.Equal(e, o.events[i]) {
			got := "nothing"
			if i < len(o.events) {
				got = fmt.Sprint(o.events[i])
			}
			return fmt.Errorf("watch %d of %q from %d: event %d of %d is %s, want %v", o.id, o.spec.key, o.spec.from, i, len(want), got, e)
		}
	}
	if len(o.events) > len(want) {
		return fmt.Errorf("watch %d of %q: %d events, want %d", o.id, o.spec.key, len(o.events), len(want))
	}
	return nil
}

func (o *observer) wanted(history []*mvccpb.Event, upTo int64) []*mvccpb.Event {
	return slices.DeleteFunc(o.spec.of(history, upTo), func(e *mvccpb.Event) bool {
		return slices.ContainsFunc(o.holes, func(hole [2]int64) bool { return hole[0] <= e.Kv.ModRevision && e.Kv.ModRevision < hole[1] })
	})
}

// audience is a client with some watches.
type audience struct {
	w         *world
	g         *rand.Rand
	observers []*observer
	stream    *watches
}

func newAudience(w *world, g *rand.Rand) *audience {
	a := &audience{w: w, g: g}
	prevKV := func() bool { return g.IntN(2) == 0 }
	from := func() int64 { return pick[int64](g, 0, 0, 1, 1+g.Int64N(60)) }
	a.observers = []*observer{
		{id: 1, spec: watchSpec{key: []byte{0}, end: []byte{0}, from: from(), prevKV: prevKV()}},
		{id: 2, spec: watchSpec{key: []byte("{t}"), end: []byte("{t~"), from: from(), prevKV: prevKV()}},
		{id: 3, spec: watchSpec{key: []byte(pick(g, "a", "b", "c", "{u}a")), from: from(), prevKV: prevKV()}},
		{id: 4, spec: watchSpec{key: []byte("a"), end: []byte("c"), from: from(), prevKV: prevKV()}},
	}
	return a
}

// open has the watches go on, by way of a node.
func (a *audience) open(ctx context.Context, node string) error {
	slow := a.g.IntN(3) == 0
	a.stream = a.w.servers[node].router.newWatches(ctx, func(d watchDelivery) error {
		if slow {
			time.Sleep(5 * time.Millisecond)
		}
		a.observers[d.id-1].deliver(ctx, d)
		return nil
	})
	for _, o := range a.observers {
		if err := o.begins(a.stream); err != nil {
			return err
		}
	}
	return nil
}

// progress asks for the progress of all watches, and notes it. It may not be
// known in time.
func (a *audience) progress(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	revision, err := a.stream.progress(ctx)
	if err == nil {
		for _, o := range a.observers {
			o.progressed(revision)
		}
	}
	return revision, err
}

// live uses streams on one node after the other until ctx ends.
func (a *audience) live(ctx context.Context) {
	for ctx.Err() == nil {
		if err := a.open(ctx, pick(a.g, a.w.nodes...)); err == nil {
			for range 1 + a.g.IntN(4) {
				time.Sleep(time.Duration(a.g.IntN(300)) * time.Millisecond)
				switch a.g.IntN(3) {
				case 0:
					_, _ = a.progress(ctx)
				case 1:
					o := pick(a.g, a.observers...)
					a.stream.cancel(o.id)
					_ = o.begins(a.stream)
				}
			}
		}
		a.stream.close()
	}
}

// finish gets everything up to the newest revision.
func (a *audience) finish(ctx context.Context) (int64, error) {
	if err := a.open(ctx, pick(a.g, a.w.nodes...)); err != nil {
		return 0, fmt.Errorf("open: %w", err)
	}
	defer a.stream.close()
	for range 20 {
		if revision, err := a.progress(ctx); err == nil && !a.again() {
			return revision, nil
		}
	}
	return 0, errors.New("no progress")
}

// again begins the watches again that have ended.
func (a *audience) again() (any bool) {
	for _, o := range a.observers {
		o.mu.Lock()
		ended := o.ended
		o.mu.Unlock()
		if ended {
			any = o.begins(a.stream) == nil || any
		}
	}
	return any
}

// replace gives a replica another state, as the installation of a snapshot does,
// that has applied as much of the log.
func (s *fakeShard) replace(node string, applied int) {
	r := s.replicas[node]
	store := openShardStore(s.w.t, s.group)
	s.mu.Lock()
	defer s.mu.Unlock()
	old := r.store
	r.store, r.applied = store, 0
	for r.applied < min(applied, len(s.log)) {
		if _, err := r.applyNext(); err != nil {
			s.w.t.Error(err)
			return
		}
	}
	old.Retire()
}

// applyMore has the replicas apply what they would hear of.
func (s *fakeShard) applyMore(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.replicas {
		for i := 0; i < n && !r.frozen && r.applied < len(s.log); i++ {
			if _, err := r.applyNext(); err != nil {
				s.w.t.Error(err)
			}
		}
	}
}

// disturb does one thing that must not be noticed.
func (w *world) disturb(g *rand.Rand) {
	s := w.shards[pick(g, w.groups...)]
	node := pick(g, s.order...)
	switch g.IntN(7) {
	case 0:
		s.elect(pick(g, append([]string{""}, s.order...)...))
	case 1:
		s.replicas[node].change(func(r *shardReplica) { r.frozen = !r.frozen })
	case 2:
		s.replicas[node].change(func(r *shardReplica) { r.hidden = !r.hidden })
	case 3, 4:
		s.mu.Lock()
		n := len(s.log)
		s.mu.Unlock()
		s.replace(node, g.IntN(n+1))
	case 5, 6:
		node = pick(g, w.nodes...)
		w.mu.Lock()
		w.hung[node] = !w.hung[node]
		w.mu.Unlock()
	}
}

func (w *world) heal() {
	w.mu.Lock()
	clear(w.hung)
	w.mu.Unlock()
	for _, s := range w.shards {
		for _, r := range s.replicas {
			r.change(func(r *shardReplica) { r.frozen, r.hidden = false, false })
		}
		s.elect(s.order[0])
	}
}

// watchAtRandom writes, disturbs, and holds what clients see against the
// history. The fewer bytes may be kept, the more is set aside.
func watchAtRandom(t *testing.T, seed uint64, compact bool, least int, plant func(*faults)) error {
	g := rand.New(rand.NewPCG(seed, 0))
	w := newWorld(t, 5, 6, 2, func(c *Config) {
		if plant != nil {
			plant(&c.faults)
		}
	})
	w.hung = make(map[string]bool)
	for _, s := range w.servers {
		s.router.following.Add(1 << 40)
		s.router.least = least
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var tasks, writers sync.WaitGroup
	for range 3 {
		mine := &requests{Rand: rand.New(rand.NewPCG(g.Uint64(), 0)), w: w, compacted: -1}
		writers.Go(func() {
			for range 40 {
				w.mu.Lock()
				r := mine.write() // it looks at the newest revision
				w.mu.Unlock()
				if r.Compaction == nil || compact {
					within, cancel := context.WithTimeout(ctx, time.Second)
					_, _ = w.do(within, w.anyKV(mine.Rand), r) // some fail, or are lost
					cancel()
				}
				time.Sleep(time.Duration(mine.IntN(3)) * 10 * time.Millisecond)
			}
		})
	}
	var clients []*audience
	for range 3 {
		a := newAudience(w, rand.New(rand.NewPCG(g.Uint64(), 0)))
		clients = append(clients, a)
		tasks.Go(func() { a.live(ctx) })
	}
	chaos := rand.New(rand.NewPCG(g.Uint64(), 0))
	tasks.Go(func() {
		for ctx.Err() == nil {
			time.Sleep(time.Duration(chaos.IntN(100)) * time.Millisecond)
			w.disturb(chaos)
		}
	})
	applies := rand.New(rand.NewPCG(g.Uint64(), 0))
	var applying sync.WaitGroup
	applied := make(chan struct{})
	applying.Go(func() {
		for {
			select {
			case <-applied:
				return
			case <-time.After(5 * time.Millisecond):
				w.shards[pick(applies, w.groups...)].applyMore(1 + applies.IntN(3))
			}
		}
	})
	defer applying.Wait()
	defer close(applied)
	writers.Wait()
	stop()
	tasks.Wait()
	w.heal()
	var last []int64
	for _, a := range clients {
		revision, err := a.finish(t.Context())
		if err != nil {
			return err
		}
		last = append(last, revision)
	}
	history := w.changes()
	for i, a := range clients {
		for _, o := range a.observers {
			o.compacts = compact
			if err := o.check(history, last[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// Whatever happens to leaders, states, nodes and connections, every watch sees
// every change once, in order, and is told of no progress that it has not made.
func TestWatchesSeeEveryChangeOnce(t *testing.T) {
	first := rand.Uint64()
	for i, least := range []int{leastShare, leastShare, 1, 400} {
		seed := first + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if err := watchAtRandom(t, seed, i%2 == 1, least, nil); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// Each planted fault must be what these tests see.
func TestWatchTestsSeeFaults(t *testing.T) {
	for name, plant := range map[string]func(*faults){
		"progress is early":         func(f *faults) { f.earlyProgress = true },
		"events are not resolved":   func(f *faults) { f.unresolvedEvents = true },
		"a relay loses what it got": func(f *faults) { f.relaySkips = true },
		"what is aside is lost":     func(f *faults) { f.asideLost = true },
	} {
		t.Run(name, func(t *testing.T) {
			first := rand.Uint64()
			least := leastShare
			if name == "what is aside is lost" {
				least = 1
			}
			for i := range uint64(100) { // most seeds show it
				var err error
				synctest.Test(t, func(t *testing.T) { err = watchAtRandom(t, first+i, false, least, plant) })
				if err != nil {
					return
				}
			}
			t.Fatalf("the fault does not show: seeds from %d", first)
		})
	}
}

// one is a stream with one watch.
type one struct {
	*watches
	deliveries chan watchDelivery
}

func (w *world) watch(node string, s watchSpec) *one {
	w.t.Helper()
	o := &one{deliveries: make(chan watchDelivery)}
	ctx := w.t.Context()
	o.watches = w.servers[node].router.newWatches(ctx, func(d watchDelivery) error {
		if d.aside != nil && !d.read(ctx, 1<<20) { // before deliver returns
			return nil
		}
		select {
		case o.deliveries <- d:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if _, err := o.add(7, s); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(o.close)
	return o
}

var everyKey = watchSpec{key: []byte{0}, end: []byte{0}}

// A write that has its revision, and is not in the log yet, must not come after
// later ones of other groups.
func TestMergedWatchWaitsForWhatIsUnderWay(t *testing.T) {
	for _, skip := range []bool{false, true} {
		t.Run(fmt.Sprintf("gates skipped: %t", skip), func(t *testing.T) {
			w := newWorld(t, 3, 2, 3, func(c *Config) { c.faults.skipGates = skip })
			w.eager = true
			reserved, goOn := make(chan struct{}), make(chan struct{})
			var once sync.Once
			w.mu.Lock()
			w.onReserve = func(group uint64, _ int64) {
				if group == 1 {
					once.Do(func() {
						close(reserved)
						<-goOn
					})
				}
			}
			w.mu.Unlock()
			o := w.watch("n1", everyKey)
			var writing sync.WaitGroup
			writing.Go(func() { w.put("n1", w.keyIn(1, "k"), "v") })
			<-reserved
			w.put("n1", w.keyIn(2, "k"), "v")
			first := <-o.deliveries
			close(goOn)
			second := <-o.deliveries
			writing.Wait()
			inOrder := first.events[0].Kv.ModRevision < second.events[0].Kv.ModRevision
			if inOrder == skip {
				t.Errorf("in order: %t: %v, %v", inOrder, first, second)
			}
		})
	}
}

// What one group has is not held back by those that are idle, wherever they are.
func TestIdleGroupsHoldNothingBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 5, 8, 1, nil)
		for _, node := range w.nodes {
			o := w.watch(node, everyKey)
			for _, group := range w.groups {
				began := time.Now()
				put := w.put("n1", w.keyIn(group, "k"), "v")
				d := <-o.deliveries
				if len(d.events) != 1 || d.events[0].Kv.ModRevision != put.Header.Revision {
					t.Fatalf("%v, want revision %d", d, put.Header.Revision)
				}
				if waited := time.Since(began); waited > 5*resolveInterval {
					t.Errorf("%s: an event of group %d came after %v", node, group, waited)
				}
			}
			o.close()
		}
	})
}

// A watch that needs what was compacted ends, and is told up to where.
func TestWatchesOfWhatIsCompacted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 4, 1, nil)
		for range 3 {
			for _, group := range w.groups {
				w.put("n1", w.keyIn(group, "k"), "v")
			}
		}
		const at = 8
		if _, err := w.kv("n1").Compact(t.Context(), &pb.CompactionRequest{Revision: at}); err != nil {
			t.Fatal(err)
		}
		for _, node := range w.nodes {
			specs := []watchSpec{everyKey}
			for _, group := range w.groups {
				specs = append(specs, watchSpec{key: []byte(w.keyIn(group, "k"))})
			}
			for _, s := range specs {
				s.from = at - 1
				if d := <-w.watch(node, s).deliveries; d.compacted != at || d.id != 7 {
					t.Errorf("%s: %q from %d: %v", node, s.key, s.from, d)
				}
				s.from = at
				if d := <-w.watch(node, s).deliveries; d.compacted != 0 || len(d.events) == 0 {
					t.Errorf("%s: %q from %d: %v", node, s.key, s.from, d)
				}
			}
		}
	})
}

// A transaction with so many events that they come in parts is delivered whole,
// wherever the client is connected.
func TestHugeTransactions(t *testing.T) {
	w := newWorld(t, 2, 2, 1, nil)
	name := string(bytes.Repeat([]byte("n"), 4<<10))
	s := w.shards[w.Group([]byte("{t}"))]
	leader := s.replicas[s.leader]
	const batches, batch = 40, 100 // more than 16 MiB of events
	for i := range batches {
		txn := &pb.TxnRequest{}
		for j := range batch {
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "{t}%s%d/%d", name, i, j)}}})
		}
		w.apply(leader, &pb.InternalRaftRequest{Txn: txn})
	}
	w.apply(leader, &pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{Key: []byte("{t}"), RangeEnd: []byte("{t~")}})
	const deleted = 1 + batches + 1 // the revision
	feed := leader.store.NewFeed(1 << 20)
	defer feed.Close()
	if err := feed.Watch(1, []byte("{t}"), []byte("{t~"), deleted); err != nil {
		t.Fatal(err)
	}
	if taken, err := feed.Take(t.Context(), 1, wholeBytes); err != nil || !taken[0].Huge {
		t.Fatalf("the transaction is not too large: %v", err)
	}
	for _, node := range w.nodes {
		for _, spec := range []watchSpec{{key: []byte("{t}"), end: []byte("{t~"), from: deleted}, {key: []byte{0}, end: []byte{0}, from: deleted}} {
			d := <-w.watch(node, spec).deliveries
			if len(d.events) != batches*batch || d.events[0].Kv.ModRevision != deleted || d.events[batches*batch-1].Kv.ModRevision != deleted {
				t.Errorf("%s: %d events, %d, %v", node, len(d.events), d.compacted, d.err)
			}
		}
	}
}

func (w *world) apply(r *shardReplica, request *pb.InternalRaftRequest) {
	w.t.Helper()
	data, err := proto.Marshal(request)
	if err == nil {
		var result fsm.Result
		result, err = r.Propose(w.t.Context(), fsm.Request{Data: data})
		err = cmp.Or(err, result.Err)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// A client that reads nothing costs a bounded amount of memory, wherever it is
// connected, and gets everything when it reads.
func TestAClientThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 2, 1, nil)
		value := string(bytes.Repeat([]byte("v"), 100<<10))
		watching := map[string]*one{}
		for _, node := range w.nodes {
			watching[node] = w.watch(node, everyKey)
		}
		const writes = 60
		for i := range writes {
			w.put("n1", w.keyIn(uint64(i%2+1), "k"), value)
			time.Sleep(20 * time.Millisecond)
		}
		synctest.Wait()
		for node, o := range watching {
			o.mu.Lock()
			for _, p := range o.byID[7].parts {
				if p.bytes > mostPartBytes+pollBytes+len(value) {
					t.Errorf("%s: %d bytes of group %d wait", node, p.bytes, p.follower.group)
				}
			}
			o.mu.Unlock()
			for got := 0; got < writes; {
				got += len((<-o.deliveries).events)
			}
		}
	})
}

// What is cancelled is not delivered any more, also while its delivery waits.
func TestCancelledWatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, 2, 1, nil)
		blocked, free := make(chan struct{}), make(chan struct{})
		var delivered []int64
		stream := w.servers["n1"].router.newWatches(t.Context(), func(d watchDelivery) error {
			delivered = append(delivered, d.id)
			close(blocked)
			<-free
			return nil
		})
		defer stream.close()
		for id := range int64(4) {
			if _, err := stream.add(id, everyKey); err != nil {
				t.Fatal(err)
			}
		}
		w.put("n1", "k", "v")
		<-blocked
		var cancelling sync.WaitGroup
		returned := make(chan struct{})
		for id := range int64(4) {
			if id == delivered[0] {
				cancelling.Go(func() { stream.cancel(id); close(returned) })
			} else {
				stream.cancel(id)
			}
		}
		synctest.Wait()
		select {
		case <-returned:
			t.Error("the watch was cancelled while it was being delivered")
		default:
		}
		close(free)
		cancelling.Wait()
		w.put("n1", "k", "w")
		time.Sleep(time.Second)
		if len(delivered) != 1 {
			t.Errorf("delivered: %v", delivered)
		}
	})
}

// Progress of watches of one group, where nothing has happened for long, is at
// the newest revision of all groups.
func TestProgressOfIdleGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 4, 1, nil)
		for _, node := range w.nodes {
			for _, group := range w.groups {
				o := w.watch(node, watchSpec{key: []byte(w.keyIn(group, "k"))})
				put := w.put("n1", w.keyIn(group%4+1, "other"), "v")
				if revision, err := o.progress(t.Context()); err != nil || revision != put.Header.Revision {
					t.Errorf("%s: progress of group %d: %d, %v, want %d", node, group, revision, err, put.Header.Revision)
				}
				if revision, ok := o.progressOf(7); !ok || revision < put.Header.Revision {
					t.Errorf("%s: known progress of group %d: %d, %t, want %d", node, group, revision, ok, put.Header.Revision)
				}
			}
		}
	})
}

// In a key space of one group a node follows its own state, as etcd does.
func TestWatchesOfOneState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		replica := newFakeReplica(openStore(t), shard.Leader{Node: "n1", ID: "n1/1", Term: 7, Self: true})
		s := newTestServer(t, testConfig(replica, &fakePeers{}))
		put := func(key, value string) int64 {
			resp, err := s.KV().Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
			if err != nil {
				t.Fatal(err)
			}
			return resp.Header.Revision
		}
		last := put("a", "1")
		got := make(chan watchDelivery, 16)
		stream := s.router.newWatches(t.Context(), func(d watchDelivery) error { got <- d; return nil })
		defer stream.close()
		for id, spec := range []watchSpec{
			{key: []byte("a")}, {key: []byte("a"), from: last, prevKV: true}, {key: []byte("a"), from: last + 2},
		} {
			if revision, err := stream.add(int64(id), spec); err != nil || revision != last {
				t.Fatalf("%d, %v, want %d", revision, err, last)
			}
		}
		if d := <-got; d.id != 1 || len(d.events) != 1 || d.events[0].Kv.ModRevision != last || d.events[0].PrevKv != nil {
			t.Errorf("%v", d)
		}
		put("a", "2")
		put("a", "3")
		if revision, err := stream.progress(t.Context()); err != nil || revision != last+2 {
			t.Errorf("progress: %d, %v", revision, err)
		}
		seen := map[int64][]int64{}
		for len(got) > 0 {
			d := <-got
			for _, e := range d.events {
				if seen[d.id] = append(seen[d.id], e.Kv.ModRevision); d.id == 1 && e.PrevKv.GetModRevision() != e.Kv.ModRevision-1 {
					t.Errorf("previous: %v", e)
				}
			}
		}
		want := map[int64][]int64{0: {last + 1, last + 2}, 1: {last + 1, last + 2}, 2: {last + 2}}
		if fmt.Sprint(seen) != fmt.Sprint(want) {
			t.Errorf("%v, want %v", seen, want)
		}
	})
}

// What other nodes ask and answer is held against the rules.
func TestQuestionsOnTheWire(t *testing.T) {
	q := &question{group: 3, wait: 70 * time.Millisecond, index: 9, most: 5000, watches: []asked{
		{number: 0, key: []byte("a"), from: 5, prevKV: true}, {number: 1, key: []byte("b"), end: []byte("c"), from: 1},
	}}
	payload := q.encode(t.Context())
	back, _, err := decodeQuestion(payload)
	if err != nil || fmt.Sprint(back) != fmt.Sprint(q) {
		t.Errorf("%v, %v, want %v", back, err, q)
	}
	for n := range payload {
		if back, _, err := decodeQuestion(payload[:n]); err == nil && len(back.watches) == len(q.watches) {
			t.Errorf("%d bytes of %d are a question: %v", n, len(payload), back)
		}
	}
	event := func(key string, revision int64) *mvccpb.Event {
		return &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision}}
	}
	for name, c := range map[string]struct {
		ok         bool
		deliveries []fsm.Delivery
	}{
		"nothing":        {true, nil},
		"good":           {true, []fsm.Delivery{{ID: 0, Events: []*mvccpb.Event{event("a", 5), event("a", 7)}, Next: 8}, {ID: 1, Compacted: 4}}},
		"in parts":       {true, []fsm.Delivery{{ID: 1, Events: []*mvccpb.Event{event("b", 2)}, Next: 3}, {ID: 1, Events: []*mvccpb.Event{event("b1", 3)}, Next: 4}}},
		"unknown watch":  {false, []fsm.Delivery{{ID: 2, Next: 8}}},
		"other key":      {false, []fsm.Delivery{{ID: 0, Events: []*mvccpb.Event{event("b", 5)}, Next: 8}}},
		"too early":      {false, []fsm.Delivery{{ID: 0, Events: []*mvccpb.Event{event("a", 4)}, Next: 8}}},
		"twice":          {false, []fsm.Delivery{{ID: 1, Events: []*mvccpb.Event{event("b", 2)}, Next: 3}, {ID: 1, Events: []*mvccpb.Event{event("b", 2)}, Next: 3}}},
		"out of order":   {false, []fsm.Delivery{{ID: 0, Events: []*mvccpb.Event{event("a", 7), event("a", 6)}, Next: 8}}},
		"beyond the end": {false, []fsm.Delivery{{ID: 0, Events: []*mvccpb.Event{event("a", 8)}, Next: 8}}},
		"back":           {false, []fsm.Delivery{{ID: 0, Next: 4}}},
	} {
		reply, err := (&batch{deliveries: c.deliveries, applied: 11, revision: 12, live: true}).encode()
		if err != nil {
			t.Fatal(err)
		}
		b, err := q.decode(reply[answerHeader:])
		if (err == nil) != c.ok || err == nil && (b.applied != 11 || b.revision != 12 || !b.live || len(b.deliveries) != len(c.deliveries)) {
			t.Errorf("%s: %v, %v", name, b, err)
		}
	}
}

// Whatever comes as a question or an answer ends in an error at worst.
func FuzzQuestions(f *testing.F) {
	q := &question{group: 3, index: 9, watches: []asked{{key: []byte("a"), end: []byte("b"), from: 5}}}
	f.Add(q.encode(f.Context()))
	reply, err := (&batch{deliveries: []fsm.Delivery{{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("a"), ModRevision: 6}}}, Next: 7}}}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(reply[answerHeader:])
	f.Fuzz(func(t *testing.T, data []byte) {
		if q, _, err := decodeQuestion(data); err == nil && (q.group == 0 && len(q.watches) > len(data)) {
			t.Errorf("%v", q)
		}
		if b, err := q.decode(data); err == nil {
			for _, d := range b.deliveries {
				for _, e := range d.Events {
					if !q.watches[0].has(e.Kv.Key) {
						t.Errorf("%v", e)
					}
				}
			}
		}
	})
}

// A node is not asked about thousands of watches again for each of many changes.
func TestQuestionsAboutManyWatchesRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, 2, 1, nil)
		key := w.keyIn(2, "k") // on n2
		const watches, puts = 1000, 100
		var got atomic.Int64
		o := w.servers["n1"].router.newWatches(t.Context(), func(d watchDelivery) error {
			got.Add(int64(len(d.events)))
			return nil
		})
		defer o.close()
		for id := range int64(watches) {
			s := watchSpec{key: []byte(key)}
			if id > 0 {
				s.key = fmt.Appendf(nil, "%s/%d", key, id)
			}
			if group, one, err := w.servers["n1"].router.groupOfRange(s.key, nil); err != nil || !one || group != 2 {
				continue
			}
			if _, err := o.add(id, s); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		polls := func() int {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.calls[methodWatchPoll]
		}
		before, begin := polls(), time.Now()
		for range puts {
			w.put("n1", key, "v")
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		if got.Load() != puts {
			t.Errorf("%d events of %d puts", got.Load(), puts)
		}
		if asked := polls() - before; asked > puts/2 {
			t.Errorf("%d questions in %v", asked, time.Since(begin))
		}
	})
}

// The streams of a node share what may wait for clients that do not read.
func TestManyStreamsKeepLittleEach(t *testing.T) {
	for _, alone := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 2, 2, 1, nil)
			if !alone {
				w.servers["n1"].router.following.Add(1 << 16)
			}
			o := w.watch("n1", everyKey)                                            // nobody takes anything from deliver
			key, value := w.keyIn(2, "k"), string(bytes.Repeat([]byte("v"), 4<<10)) // on n2
			for range 100 {
				w.put("n1", key, value)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			o.mu.Lock()
			defer o.mu.Unlock()
			kept := 0
			for _, f := range o.byID {
				for _, p := range f.parts {
					kept += p.bytes
				}
			}
			if few := kept <= 4*(leastShare+len(value)+eventBytes); few == alone {
				t.Errorf("alone: %t: %d bytes of %d are kept", alone, kept, 100*len(value))
			}
		})
	}
}

// A feed may lag behind what is known to have been taken: that a group has nothing before a revision. A compaction
// below that takes nothing away.
func TestCompactionOfWhatHasBeenTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 2, 1, nil)
		o := w.watch("n1", everyKey)
		w.put("n1", w.keyIn(2, "k"), "v")
		d := <-o.deliveries
		synctest.Wait()
		o.mu.Lock()
		g, next := o.groups[1], d.events[0].Kv.ModRevision+1
		number := o.byID[7].number
		g.parts[number].next = next
		o.mu.Unlock()
		if err := g.accept(&batch{deliveries: []fsm.Delivery{{ID: number, Next: 1, Compacted: next}}}); err != nil {
			t.Fatal(err)
		}
		w.put("n1", w.keyIn(1, "k"), "v")
		if d := <-o.deliveries; d.compacted != 0 || len(d.events) != 1 {
			t.Fatalf("after a compaction up to %d of what has been taken: %v", next, d)
		}
		synctest.Wait()
		if err := g.accept(&batch{deliveries: []fsm.Delivery{{ID: number, Compacted: next + 100}}}); err != nil {
			t.Fatal(err)
		}
		if d := <-o.deliveries; d.compacted != next+100 {
			t.Errorf("after a compaction up to %d: %v", next+100, d)
		}
	})
}

// The end of a watch for what was compacted is told before any progress beyond that.
func TestProgressDoesNotOvertakeTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 2, 1, nil)
		for _, s := range []watchSpec{everyKey, {key: []byte(w.keyIn(1, "k"))}} { // merged, and of one group
			o := w.watch("n1", s)
			w.put("n1", w.keyIn(1, "k"), "v")
			<-o.deliveries
			synctest.Wait()
			o.mu.Lock()
			number, g := o.byID[7].number, o.groups[1]
			o.mu.Unlock()
			var accepting sync.WaitGroup
			accepting.Go(func() {
				_ = g.accept(&batch{deliveries: []fsm.Delivery{{ID: number, Compacted: 1000}}})
			})
			synctest.Wait() // deliver has it, and has not returned
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if revision, err := o.progress(ctx); err == nil {
				t.Errorf("%q: progress at %d, and the end has not been told", s.key, revision)
			}
			cancel()
			if d := <-o.deliveries; d.compacted != 1000 {
				t.Errorf("%q: %v", s.key, d)
			}
			accepting.Wait()
			if _, err := o.progress(t.Context()); err != nil {
				t.Errorf("%q: %v", s.key, err)
			}
		}
	})
}

// A watch that ends by itself is not told of after it was cancelled, although it is forgotten by then.
func TestCancelWaitsForTheEndToBeTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 2, 1, nil)
		o := w.watch("n1", watchSpec{key: []byte(w.keyIn(1, "k"))})
		o.mu.Lock()
		number, g := o.byID[7].number, o.groups[1]
		o.mu.Unlock()
		synctest.Wait()
		var tasks sync.WaitGroup
		tasks.Go(func() { _ = g.accept(&batch{deliveries: []fsm.Delivery{{ID: number, Compacted: 1000}}}) })
		synctest.Wait() // deliver has it, and has not returned
		cancelled := make(chan struct{})
		tasks.Go(func() {
			o.cancel(7)
			close(cancelled)
		})
		synctest.Wait()
		if isClosed(cancelled) {
			t.Error("the watch was cancelled while its end was being told")
		}
		if d := <-o.deliveries; d.compacted != 1000 {
			t.Error(d)
		}
		tasks.Wait()
	})
}

// A stream has leaders if the groups of its watches do, wherever they are; those of others do not matter.
func TestLeadersOfWatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, 2, 1, nil)
		first, second := watchSpec{key: []byte(w.keyIn(1, "k"))}, watchSpec{key: []byte(w.keyIn(2, "k"))}
		type stream struct {
			*one
			of []uint64
		}
		var streams []stream
		for _, node := range w.nodes {
			streams = append(streams, stream{w.watch(node, first), []uint64{1}}, stream{w.watch(node, second), []uint64{2}}, stream{w.watch(node, everyKey), []uint64{1, 2}})
		}
		for _, leaderless := range []uint64{0, 1, 0, 2, 0} {
			for _, group := range w.groups {
				leader := w.shards[group].order[0]
				if group == leaderless {
					leader = ""
				}
				w.shards[group].elect(leader)
			}
			time.Sleep(3 * pollWait)
			for i, s := range streams {
				if has := s.hasLeaders(); has == slices.Contains(s.of, leaderless) {
					t.Errorf("group %d has no leader; stream %d of groups %v: %t", leaderless, i, s.of, has)
				}
			}
		}
	})
}

// Many watches that begin again where they were ask for the newest revision once.
func TestWatchesThatGoOnAskOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 2, 2, 1, nil)
		last := w.put("n1", w.keyIn(1, "k"), "v").Header.Revision
		var asked atomic.Int64
		w.mu.Lock()
		w.onLatest = func() { asked.Add(1) }
		w.mu.Unlock()
		o := w.servers["n1"].router.newWatches(t.Context(), func(watchDelivery) error { return nil })
		defer o.close()
		for id := range int64(50) {
			if revision, err := o.add(id, watchSpec{key: []byte(w.keyIn(1, "k")), from: last + 1}); err != nil || revision != last {
				t.Fatalf("%d, %v, want %d", revision, err, last)
			}
		}
		if n := asked.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
		newer := w.put("n1", w.keyIn(1, "k"), "v").Header.Revision
		if revision, err := o.add(50, watchSpec{key: []byte("x")}); err != nil || revision < newer {
			t.Errorf("from now on: %d, %v, want %d", revision, err, newer)
		}
	})
}

// However large the values are, streams whose clients do not read keep no more together than they may, and do not keep
// others from theirs.
func TestManySlowStreamsOfLargeValues(t *testing.T) {
	const limit, slow, writes = 2 << 20, 60, 30
	for _, valueBytes := range []int{5 << 10, 300 << 10} { // less than a share, and more
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 2, 2, 1, func(c *Config) { c.MaxWatchBytes = limit })
			var streams []*one
			for range slow {
				streams = append(streams, w.watch("n1", everyKey))
			}
			reads := w.watch("n1", everyKey)
			key, value := w.keyIn(2, "k"), string(bytes.Repeat([]byte("v"), valueBytes)) // on n2
			for range writes {
				w.put("n2", key, value)
			}
			for got := 0; got < writes; {
				got += len((<-reads.deliveries).events)
			}
			synctest.Wait()
			kept := 0
			for _, o := range streams {
				o.mu.Lock()
				for _, p := range o.byID[7].parts {
					kept += p.bytes
				}
				o.mu.Unlock()
			}
			if kept > limit {
				t.Errorf("values of %d bytes: %d bytes are kept, %d may be", valueBytes, kept, limit)
			}
			for _, o := range streams[:3] {
				for got := 0; got < writes; {
					got += len((<-o.deliveries).events)
				}
			}
		})
	}
}
