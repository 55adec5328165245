package shard

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"kvd/fsm"
)

// proposer gathers requests and proposes them as few, large log entries:
// everything that has queued up while earlier entries were written goes into
// the next one. Memory is bounded by the bytes in the queue.
type proposer struct {
	l     *life
	wake  chan struct{}  // capacity 1: the queue or the role changed
	slots chan struct{}  // one per entry in flight
	sent  chan inflight  // entries in flight, in log order
	open  sync.WaitGroup // calls that raft has not answered yet
	idle  sync.Pool      // of *proposal

	mu       sync.Mutex
	queue    []*proposal
	held     []*proposal // the next entry's; in groups with a sequencer they wait for revisions
	bytes    int         // of queue and held, without those who have left
	left     int         // how many have left since the queue was cleared of them
	refusing bool
	sequence sequence
}

// proposal is one request on its way into the log.
type proposal struct {
	request fsm.Request
	taken   atomic.Int32 // one of the three below
	done    chan outcome // capacity 1
}

const (
	queued    = iota // certainly not in the log
	proposed         // may be in the log
	abandoned        // the caller has left
)

type outcome struct {
	result fsm.Result
	err    error
}

// inflight is one log entry that raft has been given.
type inflight struct {
	future raft.ApplyFuture
	batch  []*proposal
	start  time.Time
	ask    *ask // nil without a sequencer
}

func newProposer(l *life) *proposer {
	return &proposer{
		l:     l,
		wake:  make(chan struct{}, 1),
		slots: make(chan struct{}, l.r.cfg.MaxInflight),
		sent:  make(chan inflight, l.r.cfg.MaxInflight),
		idle:  sync.Pool{New: func() any { return &proposal{done: make(chan outcome, 1)} }},
	}
}

// Propose replicates one request and returns what the state machine answered:
// when it returns without error, the request is durable on a quorum and
// applied here. It must be called on the leader. ErrNotLeader, ErrOverloaded,
// ErrNotProposed and ErrTooLarge are definite: the request is not in the log.
// ErrUnknownOutcome is not.
func (r *Replica) Propose(ctx context.Context, request fsm.Request) (fsm.Result, error) {
	if len(request.Data) > r.cfg.MaxQueueBytes/4 {
		return fsm.Result{}, ErrTooLarge
	}
	q := r.life.Load().proposer
	p := q.idle.Get().(*proposal)
	p.request = request
	p.taken.Store(queued)
	if err := q.enqueue(p); err != nil {
		q.idle.Put(p)
		return fsm.Result{}, err
	}
	select {
	case o := <-p.done:
		p.request = fsm.Request{}
		q.idle.Put(p)
		return o.result, o.err
	case <-ctx.Done():
		return fsm.Result{}, fmt.Errorf("%w: %w", q.leave(p), ctx.Err())
	}
}

// leave makes sure that a request whose caller is going is not proposed from
// here on, and says what may have become of it.
func (p *proposer) leave(item *proposal) error {
	for {
		switch { // it may change between the two, in either direction
		case item.taken.CompareAndSwap(proposed, abandoned):
			return ErrUnknownOutcome
		case item.taken.CompareAndSwap(queued, abandoned):
			p.forget(item)
			return ErrNotProposed
		}
	}
}

// forget frees what an abandoned request holds. A group that cannot propose
// for long must not fill its memory with those that nobody waits for.
func (p *proposer) forget(item *proposal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bytes -= len(item.request.Data)
	item.request = fsm.Request{}
	p.left++
	if p.left > p.l.r.cfg.MaxBatchRequests && p.left > len(p.queue)/2 {
		p.queue, p.left = slices.DeleteFunc(p.queue, (*proposal).isAbandoned), 0
	}
}

func (p *proposal) isAbandoned() bool { return p.taken.Load() == abandoned }

func (p *proposer) enqueue(item *proposal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.refusing:
		return ErrNotLeader
	case p.l.role.Load() == nil:
		return ErrNotLeader
	case p.bytes+len(item.request.Data) > p.l.r.cfg.MaxQueueBytes:
		p.l.r.metrics.shed.Inc()
		return ErrOverloaded
	}
	p.queue = append(p.queue, item)
	p.bytes += len(item.request.Data)
	if len(p.queue) == 1 || p.full() {
		p.kick()
	}
	return nil
}

// full reports whether what is queued is worth an entry of its own while
// others are in flight. Below that, waiting for them makes fewer, larger
// entries, and each entry costs every replica a write to disk. p.mu is held.
func (p *proposer) full() bool {
	return len(p.queue) >= p.l.r.cfg.PipelineRequests || p.bytes >= p.l.r.cfg.PipelineBytes
}

func (p *proposer) kick() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run proposes batches while this replica serves.
func (p *proposer) run() {
	defer close(p.sent)
	var entry fsm.EntryBuilder
	for {
		select {
		case <-p.wake:
		case <-p.l.done:
			return
		}
		for p.ready() {
			select {
			case p.slots <- struct{}{}:
			case <-p.l.done:
				return
			}
			batch, ask := p.next(&entry)
			if len(batch) == 0 {
				<-p.slots
				continue
			}
			start := time.Now()
			future := p.l.raft.Apply(entry.Bytes(), 0)
			if p.l.r.cfg.Faults.AcknowledgeBeforeCommit {
				acknowledgeNow(batch)
			}
			p.sent <- inflight{future, batch, start, ask}
		}
	}
}

