package fsm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/snapshot"
)

// wideKeys is more than one step of a scan looks at.
const wideKeys = 3 * scanBudget

// wideTxn puts the same value under all of wideKeys keys.
func wideTxn(value int64) *pb.TxnRequest {
	r := &pb.TxnRequest{}
	for i := range wideKeys {
		r.Success = append(r.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put(fmt.Sprintf("wide/%04d", i), fmt.Sprint(value))}})
	}
	return r
}

var wideRange = pb.RangeRequest{Key: []byte("wide/"), RangeEnd: []byte("wide0")}

// checkWide: whatever is read at a revision must be what one transaction wrote.
func checkWide(resp *pb.RangeResponse, rev int64) error {
	if rev == 0 {
		rev = resp.Header.Revision
	}
	if rev == 1 && len(resp.Kvs) == 0 {
		return nil
	}
	if len(resp.Kvs) != wideKeys || resp.Count != wideKeys {
		return fmt.Errorf("%d keys at revision %d, count %d", len(resp.Kvs), rev, resp.Count)
	}
	for _, kv := range resp.Kvs {
		if kv.ModRevision != rev || string(kv.Value) != fmt.Sprint(rev) || kv.Version != rev-1 || kv.CreateRevision != 2 {
			return fmt.Errorf("at revision %d: %v", rev, kv)
		}
	}
	return nil
}

// TestReadersSeeWholeTransactions reads at new and old revisions while transactions, compactions and
// defragmentations go on.
func TestReadersSeeWholeTransactions(t *testing.T) {
	config := testConfig(tempPath(t))
	config.InitialMmapBytes = 1 << 28 // reads stay open while the file grows
	config.CompactionBatch = 100
	s := open(t, config)
	const transactions = 30
	var stop atomic.Bool
	var readers sync.WaitGroup
	var reads, oldReads, hashes atomic.Int64
	reader := func(seed uint64) {
		random := rand.New(rand.NewPCG(seed, 1))
		for !stop.Load() {
			r := &pb.RangeRequest{Key: wideRange.Key, RangeEnd: wideRange.RangeEnd}
			if random.IntN(2) == 0 {
				if newest := s.Revision(User); newest > 2 {
					r.Revision = max(2, newest-random.Int64N(8))
				}
			}
			resp, err := s.Range(t.Context(), User, r)
			switch {
			case err == nil:
				err = checkWide(resp, r.Revision)
				reads.Add(1)
			case errors.Is(err, ErrCompacted) && r.Revision > 0 && r.Revision < s.CompactRevision(User):
				err = nil
				oldReads.Add(1)
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	}
	hasher := func() {
		type at struct{ compacted, rev int64 }
		seen := map[at]uint32{}
		for !stop.Load() {
			h, compacted, rev, err := s.HashKV(t.Context(), max(0, s.Revision(User)-1))
			if errors.Is(err, ErrCompacted) {
				continue
			}
			if old, ok := seen[at{compacted, rev}]; err != nil || ok && old != h {
				t.Errorf("hash at %d over %d: %x after %x, %v", rev, compacted, h, old, err)
				return
			}
			seen[at{compacted, rev}] = h
			hashes.Add(1)
		}
	}
	for i := range uint64(2) {
		readers.Go(func() { reader(i) })
	}
	readers.Go(hasher)
	for i := range int64(transactions) {
		apply(t, s, wideTxn(i+2))
		if i%5 == 4 {
			apply(t, s, &pb.CompactionRequest{Revision: i})
		}
		if i%20 == 10 {
			if err := s.Defragment(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	if err := s.WaitCompacted(t.Context(), User, transactions-1); err != nil {
		t.Error(err)
	}
	stop.Store(true)
	readers.Wait()
	if reads.Load() == 0 || hashes.Load() == 0 {
		t.Errorf("%d reads, %d of compacted revisions, %d hashes", reads.Load(), oldReads.Load(), hashes.Load())
	}
}

// TestReadOutlastsCompaction opens a view, compacts above its revision, and reads.
func TestReadOutlastsCompaction(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, wideTxn(2))
	v, err := s.openView(t.Context(), User, 0)
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, wideTxn(3))
	apply(t, s, &pb.CompactionRequest{Revision: 3})
	if err := s.Flush(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	resp, err := v.rangeKeys(t.Context(), &wideRange, true)
	if err == nil {
		err = checkWide(resp, 2)
	}
	if err != nil {
		t.Error(err)
	}
	v.close()
	if err := s.WaitCompacted(t.Context(), User, 3); err != nil {
		t.Error(err)
	}
	if rows, _ := stored(t, s); len(rows) != wideKeys {
		t.Errorf("%d rows are left", len(rows))
	}
}

// TestFlushedInVirtualTime shows when a flush comes, and that nothing but the interval brings it.
func TestFlushedInVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := testConfig(tempPath(t))
		config.FlushInterval = 100 * time.Millisecond
		s := open(t, config)
		for range 3 {
			apply(t, s, put("a", "1"))
			time.Sleep(99 * time.Millisecond)
			synctest.Wait()
			if s.DurableIndex() == s.AppliedIndex() {
				t.Error("flushed early")
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if s.DurableIndex() != s.AppliedIndex() {
				t.Error("not flushed in time")
			}
		}
		applied := s.AppliedIndex()
		time.Sleep(time.Hour)
		if s.DurableIndex() != applied {
			t.Error("the index changed")
		}
	})
}

func TestFullBatchIsFlushedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := testConfig(tempPath(t))
		config.FlushInterval, config.FlushBytes = time.Hour, 1000
		s := open(t, config)
		apply(t, s, put("a", strings.Repeat("x", 500)))
		synctest.Wait()
		if s.DurableIndex() != 0 {
			t.Error("flushed early")
		}
		apply(t, s, put("b", strings.Repeat("x", 500)))
		synctest.Wait()
		if s.DurableIndex() != 2 {
			t.Error("not flushed")
		}
	})
}

