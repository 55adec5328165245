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
	bytes    int
	refusing bool
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
	abandoned        // the caller has left before it was proposed
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
		if p.taken.CompareAndSwap(queued, abandoned) {
			return fsm.Result{}, fmt.Errorf("%w: %w", ErrNotProposed, ctx.Err())
		}
		return fsm.Result{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, ctx.Err())
	}
}

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
			batch := p.take(&entry)
			if len(batch) == 0 {
				<-p.slots
				break
			}
			start := time.Now()
			future := p.l.raft.Apply(entry.Bytes(), 0)
			if p.l.r.cfg.Faults.AcknowledgeBeforeCommit {
				acknowledgeNow(batch)
			}
			p.sent <- inflight{future, batch, start}
		}
	}
}

// ready reports whether there is something to propose and the right to do so.
func (p *proposer) ready() bool {
	e := p.l.role.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.queue) > 0 && (len(p.slots) == 0 || p.full()) && e != nil && e.isServing()
}

// take moves the head of the queue into a fresh entry.
func (p *proposer) take(entry *fsm.EntryBuilder) []*proposal {
	entry.Reset()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refusing {
		return nil
	}
	n := 0
	batch := make([]*proposal, 0, min(len(p.queue), p.l.r.cfg.MaxBatchRequests))
	for _, item := range p.queue {
		full := len(batch) == p.l.r.cfg.MaxBatchRequests ||
			len(batch) > 0 && entry.SizeBytes()+len(item.request.Data) > p.l.r.cfg.MaxBatchBytes
		if full {
			break
		}
		n++
		p.bytes -= len(item.request.Data)
		if item.taken.CompareAndSwap(queued, proposed) {
			entry.Add(item.request)
			batch = append(batch, item)
		}
	}
	rest := copy(p.queue, p.queue[n:])
	clear(p.queue[rest:])
	p.queue = p.queue[:rest]
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
			for i, item := range s.batch {
				item.done <- outcome{result: answer.results[i]}
			}
		default:
			err = classify(err)
			for _, item := range s.batch {
				item.done <- outcome{err: err}
			}
		}
		<-p.slots
		p.open.Done()
		p.kick()
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
	queue := p.queue
	p.queue, p.bytes = nil, 0
	p.mu.Unlock()
	for _, item := range queue {
		if item.taken.CompareAndSwap(queued, proposed) {
			item.done <- outcome{err: err}
		}
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
