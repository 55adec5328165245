package server

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/metadata"

	"kvd/shard"
)

// What etcd's own client makes of it.

// seen is what a client has seen of some events.
func seen(r clientv3.WatchResponse) (all []string) {
	for _, e := range r.Events {
		s := fmt.Sprintf("%d %s %s=%s", e.Kv.ModRevision, e.Type, e.Kv.Key, e.Kv.Value)
		if e.PrevKv != nil {
			s += fmt.Sprintf(" was %s at %d", e.PrevKv.Value, e.PrevKv.ModRevision)
		}
		all = append(all, s)
	}
	return all
}

// gather takes as many events as are wanted.
func gather(t *testing.T, watch clientv3.WatchChan, want ...string) {
	t.Helper()
	var got []string
	for len(got) < len(want) {
		r, ok := <-watch
		if !ok || r.Err() != nil {
			t.Fatalf("%v, %v after %q", ok, r.Err(), got)
		}
		got = append(got, seen(r)...)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func putNow(t testing.TB, c *clientv3.Client, key, value string) int64 {
	t.Helper()
	r, err := c.Put(t.Context(), key, value)
	if err != nil {
		t.Fatal(err)
	}
	return r.Header.Revision
}

func TestClientWatches(t *testing.T) {
	c := startNode(t, nil).client(t)
	putNow(t, c, "a/1", "one")                              // 2
	putNow(t, c, "a/2", "two")                              // 3
	putNow(t, c, "b", "else")                               // 4
	putNow(t, c, "a/1", "uno")                              // 5
	if _, err := c.Delete(t.Context(), "a/2"); err != nil { // 6
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	all := c.Watch(ctx, "a/", clientv3.WithPrefix(), clientv3.WithRev(2), clientv3.WithPrevKV(), clientv3.WithFragment())
	gather(t, all, "2 PUT a/1=one", "3 PUT a/2=two", "5 PUT a/1=uno was one at 2", "6 DELETE a/2= was two at 3")
	deletes := c.Watch(ctx, "a/", clientv3.WithPrefix(), clientv3.WithRev(1), clientv3.WithFilterPut())
	gather(t, deletes, "6 DELETE a/2=")
	puts := c.Watch(ctx, "a/2", clientv3.WithFromKey(), clientv3.WithRev(3), clientv3.WithFilterDelete())
	gather(t, puts, "3 PUT a/2=two", "4 PUT b=else")
	future := c.Watch(ctx, "b", clientv3.WithRev(8))
	now := c.Watch(ctx, "b", clientv3.WithCreatedNotify())
	if r := <-now; !r.Created || r.Header.Revision != 6 {
		t.Fatal(r)
	}
	putNow(t, c, "b", "seven")
	putNow(t, c, "b", "eight")
	gather(t, now, "7 PUT b=seven", "8 PUT b=eight")
	gather(t, future, "8 PUT b=eight")
	gather(t, puts, "7 PUT b=seven", "8 PUT b=eight")

	// A transaction is one answer.
	_, err := c.Txn(ctx).Then(clientv3.OpPut("a/3", "x"), clientv3.OpDelete("a/1"), clientv3.OpPut("c", "y")).Commit()
	if err != nil {
		t.Fatal(err)
	}
	if r := <-all; fmt.Sprint(seen(r)) != fmt.Sprint([]string{"9 PUT a/3=x", "9 DELETE a/1= was uno at 5"}) {
		t.Fatalf("%q", seen(r))
	}
	cancel()
	for range all {
	}
}

func TestClientWatchesOfWhatIsCompacted(t *testing.T) {
	c := startNode(t, nil).client(t)
	for i := range 5 {
		putNow(t, c, "k", fmt.Sprint(i))
	}
	if _, err := c.Compact(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	watch := c.Watch(t.Context(), "k", clientv3.WithRev(3))
	r := <-watch
	if !errors.Is(r.Err(), rpctypes.ErrCompacted) || r.CompactRevision != 4 || !r.Canceled {
		t.Fatalf("%+v", r)
	}
	if r, ok := <-watch; ok {
		t.Fatalf("%+v", r)
	}
	gather(t, c.Watch(t.Context(), "k", clientv3.WithRev(4)), "4 PUT k=2", "5 PUT k=3", "6 PUT k=4")
	for name, watch := range map[string]clientv3.WatchChan{
		"negative": c.Watch(t.Context(), "k", clientv3.WithRev(-1)),
		"empty":    c.Watch(metadata.AppendToOutgoingContext(t.Context(), "another", "stream"), "k", clientv3.WithRange("j")),
	} {
		r := <-watch
		if r.Err() == nil || !r.Canceled {
			t.Fatalf("%s: %+v", name, r)
		}
	}
}

func TestClientProgress(t *testing.T) {
	c := startNode(t, func(c *Config) { c.WatchProgressInterval = 10 * time.Millisecond }).client(t)
	ctx := t.Context()
	a := c.Watch(ctx, "a", clientv3.WithCreatedNotify())
	b := c.Watch(ctx, "b", clientv3.WithCreatedNotify())
	<-a
	<-b
	for i := range 10 {
		putNow(t, c, "a", fmt.Sprint(i))
	}
	if err := c.RequestProgress(ctx); err != nil {
		t.Fatal(err)
	}
	for events := 0; ; {
		r := <-a
		events += len(r.Events)
		if r.IsProgressNotify() {
			if r.Header.Revision != 11 || events != 10 {
				t.Fatalf("revision %d after %d events", r.Header.Revision, events)
			}
			break
		}
	}
	if r := <-b; !r.IsProgressNotify() || r.Header.Revision != 11 {
		t.Fatalf("%+v", r)
	}
	told := c.Watch(ctx, "c", clientv3.WithProgressNotify())
	for range 3 {
		if r := <-told; !r.IsProgressNotify() || r.Header.Revision != 11 {
			t.Fatalf("%+v", r)
		}
	}
}

// Nodes end, and clients go on with the next one where they were: they see everything once.
func TestClientsResume(t *testing.T) {
	const nodes, keys = 4, 200
	store := openStore(t)
	replica := newFakeReplica(store, shard.Leader{Node: "n1", ID: "n1/1", Term: 7, Self: true})
	var all []*node
	var endpoints []string
	for range nodes {
		n := startNode(t, func(c *Config) {
			c.Replica = func(uint64) Replica { return replica }
			c.DrainTimeout = time.Hour
		})
		all, endpoints = append(all, n), append(endpoints, n.address)
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	watches := make([]clientv3.WatchChan, 20)
	for i := range watches {
		watches[i] = client.Watch(t.Context(), "k/", clientv3.WithPrefix(), clientv3.WithRev(2), clientv3.WithFragment(), clientv3.WithProgressNotify())
	}
	last := all[nodes-1]
	var putting sync.WaitGroup
	putting.Go(func() {
		for i := range keys {
			if _, err := last.kv.Put(t.Context(), &pb.PutRequest{Key: fmt.Appendf(nil, "k/%d", i), Value: []byte("v")}); err != nil {
				t.Error(err)
			}
			if i%50 == 25 && i/50 < nodes-1 {
				if err := all[i/50].Close(); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for _, w := range watches {
		next := int64(2)
		for next < keys+2 {
			r, ok := <-w
			if !ok || r.Err() != nil {
				t.Fatalf("%v at revision %d", r.Err(), next)
			}
			for _, e := range r.Events {
				if e.Kv.ModRevision != next {
					t.Fatalf("revision %d, want %d", e.Kv.ModRevision, next)
				}
				next++
			}
		}
	}
	putting.Wait()
}

func TestManyWatchersOnOneStream(t *testing.T) {
	const watchers = 10_000
	n := startNode(t, nil)
	c := n.client(t)
	var watches []clientv3.WatchChan
	for i := range watchers {
		watches = append(watches, c.Watch(t.Context(), fmt.Sprintf("k/%d", i%(watchers/2))))
	}
	if streams, many := n.watch.streams.Load(), n.watch.watches.Load(); streams != 1 || many != watchers {
		t.Fatalf("%d streams with %d watches", streams, many)
	}
	for i := 0; i < watchers/2; i += 500 {
		putNow(t, c, fmt.Sprintf("k/%d", i), "v")
	}
	for i, w := range watches {
		if key := i % (watchers / 2); key%500 == 0 {
			gather(t, w, fmt.Sprintf("%d PUT k/%d=v", 2+key/500, key))
		}
	}
	if err := c.RequestProgress(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, w := range watches {
		if r := <-w; !r.IsProgressNotify() || r.Header.Revision != 1+watchers/1000 {
			t.Fatalf("%+v", r)
		}
	}
}

// Whatever a client is told, it can go on from there: everything before has come, and nothing after.
func TestProgressUnderWrites(t *testing.T) {
	lost := func(t *testing.T, planted faults) (why string) {
		n := startNode(t, func(c *Config) { c.faults, c.WatchProgressInterval = planted, time.Millisecond })
		stream, err := pb.NewWatchClient(n.dial(t)).Watch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c := &watchClient{t, stream}
		const keys, puts = 5, 3000
		for i := range keys {
			c.create(&pb.WatchCreateRequest{Key: fmt.Appendf(nil, "k/%d", i), ProgressNotify: true})
			for !c.next().Created {
			}
		}
		c.create(&pb.WatchCreateRequest{Key: []byte("k/"), RangeEnd: []byte("k0"), StartRevision: 2}) // number 5 sees all
		for !c.next().Created {
		}
		var putting sync.WaitGroup
		defer putting.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		putting.Go(func() {
			for i := range puts { // revision 2+i
				if ctx.Err() != nil {
					return
				}
				if _, err := n.kv.Put(t.Context(), putData(t, fmt.Sprintf("k/%d", i%keys), "v")); err != nil {
					t.Error(err)
				}
				if i%20 == 0 {
					c.progress()
				}
			}
			c.progress()
		})
		var at [keys + 1]int64 // the last one of its events that each watch has seen
		progress := func(id, revision int64) {
			next := at[id] + keys
			switch {
			case at[id] == 0:
				next = 2 + id
			case id == keys:
				next = at[id] + 1
			}
			if id == keys && at[id] == 0 {
				next = 2
			}
			if revision >= next || revision < at[id] {
				why = fmt.Sprintf("watch %d is told %d, and has seen %d, and not %d", id, revision, at[id], next)
			}
		}
		for told := 0; why == ""; {
			r := c.next()
			switch revision := r.Header.Revision; {
			case len(r.Events) > 0:
				at[r.WatchId] = r.Events[len(r.Events)-1].Kv.ModRevision
			case r.WatchId >= 0:
				progress(r.WatchId, revision)
			default:
				told++
				for id := range int64(keys + 1) {
					progress(id, revision)
				}
				if revision == puts+1 {
					if told < 1 {
						t.Fatalf("told %d times", told)
					}
					return why
				}
			}
		}
		return why
	}
	if why := lost(t, faults{}); why != "" {
		t.Fatal(why)
	}
	for _, planted := range []faults{{Faults: Faults{ProgressAhead: true}}, {earlyProgress: true}} {
		noticed := false
		for try := 0; try < 100 && !noticed; try++ { // it takes a lucky moment
			noticed = lost(t, planted) != ""
		}
		if !noticed {
			t.Fatalf("the planted fault was not noticed: %+v", planted)
		}
	}
}
