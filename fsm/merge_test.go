package fsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm/mvcc"
	"kvd/snapshot"
)

// sharded is a key space over several groups of two replicas each, whose revisions come from one counter, and a store
// that gets everything in the order of revisions.
type sharded struct {
	*rand.Rand
	next      int64 // revision
	groups    []*shardGroup
	reference *Store
}

type shardGroup struct {
	replicas [2]*Store
	keys     []string
	log      [][]byte
}

func shardOf(key []byte, n int) int {
	h := fnv.New32a()
	_, _ = h.Write(key)
	return int(h.Sum32()>>8) % n
}

func newSharded(t *testing.T, seed uint64, n int) *sharded {
	t.Helper()
	x := &sharded{Rand: rand.New(rand.NewPCG(seed, 3)), next: 2, reference: open(t, testConfig(tempPath(t)))}
	for range n {
		g := &shardGroup{}
		for i := range g.replicas {
			config := testConfig(tempPath(t))
			config.CompactionBatch = 1 + x.IntN(3)
			g.replicas[i] = open(t, config)
		}
		x.groups = append(x.groups, g)
	}
	for i := range 12 * n {
		key := fmt.Sprintf("k%03d", i)
		g := x.groups[shardOf([]byte(key), n)]
		g.keys = append(g.keys, key)
	}
	return x
}

// propose logs an entry in a group, and applies it to the reference.
func (x *sharded) propose(t *testing.T, g *shardGroup, messages ...proto.Message) {
	t.Helper()
	floor := x.next
	x.next += int64(len(messages))
	g.log = append(g.log, entryAt(t, floor, 1, messages...))
	if _, ok := messages[0].(*pb.CompactionRequest); !ok { // the reference is compacted last
		applyAt(t, x.reference, floor, messages...)
	}
}

// follow applies the group's log to its replicas, all of it or what comes of it.
func (x *sharded) follow(t *testing.T, g *shardGroup, whole bool) {
	t.Helper()
	for _, s := range g.replicas {
		for i := int(s.AppliedIndex()); i < len(g.log) && (whole || x.IntN(3) > 0); i++ {
			results, err := s.Apply(uint64(i+1), 1, g.log[i])
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range results {
				if r.Err != nil && !errors.Is(r.Err, ErrCompacted) {
					t.Fatal(r.Err)
				}
			}
		}
	}
}

func (x *sharded) write(t *testing.T) {
	t.Helper()
	g := x.groups[x.IntN(len(x.groups))]
	if len(g.keys) == 0 {
		return
	}
	key := func() []byte { return []byte(g.keys[x.IntN(len(g.keys))]) }
	value := func() []byte { return bytes.Repeat([]byte{byte('a' + x.IntN(26))}, x.IntN(40)) }
	var messages []proto.Message
	for range 1 + x.IntN(4) {
		switch x.IntN(6) {
		case 0, 1:
			messages = append(messages, &pb.DeleteRangeRequest{Key: key()})
		case 2:
			txn := &pb.TxnRequest{}
			for _, i := range x.Perm(len(g.keys))[:x.IntN(len(g.keys)+1)] {
				op := putOp(&pb.PutRequest{Key: []byte(g.keys[i]), Value: value()})
				if x.IntN(3) == 0 {
					op = &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(g.keys[i])}}}
				}
				txn.Success = append(txn.Success, op)
			}
			messages = append(messages, txn)
		default:
			messages = append(messages, &pb.PutRequest{Key: key(), Value: value()})
		}
	}
	x.propose(t, g, messages...)
	x.follow(t, g, false)
}

// compact compacts some of the groups, up to a revision.
func (x *sharded) compact(t *testing.T, upTo int64) {
	t.Helper()
	rev := max(1, upTo-x.Int64N(20))
	for _, g := range x.groups {
		if x.IntN(4) > 0 {
			x.propose(t, g, &pb.CompactionRequest{Revision: rev})
			x.follow(t, g, false)
		}
	}
}

// sources read a group's pages from any of its replicas. Between two pages, more is written and compacted.
func (x *sharded) sources(t *testing.T, cut int64) (sources []RowsSource) {
	for _, g := range x.groups {
		sources = append(sources, func(ctx context.Context, cursor []byte) (RowsPage, error) {
			if x.IntN(3) == 0 {
				x.write(t)
			}
			if x.IntN(10) == 0 {
				x.compact(t, cut)
			}
			s := g.replicas[x.IntN(2)]
			if x.IntN(3) == 0 {
				if err := s.WaitCompacted(ctx, User, s.CompactRevision(User)); err != nil {
					return RowsPage{}, err
				}
			}
			page, err := s.RowsPage(ctx, User, cursor, cut, 1+x.IntN(400))
			if err != nil {
				return RowsPage{}, err
			}
			return ParseRowsPage(page.Append(nil))
		})
	}
	return sources
}

