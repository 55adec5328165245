package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// asideOf is a transaction, of which few events are read at a time.
func asideOf(revision int64, step int, events []*mvccpb.Event) *aside {
	return &aside{
		revision: revision,
		within:   context.WithCancel,
		read: func(_ context.Context, from uint32, _ int) ([]*mvccpb.Event, uint32, error) {
			rest := events[from:]
			if len(rest) <= step {
				return rest, 0, nil
			}
			return rest[:step], from + uint32(step), nil
		},
	}
}

func eventsOf(revision int64, n, bytes int) (events []*mvccpb.Event) {
	value := strings.Repeat("v", bytes)
	for i := range n {
		events = append(events, putEvent(fmt.Sprint(i), value, revision))
		if i%3 == 0 {
			events[i] = deleteEvent(fmt.Sprint(i), revision)
		}
	}
	return events
}

// holding counts what a node's streams hold, and the most that they did.
type holding struct{ now, most atomic.Int64 }

func (n *node) holding() *holding {
	h := &holding{}
	n.router.asides.holds = func(bytes int64) {
		now := h.now.Add(bytes)
		for most := h.most.Load(); now > most && !h.most.CompareAndSwap(most, now); most = h.most.Load() {
		}
	}
	return h
}

// returned waits until nothing is held.
func (h *holding) returned() {
	for h.now.Load() != 0 {
		runtime.Gosched()
	}
}

// A transaction that is too large to be kept is one answer all the same, or comes in fragments without anything between.
func TestAsideTransactions(t *testing.T) {
	n := startFakeWatches(t, nil, nil)
	h := n.holding()
	c, f := n.open(t)
	events := eventsOf(11, 1000, 5000)
	for i, create := range []*pb.WatchCreateRequest{
		{}, {Fragment: true}, {Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}},
		{Fragment: true, Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE}},
	} {
		create.Key = []byte("k")
		c.create(create)
		c.want(10, &pb.WatchResponse{WatchId: int64(i), Created: true})
		var delivering sync.WaitGroup
		delivering.Go(func() {
			if err := f.deliver(watchDelivery{id: f.number(i), aside: asideOf(11, 70, events)}); err != nil {
				t.Error(err)
			}
		})
		got := &pb.WatchResponse{Fragment: true}
		answers := 0
		for ; got.Fragment; answers++ {
			r := c.next()
			if r.Header.Revision != 11 || r.WatchId != int64(i) || proto.Size(r) > asideBytes && create.Fragment {
				t.Fatalf("%d bytes for %d at %d", proto.Size(r), r.WatchId, r.Header.Revision)
			}
			got.Events, got.Fragment = append(got.Events, r.Events...), r.Fragment
		}
		delivering.Wait()
		one := &watched{}
		for _, filter := range create.Filters {
			one.noPut, one.noDel = one.noPut || filter == pb.WatchCreateRequest_NOPUT, one.noDel || filter == pb.WatchCreateRequest_NODELETE
		}
		if want := (&pb.WatchResponse{Events: one.wanted(events)}); !proto.Equal(got, want) || create.Fragment != (answers > 1) {
			t.Errorf("%v: %d events in %d answers, want %d", create, len(got.Events), answers, len(want.Events))
		}
		after := []*mvccpb.Event{putEvent("k", "v", 12), deleteEvent("l", 12)}
		f.give(t, f.number(i), after...)
		c.want(12, &pb.WatchResponse{WatchId: int64(i), Events: one.wanted(after)})
	}
	h.returned()
}

