package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
)

var (
	// ErrVirtual: raft tried to write a snapshot of its own. States travel as streams and are installed
	// outside of raft, so nothing may be written here.
	ErrVirtual = errors.New("the snapshot store is virtual: nothing is written to it")

	// ErrNotDurable: raft finished a snapshot of an index that the state has not made durable. The log must
	// not be truncated up to there.
	ErrNotDurable = errors.New("the state is not durable up to the snapshot's index")

	// ErrNoSnapshot: nothing of the state is durable yet.
	ErrNoSnapshot = errors.New("no durable state to make a snapshot of")

	// ErrClosed: the Store has been closed.
	ErrClosed = errors.New("snapshot store is closed")
)

// DefaultLinger is how long the log is kept for a follower that has just received a stream.
const DefaultLinger = 30 * time.Second

// Config of a Store. The zero value is valid.
type Config struct {
	// Linger is how long after a stream was read to its end the log entries that follow it are still held
	// (see HoldIndex): the follower has to install the stream before it asks for them. 0 is DefaultLinger,
	// a negative value is none.
	Linger time.Duration

	// Limit is shared by the Stores whose streams together have a bound; nil is none.
	Limit *Limit

	Logger     *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil registers nothing
}

// Store is a raft.SnapshotStore that stores nothing: the state itself is the one snapshot there is. List
// tells of what the state has made durable, Open makes a stream of it, Create returns a sink that only checks
// that the state is durable before raft may truncate the log. All methods may be called concurrently.
type Store struct {
	src     Source
	linger  time.Duration
	limit   *Limit
	log     *slog.Logger
	metrics *metrics
	ctx     context.Context // ends the streams at Close
	cancel  context.CancelFunc
	streams sync.WaitGroup

	mu     sync.Mutex // never held while src is called
	closed bool
	holds  map[*stream]hold
}

// hold keeps log entries from index on, until the time expires if that is set.
type hold struct {
	index   uint64
	expires time.Time
}

var _ raft.SnapshotStore = (*Store)(nil)

