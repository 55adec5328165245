package wal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard/wal/vfs"
)

// faultPlan is one kind of fault, that is tried at each operation of some kinds.
type faultPlan struct {
	name  string
	kinds []vfs.Kind
	fault func(vfs.Op) error
	want  error // what the caller hears
	loud  bool  // the log may not go on as if nothing had been, unless the file is none of the log's yet
}

var (
	writeOps = []vfs.Kind{vfs.OpWrite}
	syncOps  = []vfs.Kind{vfs.OpSync}
	fileOps  = []vfs.Kind{vfs.OpMkdir, vfs.OpOpen, vfs.OpRename, vfs.OpRemove, vfs.OpSyncDir, vfs.OpLock, vfs.OpTruncate, vfs.OpPreallocate}
	lookOps  = []vfs.Kind{vfs.OpRead, vfs.OpList, vfs.OpSize, vfs.OpFree}
)

func failing(err error) func(vfs.Op) error { return func(vfs.Op) error { return err } }

var faultPlans = []faultPlan{
	{"write fails", writeOps, failing(syscall.EIO), syscall.EIO, true},
	{"no space", writeOps, failing(syscall.ENOSPC), syscall.ENOSPC, true},
	{"short write", writeOps, func(op vfs.Op) error {
		return &vfs.Fault{Err: syscall.ENOSPC, Bytes: int(op.Bytes / 2)}
	}, syscall.ENOSPC, true},
	{"all written, but an error", writeOps, func(op vfs.Op) error {
		return &vfs.Fault{Err: syscall.EIO, Bytes: int(op.Bytes)}
	}, syscall.EIO, true},
	{"sync fails", syncOps, failing(syscall.EIO), syscall.EIO, true},
	{"files and names fail", fileOps, failing(syscall.ENOSPC), syscall.ENOSPC, false},
	{"looking fails", lookOps, failing(syscall.EIO), syscall.EIO, false},
}

// shortScript does everything that script does, but less often.
func shortScript(w *trial) error {
	hot, cold := w.replicas[0], w.replicas[1]
	for _, r := range w.replicas {
		if err := each(r, w.create, w.append, w.vote, w.key); err != nil {
			return err
		}
	}
	for range 5 {
		if err := each(hot, w.burst, w.burst, w.burst); err != nil {
			return err
		}
		if err := w.vote(cold); err != nil {
			return err
		}
	}
	return scriptEnd(w)
}

// Each write, sync and other operation fails once, while the disk works before and after. Whoever waits for it is
// told, nobody writes any more, and what had been acknowledged is there when the log is opened again.
func TestFaultEverywhere(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for i, plan := range faultPlans {
		t.Run(plan.name, func(t *testing.T) {
			n := rand.New(rand.NewPCG(seed, uint64(i))).IntN(stride(plan.kinds))
			for more := true; more; n += stride(plan.kinds) {
				var err error
				if more, err = runFault(plan, n); err != nil {
					t.Fatalf("operation %d: %v", n, err)
				}
			}
			if n < 10 {
				t.Errorf("only %d operations", n)
			}
		})
	}
}

// stride leaves operations out in a short run.
func stride(kinds []vfs.Kind) int {
	switch {
	case *deepFlag > 1:
		return 1
	case slices.Contains(kinds, vfs.OpRead):
		return 21
	}
	return 8
}

// faultRun makes the n-th operation of its plan fail.
type faultRun struct {
	plan faultPlan
	n    int
	w    *trial

	mu       sync.Mutex
	seen     int
	happened bool
	loud     bool   // somebody has to hear of it
	op       vfs.Op // that failed
}

func (f *faultRun) inject(op vfs.Op) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.happened || !slices.Contains(f.plan.kinds, op.Kind) {
		return nil
	}
	if f.seen++; f.seen <= f.n {
		return nil
	}
	f.happened, f.op, f.loud = true, op, f.plan.loud && !strings.HasSuffix(op.Name, spareSuffix)
	return f.plan.fault(op)
}

func (f *faultRun) so() (happened, loud bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.happened, f.loud
}

// runFault makes the n-th operation fail. It returns whether there were as many.
func runFault(plan faultPlan, n int) (happened bool, err error) {
	w := newTrial(seeded(uint64(n)), 2, Options{SegmentBytes: hostileSegmentBytes})
	f := &faultRun{plan: plan, n: n, w: w}
	w.fs.Inject(f.inject)
	if err = w.open(); err == nil {
		err = shortScript(w)
	}
	if err = f.heard(err); err == nil {
		err = f.close()
	}
	w.fs.Inject(nil)
	if err == nil {
		err = afterFault(w, uint64(n))
	}
	if happened, _ = f.so(); err != nil {
		err = fmt.Errorf("after %+v has failed: %w", f.op, err)
	}
	return happened, err
}

// heard judges what the script was told, and that nobody writes any more.
func (f *faultRun) heard(told error) error {
	happened, loud := f.so()
	switch {
	case told != nil && (!happened || !errors.Is(told, f.plan.want)):
		return f.w.failure("not what the disk said", told)
	case f.w.log == nil && told == nil:
		return errors.New("there is no log")
	case f.w.log != nil && (loud || errors.Is(told, ErrFailed)):
		if err := poisoned(f.w, f.plan.want); err != nil {
			return f.w.failure("after the fault", err)
		}
	}
	return nil
}

