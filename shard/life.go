package shard

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"kvd/fsm"
	"kvd/snapshot"
)

// life is one life of the raft instance: from Open, or from the installation
// of a snapshot, to the next. Everything that refers to raft dies with it.
type life struct {
	r          *Replica
	raft       *raft.Raft
	transport  roleTransport
	state      *state
	snapshots  *snapshot.Store
	proposer   *proposer
	reads      *reads
	tail       *tail
	succession succession

	standing sync.Mutex
	stands   time.Time // when a witness, with no leader, would have stood first

	notify chan bool             // leadership gained or lost, from raft
	role   atomic.Pointer[epoch] // this replica's leadership; nil = follower or witness
	halted atomic.Bool           // the state machine refused an entry

	configuring sync.Mutex // raft's configuration is being changed

	committed chan struct{} // capacity 1: entries were applied while leading
	advancing atomic.Bool   // a follower is being told of a commit

	ctx      context.Context // ends with this life
	cancel   context.CancelFunc
	done     <-chan struct{} // of ctx
	stopOnce sync.Once
	tasks    sync.WaitGroup
}

// epoch is one term of leadership of this replica.
type epoch struct {
	term    uint64        // known once serving
	serving chan struct{} // closed when an own-term command is applied
	over    chan struct{} // closed when the leadership is lost
}

func (e *epoch) isServing() bool {
	select {
	case <-e.serving:
		return true
	default:
		return false
	}
}

// startLife opens raft over the log and the given state. The caller has r.turn.
func (r *Replica) startLife(st *state, bootstrap *raft.Configuration) error {
	transport, err := r.cfg.NewTransport(r.install)
	if err != nil {
		return err
	}
	if r.cfg.Faults.HeartbeatFastPath {
		transport = newFastPath(transport)
	}
	l := &life{
		r: r, state: st,
		snapshots: snapshot.NewStore(st.store, snapshot.Config{Limit: r.cfg.Streams, Logger: r.slog, Registerer: r.registry.registerer()}),
		notify:    make(chan bool, 64),
		committed: make(chan struct{}, 1),
		tail:      newTail(r.cfg),
	}
	l.transport = roleTransport{transport, l}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.done = l.ctx.Done()
	l.proposer = newProposer(l)
	l.reads = newReads(l)

	conf := r.raftConfig(l.notify)
	if err := r.bootstrap(conf, l, bootstrap); err != nil {
		return errors.Join(err, transport.Close())
	}
	l.raft, err = raft.NewRaft(conf, &machine{l: l}, settledLog{r.log, l}, r.log, l.snapshots, resuming{l.transport, l})
	if err != nil {
		return errors.Join(fmt.Errorf("shard: open raft: %w", err), transport.Close())
	}
	r.life.Store(l)
	l.transport.JudgePreVotes(l.judgePreVote)
	for _, task := range []func(){l.watchLeadership, l.watchObservations, l.proposer.run, l.proposer.complete, l.reads.run, l.watchState, l.watchDisk, l.watchTail, l.tellFollowers, l.watchDeaths} {
		l.tasks.Go(task)
	}
	r.changed.fire()
	return nil
}

func (r *Replica) raftConfig(notify chan bool) *raft.Config {
	conf := raft.DefaultConfig()
	conf.LocalID = r.cfg.Replica
	conf.HeartbeatTimeout = r.cfg.HeartbeatTimeout
	conf.ElectionTimeout = r.cfg.ElectionTimeout
	// No read trusts this lease: it only makes a leader without followers give
	// up, and on a busy machine it should not be quick to.
	conf.LeaderLeaseTimeout = r.cfg.HeartbeatTimeout
	// How often replication looks for something to do by itself: it tells of
	// commits (tellFollowers is quicker) and tries again what has failed.
	conf.CommitTimeout = min(time.Second, r.cfg.HeartbeatTimeout)
	conf.BatchApplyCh = true
	conf.MaxAppendEntries = 64
	conf.NoSnapshotRestoreOnStart = true
	conf.NoLegacyTelemetry = true
	conf.ShutdownOnRemove = false
	conf.TrailingLogs = r.cfg.TrailingEntries
	conf.SnapshotThreshold = 1 << 62 // tail.go decides, by bytes as well
	conf.SnapshotInterval = 365 * 24 * time.Hour
	conf.NotifyCh = notify
	conf.Logger = newRaftLogger(r.slog)
	return conf
}

func (r *Replica) bootstrap(conf *raft.Config, l *life, first *raft.Configuration) error {
	if first == nil {
		return nil
	}
	existing, err := raft.HasExistingState(r.log, r.log, l.snapshots)
	if err != nil {
		return err
	}
	if existing {
		if begun, err := r.bootstrapBegun(l); err != nil || !begun {
			return err
		}
		if err := r.log.SetUint64(keyCurrentTerm, 0); err != nil {
			return fmt.Errorf("shard: bootstrap again: %w", err)
		}
	}
	if err := raft.BootstrapCluster(conf, r.log, r.log, l.snapshots, l.transport, *first); err != nil {
		return fmt.Errorf("shard: bootstrap: %w", err)
	}
	return nil
}

// Raft's keys in the stable store.
var (
	keyCurrentTerm  = []byte("CurrentTerm")
	keyLastVoteTerm = []byte("LastVoteTerm")
)

// bootstrapBegun reports whether a crash interrupted raft's bootstrap between
// its two writes, the term 1 and the first entry. Raft has never run then: it
// would not start without that entry.
func (r *Replica) bootstrapBegun(l *life) (bool, error) {
	last, err1 := r.log.LastIndex()
	term, err2 := r.stored(keyCurrentTerm)
	voted, err3 := r.stored(keyLastVoteTerm)
	states, err4 := l.snapshots.List()
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return false, fmt.Errorf("shard: look for a bootstrap that was interrupted: %w", err)
	}
	return last == 0 && term == 1 && voted == 0 && len(states) == 0, nil
}

