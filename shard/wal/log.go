package wal

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// Log is the log of all replicas of a node. All methods may be called concurrently.
type Log struct {
	options  Options
	log      *slog.Logger
	metrics  metrics
	lock     io.Closer
	segments segments

	born    time.Time
	writing atomic.Int64 // 1 + nanoseconds from born to when the running batch began; 0 = none runs

	populating chan struct{} // capacity 1: held by whoever creates or removes a replica

	mu         sync.Mutex // never held during I/O, nor while waiting
	head, tail *request   // those that wait to be written
	leading    bool       // somebody writes
	closing    bool
	failed     error
	population population // changed by who leads
	spares     []spare
	lastSpare  uint64

	idle   chan struct{} // closed when nobody writes any more, after closing
	closed chan struct{} // closed when Close is done

	// Of whoever leads.
	active     *segment // the last one; nil = none has a batch yet
	sequence   uint64   // of the last batch
	lastNumber uint64   // of the last segment that was taken
	asked      bool     // the next one is being prepared, or is ready
	buffer     []byte

	done     chan struct{} // ends the tasks
	tasks    sync.WaitGroup
	wanted   chan uint64   // capacity 1: the segment to prepare
	ready    chan prepared // capacity 1
	cleaning chan struct{} // capacity 1: there may be something to clean
}

// Open opens or makes the log in a directory and reads all of it. It fails with ErrLocked, with ErrCorrupt, and
// otherwise with the file system's error.
func Open(o Options) (*Log, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o.setDefaults()
	l := &Log{
		options: o, log: o.Logger, born: time.Now(), population: newPopulation(),
		populating: make(chan struct{}, 1),
		idle:       make(chan struct{}), closed: make(chan struct{}), done: make(chan struct{}),
		wanted: make(chan uint64, 1), ready: make(chan prepared, 1), cleaning: make(chan struct{}, 1),
	}
	if err := l.recover(); err != nil {
		return nil, fmt.Errorf("open raft log: %w", err)
	}
	l.metrics = newMetrics(o.Registerer, l)
	l.tasks.Go(l.prepare)
	l.tasks.Go(l.clean)
	l.kick()
	return l, nil
}

// Replicas returns those that exist, in order.
func (l *Log) Replicas() []ID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return sortedIDs(l.population.replicas)
}

// Create makes a replica with an empty log, durably. ErrExists if it exists or ever has.
func (l *Log) Create(id ID) error {
	l.populating <- struct{}{}
	defer func() { <-l.populating }()
	l.mu.Lock()
	exists := l.population.replicas[id] != nil || l.population.removed[id]
	l.mu.Unlock()
	if exists {
		return fmt.Errorf("%w: %s", ErrExists, id)
	}
	rep := newReplica(id, &l.segments)
	rep.turn <- struct{}{}
	defer func() { <-rep.turn }()
	return l.submit(rep.ask(kindCreate))
}

// Remove forgets a replica, durably: its entries, its votes and all stable keys. ErrNoReplica if there is none,
// ErrInUse if its Store is open.
func (l *Log) Remove(id ID) error {
	l.populating <- struct{}{}
	defer func() { <-l.populating }()
	l.mu.Lock()
	rep := l.population.replicas[id]
	l.mu.Unlock()
	if rep == nil {
		return fmt.Errorf("%w: %s", ErrNoReplica, id)
	}
	rep.turn <- struct{}{}
	defer func() { <-rep.turn }()
	if !rep.leave() {
		return fmt.Errorf("%w: %s", ErrInUse, id)
	}
	return l.submit(rep.ask(kindRemove))
}

// ask returns the replica's request, of a kind. The caller has the turn.
func (r *replica) ask(k kind) *request {
	r.request = request{kind: k, rep: r, wake: r.request.wake}
	return &r.request
}

// Err returns nil, or an error that is ErrFailed once a write has failed. It never waits.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

// unusable says why nothing can be written, if so. The caller holds l.mu.
func (l *Log) unusable() error {
	if l.closing {
		return ErrClosed
	}
	return l.failed
}

func (l *Log) unusableNow() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.unusable()
}

// fail makes every later write fail. It leaves alone what is no failure of the log's own.
func (l *Log) fail(err error) error {
	if errors.Is(err, ErrClosed) || errors.Is(err, ErrFailed) {
		return err
	}
	err = fmt.Errorf("%w: %w", ErrFailed, err)
	l.mu.Lock()
	if l.failed == nil {
		l.failed = err
	}
	l.mu.Unlock()
	l.log.Error("a write to the raft log failed: the node has to stop", "dir", l.options.Dir, "error", err)
	return err
}

// WriteStalled returns for how long the write that runs now has been running, 0 if none runs. It never waits.
func (l *Log) WriteStalled() time.Duration {
	began := l.writing.Load()
	if began == 0 {
		return 0
	}
	return max(time.Since(l.born)-time.Duration(began-1), 1)
}

// kick has the oldest segments looked at.
func (l *Log) kick() {
	select {
	case l.cleaning <- struct{}{}:
	default:
	}
}

// Close waits for the writes that run, leaves the mark of a clean close if none has failed, and closes the
// files. It returns a failure that Err has not returned before. Calling it again does nothing. Everything else fails with ErrClosed afterwards, also on the Stores.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		<-l.closed
		return nil
	}
	l.closing = true
	before := l.failed
	if !l.leading {
		close(l.idle)
	}
	l.mu.Unlock()
	<-l.idle
	close(l.done)
	l.tasks.Wait()
	defer close(l.closed)
	err := l.Err()
	switch {
	case err == nil:
		err = l.markClosed()
	case before != nil:
		err = nil
	}
	return errors.Join(err, l.release())
}

// release closes everything.
func (l *Log) release() error {
	l.metrics.unregister()
	select {
	case p := <-l.ready:
		if p.segment != nil {
			p.segment.file.Close()
		}
	default:
	}
	for _, s := range l.spares {
		s.file.Close()
	}
	for _, seg := range l.segments.all() {
		seg.file.Close()
	}
	return l.lock.Close()
}
