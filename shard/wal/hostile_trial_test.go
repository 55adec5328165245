package wal

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/hashicorp/raft"

	"kvd/shard/wal/vfs"
)

const trialDir = "data/log"

// trial is a log, and what has to be in it. Its steps return how the two differ. Steps of different replicas
// may run concurrently.
type trial struct {
	choose   chooser
	options  Options // but for Dir and FS
	cache    int
	fs       *vfs.Memory
	log      *Log
	replicas []*modelReplica
	step     int
	trace    []string // the last steps, for the message

	mu *sync.Mutex // under which the replicas' durable and flight change, and the trace
}

// modelReplica is what a replica should be.
type modelReplica struct {
	id      ID
	store   *Store
	durable *state // what has been acknowledged
	flight  *state // what the running call makes of it, if one runs

	guardMu sync.Mutex
	guard   uint64

	nonce   uint64
	staged  uint64 // 0: no term waits for its candidate
	replace uint64
}

func newTrial(choose chooser, replicas int, options Options) *trial {
	w := &trial{choose: choose, fs: new(vfs.Memory), options: options, cache: -1, mu: new(sync.Mutex)}
	// The parent is somebody else's: it is there for good.
	if err := errors.Join(w.fs.MkdirAll(filepath.Dir(trialDir)), w.fs.SyncDir(".")); err != nil {
		panic(err)
	}
	for i := range replicas {
		w.replicas = append(w.replicas, newModel(ID{Group: uint64(i / 2), Replica: uint64(i + 1)}))
	}
	return w
}

func newModel(id ID) *modelReplica { return &modelReplica{id: id, durable: &state{}} }

func (r *modelReplica) Guard() uint64 {
	r.guardMu.Lock()
	defer r.guardMu.Unlock()
	return r.guard
}

func (r *modelReplica) setGuard(index uint64) {
	r.guardMu.Lock()
	defer r.guardMu.Unlock()
	r.guard = max(r.guard, index)
}

func (w *trial) open() error {
	log, err := openOn(w.fs, w.options)
	if err != nil {
		return err
	}
	w.log = log
	for _, r := range w.replicas {
		r.store, r.staged, r.replace = nil, 0, 0
		if r.durable.life == alive {
			if err := w.openStore(r); err != nil {
				return err
			}
		}
	}
	return nil
}

func openOn(fs vfs.FS, o Options) (*Log, error) {
	o.Dir, o.FS = trialDir, fs
	return Open(o)
}

func (w *trial) openStore(r *modelReplica) (err error) {
	r.staged, r.replace = 0, 0
	r.store, err = w.log.Replica(r.id, ReplicaOptions{Guard: r.Guard, CacheBytes: w.cache})
	return err
}

func (w *trial) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.step++
	if w.trace = append(w.trace, fmt.Sprintf("%d: ", w.step)+fmt.Sprintf(format, args...)); len(w.trace) > 12 {
		w.trace = w.trace[1:]
	}
}

func (w *trial) now() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.step
}

