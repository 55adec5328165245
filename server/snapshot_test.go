package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// valuesAt reads everything at a revision; 0 is the newest.
func valuesAt(t *testing.T, kv pb.KVServer, revision int64) (map[string]string, int64) {
	t.Helper()
	r := proto.CloneOf(wholeRange)
	r.Revision = revision
	resp, err := kv.Range(t.Context(), r)
	if err != nil {
		t.Error(err)
		return nil, 0
	}
	values := make(map[string]string)
	for _, kv := range resp.Kvs {
		values[string(kv.Key)] = string(kv.Value)
	}
	return values, resp.Header.Revision
}

// valuesInTxn is valuesAt by a transaction.
func valuesInTxn(t *testing.T, kv pb.KVServer, revision int64) (map[string]string, int64) {
	t.Helper()
	resp, err := kv.Txn(t.Context(), &pb.TxnRequest{Success: []*pb.RequestOp{
		readOp(&pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte("h"), Revision: revision}),
		readOp(&pb.RangeRequest{Key: []byte("h"), RangeEnd: []byte{0}, Revision: revision}),
	}})
	if err != nil {
		t.Error(err)
		return nil, 0
	}
	values := make(map[string]string)
	for _, op := range resp.Responses {
		for _, kv := range op.GetResponseRange().Kvs {
			values[string(kv.Key)] = string(kv.Value)
		}
	}
	return values, resp.Header.Revision
}

// reader is one of these two.
type reader func(t *testing.T, kv pb.KVServer, revision int64) (values map[string]string, at int64)

// A write that has its revision when a read begins, and is not yet in the log,
// must not appear below the revision that the read has answered at.
func heldWrite(t *testing.T, read reader, plant func(*faults)) (stable bool) {
	w := newWorld(t, 3, 5, 2, func(c *Config) { plant(&c.faults) })
	w.put("n1", "before", "1")
	reserved, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.onReserve = func(uint64, int64) {
		once.Do(func() {
			close(reserved)
			<-release
		})
	}
	var revision int64
	var writing sync.WaitGroup
	writing.Go(func() {
		if resp, err := w.kv("n2").Put(t.Context(), putData(t, "held", "2")); err != nil {
			t.Error(err)
		} else {
			revision = resp.Header.Revision
		}
	})
	<-reserved
	first, at := read(t, w.kv("n3"), 0)
	close(release)
	writing.Wait()
	again, _ := read(t, w.kv("n1"), at)
	return maps.Equal(first, again) && revision > at
}

// Writes that come after a read's revision, while it is under way, must not be
// seen by it.
func overtakingWrites(t *testing.T, read reader, plant func(*faults)) (unseen bool) {
	w := newWorld(t, 3, 5, 2, func(c *Config) { plant(&c.faults) })
	for _, group := range w.groups {
		w.put("n1", w.keyIn(group, "k"), "old")
	}
	var least atomic.Int64 // revision of the overtaking writes
	w.onGate = func(group uint64, _ int64) {
		resp, err := w.kv("n2").Put(t.Context(), putData(t, w.keyIn(group, "k"), "new"))
		if err != nil {
			t.Error(err)
		}
		least.CompareAndSwap(0, resp.Header.Revision)
	}
	values, at := read(t, w.kv("n3"), 0)
	for _, value := range values {
		if value != "old" {
			return false
		}
	}
	return len(values) == len(w.groups) && at < least.Load()
}

// A read must see what was acknowledged before it began, whatever other reads
// are under way.
func lateReader(t *testing.T, read reader, plant func(*faults)) (seen bool) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, 5, 2, func(c *Config) { plant(&c.faults) })
		asked, release := make(chan struct{}), make(chan struct{})
		var once sync.Once
		w.onLatest = func() {
			once.Do(func() {
				close(asked)
				<-release
			})
		}
		var reading sync.WaitGroup
		reading.Go(func() { read(t, w.kv("n3"), 0) })
		<-asked
		w.put("n1", "k", "v")
		reading.Go(func() {
			values, _ := read(t, w.kv("n3"), 0)
			seen = values["k"] == "v"
		})
		synctest.Wait() // until both wait
		close(release)
		reading.Wait()
	})
	return seen
}

func TestReadsOfAllShardsAreSnapshots(t *testing.T) {
	const rangeFault = "the header is some shard's" // a transaction takes none of a shard
	none := func(*faults) {}
	for name, test := range map[string]struct {
		run    func(*testing.T, reader, func(*faults)) bool
		faults map[string]func(*faults)
	}{
		"a held write": {heldWrite, map[string]func(*faults){
			"gates are skipped": func(f *faults) { f.skipGates = true },
		}},
		"overtaking writes": {overtakingWrites, map[string]func(*faults){
			"the newest is read": func(f *faults) { f.readNewest = true },
			rangeFault:           func(f *faults) { f.shardHeader = true },
			"a group is missed":  func(f *faults) { f.missShard = true },
		}},
		"a late reader": {lateReader, map[string]func(*faults){
			"joins what is under way": func(f *faults) { f.joinBegunCut = true },
		}},
	} {
		for by, read := range map[string]reader{"range": valuesAt, "transaction": valuesInTxn} {
			t.Run(name+"/"+by, func(t *testing.T) {
				if !test.run(t, read, none) {
					t.Fatal("not a snapshot")
				}
				for fault, plant := range test.faults {
					if fault == rangeFault && by != "range" {
						continue
					}
					if test.run(t, read, plant) {
						t.Errorf("fault %q does not show", fault)
					}
				}
			})
		}
	}
}