// NewStore returns a Store over src, whose methods it calls from many goroutines until Close.
func NewStore(src Source, cfg Config) *Store {
	s := &Store{src: src, linger: cfg.Linger, limit: cfg.Limit, log: cfg.Logger, metrics: newMetrics(cfg.Registerer), holds: map[*stream]hold{}}
	if s.linger == 0 {
		s.linger = DefaultLinger
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Close breaks off the streams that run and waits for them to let go of the state. Further Opens fail with
// ErrClosed; readers that are still open must still be closed.
func (s *Store) Close() error {
	s.mu.Lock()
	wasClosed := s.closed
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.streams.Wait()
	if !wasClosed {
		s.metrics.Leave()
	}
	return nil
}

// List returns the durable state's metadata, or nothing while there is none. Size is 0: only Open knows it.
func (s *Store) List() ([]*raft.SnapshotMeta, error) {
	meta, ok := s.src.SnapshotMeta()
	if !ok {
		return nil, nil
	}
	return []*raft.SnapshotMeta{raftMeta(meta, 0)}, nil
}

func raftMeta(m Meta, size int64) *raft.SnapshotMeta {
	return &raft.SnapshotMeta{
		Version:            raft.SnapshotVersionMax,
		ID:                 snapshotID(m.Term, m.Index),
		Index:              m.Index,
		Term:               m.Term,
		Configuration:      m.Configuration.Clone(),
		ConfigurationIndex: m.ConfigurationIndex,
		Size:               size,
	}
}

func snapshotID(term, index uint64) string { return fmt.Sprintf("%d-%d", term, index) }

// HoldIndex returns the lowest index of a log entry that a stream, running or just read to its end, still
// needs: that of the last entry in the stream itself, whose term the leader has to name when it goes on from
// there. ok is false if there is no such stream.
//
// Whoever truncates the log must read how far the state is durable BEFORE this; Guard does both.
func (s *Store) HoldIndex() (index uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	index = math.MaxUint64
	for r, h := range s.holds {
		if !h.expires.IsZero() && time.Until(h.expires) <= 0 {
			delete(s.holds, r)
			continue
		}
		index, ok = min(index, h.index), true
	}
	if !ok {
		return 0, false
	}
	return index, true
}

// Guard returns the highest index up to which the log may be truncated: everything up to there is durable in
// the state, and no stream needs it, not even one that is opened next, which ends with the last durable entry.
//
// The order matters. A stream takes its hold before it opens its transaction. If no hold is seen here, the
// transaction of any later stream is opened after the durable index was read, and so contains it.
func (s *Store) Guard() uint64 {
	meta, ok := s.src.SnapshotMeta()
	if !ok || meta.Index == 0 {
		return 0
	}
	if h, held := s.HoldIndex(); held {
		return min(meta.Index, h) - 1
	}
	return meta.Index - 1
}

// Open starts a stream of the newest durable state, whatever id names: raft goes by the metadata returned
// here. The reader gives exactly meta.Size bytes, or an error in place of io.EOF; it is for one goroutine.
// Until it is closed it keeps a read transaction open, and the log from meta.Index on (see HoldIndex). Close
// may be called at any time, also while a Read blocks. Open waits while the Limit's streams are all open, and holds
// nothing meanwhile.
func (s *Store) Open(string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	if err := s.limit.enter(s.ctx); err != nil {
		return nil, nil, err
	}
	meta, r, err := s.open()
	if err != nil {
		s.limit.leave()
		return nil, nil, err
	}
	return meta, r, nil
}

func (s *Store) open() (*raft.SnapshotMeta, *stream, error) {
	// What is durable now can only be at or below what the transaction will see.
	durable, ok := s.src.SnapshotMeta()
	if !ok {
		return nil, nil, ErrNoSnapshot
	}
	r := &stream{store: s, opened: make(chan *raft.SnapshotMeta, 1), done: make(chan struct{})}
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(s.ctx)
	r.pipe, r.feed = io.Pipe()
	if err := s.hold(r, max(durable.Index, 1)); err != nil {
		r.cancel()
		return nil, nil, err
	}
	go r.run(ctx)
	select {
	case meta := <-r.opened:
		s.log.Info("snapshot stream opened", "index", meta.Index, "term", meta.Term, "bytes", meta.Size)
		return meta, r, nil
	case <-r.done:
		err := r.err
		r.end()
		return nil, nil, fmt.Errorf("open snapshot: %w", err)
	}
}

// hold registers r with its first hold, unless the store is closed.
func (s *Store) hold(r *stream, index uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.holds[r] = hold{index: index}
	s.streams.Add(1)
	s.metrics.running.Inc()
	return nil
}

// raise moves r's hold up to what its transaction really contains.
func (s *Store) raise(r *stream, index uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h, ok := s.holds[r]; ok {
		h.index = max(h.index, index)
		s.holds[r] = h
	}
}

func (s *Store) release(r *stream, complete bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.metrics.running.Dec()
	h := s.holds[r]
	if !complete || s.linger < 0 {
		delete(s.holds, r)
		return
	}
	h.expires = time.Now().Add(s.linger)
	s.holds[r] = h
}

// stream is one transfer: a goroutine that feeds a pipe from inside a read transaction.
type stream struct {
	store  *Store
	cancel context.CancelFunc
	pipe   *io.PipeReader
	feed   *io.PipeWriter
	opened chan *raft.SnapshotMeta // one value, once the transaction is open
	done   chan struct{}           // closed when the transaction is closed and err set
	err    error
	close  sync.Once
}

func (r *stream) run(ctx context.Context) {
	defer r.store.streams.Done()
	defer close(r.done)
	stop := context.AfterFunc(ctx, func() { r.feed.CloseWithError(context.Cause(ctx)) })
	defer stop()
	r.err = r.store.src.ViewSnapshot(ctx, func(tx *bbolt.Tx, meta Meta) error {
		size := StreamSize(tx, meta)
		r.store.raise(r, meta.Index)
		r.opened <- raftMeta(meta, size)
		n, err := WriteStream(ctx, r.store.limit.Writer(ctx, r.feed), tx, meta)
		r.store.metrics.bytes.Add(float64(n))
		if err == nil && n != size {
			err = fmt.Errorf("snapshot: wrote %d bytes instead of %d", n, size)
		}
		return err
	})
	if r.err == nil {
		r.store.metrics.complete.Inc()
	} else {
		r.store.metrics.broken.Inc()
	}
	r.feed.CloseWithError(r.err)
}

func (r *stream) Read(b []byte) (int, error) { return r.pipe.Read(b) }

// Close ends the transfer and waits until its transaction is closed. Calling it again does nothing.
func (r *stream) Close() error {
	r.close.Do(func() {
		r.end()
		r.store.limit.leave()
	})
	return nil
}

func (r *stream) end() {
	r.pipe.Close()
	r.cancel()
	<-r.done
	r.store.release(r, r.err == nil)
}

// Create returns the sink for a snapshot that raft takes of the state. It copies nothing: the state machine's
// Persist makes the state durable, and the sink's Close checks that it did.
func (s *Store) Create(_ raft.SnapshotVersion, index, term uint64, _ raft.Configuration, _ uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	return &sink{store: s, index: index, id: snapshotID(term, index)}, nil
}

type sink struct {
	store *Store
	index uint64
	id    string
}

func (k *sink) ID() string                { return k.id }
func (k *sink) Write([]byte) (int, error) { return 0, ErrVirtual }
func (k *sink) Cancel() error             { return nil }

func (k *sink) Close() error {
	if meta, _ := k.store.src.SnapshotMeta(); meta.Index < k.index {
		return fmt.Errorf("%w: %d, durable is %d", ErrNotDurable, k.index, meta.Index)
	}
	return nil
}