// What cannot be read any more ends its watch, also after the first fragments; a watch that is cancelled is not read on.
// After a fragment the client is told of nothing else before the end: it would drop that.
func TestAsideTransactionsThatEnd(t *testing.T) {
	n := startFakeWatches(t, nil, nil)
	h := n.holding()
	c, f := n.open(t)
	create := func(fragment bool) (id, number int64) {
		c.create(&pb.WatchCreateRequest{Key: []byte("k"), Fragment: fragment})
		id = c.next().WatchId
		f.mu.Lock()
		defer f.mu.Unlock()
		return id, f.ids[len(f.ids)-1]
	}
	other, otherNumber := create(false)
	give := func(revision int64) { f.give(t, otherNumber, putEvent("k", "v", revision)) }
	want := func(revision int64) {
		t.Helper()
		c.want(revision, &pb.WatchResponse{WatchId: other, Events: []*mvccpb.Event{putEvent("k", "v", revision)}})
	}
	for i, fragment := range []bool{true, false} {
		at := int64(20 + 10*i)
		wantFragments := func(n int) {
			t.Helper()
			for range n {
				if fragment && !c.next().Fragment {
					t.Error("the last fragment of what was not read")
				}
			}
		}
		id, number := create(fragment)
		a := asideOf(at, 1, eventsOf(at, 3, 10))
		read := a.read
		a.read = func(ctx context.Context, from uint32, maxBytes int) ([]*mvccpb.Event, uint32, error) {
			if from == 2 {
				return nil, 0, &fsm.CompactedError{Revision: 15}
			}
			return read(ctx, from, maxBytes)
		}
		if err := f.deliver(watchDelivery{id: number, aside: a}); err != nil || a.compacted != 15 {
			t.Fatal(err, a.compacted)
		}
		give(at + 1)
		wantFragments(2)
		c.want(0, &pb.WatchResponse{WatchId: id, Canceled: true, CompactRevision: 15})
		want(at + 1)
		if err := f.deliver(watchDelivery{id: number, compacted: 15}); err != nil {
			t.Fatal(err)
		}

		id, number = create(fragment)
		reading, ctx := make(chan struct{}), t.Context()
		b := asideOf(at+2, 1, eventsOf(at+2, 3, 10))
		var interrupt context.CancelFunc
		b.within = func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, interrupt = context.WithCancel(ctx)
			return ctx, interrupt
		}
		readFirst := b.read
		b.read = func(within context.Context, from uint32, maxBytes int) ([]*mvccpb.Event, uint32, error) {
			if from == 0 {
				return readFirst(within, from, maxBytes)
			}
			close(reading)
			<-within.Done()
			return nil, 0, within.Err()
		}
		var delivering sync.WaitGroup
		delivering.Go(func() {
			if err := f.deliver(watchDelivery{id: number, aside: b}); err != nil {
				t.Error(err)
			}
		})
		select {
		case <-reading:
		case <-ctx.Done():
			t.Fatal("it is not read")
		}
		interrupt()
		delivering.Wait()
		give(at + 3)
		wantFragments(1)
		if fragment {
			c.want(at+2, &pb.WatchResponse{WatchId: id, Canceled: true})
		}
		want(at + 3)
		c.cancel(id)
		if !fragment {
			c.want(at+3, &pb.WatchResponse{WatchId: id, Canceled: true})
		}
		c.create(&pb.WatchCreateRequest{Key: []byte("k"), WatchId: id})
		c.want(10, &pb.WatchResponse{WatchId: id, Created: true})
	}
	h.returned()
}

// What nobody can be reached for is waited for, but keeps no room from others.
func TestAsideTransactionsThatNobodyHas(t *testing.T) {
	for _, fragment := range []bool{true, false} {
		n := startFakeWatches(t, func(c *Config) { c.MaxWatchBytes = 1 << 20 }, nil) // enough for one at a time
		n.router.asides.patience = time.Millisecond
		h := n.holding()
		events := eventsOf(11, 3, 10)
		began, back := make(chan struct{}), make(chan struct{})
		deliver := func(lost bool) (*watchClient, *sync.WaitGroup) {
			c, f := n.open(t)
			c.create(&pb.WatchCreateRequest{Key: []byte("k"), Fragment: fragment})
			c.want(10, &pb.WatchResponse{Created: true})
			a := asideOf(11, 1, events)
			if read, once := a.read, new(sync.Once); lost {
				a.read = func(ctx context.Context, from uint32, maxBytes int) ([]*mvccpb.Event, uint32, error) {
					if from == 1 {
						once.Do(func() { close(began) })
						select {
						case <-back:
						case <-ctx.Done():
							return nil, 0, ctx.Err()
						}
					}
					return read(ctx, from, maxBytes)
				}
			}
			var delivering sync.WaitGroup
			delivering.Go(func() {
				if err := f.deliver(watchDelivery{id: f.number(0), aside: a}); err != nil {
					t.Error(err)
				}
			})
			return c, &delivering
		}
		all := func(c *watchClient, delivering *sync.WaitGroup) {
			t.Helper()
			got := &pb.WatchResponse{}
			for more := true; more; {
				r := c.next()
				got.Events, more = append(got.Events, r.Events...), r.Fragment
			}
			delivering.Wait()
			if !proto.Equal(got, &pb.WatchResponse{Events: events}) {
				t.Errorf("%d events", len(got.Events))
			}
		}
		lost, delivering := deliver(true)
		<-began
		all(deliver(false))
		close(back)
		all(lost, delivering)
		h.returned()
	}
}

