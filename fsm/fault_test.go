package fsm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/fsm/mvcc"
)

// once is a fault that strikes at its first chance after it has been armed.
type once struct{ armed atomic.Bool }

func (o *once) strike() bool { return o.armed.CompareAndSwap(true, false) }

// reopenAfterCrash opens the file as it is now.
func reopenAfterCrash(t *testing.T, s *Store) (*Store, error) {
	t.Helper()
	config := s.config
	config.faults, config.Pace = faults{}, nil // what has crashed gives no turn back
	config.Path = filepath.Join(t.TempDir(), "crashed.db")
	copyFile(t, s, config.Path)
	again, err := Open(config)
	if err == nil {
		t.Cleanup(func() { _ = again.Close() })
	}
	return again, err
}

func TestFlushWithoutItsIndexIsCaught(t *testing.T) {
	var fault once
	config := testConfig(tempPath(t))
	config.faults.stateNotWritten = fault.strike
	s := open(t, config)
	apply(t, s, put("a", "1"))
	if err := s.Flush(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := reopenAfterCrash(t, s); err != nil {
		t.Fatal(err)
	}
	fault.armed.Store(true)
	apply(t, s, put("a", "2"))
	if err := s.Flush(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	if _, err := reopenAfterCrash(t, s); !errors.Is(err, ErrCorruptState) {
		t.Errorf("rows of entry 2 under index 1: %v", err)
	}
}

func TestLostRowIsCaught(t *testing.T) {
	var fault once
	config := testConfig(tempPath(t))
	config.faults.rowNotWritten = func([]byte) bool { return fault.strike() }
	s := open(t, config)
	fault.armed.Store(true)
	apply(t, s, put("a", "1"), put("b", "2"))
	if err := s.Flush(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Range(t.Context(), User, &pb.RangeRequest{Key: []byte("a")}); !errors.Is(err, ErrCorruptState) {
		t.Errorf("read of the lost row: %v", err)
	}
	if get(t, s, "b") != "2" {
		t.Error("the other row is gone too")
	}
	if _, err := reopenAfterCrash(t, s); !errors.Is(err, ErrCorruptState) {
		t.Errorf("reopened without the row: %v", err)
	}
}

// TestReplicasThatDifferAreCaught shows that the comparisons of TestModel would notice.
func TestReplicasThatDifferAreCaught(t *testing.T) {
	var fault once
	config := testConfig(tempPath(t))
	config.faults.rowNotWritten = func([]byte) bool { return fault.strike() }
	lossy, whole := open(t, config), open(t, testConfig(tempPath(t)))
	hash := func(s *Store) uint32 {
		t.Helper()
		h, _, _, err := s.HashKV(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	for _, s := range []*Store{lossy, whole} {
		apply(t, s, put("a", "1"))
		if err := s.Flush(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		fault.armed.Store(s == lossy)
		apply(t, s, put("a", "2"))
		if err := s.Flush(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
	}
	if hash(lossy) == hash(whole) {
		t.Error("a lost row does not change the hash")
	}
	other := open(t, testConfig(tempPath(t)))
	apply(t, other, put("a", "1"))
	apply(t, other, put("a", "3"))
	_, d1 := whole.Digest()
	if _, d2 := other.Digest(); d1 == d2 || hash(whole) == hash(other) {
		t.Error("another value does not change the digest and the hash")
	}
}

func TestFailedFlushIsFatalAndReported(t *testing.T) {
	var fault once
	disk := errors.New("the disk is gone")
	config := testConfig(tempPath(t))
	config.faults.flushFails = func() error {
		if fault.armed.Load() {
			return disk
		}
		return nil
	}
	s := open(t, config)
	apply(t, s, put("a", "1"))
	if err := s.Flush(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	fault.armed.Store(true)
	apply(t, s, put("a", "2"))
	if err := s.Flush(t.Context(), 2); !errors.Is(err, disk) {
		t.Errorf("Flush: %v", err)
	}
	<-s.Failed()
	if _, err := s.Apply(3, 1, entryOf(t)); !errors.Is(err, disk) || !errors.Is(s.Err(), disk) {
		t.Errorf("Apply: %v, Err: %v", err, s.Err())
	}
	if s.DurableIndex() != 1 {
		t.Errorf("durable at %d", s.DurableIndex())
	}
	if get(t, s, "a") != "2" {
		t.Error("what was applied cannot be read any more")
	}
	if err := s.Close(); !errors.Is(err, disk) {
		t.Errorf("Close: %v", err)
	}
}

// TestHalfAppliedEntryIsNotWritten damages a row that the second request of an entry has to read.
func TestHalfAppliedEntryIsNotWritten(t *testing.T) {
	config := testConfig(tempPath(t))
	config.FlushInterval = time.Hour
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, put("a", "1"))
	if err := s.Flush(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	row := mvcc.Revision{Main: 2}.AppendKey(nil, false)
	var sound []byte
	change := func(to []byte) {
		t.Helper()
		if err := s.file.Load().db.Update(func(tx *bbolt.Tx) error {
			b := tx.Bucket(spaceBuckets[User])
			sound = slices.Clone(b.Get(row))
			return b.Put(row, to)
		}); err != nil {
			t.Fatal(err)
		}
	}
	change([]byte{0xff})
	apply(t, s, put("c", "1"))
	data := entryOf(t, put("b", "1"), &pb.PutRequest{Key: []byte("a"), Value: []byte("2"), PrevKv: true})
	if _, err := s.Apply(3, 1, data); !errors.Is(err, ErrCorruptState) {
		t.Fatalf("Apply: %v", err)
	}
	if err := s.Flush(t.Context(), 3); !errors.Is(err, ErrCorruptState) {
		t.Errorf("Flush: %v", err)
	}
	change(sound)
	if err := s.Close(); !errors.Is(err, ErrCorruptState) {
		t.Errorf("Close: %v", err)
	}
	again := open(t, testConfig(config.Path))
	if again.AppliedIndex() != 1 || get(t, again, "a") != "1" || get(t, again, "b") != "" {
		t.Errorf("at %d after reopening, a=%s b=%s", again.AppliedIndex(), get(t, again, "a"), get(t, again, "b"))
	}
}

func TestNothingIsWrittenToAFileWhoseNameMayBeLost(t *testing.T) {
	disk := errors.New("the disk is gone")
	config := testConfig(tempPath(t))
	config.FlushInterval = time.Hour
	config.faults.nameNotSynced = func() error { return disk }
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, put("a", "1"))
	if err := s.Flush(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	apply(t, s, put("a", "2"))
	if err := s.Defragment(t.Context()); !errors.Is(err, disk) {
		t.Errorf("Defragment: %v", err)
	}
	if err := s.Close(); !errors.Is(err, disk) {
		t.Errorf("Close: %v", err)
	}
	if s.DurableIndex() != 1 {
		t.Errorf("durable at %d", s.DurableIndex())
	}
}

// stored returns the rows of the file, as revision and key, and the state record.
func stored(t *testing.T, s *Store) (rows []string, m storedState) {
	t.Helper()
	tx, err := s.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer rollback(tx)
	if m, err = readStored(tx); err != nil {
		t.Fatal(err)
	}
	return rowsOf(t, tx.Bucket(spaceBuckets[User])), m
}

func rowsOf(t *testing.T, bucket *bbolt.Bucket) (rows []string) {
	t.Helper()
	if err := bucket.ForEach(func(k, v []byte) error {
		r, tombstone, err := mvcc.ParseKey(k)
		if err != nil {
			return err
		}
		key, _, err := mvcc.DecodeStamp(v, r, tombstone)
		rows = append(rows, fmt.Sprint(string(key), "@", r.Main, map[bool]string{true: "-"}[tombstone]))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(rows)
	return rows
}

// compactionHistory is three keys that are put twice, one of which is deleted at revision 8, then put again.
func compactionHistory(t *testing.T, s *Store) {
	t.Helper()
	apply(t, s, put("a", "1"), put("b", "1"), put("c", "1"), put("a", "2"), put("b", "2"), put("c", "2"))
	apply(t, s, &pb.DeleteRangeRequest{Key: []byte("b")})
	apply(t, s, put("a", "3"))
}

func TestCompactionDeletesExactlyWhatIsUnreadable(t *testing.T) {
	for rev, want := range map[int64]string{
		4: "a@2 a@5 a@9 b@3 b@6 b@8- c@4 c@7",
		5: "a@5 a@9 b@3 b@6 b@8- c@4 c@7",
		8: "a@5 a@9 b@8- c@7",
		9: "a@9 c@7",
	} {
		s := open(t, testConfig(tempPath(t)))
		compactionHistory(t, s)
		apply(t, s, &pb.CompactionRequest{Revision: rev})
		if err := s.WaitCompacted(t.Context(), User, rev); err != nil {
			t.Fatal(err)
		}
		rows, m := stored(t, s)
		if got := strings.Join(rows, " "); got != want {
			t.Errorf("compaction at %d left %s, want %s", rev, got, want)
		}
		if m.state.spaces[User].finished != rev {
			t.Errorf("compaction at %d is recorded as finished at %d", rev, m.state.spaces[User].finished)
		}
	}
}

func TestRowLeftByCompactionIsCaught(t *testing.T) {
	config := testConfig(tempPath(t))
	var fault once
	fault.armed.Store(true)
	config.faults.rowNotDeleted = func([]byte) bool { return fault.strike() }
	s := open(t, config)
	compactionHistory(t, s)
	apply(t, s, &pb.CompactionRequest{Revision: 9})
	if err := s.WaitCompacted(t.Context(), User, 9); err != nil {
		t.Fatal(err)
	}
	if rows, _ := stored(t, s); len(rows) != 3 {
		t.Errorf("left %v", rows)
	}
}

// TestCrashDuringCompaction reopens the file as every flush of a long compaction leaves it.
func TestCrashDuringCompaction(t *testing.T) {
	crash := func(t *testing.T, outOfOrder bool) (opened int, firstError error) {
		config := testConfig(tempPath(t))
		config.CompactionBatch = 1 // two rows per flush
		config.faults.outOfOrder = outOfOrder
		var store atomic.Pointer[Store]
		config.faults.flushFails = func() error { // before each flush
			s := store.Load()
			if s == nil || s.CompactRevision(User) < 0 {
				return nil
			}
			again, err := reopenAfterCrash(t, s)
			if err != nil {
				if firstError == nil {
					firstError = err
				}
				return nil
			}
			opened++
			if meta, ok := s.SnapshotMeta(); ok && again.Revision(User) != meta.Revision {
				t.Errorf("reopened at revision %d, want %d", again.Revision(User), meta.Revision)
			}
			if compacted := again.CompactRevision(User); compacted > 0 {
				if err := again.WaitCompacted(t.Context(), User, compacted); err != nil {
					t.Error(err)
				}
				if rows, _ := stored(t, again); len(rows) != 20 {
					t.Errorf("the resumed compaction left %v", rows)
				}
			}
			return again.Close()
		}
		s := open(t, config)
		store.Store(s)
		for round := range 3 {
			for i := range 40 {
				apply(t, s, put(fmt.Sprintf("k%02d", i), fmt.Sprint(round)))
			}
			for i := range 20 {
				apply(t, s, &pb.DeleteRangeRequest{Key: fmt.Appendf(nil, "k%02d", i)})
			}
		}
		apply(t, s, put("k20", "last"))
		apply(t, s, &pb.CompactionRequest{Revision: s.Revision(User)})
		if err := s.WaitCompacted(t.Context(), User, s.Revision(User)); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return opened, firstError
	}
	opened, err := crash(t, false)
	if err != nil || opened < 10 {
		t.Errorf("reopened %d times, %v", opened, err)
	}
	if _, err := crash(t, true); !errors.Is(err, ErrCorruptState) {
		t.Errorf("deleting tombstones before what they delete: %v", err)
	}
}

// A damaged page over which bbolt would end the process is an error of Open.
func TestDamagedPageIsCaught(t *testing.T) {
	config := testConfig(tempPath(t))
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, put("a", "1"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	sound, err := os.ReadFile(config.Path)
	if err != nil {
		t.Fatal(err)
	}
	pageBytes := os.Getpagesize()
	for name, damaged := range map[string][]byte{
		"cut short": sound[:3*pageBytes],
		"page ids":  slices.Clone(sound),
	} {
		for i := 2 * pageBytes; i < len(damaged); i += pageBytes {
			damaged[i] ^= 0x80
		}
		if err := os.WriteFile(config.Path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(config); !errors.Is(err, ErrCorruptState) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
