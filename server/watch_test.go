package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// fakeFeed is told by a test what to deliver.
type fakeFeed struct {
	deliver    func(watchDelivery) error
	onAdd      func(id int64, s watchSpec) (int64, error)
	onProgress func(context.Context) (int64, error)
	leads      func() bool

	mu       sync.Mutex
	ids      []int64 // of what was added and not cancelled
	specs    map[int64]watchSpec
	reached  map[int64]int64
	isClosed bool
}

func (f *fakeFeed) add(id int64, s watchSpec) (int64, error) {
	f.mu.Lock()
	f.ids, f.specs[id] = append(f.ids, id), s
	f.mu.Unlock()
	if f.onAdd != nil {
		return f.onAdd(id, s)
	}
	return 10, nil
}

func (f *fakeFeed) cancel(id int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ids = slices.DeleteFunc(f.ids, func(i int64) bool { return i == id })
}

func (f *fakeFeed) progress(ctx context.Context) (int64, error) { return f.onProgress(ctx) }

func (f *fakeFeed) progressOf(id int64) (int64, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at, ok := f.reached[id]
	return at, ok
}

func (f *fakeFeed) hasLeaders() bool { return f.leads() }

func (f *fakeFeed) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.isClosed = true
}

func (f *fakeFeed) number(i int) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ids[i]
}

// fakeWatches is a node whose streams are fed by a test.
type fakeWatches struct {
	*node
	followers chan *fakeFeed // one per stream
}

func startFakeWatches(t testing.TB, edit func(*Config), prepare func(*fakeFeed)) *fakeWatches {
	w := &fakeWatches{followers: make(chan *fakeFeed, 16)}
	w.node = startNode(t, func(c *Config) {
		c.follow = func(_ context.Context, deliver func(watchDelivery) error) watchFeed {
			f := &fakeFeed{deliver: deliver, specs: make(map[int64]watchSpec), reached: make(map[int64]int64)}
			f.onProgress = func(context.Context) (int64, error) { return 10, nil }
			f.leads = func() bool { return w.replica.Leader().Node != "" }
			if prepare != nil {
				prepare(f)
			}
			w.followers <- f
			return f
		}
		if edit != nil {
			edit(c)
		}
	})
	return w
}

// watchClient is a stream as it is on the wire.
type watchClient struct {
	t      testing.TB
	stream pb.Watch_WatchClient
}

func (w *fakeWatches) open(t testing.TB) (*watchClient, *fakeFeed) {
	t.Helper()
	stream, err := pb.NewWatchClient(w.dial(t)).Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &watchClient{t, stream}
	c.progress() // is not answered, as there are no watches
	return c, <-w.followers
}

func (c *watchClient) send(r *pb.WatchRequest) {
	c.t.Helper()
	if err := c.stream.Send(r); err != nil {
		c.t.Fatal(err)
	}
}

func (c *watchClient) create(r *pb.WatchCreateRequest) {
	c.t.Helper()
	c.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r}})
}

func (c *watchClient) cancel(id int64) {
	c.t.Helper()
	c.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}})
}

func (c *watchClient) progress() {
	c.t.Helper()
	c.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// next is what the server says next.
func (c *watchClient) next() *pb.WatchResponse {
	c.t.Helper()
	r, err := c.stream.Recv()
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// want checks everything but the header, and of that the revision.
func (c *watchClient) want(revision int64, want *pb.WatchResponse) {
	c.t.Helper()
	got := c.next()
	if got.Header.Revision != revision || got.Header.ClusterId != 0xc1 || got.Header.MemberId != 0xa1 || got.Header.RaftTerm != 7 {
		c.t.Fatalf("header %v, want revision %d; %v", got.Header, revision, got)
	}
	got.Header = nil
	if !proto.Equal(got, want) {
		c.t.Fatalf("got  %v\nwant %v", got, want)
	}
}

func (c *watchClient) end() error {
	c.t.Helper()
	for {
		if _, err := c.stream.Recv(); err != nil {
			return err
		}
	}
}

func putEvent(key, value string, revision int64) *mvccpb.Event {
	return &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), CreateRevision: 1, ModRevision: revision, Version: 2}}
}