// close closes the log. The fault may come only now.
func (f *faultRun) close() error {
	before, _ := f.so()
	err := closeLog(f.w.log)
	happened, loud := f.so()
	if err != nil && !happened {
		return f.w.failure("close", err)
	}
	if err == nil && loud && !before {
		return f.w.failure("close", errors.New("it hides the fault"))
	}
	return nil
}

// afterFault opens what is there after a fault: with everything that could be read before, with what a failed
// sync has dropped, and after a power cut.
func afterFault(w *trial, seed uint64) error {
	c := &crasher{w: w, seed: seed << 20}
	dropped := w.fs.Kill()
	dropped.DropCaches()
	for i, image := range []*vfs.Memory{w.fs.Kill(), dropped, w.fs.Crash(seed), w.fs.Crash(seed + 1)} {
		c.seen = i - 1 // the first is looked at most closely
		if err := c.judge(image, w.allowed()); err != nil {
			return w.failure(fmt.Sprintf("image %d", i), err)
		}
	}
	return nil
}

// poisoned checks that nothing is written any more, by any replica.
func poisoned(w *trial, cause error) error {
	calls := []func() error{func() error { return w.log.Create(ID{Group: 99, Replica: 99}) }}
	for _, r := range w.replicas {
		if r.durable.life != alive || r.store == nil || r.flight != nil && r.flight.life == removed {
			continue
		}
		next := makeEntry(r.durable.last()+1, 1<<40, 1, 10)
		calls = append(calls,
			func() error { return r.store.StoreLog(next) },
			func() error { return r.store.Set([]byte("other"), []byte("x")) },
			func() error { return r.store.SetUint64([]byte("CurrentTerm"), 1) },
			func() error {
				if err := r.store.SetUint64(voteTermKey, 1<<40); err != nil {
					return err
				}
				return r.store.Set(voteCandidateKey, []byte("nobody"))
			},
			r.store.Err,
		)
	}
	for i, call := range append(calls, w.log.Err) {
		if err := call(); !errors.Is(err, ErrFailed) || !errors.Is(err, cause) {
			return fmt.Errorf("call %d: %w, want ErrFailed and its cause", i, err)
		}
	}
	return nil
}

// What does not fit fails, and the rest is there when there is room again.
func TestNoSpaceLeft(t *testing.T) {
	for seed := range uint64(5) {
		w := newTrial(seeded(seed), 2, Options{SegmentBytes: hostileSegmentBytes})
		w.fs.SetCapacity(4*hostileSegmentBytes + int64(seed)*3000)
		if err := w.open(); err != nil {
			t.Fatal(err)
		}
		var err error
		for err == nil {
			if r := w.replicas[w.step%2]; r.durable.life != alive {
				err = w.create(r)
			} else {
				err = w.append(r)
			}
		}
		if !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("seed %d: %v", seed, w.failure("fill", err))
		}
		if err := poisoned(w, syscall.ENOSPC); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		_ = w.log.Close() // it cannot leave its mark any more
		w.fs.SetCapacity(0)
		if err := afterFault(w, seed); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
}

// A replica that writes and truncates for ever needs no more space than at first, whatever lies between.
func TestSpaceIsReclaimed(t *testing.T) {
	synctest.Test(t, testSpaceIsReclaimed)
}

func testSpaceIsReclaimed(t *testing.T) {
	const segments = 10
	w := newTrial(seeded(1), 3, Options{SegmentBytes: hostileSegmentBytes})
	w.fs.SetCapacity(segments * hostileSegmentBytes)
	if err := w.open(); err != nil {
		t.Fatal(err)
	}
	var written atomic.Int64
	w.fs.Inject(func(op vfs.Op) error {
		switch op.Kind {
		case vfs.OpSync:
			time.Sleep(time.Millisecond)
		case vfs.OpWrite:
			written.Add(op.Bytes)
		}
		return nil
	})
	hot, lukewarm := w.replicas[0], w.replicas[1]
	for _, r := range w.replicas {
		if err := each(r, w.create, w.vote, w.few); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		err := each(hot, w.many, w.forgetMost)
		if err == nil && i%40 == 0 {
			err = w.few(lukewarm)
		}
		if err != nil {
			t.Fatal(w.failure("write", err))
		}
	}
	if err := errors.Join(w.check(), w.log.Close(), w.open(), w.check(), w.log.Close()); err != nil {
		t.Error(w.failure("reopen", err))
	}
	if written.Load() < 8*segments*hostileSegmentBytes {
		t.Errorf("only %d bytes written", written.Load())
	}
}

func (w *trial) few(r *modelReplica) error  { return w.store(r, w.small(r, 2)) }
func (w *trial) many(r *modelReplica) error { return w.store(r, w.small(r, 20)) }

func (w *trial) forgetMost(r *modelReplica) error {
	r.setGuard(r.durable.last() - 3)
	return w.delete(r, r.durable.first(), r.durable.last())
}

func (w *trial) small(r *modelReplica, count int) (entries []*raft.Log) {
	from := w.next(r)
	for i := range uint64(count) {
		r.nonce++
		entries = append(entries, makeEntry(from+i, uint64(w.step), r.nonce<<16|r.id.Replica, 400))
	}
	return entries
}