// ready reports whether there is something to propose and the right to do so.
func (p *proposer) ready() bool {
	e := p.l.role.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.queue)+len(p.held) > 0 && (len(p.slots) == 0 || p.full()) && !p.refusing && e != nil && e.isServing()
}

// next makes an entry of what is queued.
func (p *proposer) next(entry *fsm.EntryBuilder) ([]*proposal, *ask) {
	if p.l.r.cfg.Sequencer != nil {
		return p.nextSequenced(entry)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gather()
	return p.seal(entry), nil
}

// requestOverhead is what an entry needs for a request besides its data.
const requestOverhead = 6

// gather moves the head of the queue, as much as fits into one entry with it,
// to what is held, and returns how many requests that are. p.mu is held.
func (p *proposer) gather() int {
	p.held = slices.DeleteFunc(p.held, (*proposal).isAbandoned)
	size := 0
	for _, item := range p.held {
		size += len(item.request.Data) + requestOverhead
	}
	n := 0
	for _, item := range p.queue {
		size += len(item.request.Data) + requestOverhead
		if len(p.held) == p.l.r.cfg.MaxBatchRequests || len(p.held) > 0 && size > p.l.r.cfg.MaxBatchBytes {
			break
		}
		n++
		if !item.isAbandoned() {
			p.held = append(p.held, item)
		}
	}
	rest := copy(p.queue, p.queue[n:])
	clear(p.queue[rest:])
	p.queue = p.queue[:rest]
	return len(p.held)
}

// seal makes a fresh entry of what is held and still wanted. p.mu is held.
func (p *proposer) seal(entry *fsm.EntryBuilder) []*proposal {
	entry.Reset()
	if p.refusing {
		return nil
	}
	batch := make([]*proposal, 0, len(p.held))
	for _, item := range p.held {
		if item.taken.CompareAndSwap(queued, proposed) {
			p.bytes -= len(item.request.Data)
			entry.Add(item.request)
			batch = append(batch, item)
		}
	}
	clear(p.held)
	p.held = p.held[:0]
	if len(batch) > 0 {
		p.open.Add(1)
	}
	return batch
}

// complete answers the requests of each entry, in log order.
func (p *proposer) complete() {
	for s := range p.sent {
		err := s.future.Error()
		answer, ok := s.future.Response().(applied)
		switch {
		case err == nil && ok && len(answer.results) == len(s.batch):
			p.l.r.metrics.commitSeconds.Observe(time.Since(s.start).Seconds())
			p.l.r.metrics.batchRequests.Observe(float64(len(s.batch)))
			p.answer(s.batch, answer.results)
		default:
			err = classify(err)
			for _, item := range s.batch {
				item.done <- outcome{err: err}
			}
		}
		if s.ask != nil {
			p.settled(s.ask, errors.Is(err, ErrUnknownOutcome))
		}
		<-p.slots
		p.open.Done()
		p.kick()
	}
}

// answer answers the requests of an entry that was applied.
func (p *proposer) answer(batch []*proposal, results []fsm.Result) {
	var stale []*proposal
	for i, item := range batch {
		if results[i].Err != nil && errors.Is(results[i].Err, fsm.ErrStaleFloor) {
			stale = append(stale, item)
			continue
		}
		item.done <- outcome{result: results[i]}
	}
	if len(stale) > 0 {
		p.requeue(stale)
	}
}

// classify says what an error of raft's Apply means for the request. Only
// errors that raft gives before it writes the entry are definite.
func classify(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress), errors.Is(err, raft.ErrEnqueueTimeout):
		return ErrNotLeader
	case err == nil:
		return ErrUnknownOutcome // the state machine has halted
	default:
		return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
}

// flush answers everything that is not proposed yet.
func (p *proposer) flush(err error) {
	p.mu.Lock()
	p.dropAsk()
	waiting := slices.Concat(p.held, p.queue)
	p.held, p.queue, p.left = nil, nil, 0
	waiting = slices.DeleteFunc(waiting, func(item *proposal) bool { return !item.taken.CompareAndSwap(queued, proposed) })
	for _, item := range waiting {
		p.bytes -= len(item.request.Data)
	}
	p.mu.Unlock()
	for _, item := range waiting {
		item.done <- outcome{err: err}
	}
}

// refuse stops taking requests; those not proposed yet get ErrNotLeader.
func (p *proposer) refuse() {
	p.mu.Lock()
	p.refusing = true
	p.mu.Unlock()
	p.flush(ErrNotLeader)
}

// begin counts a call of raft, unless this life is ending; open.Done ends it.
func (p *proposer) begin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.refusing {
		p.open.Add(1)
	}
	return !p.refusing
}

// queuedBytes is how many bytes wait to be proposed.
func (p *proposer) queuedBytes() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bytes
}