// A node that has no room for answers is asked again.
func TestReadTransactionWhereThereIsNoRoom(t *testing.T) {
	n := startNode(t, func(c *Config) { c.MaxAnswerBytes = 1 })
	put, err := n.KV().Put(t.Context(), &pb.PutRequest{Key: []byte("k"), Value: []byte("v")})
	if err != nil {
		t.Fatal(err)
	}
	request := func(maxBytes uint32) []byte {
		payload := []byte{protocolVersion}
		payload = binary.BigEndian.AppendUint64(payload, userGroup)
		payload = binary.BigEndian.AppendUint32(payload, 10000)
		payload = binary.BigEndian.AppendUint32(payload, 0)
		payload = binary.BigEndian.AppendUint32(payload, maxBytes)
		w := asked{key: []byte("k"), from: put.Header.Revision}
		return w.encode(payload)
	}
	for maxBytes, want := range map[uint32]code{asideBytes: codeOverloaded, 1: codeOK} {
		if reply, err := n.router.handleWatchRead(t.Context(), "", request(maxBytes)); err != nil || code(reply[1]) != want {
			t.Errorf("%d bytes: %v, %v", maxBytes, reply, err)
		}
	}
	if isRefusal(codeOverloaded.err()) {
		t.Error("it is not tried again")
	}
}

// Whoever does not find room for more gives back what he has; what needs more than there is goes alone.
func TestAsidesThatAreLargerThanTheirMemory(t *testing.T) {
	const limit = 6 << 20
	n := startFakeWatches(t, func(c *Config) { c.MaxWatchBytes, c.MaxRequestBytes, c.WatchTimeout = limit, 1000, time.Hour }, nil)
	h := n.holding()
	var clients sync.WaitGroup
	for i := range 6 {
		stream, err := pb.NewWatchClient(n.dial(t, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))).Watch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c := &watchClient{t, stream}
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		c.next()
		f := <-n.followers
		events := eventsOf(11, 400*(i+1), 5000)
		clients.Go(func() {
			if err := f.deliver(watchDelivery{id: f.number(0), aside: asideOf(11, 100, events)}); err != nil {
				t.Error(err)
			}
		})
		clients.Go(func() {
			if r, err := stream.Recv(); err != nil || !proto.Equal(&pb.WatchResponse{Events: events}, &pb.WatchResponse{Events: r.Events}) {
				t.Errorf("client %d: %d events, %v", i, len(r.GetEvents()), err)
			}
		})
	}
	clients.Wait()
	h.returned()
	if most := h.most.Load(); most > limit {
		t.Errorf("%d bytes were held, %d may be", most, limit)
	}
}

