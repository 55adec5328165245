package fsm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm/mvcc"
)

// script is a store whose changes a model of events follows.
type script struct {
	*Store
	*eventLog
	t testing.TB
}

func newScript(t testing.TB, config Config) *script {
	return &script{open(t, config), newEventLog(1), t}
}

// puts is one transaction.
func (s *script) puts(keys ...string) {
	s.t.Helper()
	r := &pb.TxnRequest{}
	rev := s.eventLog.revision + 1
	for _, key := range keys {
		value := fmt.Sprint(key, "@", rev)
		r.Success = append(r.Success, putOp(put(key, value)))
		s.eventLog.put(rev, key, value)
	}
	s.eventLog.advance(rev)
	apply(s.t, s.Store, r)
}

func (s *script) watch(f *followed, key, end string, from int64) int64 {
	s.t.Helper()
	f.lastID++
	if err := f.Watch(f.lastID, []byte(key), []byte(end), from); err != nil {
		s.t.Fatal(err)
	}
	f.watches[f.lastID] = newFollower([]byte(key), []byte(end), from)
	return f.lastID
}

// TestWatchFaultsAreNoticed plants what must not happen to a watch in what otherwise goes well.
func TestWatchFaultsAreNoticed(t *testing.T) {
	var during func() // what a test does while the store is in the midst of something
	once := func() {
		if f := during; f != nil {
			during = nil
			f()
		}
	}
	for name, test := range map[string]struct {
		hook, fault func(*faults)
		run         func(s *script, f *followed) error
	}{
		"gap at the switch": {
			hook:  func(f *faults) { f.catchingUp = once },
			fault: func(f *faults) { f.WatchGap = true },
			run: func(s *script, f *followed) error {
				s.watch(f, "a", "", 2)
				during = func() { s.puts("a") } // after the view was opened
				return f.takeAll(t.Context(), s.eventLog, 1<<20)
			},
		},
		"event twice": {
			hook:  func(f *faults) { f.publishing = once },
			fault: func(f *faults) { f.watchTwice = true },
			run: func(s *script, f *followed) (err error) {
				s.watch(f, "a", "", 2)
				during = func() { _, err = f.take(t.Context(), s.eventLog, 1<<20) } // reads what is not published yet
				s.puts("a")
				return errors.Join(err, f.takeAll(t.Context(), s.eventLog, 1<<20))
			},
		},
		"transaction split": {
			hook:  func(f *faults) { f.publishing = once },
			fault: func(f *faults) { f.publishing, f.watchSplit = nil, once },
			run: func(s *script, f *followed) (err error) {
				s.watch(f, "a", "z", 3)
				during = func() { _, err = f.take(t.Context(), s.eventLog, 1<<20) }
				s.puts("a", "b")
				return errors.Join(err, f.takeAll(t.Context(), s.eventLog, 1<<20))
			},
		},
	} {
		for _, planted := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " ", planted), func(t *testing.T) {
				config := testConfig(tempPath(t))
				test.hook(&config.faults)
				if planted {
					test.fault(&config.faults)
				}
				s := newScript(t, config)
				s.puts("a")
				f := follow(s.Store, 1<<20)
				defer f.Close()
				during = nil
				err := test.run(s, f)
				if during != nil {
					t.Error("the moment never came")
				}
				if (err != nil) != planted {
					t.Errorf("planted: %t, noticed: %v", planted, err)
				}
				t.Log(err)
			})
		}
	}
}

