package fsm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// seeds runs a test for some seeds, each named after its seed.
func seeds(t *testing.T, n int, run func(t *testing.T, seed uint64)) {
	first := rand.Uint64N(1 << 32)
	for i := range n {
		seed := first + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { run(t, seed) })
	}
}

// logEntry is an entry of the log that all replicas of a test apply.
type logEntry struct {
	data          []byte
	configuration *raft.Configuration
}

// cluster is one log, the model's answers to it, and the generator that writes it.
type cluster struct {
	*generator
	model  *model
	floors bool       // revisions are reserved
	log    []logEntry // of indexes 1, 2, ...
	want   [][]Result
}

func newCluster(seed uint64) *cluster {
	c := &cluster{generator: newGenerator(seed), model: newModel()}
	c.leases = []int64{0, 0, 0, 7, 8, 9, 10}
	c.model.maxDrops = 3
	return c
}

// grow appends a random entry.
func (c *cluster) grow(t testing.TB) {
	t.Helper()
	if c.oneIn(20) {
		configuration := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(fmt.Sprint("n/", len(c.log)))}}}
		c.log, c.want = append(c.log, logEntry{configuration: &configuration}), append(c.want, nil)
		return
	}
	var b EntryBuilder
	var want []Result
	stale := c.reserve(&b)
	c.model.index = uint64(len(c.log) + 1)
	for range c.IntN(6) {
		m := c.command()
		if c.oneIn(4) {
			m = c.leaseCommand()
		}
		c.model.place = b.Count()
		b.Add(request(t, m))
		switch {
		case stale:
			want = append(want, Result{Err: ErrStaleFloor})
			continue
		case b.floor != 0:
			c.model.reserve(b.floor + int64(b.Count()) - 1)
		}
		want = append(want, c.model.apply(m))
		c.revision, c.compacted = c.model.revision(), c.model.compacted
	}
	c.log, c.want = append(c.log, logEntry{data: b.Bytes()}), append(c.want, want)
}

// reserve gives an entry its floor, if it is to have one, and says whether that is stale.
func (c *cluster) reserve(b *EntryBuilder) (stale bool) {
	switch {
	case !c.floors:
	case c.oneIn(12):
		b.SetFloor(max(1, c.model.used-c.Int64N(3)), 1)
		return true
	case c.oneIn(12):
		b.SetFloor(c.revision+1, 2)
		return true
	default:
		b.SetFloor(c.revision+1+c.Int64N(3), 1)
	}
	return false
}

// current is the newest revision that counts in reads.
func (c *cluster) current() int64 {
	if c.floors {
		return c.revision
	}
	return 0
}

// replica is a store that follows the log of a cluster.
type replica struct {
	*Store
	config Config
}

func (c *cluster) open(t testing.TB, config Config) *replica {
	t.Helper()
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	return &replica{s, config}
}

// follow applies the log up to index, from anywhere, and compares the results with the model's.
func (c *cluster) follow(t testing.TB, r *replica, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		index := uint64(i + 1)
		skipped := index <= r.AppliedIndex()
		if configuration := c.log[i].configuration; configuration != nil {
			if err := r.ApplyConfiguration(index, 1, *configuration); err != nil {
				t.Fatal(err)
			}
			continue
		}
		results, err := r.Apply(index, 1, c.log[i].data)
		if err != nil {
			t.Fatal(err)
		}
		if skipped {
			if results != nil {
				t.Fatalf("entry %d was applied twice", index)
			}
			continue
		}
		if len(results) != len(c.want[i]) {
			t.Fatalf("entry %d has %d results, want %d", index, len(results), len(c.want[i]))
		}
		for j, want := range c.want[i] {
			if got := results[j]; !sameResult(got, want) {
				t.Fatalf("entry %d, request %d:\ngot  %v, %v\nwant %v, %v", index, j, got.Response, got.Err, want.Response, want.Err)
			}
		}
	}
}

func sameResult(a, b Result) bool {
	if a.Err != nil || b.Err != nil {
		return a.Err != nil && errors.Is(a.Err, b.Err)
	}
	if a.Response == nil || b.Response == nil {
		return a.Response == nil && b.Response == nil
	}
	return proto.Equal(a.Response, b.Response)
}

// read compares random reads with the model's; the replica must have applied the whole log.
func (c *cluster) read(t testing.TB, r *replica) {
	t.Helper()
	c.sameLeases(t, r)
	a := c.model.begin()
	for range 4 {
		q := c.rangeRequest()
		resp, err := r.RangeAt(t.Context(), User, q, c.current())
		want, wantErr := a.rangeKeys(q)
		if !sameResult(Result{resp, err}, Result{want, wantErr}) {
			t.Fatalf("range %v:\ngot  %v, %v\nwant %v, %v", q, resp, err, want, wantErr)
		}
		page, err := r.RangePageAt(t.Context(), User, q, c.current())
		if err == nil && resp != nil {
			if page.Count > resp.Count || page.Count < int64(len(page.Kvs)) {
				t.Fatalf("range %v: page of %d keys has count %d of %d", q, len(page.Kvs), page.Count, resp.Count)
			}
			page.Count = resp.Count
		}
		if !sameResult(Result{page, err}, Result{want, wantErr}) {
			t.Fatalf("page %v:\ngot  %v, %v\nwant %v, %v", q, page, err, want, wantErr)
		}
	}
	q := c.txn(0, false)
	resp, err := r.ReadTxnAt(t.Context(), User, q, c.current())
	want, wantErr := a.txn(q)
	if !sameResult(Result{resp, err}, Result{want, wantErr}) {
		t.Fatalf("transaction %v:\ngot  %v, %v\nwant %v, %v", q, resp, err, want, wantErr)
	}
}

