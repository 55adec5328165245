package wal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
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

// runFault makes the n-th operation fail. It returns whether there were as many.
func runFault(plan faultPlan, n int) (happened bool, err error) {
	w := newTrial(seeded(uint64(n)), 2, Options{SegmentBytes: hostileSegmentBytes})
	seen, loud := 0, false
	w.fs.Inject(func(op vfs.Op) error {
		if happened || !slices.Contains(plan.kinds, op.Kind) {
			return nil
		}
		if seen++; seen <= n {
			return nil
		}
		happened, loud = true, plan.loud && !strings.HasSuffix(op.Name, spareSuffix)
		w.note("%+v fails", op)
		return plan.fault(op)
	})
	err = w.open()
	opened := w.log != nil
	if err == nil {
		err = shortScript(w)
	}
	told := err
	switch {
	case err != nil && (!happened || !errors.Is(err, plan.want)):
		return happened, w.failure("not what the disk said", err)
	case opened && happened && (loud || errors.Is(err, ErrFailed)):
		if err := poisoned(w, plan.want); err != nil {
			return happened, w.failure("after the fault", err)
		}
	}
	// A fault may come only now, in Close.
	late := !happened
	if err := closeLog(w.log); err == nil && late && happened && loud {
		return happened, w.failure("close", errors.New("it hides the fault"))
	} else if err != nil && !happened {
		return happened, w.failure("close", err)
	}
	w.fs.Inject(nil)
	if told == nil && loud && happened && !late && opened && w.log.Err() == nil {
		return happened, w.failure("run", errors.New("nobody has heard of the fault"))
	}
	return happened, afterFault(w, uint64(n))
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
	if w.log.Err() == nil {
		return errors.New("the log goes on")
	}
	calls := map[string]func() error{
		"Log.Err":    w.log.Err,
		"Log.Create": func() error { return w.log.Create(ID{Group: 99, Replica: 99}) },
	}
	for _, r := range w.replicas {
		if r.durable.life != alive || r.store == nil || r.flight != nil && r.flight.life == removed {
			continue
		}
		next := makeEntry(r.durable.last()+1, 1<<40, 1, 10)
		calls[r.id.String()+" Err"] = r.store.Err
		calls[r.id.String()+" StoreLog"] = func() error { return r.store.StoreLog(next) }
		calls[r.id.String()+" Set"] = func() error { return r.store.Set([]byte("other"), []byte("x")) }
		calls[r.id.String()+" SetUint64"] = func() error { return r.store.SetUint64([]byte("CurrentTerm"), 1) }
		calls[r.id.String()+" vote"] = func() error {
			if err := r.store.SetUint64(voteTermKey, 1<<40); err != nil {
				return err
			}
			return r.store.Set(voteCandidateKey, []byte("nobody"))
		}
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, ErrFailed) || !errors.Is(err, cause) {
			return fmt.Errorf("%s: %w, want ErrFailed and its cause", name, err)
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
	written := int64(0)
	w.fs.Inject(func(op vfs.Op) error {
		switch op.Kind {
		case vfs.OpSync:
			time.Sleep(time.Millisecond)
		case vfs.OpWrite:
			written += op.Bytes
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
	if written < 8*segments*hostileSegmentBytes {
		t.Errorf("only %d bytes written", written)
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