func TestSlowWatchIsBoundedAndMissesNothing(t *testing.T) {
	s := newScript(t, testConfig(tempPath(t)))
	slow, quick := follow(s.Store, 10_000), follow(s.Store, 10_000)
	defer slow.Close()
	defer quick.Close()
	for _, f := range []*followed{slow, quick} {
		s.watch(f, "a", "b", 2)
		s.watch(f, "a", "", 2)
		s.watch(f, "never", "", 2)
	}
	for i := range 2000 {
		s.puts("a", "a/1", "b")
		if slow.bytes > slow.maxBytes || quick.bytes > quick.maxBytes {
			t.Fatalf("%d and %d bytes are queued", slow.bytes, quick.bytes)
		}
		if i%10 == 9 {
			if err := quick.takeAll(t.Context(), s.eventLog, 5000); err != nil {
				t.Fatal(err)
			}
			if len(quick.lagging) > 0 {
				t.Fatal("the quick one lags")
			}
		}
	}
	if len(slow.lagging) != 2 {
		t.Errorf("%d watches of the slow feed lag", len(slow.lagging))
	}
	if err := slow.takeAll(t.Context(), s.eventLog, 5000); err != nil {
		t.Fatal(err)
	}
	if slow.bytes != 0 || quick.bytes != 0 {
		t.Errorf("%d and %d bytes are queued in the end", slow.bytes, quick.bytes)
	}
}

// TestQueueWaitsForTheHistoryBeforeIt: a watch that was detached while its queue waited behind another's is attached
// again, has history to read up to there, and is given more.
func TestQueueWaitsForTheHistoryBeforeIt(t *testing.T) {
	var during func()
	config := testConfig(tempPath(t))
	config.faults.catchingUp = func() {
		if f := during; f != nil {
			during = nil
			f()
		}
	}
	s := newScript(t, config)
	const size = eventBytes + 4 // x and x@2
	f := follow(s.Store, 4*size)
	defer f.Close()
	s.watch(f, "x", "", 2)
	s.watch(f, "a", "", 2)
	for _, key := range []string{"x", "x", "x", "a", "a"} { // no room for the last
		s.puts(key)
	}
	during = func() { s.puts("a") }
	if _, err := f.take(t.Context(), s.eventLog, 4*size); err != nil {
		t.Fatal(err)
	}
	w := f.Feed.watches[2]
	s.puts("a")
	if during != nil || w.isLive() || len(w.queue) != 1 || !w.isPending {
		t.Fatalf("not what is tested: %+v", w)
	}
	if err := f.takeAll(t.Context(), s.eventLog, 4*size); err != nil {
		t.Fatal(err)
	}
}