// do runs a call that makes next of r's durable state, or must be refused with refusal.
func (w *trial) do(r *modelReplica, next *state, refusal error, call func() error) error {
	w.mu.Lock()
	if refusal == nil {
		r.flight = next
	}
	w.mu.Unlock()
	err := call()
	switch {
	case refusal != nil && !errors.Is(err, refusal):
		return fmt.Errorf("%s: got %w, want %w", r.id, err, refusal)
	case refusal == nil && err != nil:
		return fmt.Errorf("%s: %w", r.id, err) // flight stays: it may or may not have happened
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if refusal == nil {
		r.durable, r.flight = next, nil
	}
	return nil
}

// allowed is what each replica may have after a crash now. The caller holds w.mu.
func (w *trial) allowed() map[ID][]*state {
	out := map[ID][]*state{}
	for _, r := range w.replicas {
		out[r.id] = []*state{r.durable}
		if r.flight != nil {
			out[r.id] = append(out[r.id], r.flight)
		}
	}
	return out
}

// random is one random step.
func (w *trial) random() error {
	r := w.replicas[w.choose(len(w.replicas), "replica")]
	if r.durable.life != alive {
		return w.create(r)
	}
	steps := []func(*modelReplica) error{
		w.append, w.append, w.append, w.append, w.append, w.append, w.vote, w.vote, w.key, w.key, w.beginning, w.beginning,
		w.beginning, w.end, w.end, w.all, w.misplaced, w.burst, w.burst, w.reset, w.reopenStore, w.remove,
	}
	return steps[w.choose(len(steps), "step")](r)
}

func (w *trial) create(r *modelReplica) error {
	if r.durable.life == removed {
		w.note("create %s again", r.id)
		return w.do(r, nil, ErrExists, func() error { return w.log.Create(r.id) })
	}
	w.note("create %s", r.id)
	if err := w.do(r, &state{life: alive}, nil, func() error { return w.log.Create(r.id) }); err != nil {
		return err
	}
	if err := w.log.Create(r.id); !errors.Is(err, ErrExists) {
		return fmt.Errorf("%s created twice: %w", r.id, err)
	}
	return w.openStore(r)
}

// remove is rare, and another replica takes the place.
func (w *trial) remove(r *modelReplica) error {
	if !w.choose.oneIn(3, "remove") {
		return w.key(r)
	}
	if err := w.removeNow(r); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.replicas = append(w.replicas, newModel(ID{Group: r.id.Group, Replica: r.id.Replica + 100}))
	return nil
}

func (w *trial) removeNow(r *modelReplica) error {
	w.note("remove %s", r.id)
	if err := r.store.Close(); err != nil {
		return err
	}
	if err := w.do(r, &state{life: removed}, nil, func() error { return w.log.Remove(r.id) }); err != nil {
		return err
	}
	if _, err := w.log.Replica(r.id, ReplicaOptions{}); !errors.Is(err, ErrNoReplica) {
		return fmt.Errorf("%s is still there after its removal: %w", r.id, err)
	}
	return nil
}

func (w *trial) sizeBytes() int {
	switch w.choose(12, "size") {
	case 0:
		return 0
	case 10:
		return w.choose(6000, "bytes")
	case 11:
		return w.choose(3*int(w.options.SegmentBytes)/2, "bytes")
	}
	return w.choose(300, "bytes")
}

func (w *trial) entries(r *modelReplica, from uint64, count int) (entries []*raft.Log) {
	term := r.durable.term + uint64(w.now())
	for i := range uint64(count) {
		r.nonce++
		entries = append(entries, makeEntry(from+i, term, r.nonce<<16|r.id.Replica, w.sizeBytes()))
	}
	return entries
}

// next is where the log goes on, anywhere if it is empty.
func (w *trial) next(r *modelReplica) uint64 {
	if r.durable.last() == 0 {
		return w.choose.between(1, 50, "from")
	}
	return r.durable.last() + 1
}

func (w *trial) append(r *modelReplica) error {
	return w.store(r, w.entries(r, w.next(r), 1+w.choose(6, "entries")))
}

// store judges by what raft-boltdb's guards say: entries follow the last one, or replace all that there are
// after DeleteRange has been asked to remove all of them.
func (w *trial) store(r *modelReplica, entries []*raft.Log) error {
	from := entries[0].Index
	w.note("%s stores %d entries from %d", r.id, len(entries), from)
	next, refusal := r.durable.with(slices.Concat(r.durable.entries, entries)), error(nil)
	if first, last := r.durable.first(), r.durable.last(); last != 0 && from != last+1 {
		next = r.durable.with(entries)
		switch {
		case from != first || r.replace != first:
			refusal = ErrGap
		case from <= r.Guard():
			refusal = ErrGuarded
		}
	}
	r.replace = 0
	return w.do(r, next, refusal, func() error { return r.store.StoreLogs(entries) })
}

// misplaced stores what does not follow.
func (w *trial) misplaced(r *modelReplica) error {
	if r.durable.last() == 0 {
		return w.append(r)
	}
	if w.choose(2, "hole inside") == 0 {
		entries := append(w.entries(r, r.durable.last()+1, 2), w.entries(r, r.durable.last()+4, 1)...)
		w.note("%s stores entries with a hole", r.id)
		return w.do(r, nil, ErrGap, func() error { return r.store.StoreLogs(entries) })
	}
	return w.store(r, w.entries(r, w.choose.between(r.durable.first(), r.durable.last()+3, "from"), 2))
}

// burst fills segments and lets go of them.
func (w *trial) burst(r *modelReplica) error {
	for range 4 {
		if err := w.store(r, w.entries(r, w.next(r), 4)); err != nil {
			return err
		}
	}
	r.setGuard(r.durable.last() - 1)
	return w.delete(r, r.durable.first(), r.durable.last()-1)
}

// beginning removes the beginning, as far as the guard allows.
func (w *trial) beginning(r *modelReplica) error {
	if r.durable.last() == 0 {
		return w.append(r)
	}
	r.setGuard(w.choose.between(r.durable.first()-1, r.durable.last(), "guard"))
	lo := r.durable.first() - uint64(w.choose(2, "before the beginning"))
	return w.delete(r, lo, w.choose.between(r.durable.first(), r.durable.last()+1, "hi"))
}

// end removes the end, or tries to make a hole.
func (w *trial) end(r *modelReplica) error {
	if len(r.durable.entries) < 3 {
		return w.append(r)
	}
	lo := w.choose.between(r.durable.first()+1, r.durable.last(), "lo")
	hi := r.durable.last() + uint64(w.choose(2, "beyond the end"))
	if w.choose.oneIn(6, "hole") {
		hi = w.choose.between(lo, r.durable.last(), "hi")
	}
	if err := w.delete(r, lo, hi); err != nil {
		return err
	}
	return w.append(r)
}

// all removes everything, and often stores other entries in their place.
func (w *trial) all(r *modelReplica) error {
	if r.durable.last() == 0 {
		return w.append(r)
	}
	if err := w.delete(r, r.durable.first(), r.durable.last()); err != nil {
		return err
	}
	from := r.durable.first()
	if from == 0 {
		from = 7
	}
	return w.store(r, w.entries(r, from, 1+w.choose(3, "entries")))
}

// delete judges by DeleteRange of raftlog.
func (w *trial) delete(r *modelReplica, lo, hi uint64) error {
	guard, s := r.Guard(), r.durable
	w.note("%s deletes %d to %d of %d to %d, guard %d", r.id, lo, hi, s.first(), s.last(), guard)
	next, refusal := s, error(nil)
	switch {
	case s.first() == 0 || lo > hi || lo > s.last() || hi < s.first():
	case lo == s.first() && hi >= s.last() && guard < s.first():
		r.replace = s.first()
	case lo <= s.first():
		next = s.with(s.from(min(hi, guard) + 1))
	case hi < s.last():
		refusal = ErrGap
	case lo <= guard:
		refusal = ErrGuarded
	default:
		next = s.with(s.below(lo))
	}
	return w.do(r, next, refusal, func() error { return r.store.DeleteRange(lo, hi) })
}

func (w *trial) reset(r *modelReplica) error {
	w.note("%s resets %d to %d", r.id, r.durable.first(), r.durable.last())
	r.replace = 0
	return w.do(r, r.durable.with(nil), nil, r.store.Reset)
}

// vote stages a term, and often a candidate.
func (w *trial) vote(r *modelReplica) error {
	if !w.choose.oneIn(5, "candidate alone") {
		r.staged = r.durable.term + 1 + uint64(w.choose(3, "terms"))
		w.note("%s stages term %d", r.id, r.staged)
		if err := w.do(r, r.durable, nil, func() error { return r.store.SetUint64(voteTermKey, r.staged) }); err != nil {
			return err
		}
		if w.choose.oneIn(5, "no candidate") {
			return nil
		}
	}
	next, refusal := *r.durable, error(nil)
	next.term, next.vote, next.voted = r.staged, fmt.Sprintf("n%d/%d", w.choose(3, "candidate"), r.staged), true
	if r.staged == 0 {
		refusal = ErrVoteTerm
	}
	w.note("%s votes for %s in %d", r.id, next.vote, r.staged)
	r.staged = 0
	return w.do(r, &next, refusal, func() error { return r.store.Set(voteCandidateKey, []byte(next.vote)) })
}

func (w *trial) key(r *modelReplica) error {
	key := modelKeys[w.choose(len(modelKeys), "key")]
	r.nonce++
	value := makeEntry(1, 1, r.nonce<<16|r.id.Replica, 8).Data
	if key == "CurrentTerm" {
		w.note("%s sets its term", r.id)
		value = []byte{0, 0, 0, 0, 0, 1, byte(r.nonce >> 8), byte(r.nonce)}
		return w.do(r, r.durable.withKey(key, string(value)), nil, func() error {
			return r.store.SetUint64([]byte(key), 1<<16|r.nonce&0xffff)
		})
	}
	if key == "large" {
		value = makeEntry(1, 1, r.nonce<<16|r.id.Replica, w.choose(1500, "bytes")).Data
	}
	w.note("%s sets %s to %d bytes", r.id, key, len(value))
	return w.do(r, r.durable.withKey(key, string(value)), nil, func() error { return r.store.Set([]byte(key), value) })
}

// reopenStore forgets what was only staged.
func (w *trial) reopenStore(r *modelReplica) error {
	w.note("%s is closed and opened", r.id)
	if err := r.store.Close(); err != nil {
		return err
	}
	return w.openStore(r)
}

// check compares every replica that is open with its durable state.
func (w *trial) check() error {
	for _, r := range w.replicas {
		if r.durable.life != alive {
			continue
		}
		got, err := observe(r.store)
		if err == nil {
			err = wantState(got, []*state{r.durable})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.id, err)
		}
	}
	return nil
}

