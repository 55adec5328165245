package transport

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// pipeline is a raft.AppendPipeline over one connection. After its first failure, which includes an
// answer without success, it fails every later send at once: raft stops reading the answers then, so
// waiting for it would never end (hashicorp/raft#612).
//
// Entries may leave before raft asks for it (Group.AppendEarly). What raft asks for later is then not sent
// again: its future gets the answer that the early message gets.
type pipeline struct {
	g      *Group
	c      *conn
	peer   raft.ServerID
	target raft.ServerAddress
	ctx    context.Context // ends with the first failure, with Close, and with the Group
	fail   context.CancelCauseFunc
	closed chan struct{}
	slots  chan struct{} // one per flight without an answer
	sent   chan *flight  // in order
	done   chan raft.AppendFuture
	tasks  sync.WaitGroup
	once   sync.Once

	turn  chan struct{} // has room for the one who sends, who may wait for room himself
	tail  tail          // turn guards it
	early []*flight     // that raft has not asked for, in order; turn guards it

	mu    sync.Mutex
	known known
}

// tail is the last entry that was sent, or that the peer is known to have; term is the leader's, 0 if
// nothing was sent yet.
type tail struct{ term, index, logTerm uint64 }

// known is what the peer has told it knows.
type known struct {
	match  uint64    // its log is this replica's up to here
	commit uint64    // and committed up to here
	sent   time.Time // when it was last sent anything
}

// flight is a message on its way, until it is answered.
type flight struct {
	s     sent
	start time.Time
	args  *raft.AppendEntriesRequest
	resp  *raft.AppendEntriesResponse
	err   error

	finished bool      // resp and err are set; pipeline.mu guards this and waiting
	waiting  []*future // raft's, that get this answer
}

func (f *flight) first() uint64 { return f.args.Entries[0].Index }
func (f *flight) last() uint64  { return f.args.Entries[len(f.args.Entries)-1].Index }

// future implements raft.AppendFuture.
type future struct {
	start time.Time
	args  *raft.AppendEntriesRequest
	resp  *raft.AppendEntriesResponse
	ready chan struct{} // closed when resp and err are set
	err   error
}

func (f *future) Error() error {
	<-f.ready
	return f.err
}
func (f *future) Start() time.Time                      { return f.start }
func (f *future) Request() *raft.AppendEntriesRequest   { return f.args }
func (f *future) Response() *raft.AppendEntriesResponse { return f.resp }

var errPipelineBroken = errors.New("an earlier request of the pipeline was not successful")

// AppendEntriesPipeline implements raft.Transport. The pipeline stays with the connection that it began
// on, so that its requests cannot overtake each other.
func (g *Group) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	c, err := g.connect(target)
	if err != nil {
		return nil, err
	}
	window := g.t.cfg.PipelineWindow
	p := &pipeline{g: g, c: c, peer: id, target: target, closed: make(chan struct{}), turn: make(chan struct{}, 1),
		slots: make(chan struct{}, window), sent: make(chan *flight, window), done: make(chan raft.AppendFuture, window)}
	p.ctx, p.fail = context.WithCancelCause(g.ctx)
	p.tasks.Go(p.deliver)
	g.peersMu.Lock()
	g.pipelines = append(g.pipelines, p)
	g.peersMu.Unlock()
	return p, nil
}

// AppendEntries implements raft.AppendPipeline. It waits for room in the window and in the connection's
// queue, at most for Config.RPCTimeout. A request that tells the peer nothing is dropped, and its future
// never comes out of Consumer.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-p.ctx.Done():
	}
	if p.ctx.Err() != nil {
		return nil, context.Cause(p.ctx)
	}
	if p.tail.term != args.Term && (len(p.early) == 0 || !p.g.t.faults.answersForOthers) {
		p.tail, p.early = tail{args.Term, args.PrevLogEntry, args.PrevLogTerm}, nil
	}
	if p.tellsNothing(args) {
		return &future{start: time.Now(), args: args, resp: resp, ready: closed}, nil
	}
	p.g.fit(args)
	f := &future{start: time.Now(), args: args, resp: resp, ready: make(chan struct{})}
	rest, covering := p.unsent(args)
	if covering != nil {
		p.attach(f, covering)
		return f, nil
	}
	return f, p.send(f, rest)
}

