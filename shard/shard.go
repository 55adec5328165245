// Package shard runs one replica of one Raft group on this node: it proposes
// writes, confirms leadership for reads, installs snapshots and changes the
// group's members. It knows nothing of strategies, keys or other groups.
//
// The paths follow docs/design.md: section 4 (writes), 5 (reads), 8
// (snapshots) and 12 (the traps of hashicorp/raft and their guards).
package shard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"kvd/fsm"
	"kvd/snapshot"
)

// Transport carries the messages of one replica and tells when peers answered.
// A Transport serves one life of the raft instance and is closed with it.
type Transport interface {
	raft.Transport
	raft.WithPreVote
	raft.WithClose

	// Acked is the SEND time of the latest AppendEntries that peer answered
	// with success in exactly that term; zero if there is none.
	Acked(peer raft.ServerID, term uint64) time.Time
	// AckNotify is signalled (capacity 1) when an Acked value grows.
	AckNotify() <-chan struct{}
	// MatchIndex is the highest log index known to be on peer in that term.
	MatchIndex(peer raft.ServerID, term uint64) uint64
	// Suspend makes every outgoing message fail at once while it is true.
	Suspend(bool)

	// AppendEarly sends entries to the followers just before the leader writes
	// them to its own log. It does not wait.
	AppendEarly(term, commit uint64, entries []*raft.Log)

	// Dead reports whether the process of the peer's node is proven dead, which
	// silence does not prove.
	Dead(peer raft.ServerID) bool
	// DeathNotify is signalled (capacity 1) when a node is found dead.
	DeathNotify() <-chan struct{}
	// JudgePreVotes sets who answers requests for a pre-vote; those for which
	// it returns nil go to raft.
	JudgePreVotes(func(*raft.RequestPreVoteRequest) *raft.RequestPreVoteResponse)
	// Stand has this replica's raft stand for election at once, if still says so
	// when it is raft's turn to be told.
	Stand(still func() bool)
}

// InstallFunc receives a snapshot that a leader streams to this replica.
type InstallFunc func(context.Context, *raft.InstallSnapshotRequest, io.Reader) (*raft.InstallSnapshotResponse, error)

// LogStore is the durable log and the votes of one replica. A StoreLogs that
// has returned nil is durable.
type LogStore interface {
	raft.LogStore
	raft.StableStore
	// Reset empties the log and keeps term and vote.
	Reset() error
	// Err is why the log takes no more writes; nil while it does.
	Err() error
	// WriteStalled is how long the write in progress has been running.
	WriteStalled() time.Duration
	Close() error
}