// Writes that come after a transaction's revision, while it is under way, must
// not be what it compares.
func TestComparesOfAllShardsAreOfOneMoment(t *testing.T) {
	for name, test := range map[string]struct {
		plant func(*faults)
		holds bool
	}{
		"at the cut":         {func(*faults) {}, true},
		"the newest is read": {func(f *faults) { f.readNewest = true }, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 3, 5, 2, func(c *Config) { test.plant(&c.faults) })
			txn := &pb.TxnRequest{}
			for _, group := range w.groups {
				key := w.keyIn(group, "k")
				w.put("n1", key, "old")
				txn.Compare = append(txn.Compare, &pb.Compare{Key: []byte(key), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("old")}})
			}
			w.onGate = func(group uint64, _ int64) { w.put("n2", w.keyIn(group, "k"), "new") }
			resp, err := w.kv("n3").Txn(t.Context(), txn)
			if err != nil || resp.Succeeded != test.holds {
				t.Fatalf("%v, %v", resp, err)
			}
		})
	}
}

// history is what all groups have written, by revision.
func (w *world) history(t *testing.T) map[int64]*pb.PutRequest {
	written := make(map[int64]*pb.PutRequest)
	for _, s := range w.shards {
		for _, entry := range s.log {
			const header = 22
			_, n := binary.Uvarint(entry.data[header+1:])
			var r pb.InternalRaftRequest
			if err := proto.Unmarshal(entry.data[header+1+n:], &r); err != nil {
				t.Fatal(err)
			}
			floor := int64(binary.LittleEndian.Uint64(entry.data[2:]))
			if written[floor] != nil {
				t.Fatalf("two writes at %d", floor)
			}
			written[floor] = r.Put
		}
	}
	return written
}

// While nodes write, lead in turn and lose each other's calls, every read of
// all shards is what had been written up to its revision, and no less than what
// had been acknowledged when it began.
func TestSnapshotsUnderWritesAndFailures(t *testing.T) {
	const writers, readers, rounds, keys = 4, 3, 60, 20
	w := newWorld(t, 3, 6, 2, nil)
	seed := seeded(t).Uint64()
	var chaos struct {
		sync.Mutex
		*rand.Rand
	}
	chaos.Rand = rand.New(rand.NewPCG(seed, 1))
	w.onCall = func(string, string, string) (before, after error) {
		chaos.Lock()
		defer chaos.Unlock()
		switch chaos.IntN(20) {
		case 0:
			return errNeverSent, nil
		case 1:
			return nil, errors.New("connection lost")
		case 2:
			s := w.shards[pick(chaos.Rand, w.groups...)]
			s.elect(pick(chaos.Rand, s.order...))
		}
		return nil, nil
	}
	type answer struct {
		acknowledged, at int64
		values           map[string]string
	}
	var (
		acknowledged atomic.Int64
		answers      = make([][]answer, readers)
		busy         sync.WaitGroup
	)
	for i := range writers {
		busy.Go(func() {
			g := rand.New(rand.NewPCG(seed, uint64(10+i)))
			for n := range rounds * 3 {
				resp, err := w.anyKV(g).Put(t.Context(), putData(t, fmt.Sprint("k", g.IntN(keys)), fmt.Sprint(i, "-", n)))
				if err != nil {
					continue // of unknown outcome
				}
				for now := acknowledged.Load(); now < resp.Header.Revision && !acknowledged.CompareAndSwap(now, resp.Header.Revision); now = acknowledged.Load() {
				}
			}
		})
	}
	for i := range readers {
		busy.Go(func() {
			g := rand.New(rand.NewPCG(seed, uint64(20+i)))
			for range rounds {
				a := answer{acknowledged: acknowledged.Load()}
				if g.IntN(3) == 0 && a.acknowledged > 0 {
					a.at = 1 + g.Int64N(a.acknowledged)
					a.acknowledged = 0
					a.values, _ = valuesAt(t, w.anyKV(g), a.at)
				} else {
					a.values, a.at = valuesAt(t, w.anyKV(g), 0)
				}
				answers[i] = append(answers[i], a)
			}
		})
	}
	busy.Wait()
	written := w.history(t)
	for _, list := range answers {
		for _, a := range list {
			if a.at < a.acknowledged {
				t.Errorf("answered at %d after %d had been acknowledged", a.at, a.acknowledged)
			}
			want := make(map[string]string)
			for revision := range a.at + 1 {
				if put := written[revision]; put != nil {
					want[string(put.Key)] = string(put.Value)
				}
			}
			if !maps.Equal(a.values, want) {
				t.Errorf("at %d: %v, want %v", a.at, a.values, want)
			}
		}
	}
}

// A compaction between a read's revision and its answer makes it read again.
func TestReadOvertakenByCompaction(t *testing.T) {
	t.Run("range", func(t *testing.T) { readOvertakenByCompaction(t, valuesAt) })
	t.Run("transaction", func(t *testing.T) { readOvertakenByCompaction(t, valuesInTxn) })
}

func readOvertakenByCompaction(t *testing.T, read reader) {
	w := newWorld(t, 3, 5, 2, nil)
	key := w.keyIn(2, "k")
	w.put("n1", key, "1")
	w.put("n1", key, "2")
	var once sync.Once
	w.onGate = func(group uint64, at int64) {
		if group != 2 {
			return
		}
		once.Do(func() {
			for range 3 {
				w.put("n1", key, "3")
			}
			if _, err := w.kv("n1").Compact(t.Context(), &pb.CompactionRequest{Revision: at + 2}); err != nil {
				t.Error(err)
			}
		})
	}
	values, at := read(t, w.kv("n3"), 0)
	if values[key] != "3" || at < 6 {
		t.Fatalf("%v at %d", values, at)
	}
	if _, err := w.kv("n3").Range(t.Context(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: 2}); err == nil {
		t.Fatal("a compacted revision was read")
	}
}