// inspect opens the log on fs and compares it with what is allowed. It returns the log and what it found.
func inspect(fs vfs.FS, o Options, allowed map[ID][]*state) (*Log, map[ID][]*state, error) {
	log, err := openOn(fs, o)
	if err != nil {
		return nil, nil, fmt.Errorf("open: %w", err)
	}
	found := map[ID][]*state{}
	for _, id := range log.Replicas() {
		if allowed[id] == nil {
			return log, nil, fmt.Errorf("%s was never created", id)
		}
		store, err := log.Replica(id, ReplicaOptions{Guard: func() uint64 { return 0 }})
		if err != nil {
			return log, nil, fmt.Errorf("%s: %w", id, err)
		}
		got, err := observe(store)
		if err == nil {
			err = wantState(got, allowed[id])
		}
		if err := errors.Join(err, store.Close()); err != nil {
			return log, nil, fmt.Errorf("%s: %w", id, err)
		}
		found[id] = []*state{got}
	}
	for id, states := range allowed {
		if found[id] != nil {
			continue
		}
		gone := slices.DeleteFunc(slices.Clone(states), func(s *state) bool { return s.life == alive })
		if len(gone) == 0 {
			return log, nil, fmt.Errorf("%s is missing", id)
		}
		found[id] = gone
	}
	return log, found, nil
}