// TestIdleWatchOutlivesCompaction: a live watch needs nothing of the past, even if its feed is full.
func TestIdleWatchOutlivesCompaction(t *testing.T) {
	s := newScript(t, testConfig(tempPath(t)))
	f := follow(s.Store, 2*(eventBytes+20))
	defer f.Close()
	s.watch(f, "a", "", 2)
	idle := s.watch(f, "b", "", 2)
	for range 10 {
		s.puts("a")
		if err := f.takeAll(t.Context(), s.eventLog, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if next := f.Next(idle); next != s.eventLog.revision+1 {
		t.Errorf("the idle watch goes on from %d at %d", next, s.eventLog.revision)
	}
	apply(t, s.Store, &pb.CompactionRequest{Revision: s.eventLog.revision})
	s.eventLog.compacted = s.eventLog.revision
	s.puts("a")
	s.puts("a")
	s.puts("b") // no room for it
	if len(f.lagging) != 1 {
		t.Errorf("%d watches lag", len(f.lagging))
	}
	if err := f.takeAll(t.Context(), s.eventLog, 1<<20); err != nil {
		t.Fatal(err)
	}
	if len(f.watches) != 2 {
		t.Errorf("%d watches are left", len(f.watches))
	}
}

func TestLaggingWatchEndsWithCompaction(t *testing.T) {
	s := newScript(t, testConfig(tempPath(t)))
	for range 5 {
		s.puts("a", "b")
	}
	f := follow(s.Store, 1<<20)
	defer f.Close()
	single, wide := s.watch(f, "a", "", 3), s.watch(f, "a", "\x00", 3)
	fine := s.watch(f, "a", "", 4)
	apply(t, s.Store, &pb.CompactionRequest{Revision: 4})
	s.eventLog.compacted = 4
	if err := s.WaitCompacted(t.Context(), User, 4); err != nil {
		t.Fatal(err)
	}
	if err := f.takeAll(t.Context(), s.eventLog, 1<<20); err != nil {
		t.Fatal(err)
	}
	if f.watches[single] != nil || f.watches[wide] != nil || f.watches[fine] == nil {
		t.Errorf("left: %v", f.watches)
	}
	var compacted *CompactedError
	if err := f.Watch(100, []byte("a"), nil, 3); !errors.As(err, &compacted) || compacted.Revision != 4 || !errors.Is(err, ErrCompacted) {
		t.Errorf("watch from 3: %v", err)
	}
}

// TestWideHistory reads ranges of many keys, over rows in the file and in memory.
func TestWideHistory(t *testing.T) {
	config := testConfig(tempPath(t))
	s := newScript(t, config)
	defaults := s.hub.limits
	for i := range 3000 {
		s.puts(fmt.Sprintf("k/%05d", i*7%3000), fmt.Sprintf("few/%d", i%5))
		if i == 2500 {
			if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, limits := range map[string]historyLimits{"defaults": defaults, "small": {rows: 100, near: 10, keys: 200, batch: 50, changes: 300, perKey: 50}} {
		t.Run(name, func(t *testing.T) {
			s.hub.limits = limits
			f := follow(s.Store, 1<<20)
			defer f.Close()
			for _, span := range [][2]string{{"k/", "k0"}, {"k/00100", "k/00150"}, {"few/", "few0"}, {"few/1", ""}, {"a", "\x00"}, {"x", "y"}, {"y", "x"}} {
				for _, from := range []int64{2, 1500, 2900, 4000} {
					s.watch(f, span[0], span[1], from)
				}
			}
			if err := f.takeAll(t.Context(), s.eventLog, 100_000); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestDeletedKeysHaveKeyAndRevisionAlone(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, put("a", "1"), &pb.DeleteRangeRequest{Key: []byte("a")})
	want := &mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte("a"), ModRevision: 3}}
	f := s.NewFeed(1 << 20)
	defer f.Close()
	for id, end := range []string{"", "b"} {
		if err := f.Watch(int64(id), []byte("a"), []byte(end), 3); err != nil {
			t.Fatal(err)
		}
	}
	all, err := f.Take(t.Context(), 1<<20, 1<<20)
	if err != nil || len(all) != 2 {
		t.Fatal(all, err)
	}
	for _, d := range all {
		if len(d.Events) != 1 || !proto.Equal(d.Events[0], want) {
			t.Errorf("got %v", d)
		}
	}
}

func TestFeedOfARetiredStore(t *testing.T) {
	s := newScript(t, testConfig(tempPath(t)))
	s.puts("a")
	f := follow(s.Store, 1<<20)
	defer f.Close()
	s.watch(f, "a", "", 2)
	s.watch(f, "b", "", 3)
	s.puts("a")
	select {
	case <-f.Done():
		t.Fatal("done")
	default:
	}
	s.Retire()
	<-f.Done()
	if err := f.takeAll(t.Context(), s.eventLog, 1<<20); err != nil {
		t.Error(err)
	}
	if err := f.Watch(10, []byte("a"), nil, 2); !errors.Is(err, ErrClosed) {
		t.Errorf("watch a retired store: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Take(t.Context(), 1, 1<<20); !errors.Is(err, ErrClosed) {
		t.Errorf("take from a closed store: %v, %v", got, err)
	}
	if a, b := f.Next(1), f.Next(2); a != 4 || b != 4 {
		t.Errorf("the watches go on from %d and %d", a, b)
	}
	f.Close()
	f.Close()
	if f.Next(1) != 0 {
		t.Error("a closed feed has watches")
	}
}

// TestCloseDuringTake: consumers that still take when the store closes get an error, and no more.
func TestCloseDuringTake(t *testing.T) {
	s := newScript(t, testConfig(tempPath(t)))
	for range 200 {
		s.puts("a", "b", "c")
	}
	if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
		t.Fatal(err)
	}
	var consumers sync.WaitGroup
	began := make(chan struct{}, 4)
	for i := range cap(began) {
		f := s.NewFeed(1 << 20)
		consumers.Go(func() {
			defer f.Close()
			for id := int64(0); ; id++ {
				err := f.Watch(id, []byte("a"), [][]byte{nil, {0}}[i%2], 2)
				for err == nil {
					var all []Delivery
					if all, err = f.Take(context.Background(), 1000, 1<<20); all == nil {
						break
					}
				}
				f.Cancel(id)
				switch {
				case errors.Is(err, ErrClosed):
					return
				case err != nil:
					t.Error(err)
					return
				}
				signal(began)
			}
		})
	}
	for range cap(began) {
		<-began
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	consumers.Wait()
	if n := s.hub.watching.Load(); n != 0 {
		t.Errorf("%d watches are left", n)
	}
}

func TestWatchIsRefused(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	f := s.NewFeed(1)
	if err := f.Watch(1, []byte("a"), nil, 1); err != nil {
		t.Fatal(err)
	}
	if err := f.Watch(1, []byte("b"), nil, 1); !errors.Is(err, ErrWatchExists) {
		t.Errorf("second watch of one id: %v", err)
	}
	f.Cancel(1)
	f.Cancel(1)
	if err := f.Watch(1, []byte("b"), nil, 1); err != nil {
		t.Error(err)
	}
	f.Close()
	if err := f.Watch(2, []byte("b"), nil, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("watch of a closed feed: %v", err)
	}
	if _, err := f.Take(t.Context(), 1, 1<<20); !errors.Is(err, ErrClosed) {
		t.Errorf("take from a closed feed: %v", err)
	}
	config := testConfig(tempPath(t))
	config.Witness = true
	if err := open(t, config).NewFeed(1).Watch(1, []byte("a"), nil, 1); !errors.Is(err, ErrWitness) {
		t.Errorf("watch a witness: %v", err)
	}
}

// TestTakeGivesUp: a canceled Take loses nothing.
func TestTakeGivesUp(t *testing.T) {
	s := newScript(t, testConfig(tempPath(t)))
	s.puts("a", "b")
	f := follow(s.Store, 1<<20)
	defer f.Close()
	s.watch(f, "a", "c", 2)
	ctx, cancel := context.WithCancel(t.Context())
	for range rangeScans {
		s.hub.scans <- struct{}{}
	}
	cancel()
	if _, err := f.Take(ctx, 1<<20, 1<<20); !errors.Is(err, context.Canceled) {
		t.Errorf("take: %v", err)
	}
	for range rangeScans {
		<-s.hub.scans
	}
	select {
	case <-f.Ready():
	default:
		t.Error("the feed is not ready")
	}
	if err := f.takeAll(t.Context(), s.eventLog, 1<<20); err != nil {
		t.Error(err)
	}
}

func TestPrevKV(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, put("a", "1"), put("a", "2"), &pb.DeleteRangeRequest{Key: []byte("a")}, put("a", "3"), put("b", "1"), put("a", "4"))
	prev := func(rev int64) string {
		t.Helper()
		kv, err := s.PrevKV(t.Context(), []byte("a"), rev)
		if err != nil {
			t.Fatal(err)
		}
		return string(kv.GetValue())
	}
	var got []string
	for rev := range int64(9) {
		got = append(got, prev(rev))
	}
	if want := "|||1|2||3|3|4"; strings.Join(got, "|") != want {
		t.Errorf("got %q", got)
	}
	if _, err := s.PrevKV(t.Context(), []byte("a"), 9); !errors.Is(err, ErrFutureRevision) {
		t.Errorf("of the future: %v", err)
	}
	apply(t, s, &pb.CompactionRequest{Revision: 5})
	if got := prev(5) + "," + prev(6); got != ",3" {
		t.Errorf("compacted: %q", got)
	}
}

// TestFeedWakesItsConsumer lets one that only waits for Ready get everything.
func TestFeedWakesItsConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript(t, testConfig(tempPath(t)))
		f := follow(s.Store, 3000)
		s.watch(f, "a", "", 2)
		s.watch(f, "a", "b", 2)
		const transactions = 300
		got := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-f.Done():
					return
				case <-f.Ready():
				}
				all, err := f.Take(t.Context(), 1000, 1<<20)
				if err != nil {
					t.Error(err)
					return
				}
				for _, d := range all {
					got += len(d.Events)
				}
			}
		}()
		for i := range transactions {
			s.puts("a", "a/1")
			if i%7 == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		s.Retire()
		<-done
		f.Close()
		if got != 3*transactions {
			t.Errorf("%d events", got)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestChangesOfTheIndex(t *testing.T) {
	var x mvcc.Index
	for rev := int64(2); rev < 30; rev++ {
		x.Put(fmt.Append(nil, "k", rev%3), mvcc.Revision{Main: rev})
	}
	got, complete, _, done := x.Changes(mvcc.NewSpan([]byte("k"), []byte("l")), "k", 10, 25, 10, 3, nil)
	if !done || complete != 19 || len(got) != 9 {
		t.Errorf("%d changes, those before %d, %t", len(got), complete, done)
	}
}

// A transaction that is too large for a watch is read in parts, with what was before.
func TestHugeTransactionInParts(t *testing.T) {
	config := testConfig(tempPath(t))
	s := newScript(t, config)
	const n = 50
	var keys []string
	for i := range n {
		keys = append(keys, fmt.Sprintf("k/%02d", i))
	}
	s.puts(append(keys, "other")...)
	if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
		t.Fatal(err)
	}
	s.puts("k/small")
	apply(t, s.Store, &pb.DeleteRangeRequest{Key: []byte("k/"), RangeEnd: []byte("k0")})
	f := s.NewFeed(1 << 20)
	defer f.Close()
	if err := f.Watch(1, []byte("k/"), []byte("k0"), 2); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		next   int64
		events int
		huge   bool
	}{{2, 0, true}, {4, 1, true}} {
		all, err := f.Take(t.Context(), 1<<20, 20*eventBytes)
		if err != nil || len(all) != 1 || len(all[0].Events) != c.events || all[0].Next != c.next || all[0].Huge != c.huge {
			t.Fatalf("%v, %v, want %+v", all, err, c)
		}
		if again, err := f.Take(t.Context(), 1<<20, 20*eventBytes); err != nil || again != nil {
			t.Fatalf("after the end: %v, %v", again, err)
		}
		if err := f.Watch(1, []byte("k/"), []byte("k0"), c.next+1); err != nil {
			t.Fatal(err)
		}
	}
	for _, part := range []TransactionPart{{Revision: 2, MaxBytes: 3 * eventBytes}, {Revision: 4, MaxBytes: 1}, {Revision: 4, MaxBytes: 3 * eventBytes, PrevKV: true}, {Revision: 4, MaxBytes: 1 << 20, PrevKV: true}} {
		part.Key, part.RangeEnd = []byte("k/"), []byte("k0")
		want := keys
		if part.Revision == 4 {
			want = append(slices.Clone(keys), "k/small")
		}
		for {
			events, next, err := s.ReadTransaction(t.Context(), part)
			if err != nil || len(events) == 0 || len(events) > len(want) || len(events)*eventBytes > part.MaxBytes+2*eventBytes {
				t.Fatalf("%+v: %d events of %d, %v", part, len(events), len(want), err)
			}
			for i, e := range events {
				if string(e.Kv.Key) != want[i] || e.Kv.ModRevision != part.Revision || part.PrevKV != (string(e.PrevKv.GetKey()) == want[i]) {
					t.Fatalf("%+v: %v, want %s", part, e, want[i])
				}
			}
			want, part.From = want[len(events):], next
			if next == 0 {
				break
			}
		}
		if len(want) > 0 {
			t.Errorf("%+v: ends before %s", part, want[0])
		}
	}
	if _, _, err := s.ReadTransaction(t.Context(), TransactionPart{Key: []byte("k"), Revision: 5, MaxBytes: 1}); !errors.Is(err, ErrFutureRevision) {
		t.Errorf("in the future: %v", err)
	}
	apply(t, s.Store, &pb.CompactionRequest{Revision: 4})
	var compacted *CompactedError
	if _, _, err := s.ReadTransaction(t.Context(), TransactionPart{Key: []byte("k"), Revision: 3, MaxBytes: 1}); !errors.As(err, &compacted) || compacted.Revision != 4 {
		t.Errorf("of what is compacted: %v", err)
	}
}