// readAll compares every readable revision with the model's.
func (c *cluster) readAll(t testing.TB, r *replica) {
	t.Helper()
	a := c.model.begin()
	for rev := max(1, c.compacted); rev <= c.revision; rev++ {
		q := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: rev}
		resp, err := r.RangeAt(t.Context(), User, q, c.current())
		want, wantErr := a.rangeKeys(q)
		if !sameResult(Result{resp, err}, Result{want, wantErr}) {
			t.Fatalf("revision %d:\ngot  %v, %v\nwant %v, %v", rev, resp, err, want, wantErr)
		}
	}
}

// same compares all that replicas of one index must agree on.
func (c *cluster) same(t testing.TB, a, b *replica) {
	t.Helper()
	i, digest := a.Digest()
	if j, other := b.Digest(); i != j || digest != other {
		t.Fatalf("digests %d:%x and %d:%x", i, digest, j, other)
	}
	if a.Revision(User) != b.Revision(User) || a.CompactRevision(User) != b.CompactRevision(User) {
		t.Fatalf("revisions %d, %d and %d, %d", a.Revision(User), a.CompactRevision(User), b.Revision(User), b.CompactRevision(User))
	}
	ca, ia := a.Configuration()
	cb, ib := b.Configuration()
	if ia != ib || fmt.Sprint(ca) != fmt.Sprint(cb) {
		t.Fatalf("configurations %d:%v and %d:%v", ia, ca, ib, cb)
	}
	for _, rev := range []int64{0, c.atRevision()} {
		if rev < 0 {
			continue
		}
		h, compacted, at, err := a.HashKV(t.Context(), rev)
		h2, compacted2, at2, err2 := b.HashKV(t.Context(), rev)
		if h != h2 || compacted != compacted2 || at != at2 || !errors.Is(err, err2) {
			t.Fatalf("hashes at %d: %x, %d, %d, %v and %x, %d, %d, %v", rev, h, compacted, at, err, h2, compacted2, at2, err2)
		}
	}
}

// TestModel lets three replicas follow one log: one flushes all the time, one is closed and reopened, one crashes,
// which leaves it the file of some earlier flush, and applies the log from the beginning.
func TestModel(t *testing.T) {
	seeds(t, 12, func(t *testing.T, seed uint64) {
		c, dir := newCluster(seed), t.TempDir()
		c.floors = seed%2 == 0
		config := func(name string) Config {
			config := testConfig(filepath.Join(dir, name))
			config.maxDrops = c.model.maxDrops
			return config
		}
		steady, closing, crashing := c.open(t, config("steady")), c.open(t, config("closing")), c.open(t, config("crashing"))
		for range 12 {
			from := len(c.log)
			for range 1 + c.IntN(20) {
				c.grow(t)
				c.follow(t, steady, len(c.log)-1, len(c.log))
				c.read(t, steady)
				if c.oneIn(5) {
					if err := steady.Flush(t.Context(), steady.AppliedIndex()); err != nil {
						t.Fatal(err)
					}
					c.read(t, steady)
				}
			}
			c.follow(t, closing, from, len(c.log))
			if err := closing.Close(); err != nil {
				t.Fatal(err)
			}
			closing = c.open(t, closing.config)
			crashing = c.crash(t, crashing)
			c.follow(t, crashing, 0, len(c.log))
			for _, r := range []*replica{closing, crashing} {
				c.read(t, r)
				c.readAll(t, r)
				c.same(t, steady, r)
			}
		}
		for _, r := range []*replica{steady, closing, crashing} {
			if err := r.WaitCompacted(t.Context(), User, c.compacted); err != nil {
				t.Fatal(err)
			}
			c.readAll(t, r)
			c.same(t, steady, r)
		}
		for _, r := range []*replica{steady, closing, crashing} {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			checkFile(t, r.config.Path)
		}
	})
}

// crash copies the file as it is after some flush, and opens the copy.
func (c *cluster) crash(t testing.TB, r *replica) *replica {
	t.Helper()
	c.follow(t, r, 0, c.IntN(len(c.log)+1))
	config := r.config
	config.Path += "x"
	copyFile(t, r.Store, config.Path)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	checkFile(t, r.config.Path)
	if err := os.Remove(r.config.Path); err != nil {
		t.Fatal(err)
	}
	return c.open(t, config)
}

// copyFile copies what is durable, between two flushes.
func copyFile(t testing.TB, s *Store, to string) {
	t.Helper()
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer rollback(tx)
	if err := tx.CopyFile(to, 0o600); err != nil {
		t.Fatal(err)
	}
}