func deleteEvent(key string, revision int64) *mvccpb.Event {
	return &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision}}
}

// give delivers.
func (f *fakeFeed) give(t *testing.T, id int64, events ...*mvccpb.Event) {
	t.Helper()
	if err := f.deliver(watchDelivery{id: id, events: events}); err != nil {
		t.Fatal(err)
	}
}

func TestWatchNumbers(t *testing.T) {
	c, f := startFakeWatches(t, nil, nil).open(t)
	create := func(id, want int64) {
		t.Helper()
		c.create(&pb.WatchCreateRequest{Key: []byte("k"), WatchId: id})
		c.want(10, &pb.WatchResponse{WatchId: want, Created: true})
	}
	create(0, 0)
	create(2, 2)
	create(0, 1)
	create(0, 3) // 2 is taken
	c.create(&pb.WatchCreateRequest{Key: []byte("k"), WatchId: 2})
	c.want(10, &pb.WatchResponse{WatchId: clientv3.InvalidWatchID, Created: true, Canceled: true, CancelReason: "mvcc: duplicate watch ID provided on the WatchStream"})
	c.cancel(77) // is not answered
	c.cancel(2)
	c.want(10, &pb.WatchResponse{WatchId: 2, Canceled: true})
	create(2, 2)
	create(-1, -1)                                 // etcd does not mind
	f.give(t, f.number(3), putEvent("k", "v", 11)) // the new 2
	c.want(11, &pb.WatchResponse{WatchId: 2, Events: []*mvccpb.Event{putEvent("k", "v", 11)}})
	// Whatever revision the node has heard of, the stream does not go back.
	c.cancel(2)
	c.want(11, &pb.WatchResponse{WatchId: 2, Canceled: true})
}

func TestWatchesThatAreRefused(t *testing.T) {
	const range_ = "mvcc: watcher range is empty"
	for _, c := range []struct {
		name string
		r    *pb.WatchCreateRequest
		why  string // empty: it is not
		want watchSpec
	}{
		{"no key", &pb.WatchCreateRequest{}, "", watchSpec{key: []byte{0}}},
		{"everything", &pb.WatchCreateRequest{RangeEnd: []byte{0}}, "", watchSpec{key: []byte{0}, end: []byte{0}}},
		{"from a key", &pb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte{0}}, "", watchSpec{key: []byte("k"), end: []byte{0}}},
		{"the past", &pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 3, PrevKv: true}, "", watchSpec{key: []byte("k"), from: 3, prevKV: true}},
		{"end before begin", &pb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("a")}, range_, watchSpec{}},
		{"end at begin", &pb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("k")}, range_, watchSpec{}},
		{"before time", &pb.WatchCreateRequest{Key: []byte("k"), RangeEnd: []byte("a"), StartRevision: -1}, "etcdserver: mvcc: required revision has been compacted", watchSpec{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, f := startFakeWatches(t, nil, nil).open(t)
			client.create(c.r)
			if c.why != "" {
				client.want(1, &pb.WatchResponse{WatchId: clientv3.InvalidWatchID, Created: true, Canceled: true, CancelReason: c.why})
				return
			}
			client.want(10, &pb.WatchResponse{Created: true})
			if got := f.specs[f.number(0)]; fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Fatalf("%v, want %v", got, c.want)
			}
		})
	}
}