// Clients that do not read keep nobody waiting for ever, and no more than they may.
func TestManySlowClientsOfAsides(t *testing.T) {
	const limit, slow = 8 << 20, 8
	n := startFakeWatches(t, func(c *Config) { c.MaxWatchBytes, c.MaxRequestBytes = limit, 1000 }, nil)
	n.router.asides.patience = 100 * time.Millisecond
	h := n.holding()
	var delivering sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	open := func(options ...grpc.DialOption) pb.Watch_WatchClient {
		stream, err := pb.NewWatchClient(n.dial(t, options...)).Watch(ctx)
		if err != nil {
			t.Fatal(err)
		}
		c := &watchClient{t, stream}
		c.create(&pb.WatchCreateRequest{Key: []byte("k")})
		c.next()
		f := <-n.followers
		a := asideOf(11, 50, eventsOf(11, 200, 5000))
		delivering.Go(func() { _ = f.deliver(watchDelivery{id: f.number(0), aside: a}) }) // fails with the stream
		return stream
	}
	for range slow {
		open(grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	}
	for { // as clients do; on a slow machine this one may seem not to read
		if r, err := open().Recv(); err == nil {
			if len(r.Events) != 200 {
				t.Error(r)
			}
			break
		} else if status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
	}
	cancel() // nobody waits any more, so the last ones have longer
	delivering.Wait()
	h.returned()
	if most := h.most.Load(); most > limit {
		t.Errorf("%d bytes were held, %d may be", most, limit)
	}
}

// A delete of many keys reaches a client of the real thing.
func TestClientWatchesAHugeDelete(t *testing.T) {
	n := startNode(t, func(c *Config) { c.MaxWatchBytes = 1 << 20 })
	const keys, batch = 12000, 100
	for i := 0; i < keys; i += batch {
		txn := &pb.TxnRequest{}
		for j := range batch {
			put := &pb.PutRequest{Key: fmt.Appendf(nil, "k/%08d", i+j), Value: []byte("v")}
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
		}
		if _, err := n.KV().Txn(t.Context(), txn); err != nil {
			t.Fatal(err)
		}
	}
	client := n.client(t)
	watch := client.Watch(t.Context(), "k/", clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithRev(2))
	fragments := client.Watch(t.Context(), "k/", clientv3.WithPrefix(), clientv3.WithFragment(), clientv3.WithRev(2))
	deleted, err := n.KV().DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte("k/"), RangeEnd: []byte("k0")})
	if err != nil {
		t.Fatal(err)
	}
	after, err := n.KV().Put(t.Context(), &pb.PutRequest{Key: []byte("k/"), Value: []byte("v")})
	if err != nil {
		t.Fatal(err)
	}
	for name, responses := range map[string]clientv3.WatchChan{"whole": watch, "fragments": fragments} {
		puts := 0
		for last := int64(0); last < after.Header.Revision; {
			r := <-responses
			if r.Err() != nil || len(r.Events) == 0 {
				t.Fatalf("%s: %v, %d events", name, r.Err(), len(r.Events))
			}
			if first := r.Events[0].Kv.ModRevision; first <= last {
				t.Fatalf("%s: revision %d after %d", name, first, last)
			}
			deletes := 0
			for _, e := range r.Events {
				if last = e.Kv.ModRevision; last < deleted.Header.Revision {
					puts++
				}
				if e.Type == mvccpb.Event_DELETE {
					deletes++
					if name == "whole" && string(e.PrevKv.GetValue()) != "v" {
						t.Fatalf("before %v was %v", e.Kv, e.PrevKv)
					}
				}
			}
			if deletes > 0 && deletes != keys {
				t.Fatalf("%s: %d keys of %d were deleted", name, deletes, keys)
			}
		}
		if puts != keys {
			t.Errorf("%s: %d puts", name, puts)
		}
	}
}

// inProcess is a stream without gRPC.
type inProcess struct {
	grpc.ServerStream
	ctx  context.Context
	sent []*pb.WatchResponse
}

func (s *inProcess) Context() context.Context            { return s.ctx }
func (s *inProcess) Recv() (*pb.WatchRequest, error)     { return nil, errors.ErrUnsupported }
func (s *inProcess) Send(answer *pb.WatchResponse) error { s.sent = append(s.sent, answer); return nil }

func TestAsideTransactionsInTheProcess(t *testing.T) {
	n := startNode(t, nil)
	stream := &inProcess{ctx: t.Context()}
	w := newWatchStream(n.Server.watch, stream)
	one := &watched{id: 3, number: 1}
	w.open[1] = one
	events := eventsOf(11, 100, 500)
	if err := w.sendAside(t.Context(), one, asideOf(11, 7, events)); err != nil {
		t.Fatal(err)
	}
	if len(stream.sent) != 1 || stream.sent[0].WatchId != 3 || !proto.Equal(&pb.WatchResponse{Events: stream.sent[0].Events}, &pb.WatchResponse{Events: events}) {
		t.Errorf("%d answers", len(stream.sent))
	}
}