// TestSlowDisk holds a flush up: apply and reads go on, until too much is waiting.
func TestSlowDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held, release := make(chan struct{}), make(chan struct{})
		config := testConfig(tempPath(t))
		config.FlushBytes, config.MaxLagBytes = 1000, 10_000
		var count atomic.Int64
		config.faults.flushFails = func() error {
			if count.Add(1) == 1 {
				close(held)
				<-release
			}
			return nil
		}
		s := open(t, config)
		value := strings.Repeat("x", 1000)
		apply(t, s, put("k0", value))
		<-held
		for i := 1; i < 9; i++ {
			apply(t, s, put("k"+strconv.Itoa(i), value))
		}
		if s.DurableIndex() != 0 || get(t, s, "k0") != value || get(t, s, "k8") != value {
			t.Error("reads do not see what waits for the disk")
		}
		apply(t, s, put("k9", value)) // goes over the limit
		var done atomic.Bool
		var applying sync.WaitGroup
		applying.Go(func() {
			apply(t, s, put("k10", value))
			done.Store(true)
		})
		synctest.Wait()
		if done.Load() {
			t.Error("apply does not wait for the disk")
		}
		close(release)
		applying.Wait()
		if err := s.Flush(t.Context(), 11); err != nil {
			t.Error(err)
		}
		if n := s.pendingBytes.Load(); n != 0 {
			t.Errorf("%d bytes are said to be pending", n)
		}
	})
}

// TestFailureEndsWaiting lets the disk fail while apply and a flush wait for it.
func TestFailureEndsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		disk := errors.New("the disk is gone")
		config := testConfig(tempPath(t))
		config.FlushBytes, config.MaxLagBytes = 1, 1
		config.faults.flushFails = func() error {
			<-release
			return disk
		}
		s := open(t, config)
		apply(t, s, put("a", "1"))
		var waiting sync.WaitGroup
		waiting.Go(func() {
			if _, err := s.Apply(2, 1, entryOf(t)); !errors.Is(err, disk) {
				t.Errorf("Apply: %v", err)
			}
		})
		waiting.Go(func() {
			if err := s.Flush(t.Context(), 1); !errors.Is(err, disk) {
				t.Errorf("Flush: %v", err)
			}
		})
		synctest.Wait()
		close(release)
		waiting.Wait()
	})
}

