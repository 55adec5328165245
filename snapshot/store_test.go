package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

// source is a state that becomes durable when the test says so.
type source struct {
	db *bbolt.DB

	mu       sync.Mutex
	meta     Meta
	ok       bool
	onMeta   func() // called once, before the next SnapshotMeta
	beforeTx func() // called before each transaction is opened
	afterTx  func() // called after it was closed, if any
}

func (s *source) SnapshotMeta() (Meta, bool) {
	s.mu.Lock()
	hook := s.onMeta
	s.onMeta = nil
	s.mu.Unlock()
	if hook != nil {
		hook()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.meta, s.ok
}

func (s *source) advance(index uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.meta.Index, s.ok = max(s.meta.Index, index), true
}

func (s *source) ViewSnapshot(ctx context.Context, fn func(*bbolt.Tx, Meta) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.beforeTx != nil {
		s.beforeTx()
	}
	if s.afterTx != nil {
		defer s.afterTx()
	}
	return s.db.View(func(tx *bbolt.Tx) error {
		s.mu.Lock()
		meta := s.meta
		s.mu.Unlock()
		return fn(tx, meta)
	})
}

func newSource(t testing.TB, keys int) *source {
	db := newDB(t, newRand(30), keys)
	db.meta.Index = 100
	return &source{db: db.DB, meta: db.meta, ok: true}
}

func newTestStore(t testing.TB, src Source, cfg Config) *Store {
	t.Helper()
	s := NewStore(src, cfg)
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), s.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func mustOpen(t testing.TB, s *Store) (*raft.SnapshotMeta, io.ReadCloser) {
	t.Helper()
	meta, r, err := s.Open("whatever")
	if err != nil {
		t.Fatal(err)
	}
	return meta, r
}

func TestStoreStreamsTheDurableState(t *testing.T) {
	src := newSource(t, 300)
	reg := prometheus.NewRegistry()
	s := newTestStore(t, src, Config{Registerer: reg})
	_ = NewStore(src, Config{Registerer: reg}) // as after an install
	list, err := s.List()
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	want := &raft.SnapshotMeta{Version: 1, ID: list[0].ID, Index: 100, Term: src.meta.Term,
		Configuration: src.meta.Configuration, ConfigurationIndex: src.meta.ConfigurationIndex}
	if list[0].ID == "" || !reflect.DeepEqual(list[0], want) {
		t.Errorf("listed %+v, want %+v", list[0], want)
	}
	src.advance(120) // the newest state is streamed, whatever was listed
	meta, r := mustOpen(t, s)
	if meta.Index != 120 || meta.Size%512 != 0 {
		t.Errorf("opened %+v", meta)
	}
	b, err := io.ReadAll(iotest.OneByteReader(r))
	if err != nil || int64(len(b)) != meta.Size {
		t.Errorf("%d bytes of %d, %v", len(b), meta.Size, err)
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}
	got, err := Verify(ctx, bytes.NewReader(b))
	if err != nil || !reflect.DeepEqual(got, src.meta) {
		t.Errorf("%+v, %v, want %+v", got, err, src.meta)
	}
	if n := counter(t, reg, "kvd_snapshot_stream_bytes_total"); n != float64(meta.Size) {
		t.Errorf("%v bytes counted, want %d", n, meta.Size)
	}
}

func counter(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func TestStoreOfAnEmptyState(t *testing.T) {
	s := newTestStore(t, &source{}, Config{})
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Error(list, err)
	}
	if _, _, err := s.Open("1-1"); !errors.Is(err, ErrNoSnapshot) {
		t.Error(err)
	}
	if index, held := s.HoldIndex(); held || s.Guard() != 0 {
		t.Errorf("hold %d %v, guard %d", index, held, s.Guard())
	}
}

// Raft truncates its log only after the sink was closed without error.
func TestSinkDemandsADurableState(t *testing.T) {
	src := newSource(t, 10)
	s := newTestStore(t, src, Config{})
	for _, c := range []struct {
		index uint64
		want  error
	}{{99, nil}, {100, nil}, {101, ErrNotDurable}} {
		sink, err := s.Create(1, c.index, 7, raft.Configuration{}, 1, nil)
		if err != nil || sink.ID() == "" {
			t.Fatal(err)
		}
		if err := sink.Close(); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("snapshot of %d: %v", c.index, err)
		}
		if err := sink.Cancel(); err != nil {
			t.Error(err)
		}
		if _, err := sink.Write([]byte("state")); !errors.Is(err, ErrVirtual) {
			t.Errorf("Write: %v", err)
		}
	}
	src.ok, src.meta = false, Meta{}
	if sink, _ := s.Create(1, 1, 1, raft.Configuration{}, 1, nil); !errors.Is(sink.Close(), ErrNotDurable) {
		t.Error("a snapshot of an empty state")
	}
}