// send sends a request that waits for room.
func (p *pipeline) send(f *future, args *raft.AppendEntriesRequest) error {
	timeout := p.g.t.cfg.RPCTimeout
	if err := p.slot(timeout); err != nil {
		return err
	}
	fl := &flight{start: time.Now(), args: args, resp: new(raft.AppendEntriesResponse), waiting: []*future{f}}
	f.start = fl.start
	var err error
	if fl.s, err = p.g.send(p.c, p.target, timeout, args, true); err != nil {
		p.fail(err)
		return err
	}
	p.took(fl)
	return nil
}

// slot waits for room in the window.
func (p *pipeline) slot(timeout time.Duration) error {
	select {
	case p.slots <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case p.slots <- struct{}{}:
		return nil
	case <-p.ctx.Done():
		return context.Cause(p.ctx)
	case <-timer.C:
		p.fail(ErrTimeout)
		return ErrTimeout
	}
}

// took notes what has been sent. The caller has p.turn.
func (p *pipeline) took(fl *flight) {
	if n := len(fl.args.Entries); n > 0 {
		last := fl.args.Entries[n-1]
		p.tail.index, p.tail.logTerm = last.Index, last.Term
	}
	p.sent <- fl // has room: a slot was free
}

var closed = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// tellsNothing reports whether a request has neither entries nor a commit index that the peer does not have:
// raft sends one each CommitTimeout. Some still go out, for a replica that was opened again behind the same
// connection and does not remember the commit index.
func (p *pipeline) tellsNothing(args *raft.AppendEntriesRequest) bool {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(args.Entries) == 0 && args.PrevLogEntry <= p.known.match && args.LeaderCommitIndex <= p.known.commit &&
		now.Sub(p.known.sent) < p.g.t.cfg.RepeatAfter && p.c.cause() == nil {
		return true
	}
	p.known.sent = now
	return false
}

// learn notes what a peer knows that has answered with success.
func (p *pipeline) learn(args *raft.AppendEntriesRequest) {
	match := args.PrevLogEntry
	if n := len(args.Entries); n > 0 {
		match = args.Entries[n-1].Index
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known.match = max(p.known.match, match)
	p.known.commit = max(p.known.commit, min(match, args.LeaderCommitIndex))
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.done }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.once.Do(func() {
		close(p.closed)
		p.fail(raft.ErrPipelineShutdown)
		p.g.forget(p)
	})
	p.tasks.Wait()
	return nil
}

// deliver completes what was sent, in order, until Close.
func (p *pipeline) deliver() {
	for {
		select {
		case fl := <-p.sent:
			p.complete(fl)
			p.mu.Lock()
			fl.finished = true
			waiting := fl.waiting
			p.mu.Unlock()
			for _, f := range waiting {
				p.answer(f, fl)
			}
			<-p.slots
		case <-p.closed:
			if len(p.sent) == 0 {
				return
			}
		}
	}
}

// answer gives raft's future the answer to a message.
func (p *pipeline) answer(f *future, fl *flight) {
	*f.resp, f.err = *fl.resp, fl.err
	close(f.ready)
	select {
	case p.done <- f:
	case <-p.closed:
	}
}

// attach has a message that was sent before raft asked for it answer raft's future.
func (p *pipeline) attach(f *future, fl *flight) {
	f.start = fl.start
	p.mu.Lock()
	finished := fl.finished
	if !finished {
		fl.waiting = append(fl.waiting, f)
	}
	p.mu.Unlock()
	if !finished {
		return
	}
	*f.resp, f.err = *fl.resp, fl.err
	close(f.ready)
	select {
	case p.done <- f:
	case <-p.ctx.Done(): // raft reads no more
	}
}

// complete waits for the answer to a message.
func (p *pipeline) complete(fl *flight) {
	payload, err := fl.s.wait(p.ctx.Done(), fl.start.Add(p.g.t.cfg.RPCTimeout))
	if errors.Is(err, ErrClosed) && p.g.ctx.Err() == nil {
		err = context.Cause(p.ctx) // why the pipeline ended: another request may have timed out at the same instant
	}
	if err == nil {
		err = decodeResponse(payload, fl.resp)
	}
	switch {
	case err != nil:
		resetResponse(fl.resp)
		p.fail(err)
	case !fl.resp.Success:
		p.fail(errPipelineBroken)
	default:
		p.learn(fl.args)
	}
	if err == nil {
		p.g.record(p.peer, fl.start, fl.args, fl.resp)
	}
	fl.err = err
}