// merge returns a file with all of the groups' rows up to the cut.
func (x *sharded) merge(t *testing.T, cut int64, loseNewest bool) (path string, meta snapshot.Meta) {
	t.Helper()
	b, err := NewBuilder(tempPath(t))
	if err != nil {
		t.Fatal(err)
	}
	if !loseNewest {
		b.limit = 1 + x.IntN(4000)
	}
	t.Cleanup(func() {
		if err := b.Discard(); err != nil {
			t.Error(err)
		}
	})
	meta = snapshot.Meta{ClusterID: 7, Group: 0, Index: 5, Term: 2, ConfigurationIndex: 1, Configuration: configurationOf("n1/1"), Revision: cut}
	if meta.CompactRevision, meta.Keys, err = b.Merge(t.Context(), x.sources(t, cut)); err != nil {
		t.Fatal(err)
	}
	if loseNewest {
		newest := b.rows[0].storedKey
		b.lose = func(key []byte) bool { return bytes.Equal(key, newest) }
	}
	if err := b.Finish(meta); err != nil {
		t.Fatal(err)
	}
	return b.path, meta
}

var everything = pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}

// sameReads compares what two stores answer at every revision that is readable in one and not above cut; only keys of
// which mine says so count.
func sameReads(t *testing.T, got, want *Store, oldest, cut int64, mine func(key []byte) bool) error {
	t.Helper()
	for rev := max(1, oldest); rev <= cut; rev++ {
		q := proto.CloneOf(&everything)
		q.Revision = rev
		a, err := got.RangeAt(t.Context(), User, q, cut)
		if err != nil {
			return fmt.Errorf("at %d: %w", rev, err)
		}
		b, err := want.RangeAt(t.Context(), User, q, cut)
		if err != nil {
			t.Fatal(err)
		}
		b.Kvs = slices.DeleteFunc(b.Kvs, func(kv *mvccpb.KeyValue) bool { return !mine(kv.Key) })
		b.Count, b.Header = int64(len(b.Kvs)), a.Header
		if !proto.Equal(a, b) {
			return fmt.Errorf("at %d: %v, want %v", rev, a, b)
		}
	}
	return nil
}

func all([]byte) bool { return true }