// What was compacted before the watch began, and after: two messages, the last one without a revision and a reason. The
// number stays taken until it is cancelled.
func TestCompactedWatches(t *testing.T) {
	c, f := startFakeWatches(t, nil, func(f *fakeFeed) {
		f.onAdd = func(_ int64, s watchSpec) (int64, error) {
			if s.from == 3 {
				return 0, &fsm.CompactedError{Revision: 7}
			}
			return 10, nil
		}
	}).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 3, WatchId: 5})
	c.want(1, &pb.WatchResponse{WatchId: 5, Created: true})
	c.want(0, &pb.WatchResponse{WatchId: 5, Canceled: true, CompactRevision: 7})
	c.create(&pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 8, WatchId: 5})
	if r := c.next(); r.CancelReason == "" {
		t.Fatal(r)
	}
	c.cancel(5)
	c.want(1, &pb.WatchResponse{WatchId: 5, Canceled: true})
	c.create(&pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 8, WatchId: 5})
	c.want(10, &pb.WatchResponse{WatchId: 5, Created: true})
	if err := f.deliver(watchDelivery{id: 2, events: []*mvccpb.Event{putEvent("k", "v", 8)}, compacted: 9}); err != nil {
		t.Fatal(err)
	}
	c.want(8, &pb.WatchResponse{WatchId: 5, Events: []*mvccpb.Event{putEvent("k", "v", 8)}})
	c.want(0, &pb.WatchResponse{WatchId: 5, Canceled: true, CompactRevision: 9})
	f.give(t, 2, putEvent("k", "v", 12)) // must not arrive
	c.cancel(5)
	c.want(10, &pb.WatchResponse{WatchId: 5, Canceled: true})
}

func TestWatchFilters(t *testing.T) {
	c, f := startFakeWatches(t, nil, nil).open(t)
	put, del := putEvent("k", "v", 11), deleteEvent("k", 12)
	for i, filters := range [][]pb.WatchCreateRequest_FilterType{
		{pb.WatchCreateRequest_NOPUT}, {pb.WatchCreateRequest_NODELETE}, {pb.WatchCreateRequest_NOPUT, pb.WatchCreateRequest_NODELETE, 99}, {99},
	} {
		c.create(&pb.WatchCreateRequest{Key: []byte("k"), Filters: filters})
		c.want(10, &pb.WatchResponse{WatchId: int64(i), Created: true})
	}
	for i := range 4 {
		f.give(t, f.number(i), put, del)
	}
	c.want(12, &pb.WatchResponse{WatchId: 0, Events: []*mvccpb.Event{del}})
	c.want(11, &pb.WatchResponse{WatchId: 1, Events: []*mvccpb.Event{put}})
	c.want(12, &pb.WatchResponse{WatchId: 3, Events: []*mvccpb.Event{put, del}})
}

// Events that come before the follower has answered wait until the client knows the watch; those of others do not.
func TestEventsWaitForTheirWatch(t *testing.T) {
	given := make(chan error, 1)
	c, f := startFakeWatches(t, nil, func(f *fakeFeed) {
		f.onAdd = func(id int64, _ watchSpec) (int64, error) {
			go func() { given <- f.deliver(watchDelivery{id: id, events: []*mvccpb.Event{putEvent("k", "v", 11)}}) }()
			time.Sleep(time.Millisecond) // more often than not it comes first
			return 10, nil
		}
	}).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k")})
	c.want(10, &pb.WatchResponse{Created: true})
	c.want(11, &pb.WatchResponse{Events: []*mvccpb.Event{putEvent("k", "v", 11)}})
	if err := <-given; err != nil {
		t.Fatal(err)
	}
	_ = f
}

func TestFragments(t *testing.T) {
	const limit = 1000
	edit := func(c *Config) { c.MaxRequestBytes = limit }
	value := strings.Repeat("v", 300<<10)
	var events []*mvccpb.Event
	for i := range 6 {
		events = append(events, putEvent(fmt.Sprint(i), value, 11)) // one revision
	}
	events = append(events, putEvent("last", "v", 12))
	c, f := startFakeWatches(t, edit, nil).open(t)
	for i, fragment := range []bool{true, false} {
		c.create(&pb.WatchCreateRequest{Key: []byte("k"), Fragment: fragment})
		c.want(10, &pb.WatchResponse{WatchId: int64(i), Created: true})
		f.give(t, f.number(i), events...)
		var got []*mvccpb.Event
		answers := 0
		for len(got) < 6 {
			r := c.next()
			got = append(got, r.Events...)
			answers++
			if size := proto.Size(r); fragment && size > limit+overheadBytes || r.Fragment != (fragment && len(got) < 6) || r.Header.Revision != 11 {
				t.Fatalf("%d bytes, %d events so far, fragment %v", size, len(got), r.Fragment)
			}
		}
		if fragment && answers < 4 || !fragment && answers != 1 {
			t.Fatalf("%d answers", answers)
		}
		for i, e := range got {
			if !proto.Equal(e, events[i]) {
				t.Fatalf("event %d is %v", i, e)
			}
		}
		c.want(12, &pb.WatchResponse{WatchId: int64(i), Events: events[6:]})
	}
}