func TestDefragment(t *testing.T) {
	config := testConfig(tempPath(t))
	s := open(t, config)
	for i := range int64(20) {
		apply(t, s, wideTxn(i+2))
	}
	apply(t, s, &pb.CompactionRequest{Revision: 21})
	if err := s.WaitCompacted(t.Context(), User, 21); err != nil {
		t.Fatal(err)
	}
	rows, before := stored(t, s)
	allocated, used := s.SizeBytes()
	if used >= allocated {
		t.Errorf("%d bytes of %d in use after a compaction", used, allocated)
	}
	if err := s.ViewSnapshot(t.Context(), func(tx *bbolt.Tx, meta snapshot.Meta) error {
		if err := s.Defragment(t.Context()); err != nil {
			return err
		}
		if got := rowsOf(t, tx.Bucket(spaceBuckets[User])); fmt.Sprint(got) != fmt.Sprint(rows) {
			t.Error("the running view has changed")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if smaller, _ := s.SizeBytes(); smaller >= allocated {
		t.Errorf("%d bytes became %d", allocated, smaller)
	}
	got, after := stored(t, s)
	if fmt.Sprint(got) != fmt.Sprint(rows) || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Error("defragmentation has changed the state")
	}
	apply(t, s, wideTxn(22))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := again.Range(t.Context(), User, &wideRange)
	if err == nil {
		err = checkWide(resp, 0)
	}
	if err != nil {
		t.Error(err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}

func TestCloseEndsDefragment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := testConfig(tempPath(t))
		closed := make(chan error, 1)
		var s *Store
		config.faults.copying = func() {
			go func() { closed <- s.Close() }()
			synctest.Wait() // until Close waits for the defragmentation, which has been told
		}
		s = open(t, config)
		apply(t, s, put("a", "1"))
		if err := s.Defragment(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("Defragment: %v", err)
		}
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(config.Path + defragmentSuffix); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the new file: %v", err)
		}
	})
}

func TestDefragmentAfterAMove(t *testing.T) {
	config := testConfig(tempPath(t))
	s := open(t, config)
	apply(t, s, put("a", "1"))
	target := filepath.Join(filepath.Dir(config.Path), "elsewhere.db")
	if err := os.Rename(config.Path, target); err != nil {
		t.Fatal(err)
	}
	if err := s.Defragment(t.Context()); err == nil {
		t.Error("defragmented a file that is not there")
	}
	s.Moved(target)
	if err := s.Defragment(t.Context()); err != nil {
		t.Error(err)
	}
	other := open(t, testConfig(config.Path))
	s.Moved(config.Path)
	if err := s.Defragment(t.Context()); err == nil {
		t.Error("replaced another store's file")
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	moved := open(t, testConfig(target))
	if get(t, moved, "a") != "1" {
		t.Error("the value is gone")
	}
}

// A snapshot may take the file's place while a defragmentation copies. The copy
// must not bring the old state back under that name.
func TestDefragmentLeavesTheNameToASuccessor(t *testing.T) {
	config := testConfig(tempPath(t))
	successor := filepath.Join(filepath.Dir(config.Path), "successor.db")
	next := open(t, testConfig(successor))
	apply(t, next, put("a", "2"))
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	var s *Store
	config.faults.copying = func() {
		s.Moved("")
		if err := os.Rename(successor, config.Path); err != nil {
			t.Error(err)
		}
	}
	s = open(t, config)
	apply(t, s, put("a", "1"))
	if err := s.Defragment(t.Context()); err == nil {
		t.Error("the old state has taken its name back")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	config.faults.copying = nil
	again := open(t, config)
	if got := get(t, again, "a"); got != "2" {
		t.Errorf("a = %q", got)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
}