// mergeAndCompare writes a random history, merges the groups, and compares the result with the reference.
func mergeAndCompare(t *testing.T, seed uint64, loseNewest bool) (*sharded, string, snapshot.Meta, error) {
	t.Helper()
	x := newSharded(t, seed, 1+int(seed%5))
	for range 150 {
		x.write(t)
		if x.IntN(25) == 0 {
			x.compact(t, x.next-1)
		}
	}
	for _, g := range x.groups {
		x.follow(t, g, true)
	}
	cut := x.next - 1
	path, meta := x.merge(t, cut, loseNewest)
	s, err := Open(mergedConfig(path))
	if err != nil {
		return x, path, meta, err
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		checkFile(t, path)
	}()
	if err := sameReads(t, s, x.reference, meta.CompactRevision, cut, all); err != nil {
		return x, path, meta, err
	}
	if meta.CompactRevision > 0 {
		applyAt(t, x.reference, x.next, &pb.CompactionRequest{Revision: meta.CompactRevision})
		x.next++
	}
	for range 2 {
		for rev := max(1, meta.CompactRevision); rev <= cut; rev++ {
			h, compacted, _, err := s.HashKV(t.Context(), rev)
			want, _, _, err2 := x.reference.HashKVAt(t.Context(), rev, cut)
			if err != nil || err2 != nil || h != want || compacted != meta.CompactRevision {
				return x, path, meta, fmt.Errorf("hash at %d: %x, want %x, compacted at %d, %w", rev, h, want, compacted, errors.Join(err, err2))
			}
		}
		for _, s := range []*Store{s, x.reference} {
			if err := errors.Join(s.Flush(t.Context(), s.AppliedIndex()), s.WaitCompacted(t.Context(), User, meta.CompactRevision)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, want := storedRows(t, s, cut), storedRows(t, x.reference, cut); got != want {
		return x, path, meta, fmt.Errorf("after compaction at %d it has the rows\n%s, want\n%s", meta.CompactRevision, got, want)
	}
	return x, path, meta, sameReads(t, s, x.reference, meta.CompactRevision, cut, all)
}

// storedRows are those of a store's file up to a revision.
func storedRows(t *testing.T, s *Store, upTo int64) string {
	t.Helper()
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer rollback(tx)
	var b bytes.Buffer
	if err := tx.Bucket(spaceBuckets[User]).ForEach(func(k, v []byte) error {
		r, tombstone, err := mvcc.ParseKey(k)
		if r.Main <= upTo {
			fmt.Fprintf(&b, "%d.%d %t %x\n", r.Main, r.Sub, tombstone, v)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func mergedConfig(path string) Config {
	config := testConfig(path)
	config.ClusterID = 7
	return config
}

// Groups with disjoint revisions, read page by page from changing replicas while they go on, are together the store
// that got everything; and what is taken apart again is each of them.
func TestMergeAndSplit(t *testing.T) {
	seeds(t, 12, func(t *testing.T, seed uint64) {
		x, path, meta, err := mergeAndCompare(t, seed, false)
		if err != nil {
			t.Fatal(err)
		}
		n := len(x.groups)
		parts := make([]*Builder, n)
		dir := t.TempDir()
		for i := range parts {
			if i == n-1 && n > 2 {
				break // one is left out
			}
			if parts[i], err = NewBuilder(filepath.Join(dir, fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
		}
		whole, err := SplitFile(t.Context(), path, func(key []byte) *Builder { return parts[shardOf(key, n)] })
		if err != nil {
			t.Fatal(err)
		}
		if whole.Revision != meta.Revision || whole.CompactRevision != meta.CompactRevision || whole.Index == 0 {
			t.Errorf("the file says %v, want %v", whole, meta)
		}
		for i, b := range parts {
			if b == nil {
				continue
			}
			of := whole
			of.Group, of.Keys, of.Index, of.Configuration = uint64(i+1), -1, 9, configurationOf(raft.ServerID(fmt.Sprint("n/", i)))
			if err := b.Finish(of); err != nil {
				t.Fatal(err)
			}
			config := mergedConfig(b.path)
			config.Group = of.Group
			s := open(t, config)
			if got, _ := s.SnapshotMeta(); got.Index != 9 || got.Group != of.Group || fmt.Sprint(got.Configuration) != fmt.Sprint(of.Configuration) {
				t.Errorf("part %d says %v", i, got)
			}
			mine := func(key []byte) bool { return shardOf(key, n) == i }
			if err := sameReads(t, s, x.reference, whole.CompactRevision, whole.Revision, mine); err != nil {
				t.Errorf("part %d: %v", i, err)
			}
			original := x.groups[i].replicas[x.IntN(2)]
			if err := sameReads(t, s, original, max(whole.CompactRevision, original.CompactRevision(User)), whole.Revision, all); err != nil {
				t.Errorf("part %d and its origin: %v", i, err)
			}
		}
	})
}

// TestMergeNoticesALostRow shows that the comparisons would notice.
func TestMergeNoticesALostRow(t *testing.T) {
	seeds(t, 3, func(t *testing.T, seed uint64) {
		if _, _, _, err := mergeAndCompare(t, seed, true); err == nil {
			t.Error("nothing was noticed")
		}
	})
}

// A key that was deleted does not come back when its tombstone has been compacted in the replica of one page, and the
// put before it has not been in that of the next.
func TestPagesOfReplicasThatCompactApart(t *testing.T) {
	for _, fault := range []bool{false, true} {
		ahead, behind := testConfig(tempPath(t)), testConfig(tempPath(t))
		ahead.faults.unjudged, behind.faults.unjudged = fault, fault
		replicas := []*Store{open(t, ahead), open(t, behind)}
		for _, s := range replicas {
			applyAt(t, s, 5, put("d", ""))
			applyAt(t, s, 10, put("a", ""))
			applyAt(t, s, 15, put("c", ""))
			applyAt(t, s, 20, &pb.DeleteRangeRequest{Key: []byte("a")})
			applyAt(t, s, 30, put("b", ""))
		}
		applyAt(t, replicas[0], 40, &pb.CompactionRequest{Revision: 25})
		if err := replicas[0].WaitCompacted(t.Context(), User, 25); err != nil {
			t.Fatal(err)
		}
		b, err := NewBuilder(tempPath(t))
		if err != nil {
			t.Fatal(err)
		}
		pages := 0
		compacted, keys, err := b.Merge(t.Context(), []RowsSource{func(ctx context.Context, cursor []byte) (RowsPage, error) {
			s := replicas[pages]
			pages++
			return s.RowsPage(ctx, User, cursor, 35, 100) // two rows
		}})
		if err != nil || compacted != 25 || keys != 3 || pages != 2 {
			t.Fatalf("compacted %d, %d keys, %d pages, %v", compacted, keys, pages, err)
		}
		if err := b.Finish(snapshot.Meta{Index: 1, Revision: 35, CompactRevision: compacted, Keys: keys}); err != nil {
			t.Fatal(err)
		}
		s, err := Open(testConfig(b.path))
		if fault {
			if !errors.Is(err, ErrCorruptState) {
				t.Errorf("the key that came back was not noticed: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if r, err := s.Range(t.Context(), User, &everything); err != nil || r.Count != 3 {
			t.Errorf("%v, %v", r, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A merged state can be streamed as a backup, adopted by a new cluster, and written on.
func TestMergedStateIsABackup(t *testing.T) {
	_, path, meta, err := mergeAndCompare(t, 4, false)
	if err != nil {
		t.Fatal(err)
	}
	var stream bytes.Buffer
	if err := ViewFile(t.Context(), path, func(tx *bbolt.Tx, of snapshot.Meta) error {
		n, err := snapshot.WriteStream(t.Context(), &stream, tx, of)
		if n != snapshot.StreamSize(tx, of) {
			t.Errorf("%d bytes, announced %d", n, snapshot.StreamSize(tx, of))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	staged, err := snapshot.Stage(t.Context(), &stream, dir)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(staged.Meta) != fmt.Sprint(meta) {
		t.Errorf("staged %v, want %v", staged.Meta, meta)
	}
	restored := filepath.Join(dir, "state.db")
	if err := staged.Commit(restored); err != nil {
		t.Fatal(err)
	}
	if err := Adopt(restored, snapshot.Meta{ClusterID: 8, Index: 1, Term: 1, ConfigurationIndex: 1, Configuration: configurationOf("n1/1")}); err != nil {
		t.Fatal(err)
	}
	config := testConfig(restored)
	config.ClusterID = 8
	s := open(t, config)
	before, err := s.Range(t.Context(), User, &everything)
	if err != nil || len(before.Kvs) == 0 {
		t.Fatal(before, err)
	}
	kv := before.Kvs[0]
	if r := apply(t, s, put(string(kv.Key), "more")); r[0].Response.(*pb.PutResponse).Header.Revision != meta.Revision+1 {
		t.Errorf("the next put: %v", r)
	}
	after, err := s.Range(t.Context(), User, &pb.RangeRequest{Key: kv.Key})
	if err != nil || after.Kvs[0].Version != kv.Version+1 || after.Kvs[0].CreateRevision != kv.CreateRevision {
		t.Errorf("%v became %v, %v", kv, after, err)
	}
}

func TestBuilderRefuses(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, put("a", "1"), put("b", "2"))
	page, err := s.RowsPage(t.Context(), User, nil, 3, 1<<20)
	if err != nil || page.Cursor != nil || page.Keys != 2 || page.Compacted != -1 {
		t.Fatal(page, err)
	}
	builder := func() *Builder {
		b, err := NewBuilder(tempPath(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := b.Discard(); err != nil {
				t.Error(err)
			}
		})
		return b
	}
	b := builder()
	if err := b.Add(page.Rows); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(page.Rows); !errors.Is(err, ErrRowOrder) {
		t.Errorf("the same rows again: %v", err)
	}
	source := func(context.Context, []byte) (RowsPage, error) { return page, nil }
	if _, _, err := builder().Merge(t.Context(), []RowsSource{source, source}); !errors.Is(err, ErrRowOrder) {
		t.Errorf("two states with the same revisions: %v", err)
	}
	for name, bad := range map[string]RowsPage{
		"endless":        {Cursor: make([]byte, rowsCursorBytes)},
		"uncounted":      {Rows: page.Rows, Keys: -1},
		"cut off":        {Rows: page.Rows[:len(page.Rows)-1]},
		"without values": {Rows: page.Rows[:19]},
		"another key":    {Rows: append([]byte{3, 1, 2, 3}, page.Rows[18:]...)},
	} {
		source := func(context.Context, []byte) (RowsPage, error) { return bad, nil }
		if _, _, err := builder().Merge(t.Context(), []RowsSource{source}); !errors.Is(err, ErrMalformedRows) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, meta := range []snapshot.Meta{
		{Index: 0, Revision: 3, CompactRevision: -1},
		{Index: 1, Revision: 2, CompactRevision: -1},
		{Index: 1, Revision: 3, CompactRevision: 4},
		{Index: 1, Revision: 3, CompactRevision: -2},
	} {
		if err := b.Finish(meta); err == nil {
			t.Errorf("finished as %v", meta)
		}
	}
	if err := b.Finish(snapshot.Meta{Index: 1, Revision: 3, CompactRevision: -1, Keys: 7}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(testConfig(b.path)); !errors.Is(err, ErrCorruptState) {
		t.Errorf("a state with a wrong number of keys: %v", err)
	}
	if _, err := NewBuilder(b.path); err == nil {
		t.Error("a builder overwrites a file")
	}
	unfinished := builder()
	if err := unfinished.Add(page.Rows); err != nil {
		t.Fatal(err)
	}
	if err := unfinished.write(); err != nil {
		t.Fatal(err)
	}
	crashed := testConfig(tempPath(t))
	if err := unfinished.db.View(func(tx *bbolt.Tx) error { return tx.CopyFile(crashed.Path, 0o600) }); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(crashed); err == nil {
		t.Error("a store takes a file that was not finished")
		_ = s.Close()
	}
}

func TestRowsPageRefuses(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	applyAt(t, s, 10, put("a", "1"))
	applyAt(t, s, 20, &pb.CompactionRequest{Revision: 15})
	if _, err := s.RowsPage(t.Context(), User, nil, 14, 100); !errors.Is(err, ErrCompacted) {
		t.Errorf("a compacted cut: %v", err)
	}
	page, err := s.RowsPage(t.Context(), User, nil, 15, 100)
	if err != nil || page.Compacted != 15 || page.Keys != 1 || len(page.Rows) == 0 {
		t.Errorf("%v, %v", page, err)
	}
	later := rowsCursor{compacted: 16}.append(nil)
	if _, err := s.RowsPage(t.Context(), User, later, 15, 100); !errors.Is(err, ErrCompacted) {
		t.Errorf("a cut that is compacted elsewhere: %v", err)
	}
	for _, cursor := range [][]byte{{}, {1}, bytes.Repeat([]byte{0xff}, rowsCursorBytes)} {
		if _, err := s.RowsPage(t.Context(), User, cursor, 15, 100); !errors.Is(err, ErrMalformedRows) {
			t.Errorf("cursor %x: %v", cursor, err)
		}
	}
	if _, err := s.RowsPage(t.Context(), spaces, nil, 15, 100); !errors.Is(err, ErrUnknownSpace) {
		t.Errorf("got %v", err)
	}
}

// What is written to the file while a page is being made is in the page once, and a transaction that is being applied
// is not in it.
func TestRowsPageWhileOthersWrite(t *testing.T) {
	config := testConfig(tempPath(t))
	config.FlushInterval = time.Hour
	var s *Store
	config.faults.paging = func() {
		if err := s.Flush(t.Context(), s.AppliedIndex()); err != nil {
			t.Error(err)
		}
	}
	s = open(t, config)
	apply(t, s, put("a", "1"), put("b", "2"), &pb.DeleteRangeRequest{Key: []byte("a")})
	w := s.newWriter(User)
	s.mu.Lock()
	w.put(putCommand{key: []byte("c")}) // not published
	s.mu.Unlock()
	for i, want := range []string{"4 3 2", "4 3 2"} {
		page, err := s.RowsPage(t.Context(), User, nil, math.MaxInt64, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for rest := page.Rows; len(rest) > 0; {
			var row rowOfPage
			if row, rest, err = nextRow(rest); err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprint(row.revision.Main))
		}
		if strings.Join(got, " ") != want || page.Keys != 1 || page.Cursor != nil {
			t.Errorf("page %d: rows %v, %d keys, cursor %x; want %s", i, got, page.Keys, page.Cursor, want)
		}
	}
	w.publish()
}

func FuzzRowsPage(f *testing.F) {
	f.Add(RowsPage{Compacted: -1, Keys: 3, Rows: []byte("rows")}.Append(nil))
	f.Add(RowsPage{Compacted: 7, Keys: -1, Cursor: rowsCursor{compacted: 7}.append(nil)}.Append(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		page, err := ParseRowsPage(data)
		if err != nil {
			if !errors.Is(err, ErrMalformedRows) {
				t.Error(err)
			}
			return
		}
		if again := page.Append(nil); !bytes.Equal(again, data) {
			t.Errorf("%x became %x", data, again)
		}
		for rest := page.Rows; len(rest) > 0; {
			row, next, err := nextRow(rest)
			if err != nil {
				if !errors.Is(err, ErrMalformedRows) {
					t.Error(err)
				}
				break
			}
			if again := appendRow(nil, row.storedKey, row.data); len(again) > len(rest)-len(next) {
				t.Errorf("%d bytes became %d", len(rest)-len(next), len(again))
			}
			rest = next
		}
	})
}