// Many revisions do not come in one answer, and none comes in two.
func TestAnswersHoldWholeRevisions(t *testing.T) {
	c, f := startFakeWatches(t, nil, nil).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k"), Fragment: true})
	c.next()
	value := strings.Repeat("v", 50<<10)
	var events []*mvccpb.Event
	for i := range 100 {
		events = append(events, putEvent(fmt.Sprint(i), value, int64(11+i/3)))
	}
	f.give(t, f.number(0), events...)
	last, answers := int64(0), 0
	for i := 0; i < len(events); answers++ {
		r := c.next()
		if proto.Size(r) > watchAnswerBytes || r.Fragment || r.Events[0].Kv.ModRevision <= last {
			t.Fatalf("%d bytes, fragment %v, revision %d after %d", proto.Size(r), r.Fragment, r.Events[0].Kv.ModRevision, last)
		}
		for _, e := range r.Events {
			if string(e.Kv.Key) != fmt.Sprint(i) {
				t.Fatalf("key %s, want %d", e.Kv.Key, i)
			}
			last = e.Kv.ModRevision
			i++
		}
	}
	if answers < 5 {
		t.Fatalf("%d answers", answers)
	}
}

func TestProgressOnRequest(t *testing.T) {
	at := make(chan int64)
	c, f := startFakeWatches(t, nil, func(f *fakeFeed) {
		f.onProgress = func(ctx context.Context) (int64, error) {
			select {
			case revision := <-at:
				return revision, nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
	}).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k")})
	c.want(10, &pb.WatchResponse{Created: true})
	c.create(&pb.WatchCreateRequest{Key: []byte("l")})
	c.want(10, &pb.WatchResponse{WatchId: 1, Created: true})
	c.progress()
	at <- 20
	c.want(20, &pb.WatchResponse{WatchId: clientv3.InvalidWatchID})

	// An event beyond the revision comes first: the client must not be told to go on before it.
	c.progress()
	at <- 20 // taken, and answered after the event below or before it
	c.want(20, &pb.WatchResponse{WatchId: clientv3.InvalidWatchID})
	f.give(t, f.number(0), putEvent("k", "v", 25))
	c.want(25, &pb.WatchResponse{Events: []*mvccpb.Event{putEvent("k", "v", 25)}})
	c.progress()
	at <- 24
	at <- 25 // asked again
	c.want(25, &pb.WatchResponse{WatchId: clientv3.InvalidWatchID})

	// It does not become the same for all: each is told alone.
	f.give(t, f.number(0), putEvent("k", "v", 30))
	c.next()
	c.progress()
	for range progressTries {
		at <- 28
	}
	got := map[int64]int64{}
	for range 2 {
		r := c.next()
		got[r.WatchId] = r.Header.Revision
	}
	if got[0] != 30 || got[1] != 28 {
		t.Fatalf("%v", got)
	}

	// A watch of the future keeps all from being told, as in etcd.
	c.create(&pb.WatchCreateRequest{Key: []byte("m"), StartRevision: 40})
	c.next()
	c.progress()
	at <- 39
	c.progress()
	at <- 40
	c.want(40, &pb.WatchResponse{WatchId: clientv3.InvalidWatchID})
}

// A watch that begins while the follower looks is not covered by what it finds.
func TestProgressAndNewWatches(t *testing.T) {
	at := make(chan int64)
	asked := make(chan struct{}, 8)
	c, _ := startFakeWatches(t, nil, func(f *fakeFeed) {
		f.onProgress = func(ctx context.Context) (int64, error) {
			asked <- struct{}{}
			select {
			case revision := <-at:
				return revision, nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
	}).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k")})
	c.next()
	c.progress()
	<-asked
	c.create(&pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 2})
	c.want(10, &pb.WatchResponse{WatchId: 1, Created: true})
	at <- 20
	<-asked // again
	at <- 21
	c.want(21, &pb.WatchResponse{WatchId: clientv3.InvalidWatchID})
}

func TestProgressFromTimeToTime(t *testing.T) {
	c, f := startFakeWatches(t, func(c *Config) { c.WatchProgressInterval = 20 * time.Millisecond }, func(f *fakeFeed) {
		f.onProgress = func(context.Context) (int64, error) { return 0, errors.New("not all of them") }
		f.reached[1], f.reached[2] = 20, 30
	}).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k"), ProgressNotify: true})
	c.want(10, &pb.WatchResponse{Created: true})
	c.create(&pb.WatchCreateRequest{Key: []byte("l"), WatchId: 5}) // does not want it
	for told := 0; told < 3; {
		r := c.next()
		if r.Created {
			continue
		}
		told++
		r.Header = &pb.ResponseHeader{Revision: r.Header.Revision}
		if !proto.Equal(r, &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 20}}) {
			t.Fatal(r)
		}
	}
	f.give(t, 1, putEvent("k", "v", 25))
	for last := int64(0); last != 25; {
		r := c.next()
		last = r.Header.Revision
		if len(r.Events) == 0 && last != 20 {
			t.Fatal(r)
		}
	}
	c.want(25, &pb.WatchResponse{}) // never back to 20
}

func TestTooManyWatches(t *testing.T) {
	n := startFakeWatches(t, func(c *Config) { c.MaxStreamWatches, c.MaxWatches, c.MaxWatchStreams = 2, 3, 2 }, nil)
	refused := func(c *watchClient, why string) {
		t.Helper()
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		if r := c.next(); !r.Created || !r.Canceled || r.WatchId != clientv3.InvalidWatchID || !strings.HasPrefix(r.CancelReason, why) {
			t.Fatal(r)
		}
	}
	a, f := n.open(t)
	for range 2 {
		a.create(&pb.WatchCreateRequest{Key: []byte("k")})
		a.next()
	}
	refused(a, "kvd: the stream has as many watches")
	b, _ := n.open(t)
	b.create(&pb.WatchCreateRequest{Key: []byte("k")})
	b.want(10, &pb.WatchResponse{Created: true})
	refused(b, "kvd: this node serves as many watches")
	a.cancel(0)
	a.next()
	b.create(&pb.WatchCreateRequest{Key: []byte("k")})
	b.want(10, &pb.WatchResponse{WatchId: 1, Created: true})
	third, err := pb.NewWatchClient(n.dial(t)).Watch(t.Context())
	if err == nil {
		_, err = third.Recv()
	}
	if status.Code(err) != codes.ResourceExhausted || reasonOf(err) != ReasonBusy {
		t.Fatal(err)
	}
	a.cancel(1)
	a.next()
	f.onAdd = func(int64, watchSpec) (int64, error) { return 0, rpctypes.ErrGRPCTimeout } // ends the stream
	a.create(&pb.WatchCreateRequest{Key: []byte("k")})
	sameStatus(t, a.end(), rpctypes.ErrGRPCTimeout)
	for n.watch.streams.Load() > 1 {
		time.Sleep(time.Millisecond)
	}
	if n.watch.watches.Load() != 2 || n.watch.keyBytes.Load() != 2 {
		t.Fatalf("%d watches with %d bytes", n.watch.watches.Load(), n.watch.keyBytes.Load())
	}
	if !f.isClosed {
		t.Fatal("the follower goes on")
	}
}

// A failure of what feeds a watch ends the stream, so that the client goes on elsewhere.
func TestWatchStreamsEnd(t *testing.T) {
	for name, c := range map[string]struct {
		err, want error
	}{
		"status":  {rpctypes.ErrGRPCTimeout, rpctypes.ErrGRPCTimeout},
		"unknown": {errors.New("a disk"), status.Error(codes.Unavailable, "kvd: a disk")},
	} {
		t.Run(name, func(t *testing.T) {
			client, f := startFakeWatches(t, nil, nil).open(t)
			client.create(&pb.WatchCreateRequest{Key: []byte("k")})
			client.next()
			if err := f.deliver(watchDelivery{id: 1, err: c.err}); err != nil {
				t.Fatal(err)
			}
			if err := client.end(); status.Code(err) != status.Code(c.want) || status.Convert(err).Message() != status.Convert(c.want).Message() {
				t.Fatal(err)
			}
		})
	}
}

func TestSlowWatchClients(t *testing.T) {
	n := startFakeWatches(t, func(c *Config) { c.WatchTimeout = 50 * time.Millisecond }, nil)
	c, f := n.open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k")})
	c.next()
	value := strings.Repeat("v", 64<<10)
	given := int64(11)
	for ; f.deliver(watchDelivery{id: 1, events: []*mvccpb.Event{putEvent("k", value, given)}}) == nil; given++ {
	}
	if given > 100 {
		t.Fatalf("%d answers are kept for a client that does not read", given)
	}
	err := c.end()
	if status.Code(err) != codes.Unavailable || reasonOf(err) != ReasonStalled {
		t.Fatal(err)
	}
}

// When answers take all memory that they may, large ones of watches wait.
func TestWatchesWaitForMemory(t *testing.T) {
	n := startFakeWatches(t, nil, nil)
	c, f := n.open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k")})
	c.next()
	n.router.answers.bytes.Add(n.cfg.MaxAnswerBytes)
	small, large := putEvent("k", "v", 11), putEvent("k", strings.Repeat("v", 64<<10), 12)
	f.give(t, 1, small)
	c.want(11, &pb.WatchResponse{Events: []*mvccpb.Event{small}})
	f.give(t, 1, large)
	time.AfterFunc(20*time.Millisecond, func() { n.router.answers.bytes.Add(-n.cfg.MaxAnswerBytes) })
	c.want(12, &pb.WatchResponse{Events: []*mvccpb.Event{large}})
}

func TestWatchesThatWantALeader(t *testing.T) {
	n := startFakeWatches(t, nil, nil)
	ctx := metadata.AppendToOutgoingContext(t.Context(), rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
	stream, err := pb.NewWatchClient(n.dial(t)).Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wanting := &watchClient{t, stream}
	wanting.create(&pb.WatchCreateRequest{Key: []byte("k")})
	wanting.want(10, &pb.WatchResponse{Created: true})
	<-n.followers
	patient, _ := n.open(t)
	n.replica.elect("", false)
	sameStatus(t, wanting.end(), rpctypes.ErrGRPCNoLeader)
	stream, err = pb.NewWatchClient(n.dial(t)).Watch(ctx)
	if err == nil {
		_, err = stream.Recv()
	}
	sameStatus(t, err, rpctypes.ErrGRPCNoLeader)
	patient.create(&pb.WatchCreateRequest{Key: []byte("k")})
	if r := patient.next(); !r.Created || r.Canceled {
		t.Fatal(r)
	}
}

// However long requests may take to end, watches do not keep a node.
func TestCloseEndsWatches(t *testing.T) {
	n := startFakeWatches(t, func(c *Config) { c.DrainTimeout = time.Hour }, nil)
	var clients []*watchClient
	for range 20 {
		c, f := n.open(t)
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		c.next()
		f.give(t, 1, putEvent("k", "v", 11))
		c.want(11, &pb.WatchResponse{Events: []*mvccpb.Event{putEvent("k", "v", 11)}})
		clients = append(clients, c)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range clients {
		sameStatus(t, c.end(), rpctypes.ErrGRPCStopped)
	}
}

func TestPanicsOfWatchesAreContained(t *testing.T) {
	c, _ := startFakeWatches(t, nil, func(f *fakeFeed) {
		f.onAdd = func(int64, watchSpec) (int64, error) { panic("bug") }
	}).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k")})
	if err := c.end(); status.Code(err) != codes.Internal || reasonOf(err) != ReasonInternal {
		t.Fatal(err)
	}
}

// A client that has nothing more to ask still listens, as curl does.
func TestHalfClosedWatchStreams(t *testing.T) {
	c, f := startFakeWatches(t, nil, nil).open(t)
	c.create(&pb.WatchCreateRequest{Key: []byte("k")})
	if err := c.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	c.next()
	for i := range int64(5) {
		f.give(t, 1, putEvent("k", "v", 11+i))
		c.want(11+i, &pb.WatchResponse{Events: []*mvccpb.Event{putEvent("k", "v", 11+i)}})
	}
}

// Watches over HTTP come one message per line. They do not take the place of other requests.
func TestWatchesOverHTTP(t *testing.T) {
	n := startFakeWatches(t, nil, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	open := func() *http.Response {
		t.Helper()
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, n.httpURL+"/v3/watch", strings.NewReader(`{"create_request":{"key":"aw=="}}`))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp
	}
	lines := bufio.NewScanner(open().Body)
	line := func(want string) {
		t.Helper()
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		var got, wanted any
		if err := json.Unmarshal(lines.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(want), &wanted); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, wanted) {
			t.Fatalf("%s", lines.Bytes())
		}
	}
	const header = `"header":{"cluster_id":"193","member_id":"161","raft_term":"7",`
	line(`{"result":{` + header + `"revision":"10"},"created":true}}`)
	f := <-n.followers
	f.give(t, 1, putEvent("k", "v", 11))
	line(`{"result":{` + header + `"revision":"11"},"events":[{"kv":{"key":"aw==","value":"dg==","create_revision":"1","mod_revision":"11","version":"2"}}]}}`)
	for range maxGatewayRequests {
		open()
		<-n.followers
	}
	resp, err := http.Post(n.httpURL+"/v3/kv/range", "application/json", strings.NewReader(`{"key":"aw=="}`))
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%v, %v", resp, err)
	}
	_ = resp.Body.Close()
	cancel()
	for n.watch.streams.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
}

// A client goes on from a progress answer when its stream breaks: what comes after the answer and is of a revision up to
// it would be lost.
func TestProgressDoesNotOvertakeEvents(t *testing.T) {
	overtakes := func(t *testing.T, planted faults) bool {
		n := startFakeWatches(t, func(c *Config) { c.faults = planted }, func(f *fakeFeed) {
			f.onProgress = func(ctx context.Context) (int64, error) {
				f.mu.Lock()
				none := len(f.ids) == 0
				f.mu.Unlock()
				if none {
					return 1, nil
				}
				return 2, f.deliver(watchDelivery{id: 1, events: []*mvccpb.Event{putEvent("k", "v", 2)}}) // it had not come yet
			}
		})
		c, _ := n.open(t)
		c.create(&pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 2})
		c.next()
		if _, err := n.kv.Put(t.Context(), putData(t, "k", "v")); err != nil { // revision 2
			t.Fatal(err)
		}
		seen := int64(1)
		for {
			c.progress()
			r := c.next()
			if len(r.Events) > 0 {
				seen = r.Events[len(r.Events)-1].Kv.ModRevision
				continue
			}
			return r.Header.Revision > seen
		}
	}
	if overtakes(t, faults{}) {
		t.Fatal("told that there is nothing up to revision 2")
	}
	if !overtakes(t, faults{Faults: Faults{ProgressAhead: true}}) {
		t.Fatal("the planted fault was not noticed")
	}
}