// The hold is there before the transaction, so that no truncation gets between.
func TestHoldComesBeforeTheTransaction(t *testing.T) {
	src := newSource(t, 10)
	s := newTestStore(t, src, Config{Linger: -1})
	src.beforeTx = func() {
		if index, held := s.HoldIndex(); !held || index > 100 {
			t.Errorf("about to open the transaction: hold %d %v", index, held)
		}
		src.advance(150) // and a truncation up to here must wait
		if g := s.Guard(); g != 99 {
			t.Errorf("guard %d", g)
		}
	}
	meta, r := mustOpen(t, s)
	if index, held := s.HoldIndex(); meta.Index != 150 || !held || index != 150 || s.Guard() != 149 {
		t.Errorf("opened at %d: hold %d %v, guard %d", meta.Index, index, held, s.Guard())
	}
	r.Close()
	if _, held := s.HoldIndex(); held || s.Guard() != 149 {
		t.Errorf("closed: held %v, guard %d", held, s.Guard())
	}
}

// Between the two things that Guard looks at, a stream opens and the state goes on. In the other order it
// would see no stream, and then the newer state.
func TestGuardAgainstAnOpen(t *testing.T) {
	src := newSource(t, 10)
	s := newTestStore(t, src, Config{})
	src.onMeta = func() {
		mustOpen(t, s)
		src.advance(200)
	}
	if g := s.Guard(); g > 99 {
		t.Errorf("guard %d, a stream needs 100", g)
	}
}

// Random opens, ends and truncations: the log never begins above what a stream that runs needs.
func TestHoldProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		src := newSource(t, 0)
		s := NewStore(src, Config{Linger: -1})
		defer s.Close()
		open := map[io.ReadCloser]uint64{}
		removed := uint64(0) // of the log, up to here
		rt.Repeat(map[string]func(*rapid.T){
			"advance": func(rt *rapid.T) { src.advance(src.meta.Index + rapid.Uint64Range(0, 50).Draw(rt, "by")) },
			"open": func(rt *rapid.T) {
				if rapid.Bool().Draw(rt, "truncated meanwhile") {
					src.beforeTx = func() { removed = max(removed, s.Guard()) }
				}
				meta, r := mustOpen(t, s)
				src.beforeTx = nil
				open[r] = meta.Index
			},
			"close": func(rt *rapid.T) {
				for r := range open {
					if rapid.Bool().Draw(rt, "read") {
						_, _ = io.Copy(io.Discard, r)
					}
					r.Close()
					delete(open, r)
					return
				}
			},
			"truncate": func(*rapid.T) { removed = max(removed, s.Guard()) },
			"": func(rt *rapid.T) {
				lowest := uint64(math.MaxUint64)
				for _, index := range open {
					if lowest = min(lowest, index); index <= removed {
						rt.Fatalf("the log is removed up to %d, a stream needs %d", removed, index)
					}
				}
				if index, held := s.HoldIndex(); held != (len(open) > 0) || held && index != lowest {
					rt.Fatalf("hold %d %v, want %d", index, held, lowest)
				}
				if len(open) == 0 && s.Guard() != src.meta.Index-1 {
					rt.Fatalf("guard %d without a stream, durable %d", s.Guard(), src.meta.Index)
				}
			},
		})
		for r := range open {
			r.Close()
		}
	})
}

// A follower that has received a stream gets some time to install it and ask for what follows. One that broke
// off starts anew.
func TestHoldLingers(t *testing.T) {
	src := newSource(t, 100)
	synctest.Test(t, func(t *testing.T) {
		s := NewStore(src, Config{Linger: time.Minute})
		defer s.Close()
		_, broken := mustOpen(t, s)
		broken.Close()
		if _, held := s.HoldIndex(); held {
			t.Error("a broken stream holds the log")
		}
		_, r := mustOpen(t, s)
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Error(err)
		}
		r.Close()
		src.advance(300)
		time.Sleep(59 * time.Second)
		if index, held := s.HoldIndex(); !held || index != 100 || s.Guard() != 99 {
			t.Errorf("hold %d %v", index, held)
		}
		time.Sleep(time.Second)
		if _, held := s.HoldIndex(); held || s.Guard() != 299 || len(s.holds) != 0 {
			t.Errorf("held %v, guard %d", held, s.Guard())
		}
	})
}