// stored is a number in the stable store, 0 if it is not set.
func (r *Replica) stored(key []byte) (uint64, error) {
	value, err := r.log.GetUint64(key)
	if err != nil && err.Error() == "not found" { // as raft tells
		return 0, nil
	}
	return value, err
}

func (l *life) stopped() bool { return l.ctx.Err() != nil }

// stop ends this life and returns when nothing of it runs any more. State and
// log stay open.
func (l *life) stop() {
	l.stopOnce.Do(func() {
		l.proposer.refuse()
		_ = l.transport.Close()
		// Raft forgets the calls in its channels when it shuts down. Without a
		// transport a leader steps down within its lease, and then answers
		// them all, so wait for that first. It takes as long as a write to the
		// disk that stalls, which Shutdown would wait for too.
		l.proposer.open.Wait()
		_ = l.snapshots.Close()
		_ = l.raft.Shutdown().Error()
		l.cancel()
		l.tasks.Wait()
	})
}

// watchLeadership follows raft's notifications. Raft's main loop blocks on a
// full channel, so nothing here waits.
func (l *life) watchLeadership() {
	var e *epoch
	for {
		select {
		case leads := <-l.notify:
			l.endEpoch(e)
			e = nil
			if leads {
				e = l.beginEpoch()
			}
			l.r.changed.fire()
		case <-l.done:
			l.endEpoch(e)
			return
		}
	}
}

func (l *life) beginEpoch() *epoch {
	e := &epoch{serving: make(chan struct{}), over: make(chan struct{})}
	l.pace(true)
	l.tasks.Go(func() { l.beat(e) })
	if l.r.Witness() {
		l.tasks.Go(func() { l.handOver(e) })
		return e
	}
	l.role.Store(e)
	l.tasks.Go(func() { l.establish(e) })
	return e
}

// endEpoch answers everything that waits for the leadership that is lost; e is
// nil if there was none.
func (l *life) endEpoch(e *epoch) {
	l.role.Store(nil)
	if e != nil {
		close(e.over)
		l.pace(false)
		l.r.metrics.leaderChanges.Inc()
	}
	l.proposer.flush(ErrNotLeader)
	l.reads.flush(ErrNotLeader)
}

// establish commits an empty command of the new term. Only when it is applied
// does raft's commit index cover everything that earlier leaders acknowledged,
// and only then does this replica serve.
func (l *life) establish(e *epoch) {
	if !l.proposer.begin() {
		return
	}
	defer l.proposer.open.Done()
	f := l.raft.Apply(emptyEntry(), 0)
	if err := f.Error(); err != nil {
		l.r.slog.Info("leadership was lost before it could serve", "error", err)
		return
	}
	answer, ok := f.Response().(applied)
	if !ok {
		return // the state machine has halted
	}
	e.term = answer.term
	close(e.serving)
	l.proposer.kick()
	l.r.changed.fire()
	l.r.slog.Info("leading the group", "term", e.term)
}

// emptyEntry holds a command that changes nothing.
func emptyEntry() []byte {
	var b fsm.EntryBuilder
	b.Add(fsm.Request{})
	return b.Bytes()
}

// watchObservations wakes those who wait for a leader when raft sees one.
func (l *life) watchObservations() {
	ch := make(chan raft.Observation, 16)
	observer := raft.NewObserver(ch, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	l.raft.RegisterObserver(observer)
	defer l.raft.DeregisterObserver(observer)
	l.r.changed.fire()
	for {
		select {
		case <-ch:
			l.r.changed.fire()
		case <-l.done:
			return
		}
	}
}

// serving waits until this replica leads and may serve, and returns the epoch.
func (l *life) serving(ctx context.Context) (*epoch, error) {
	e := l.role.Load()
	if e == nil {
		return nil, ErrNotLeader
	}
	select {
	case <-e.serving:
		return e, nil
	case <-e.over:
		return nil, ErrNotLeader
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrNotProposed, ctx.Err())
	}
}

// state is a state machine that readers pin.
type state struct {
	store  *fsm.Store
	closed chan struct{}

	mu      sync.Mutex
	refs    int
	retired bool
}

func newState(store *fsm.Store) *state {
	return &state{store: store, closed: make(chan struct{})}
}

func (s *state) acquire() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired {
		return false
	}
	s.refs++
	return true
}

func (s *state) release() {
	s.mu.Lock()
	s.refs--
	last := s.retired && s.refs == 0
	s.mu.Unlock()
	if last {
		_ = s.close()
	}
}

// retire closes the state now, or when its last reader is done.
func (s *state) retire() error {
	s.mu.Lock()
	s.retired = true
	last := s.refs == 0
	s.mu.Unlock()
	s.store.Retire() // those who watch it go on in the next life's
	if last {
		return s.close()
	}
	return nil
}

func (s *state) close() error {
	defer close(s.closed)
	return s.store.Close()
}

// waitClosed waits until the last reader of a retired state is done.
func (s *state) waitClosed(limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-s.closed:
		return nil
	case <-timer.C:
		return fmt.Errorf("shard: the state is still being read after %v", limit)
	}
}

// broadcast wakes everyone who waits, once per fire.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

func (b *broadcast) init() { b.ch = make(chan struct{}) }

func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ch
}

func (b *broadcast) fire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.ch)
	b.ch = make(chan struct{})
}
