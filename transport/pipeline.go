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
type pipeline struct {
	g      *Group
	c      *conn
	peer   raft.ServerID
	target raft.ServerAddress
	ctx    context.Context // ends with the first failure, with Close, and with the Group
	fail   context.CancelCauseFunc
	closed chan struct{}
	slots  chan struct{} // one per request without an answer
	sent   chan *future  // in order
	done   chan raft.AppendFuture
	tasks  sync.WaitGroup
	once   sync.Once

	mu    sync.Mutex
	known known
}

// known is what the peer has told it knows.
type known struct {
	match  uint64    // its log is this replica's up to here
	commit uint64    // and committed up to here
	sent   time.Time // when it was last sent anything
}

// future implements raft.AppendFuture.
type future struct {
	s     sent
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
	p := &pipeline{g: g, c: c, peer: id, target: target, closed: make(chan struct{}),
		slots: make(chan struct{}, window), sent: make(chan *future, window), done: make(chan raft.AppendFuture, window)}
	p.ctx, p.fail = context.WithCancelCause(g.ctx)
	p.tasks.Go(p.deliver)
	return p, nil
}

// AppendEntries implements raft.AppendPipeline. It waits for room in the window and in the connection's
// queue, at most for Config.RPCTimeout. A request that tells the peer nothing is dropped, and its future
// never comes out of Consumer.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	if p.ctx.Err() != nil {
		return nil, context.Cause(p.ctx)
	}
	if p.tellsNothing(args) {
		return &future{start: time.Now(), args: args, resp: resp, ready: closed}, nil
	}
	timeout := p.g.t.cfg.RPCTimeout
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case p.slots <- struct{}{}:
	case <-p.ctx.Done():
		return nil, context.Cause(p.ctx)
	case <-timer.C:
		p.fail(ErrTimeout)
		return nil, ErrTimeout
	}
	p.g.fit(args)
	f := &future{start: time.Now(), args: args, resp: resp, ready: make(chan struct{})}
	var err error
	if f.s, err = p.g.send(p.c, p.target, timeout, args); err != nil {
		p.fail(err)
		return nil, err
	}
	p.sent <- f // has room: a slot was free
	return f, nil
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
	})
	p.tasks.Wait()
	return nil
}

// deliver completes the futures in order, until Close.
func (p *pipeline) deliver() {
	for {
		select {
		case f := <-p.sent:
			p.complete(f)
			select {
			case p.done <- f:
				<-p.slots
			case <-p.closed:
			}
		case <-p.closed:
			if len(p.sent) == 0 {
				return
			}
		}
	}
}

// complete waits for the answer to a request.
func (p *pipeline) complete(f *future) {
	timer := time.NewTimer(time.Until(f.start.Add(p.g.t.cfg.RPCTimeout)))
	defer timer.Stop()
	payload, err := f.s.wait(p.ctx.Done(), timer.C)
	if errors.Is(err, ErrClosed) && p.g.ctx.Err() == nil {
		err = context.Cause(p.ctx) // why the pipeline ended: another request may have timed out at the same instant
	}
	if err == nil {
		err = decodeResponse(payload, f.resp)
	}
	switch {
	case err != nil:
		resetResponse(f.resp)
		p.fail(err)
	case !f.resp.Success:
		p.fail(errPipelineBroken)
	default:
		p.learn(f.args)
	}
	if err == nil {
		p.g.record(p.peer, f.start, f.args, f.resp)
	}
	f.err = err
	close(f.ready)
}