// A reader that nobody reads is closed, by its owner or with the store: the transaction ends before Close
// returns, and a blocked Read too.
func TestCloseEndsTheTransaction(t *testing.T) {
	src := newSource(t, 8000)
	var mu sync.Mutex
	running := 0
	count := func(by int) func() { return func() { mu.Lock(); running += by; mu.Unlock() } }
	src.beforeTx, src.afterTx = count(1), count(-1)
	s := NewStore(src, Config{})
	_, a := mustOpen(t, s)
	meta, b := mustOpen(t, s)
	if _, err := io.ReadFull(a, make([]byte, 1000)); err != nil {
		t.Error(err)
	}
	a.Close()
	if mu.Lock(); running != 1 {
		t.Errorf("%d transactions are open after one of two streams was closed", running)
	}
	mu.Unlock()
	if _, err := a.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("Read after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if mu.Lock(); running != 0 {
		t.Errorf("%d transactions are open after the store was closed", running)
	}
	mu.Unlock()
	if n, err := io.Copy(io.Discard, b); err == nil || n >= meta.Size {
		t.Errorf("a stream of a closed store gave %d bytes and %v", n, err)
	}
	b.Close()
	if _, held := s.HoldIndex(); held {
		t.Error("held after the end")
	}
	if _, _, err := s.Open(""); !errors.Is(err, ErrClosed) {
		t.Errorf("Open after Close: %v", err)
	}
}

func TestOpenFails(t *testing.T) {
	src := newSource(t, 10)
	src.db.Close()
	s := newTestStore(t, src, Config{})
	if _, _, err := s.Open(""); err == nil || !strings.Contains(err.Error(), "open snapshot") {
		t.Error(err)
	}
	if _, held := s.HoldIndex(); held {
		t.Error("a failed Open holds the log")
	}
}

// The only thing that is read of a state while others write to it.
func TestConcurrentStreams(t *testing.T) {
	src := newSource(t, 3000)
	s := newTestStore(t, src, Config{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 5 {
				meta, r, err := s.Open("")
				if err != nil {
					t.Error(err)
					return
				}
				got, err := Verify(ctx, r)
				if err != nil || got.Index != meta.Index {
					t.Errorf("%+v, %v, want %d", got, err, meta.Index)
				}
				r.Close()
				src.advance(meta.Index + uint64(i))
				g := s.Guard()
				if durable, _ := src.SnapshotMeta(); g >= durable.Index {
					t.Errorf("guard %d, durable %d", g, durable.Index)
				}
			}
		})
	}
	wg.Wait()
}

// Stores that share a Limit wait for each other's streams, and hold nothing while they wait.
func TestALimitBoundsTheStreamsOfAllStores(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := NewLimit(2, 0)
		var stores []*Store
		for range 5 {
			stores = append(stores, NewStore(newSource(t, 10), Config{Limit: limit, Linger: -1}))
		}
		_, a := mustOpen(t, stores[0])
		_, b := mustOpen(t, stores[1])
		opened := make(chan io.ReadCloser, 2)
		for _, s := range stores[2:4] {
			go func() {
				_, r, err := s.Open("")
				if err != nil {
					t.Error(err)
				}
				opened <- r
			}()
		}
		closed := make(chan error, 1)
		go func() {
			_, _, err := stores[4].Open("")
			closed <- err
		}()
		synctest.Wait()
		if len(opened) > 0 {
			t.Error("a third stream was opened")
		}
		for _, s := range stores[2:] {
			if index, ok := s.HoldIndex(); ok {
				t.Errorf("a store that waits holds the log at %d", index)
			}
		}
		if err := stores[4].Close(); err != nil {
			t.Error(err)
		}
		if err := <-closed; !errors.Is(err, ErrClosed) {
			t.Errorf("a store that was closed while it waited: %v", err)
		}
		for _, r := range []io.Closer{a, a, b, b} { // closing twice makes no room for two
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
		c, d := <-opened, <-opened
		if len(limit.slots) != 2 {
			t.Errorf("%d streams are open", len(limit.slots))
		}
		// A stream that cannot be made leaves room for others.
		empty := newSource(t, 1)
		empty.ok = false
		none := NewStore(empty, Config{Limit: limit})
		if err := errors.Join(c.Close(), d.Close()); err != nil {
			t.Error(err)
		}
		for range 3 {
			if _, _, err := none.Open(""); !errors.Is(err, ErrNoSnapshot) {
				t.Errorf("opened nothing: %v", err)
			}
		}
		for _, s := range append(stores, none) {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
		if len(limit.slots) != 0 {
			t.Errorf("%d streams are still counted", len(limit.slots))
		}
	})
}
