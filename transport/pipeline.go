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
// queue, at most for Config.RPCTimeout.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	timeout := p.g.t.cfg.RPCTimeout
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	if p.ctx.Err() != nil {
		return nil, context.Cause(p.ctx)
	}
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
	}
	if err == nil {
		p.g.record(p.peer, f.start, f.args, f.resp)
	}
	f.err = err
	close(f.ready)
}