// Config says what a replica is made of. The zero value of every duration and
// bound means its default.
type Config struct {
	Group     uint64
	ClusterID uint64
	// Replica is `<node>/<number>`; never reused after its files are gone.
	Replica raft.ServerID
	// Dir holds state.db, and staged files while a snapshot arrives.
	Dir string
	// Bootstrap is the first configuration of a new group; nil for a replica
	// that waits to be added. Ignored when the replica has state.
	Bootstrap *raft.Configuration

	// NewTransport makes the transport of the raft instance's next life. It
	// fails with ErrClosed if the node is closing.
	NewTransport func(InstallFunc) (Transport, error)
	// OpenLog opens the log; guard is the highest index that truncation of the
	// log's beginning may delete.
	OpenLog func(guard func() uint64) (LogStore, error)
	// State tunes the state machine; Path, Group, ClusterID and Witness are
	// filled in.
	State fsm.Config
	// Sequencer hands out the revisions of a group that shares them with
	// others; nil: the state numbers them itself.
	Sequencer Sequencer
	// Streams bounds the snapshots that the replicas of a process send at a
	// time; nil: no bound.
	Streams *snapshot.Limit

	HeartbeatTimeout time.Duration // follower without contact starts an election; 1 s
	ElectionTimeout  time.Duration // candidate without a result tries again; 1 s

	MaxQueueBytes    int // proposals waiting; above it they are shed; 64 MiB
	MaxBatchBytes    int // of one log entry; 1 MiB
	MaxBatchRequests int // of one log entry; 1024
	MaxInflight      int // entries proposed and not yet applied; 4
	PipelineRequests int // queued requests that do not wait for entries in flight; 256
	PipelineBytes    int // queued bytes that do not; 128 KiB

	SnapshotEntries uint64 // log entries between truncations; 10,000
	SnapshotBytes   int64  // log bytes between truncations; 256 MiB
	TrailingEntries uint64 // entries kept for lagging followers; 5,000
	TrailingBytes   int64  // bytes kept for lagging followers; 64 MiB

	// WitnessLogBytes bounds the log of a witness while a data replica lacks
	// its beginning. At the bound it takes no more writes; 4 GiB.
	WitnessLogBytes int64

	DiskStepDown time.Duration // a log write this slow silences the replica; 5 s
	DiskFatal    time.Duration // a log write this slow ends the process; 30 s

	// OnFatal is told, once, why this replica cannot go on. The process must
	// end; the data on disk is as good as it was.
	OnFatal    func(error)
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	// Faults are planted by tests to prove that the checkers see them.
	Faults Faults
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c *Config) setDefaults() {
	setDefault(&c.HeartbeatTimeout, time.Second)
	setDefault(&c.ElectionTimeout, max(time.Second, c.HeartbeatTimeout))
	setDefault(&c.MaxQueueBytes, 64<<20)
	setDefault(&c.MaxBatchBytes, 1<<20)
	setDefault(&c.MaxBatchRequests, 1024)
	setDefault(&c.MaxInflight, 4)
	setDefault(&c.PipelineRequests, 256)
	setDefault(&c.PipelineBytes, 128<<10)
	setDefault(&c.SnapshotEntries, 10_000)
	setDefault(&c.SnapshotBytes, 256<<20)
	setDefault(&c.TrailingEntries, 5_000)
	setDefault(&c.TrailingBytes, 64<<20)
	setDefault(&c.WitnessLogBytes, 4<<30)
	setDefault(&c.DiskStepDown, 5*time.Second)
	setDefault(&c.DiskFatal, 30*time.Second)
	if c.OnFatal == nil {
		c.OnFatal = func(error) {}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// MaxTrailingEntries bounds Config.TrailingEntries: the size of each is kept in
// memory.
const MaxTrailingEntries = 1 << 24

// Validate names the first field that cannot work.
func (c *Config) Validate() error {
	switch {
	case c.Replica == "" || NodeOf(c.Replica) == "":
		return fmt.Errorf("shard: replica id %q is not <node>/<number>", c.Replica)
	case c.Dir == "":
		return errors.New("shard: no directory")
	case c.NewTransport == nil || c.OpenLog == nil:
		return errors.New("shard: no transport or no log")
	case c.TrailingEntries > MaxTrailingEntries:
		return fmt.Errorf("shard: %d trailing entries exceed %d", c.TrailingEntries, MaxTrailingEntries)
	case c.HeartbeatTimeout > c.ElectionTimeout:
		return fmt.Errorf("shard: heartbeat timeout %v exceeds election timeout %v", c.HeartbeatTimeout, c.ElectionTimeout)
	}
	return nil
}

// Replica is one replica of a group. All methods are safe for concurrent use.
type Replica struct {
	cfg      Config
	log      LogStore
	registry *registry
	metrics  *metrics
	slog     *slog.Logger

	installing sync.Mutex // tried, never waited for: one snapshot at a time

	// turn has room for the one who changes the life or closes. It is not a
	// mutex because ending a life takes time.
	turn   chan struct{}
	closed atomic.Bool
	life   atomic.Pointer[life]

	floor atomic.Uint64 // what a witness may remove of its log
	held  *held         // a witness's log; nil on others

	changed broadcast // leader, role or life changed
	fatal   sync.Once
}

// Create makes the durable files of a replica that has never been opened, so
// that their absence later means that they were lost.
func Create(cfg Config) error {
	r, store, err := open(cfg)
	if err != nil {
		return err
	}
	defer r.registry.close()
	return errors.Join(r.log.Close(), store.Close())
}

// Open starts the replica in cfg.Dir, creating it if it is new. It returns
// when the state is readable; catching up with the group goes on behind.
func Open(cfg Config) (*Replica, error) {
	r, store, err := open(cfg)
	if err != nil {
		return nil, err
	}
	r.metrics = newMetrics(r)
	if err := r.startLife(newState(store), cfg.Bootstrap); err != nil {
		defer r.registry.close()
		return nil, errors.Join(err, r.log.Close(), store.Close())
	}
	return r, nil
}

// open opens state and log and makes them fit each other, without raft.
func open(cfg Config) (*Replica, *fsm.Store, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("shard: create %s: %w", cfg.Dir, err)
	}
	if err := snapshot.Cleanup(cfg.Dir); err != nil {
		return nil, nil, err
	}
	r := &Replica{cfg: cfg, turn: make(chan struct{}, 1), slog: cfg.Logger.With("group", cfg.Group, "replica", string(cfg.Replica)), registry: newRegistry(cfg)}
	r.changed.init()
	store, err := r.openFiles()
	if err != nil {
		r.registry.close()
		return nil, nil, err
	}
	return r, store, nil
}

func (r *Replica) openFiles() (*fsm.Store, error) {
	store, err := r.openState(r.statePath())
	if err != nil {
		return nil, err
	}
	if r.log, err = r.cfg.OpenLog(r.truncationGuard); err != nil {
		return nil, errors.Join(err, store.Close())
	}
	err = r.repairLog(store)
	if r.Witness() && err == nil {
		r.held = &held{log: r.slog, limitBytes: r.cfg.WitnessLogBytes, empty: emptyEntry()}
		err = r.held.measure(r.log)
	}
	if err != nil {
		return nil, errors.Join(err, r.log.Close(), store.Close())
	}
	return store, nil
}

// StateFile is the name of the state in a replica's directory.
const StateFile = "state.db"

func (r *Replica) statePath() string { return filepath.Join(r.cfg.Dir, StateFile) }

func (r *Replica) openState(path string) (*fsm.Store, error) {
	cfg := r.cfg.State
	cfg.Path, cfg.Group, cfg.ClusterID, cfg.Witness = path, r.cfg.Group, r.cfg.ClusterID, r.Witness()
	cfg.Logger, cfg.Registerer = r.slog, r.registry.registerer()
	return fsm.Open(cfg)
}

// Close stops the replica: the transport first, so that no call into raft can
// stall behind a dead peer, then raft, then state and log. A snapshot that is
// being received is dropped when the last of it has come; the owner of the
// connections ends it sooner. Idempotent.
func (r *Replica) Close() error {
	r.turn <- struct{}{}
	defer func() { <-r.turn }()
	if r.closed.Swap(true) {
		return nil
	}
	l := r.life.Load()
	l.stop()
	r.changed.fire()
	defer r.registry.close()
	return errors.Join(l.state.retire(), l.state.waitClosed(closeWait), r.log.Close())
}

// closeWait bounds how long Close waits for readers of the state.
const closeWait = 10 * time.Second

// fail reports an error after which the replica must not go on.
func (r *Replica) fail(err error) {
	r.fatal.Do(func() {
		r.slog.Error("replica halted", "error", err)
		r.cfg.OnFatal(fmt.Errorf("group %d: %w", r.cfg.Group, err))
	})
}

// AcquireState waits until this replica's state has applied minIndex and pins
// it: the state stays readable until release is called, even if a snapshot
// replaces it. release must be called exactly once, and soon: Close waits for
// it. A witness answers ErrNoState.
func (r *Replica) AcquireState(ctx context.Context, minIndex uint64) (_ *fsm.Store, release func(), _ error) {
	if r.Witness() {
		return nil, nil, ErrNoState
	}
	for {
		next := r.changed.wait()
		l := r.life.Load()
		if l.state.acquire() {
			if l.state.store.AppliedIndex() >= minIndex {
				return l.state.store, l.state.release, nil
			}
			err := l.waitApplied(ctx, minIndex)
			if err == nil {
				return l.state.store, l.state.release, nil
			}
			l.state.release()
			if ctx.Err() != nil || !l.stopped() {
				return nil, nil, err
			}
		}
		if err := r.waitLife(ctx, l, next); err != nil {
			return nil, nil, err
		}
	}
}

// waitApplied waits within this life.
func (l *life) waitApplied(ctx context.Context, index uint64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.ctx, cancel)()
	return l.state.store.WaitApplied(ctx, index)
}

// waitLife waits until old is no longer the replica's life.
func (r *Replica) waitLife(ctx context.Context, old *life, next <-chan struct{}) error {
	for r.life.Load() == old {
		if r.closed.Load() {
			return ErrClosed
		}
		select {
		case <-next:
			next = r.changed.wait()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
