package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm"
)

// source reads a range of one group, page by page, wherever its data is.
type source struct {
	router   *router
	ask      pageRequest        // of the next page
	node     string             // that is likely to have the state; "" = unknown
	done     bool               // there is no next page
	count    int64              // of all keys, if asked for
	revision int64              // of the answers' headers
	buffer   []*mvccpb.KeyValue // read, and not taken yet
}

// fetch appends the next page to the buffer; meter is told what it takes.
// Errors are those of the state machine, errPageFull, or gRPC statuses.
func (s *source) fetch(ctx context.Context, meter *sharedMeter) error {
	p, release, err := s.router.fetchPage(ctx, &s.ask, s.node)
	if err != nil {
		return err
	}
	defer release()
	if err := meter.Take(sizeOf(p.kvs)); err != nil {
		return err
	}
	if s.ask.count {
		s.count, s.ask.count = p.count, false
	}
	s.buffer = append(s.buffer, p.kvs...)
	s.done = p.next == nil
	s.ask.r.Key = p.next
	if s.ask.r.Revision <= 0 {
		s.ask.r.Revision = p.revision
	}
	s.revision = max(s.revision, p.revision)
	s.ask.lead, s.ask.index, s.node = false, p.index, p.node // where this page came from, the next one is
	return nil
}

// sizeOf is what keys take in memory.
func sizeOf(kvs []*mvccpb.KeyValue) int {
	n := 0
	for _, kv := range kvs {
		n += kvBytes + len(kv.Key) + len(kv.Value)
	}
	return n
}

// kvBytes is what a key takes beside its name and its value.
const kvBytes = 128

// fetchPage reads a page, from this node's replica if it has what is asked for.
// What cannot be had at once is tried again, here and elsewhere, until ctx ends.
func (r *router) fetchPage(ctx context.Context, p *pageRequest, node string) (*page, func(), error) {
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	for a := (attempts{router: r}); ; {
		out, release, changed, err := r.fetchOnce(ctx, &a, p, node)
		switch {
		case err == nil:
			return out, release, nil
		case isFinal(err, p):
			return nil, nil, err
		case !a.again(ctx, changed, err):
			return nil, nil, r.readStatus(ctx, err)
		}
	}
}

// isFinal tells an answer from a failure. A revision that is not asked of the
// leader is known to exist: where it is in the future, the state is behind.
func isFinal(err error, p *pageRequest) bool {
	if errors.Is(err, fsm.ErrFutureRevision) {
		return p.lead
	}
	return isRefusal(err) || errors.Is(err, errPageFull)
}

func (r *router) fetchOnce(ctx context.Context, a *attempts, p *pageRequest, node string) (_ *page, _ func(), changed <-chan struct{}, err error) {
	ctx, cancel := context.WithTimeout(ctx, a.attemptTimeout())
	defer cancel()
	to := r.target(p.group, a.n)
	switch {
	case p.lead && to.here, !p.lead && to.replica != nil && a.n%2 == 0:
		if !p.lead {
			ctx, cancel = context.WithTimeout(ctx, patience<<min(a.n, 10))
			defer cancel()
		}
		out, release, err := r.pageHere(ctx, to.replica, p)
		return out, release, to.changed, err
	case p.lead:
		node = to.node
	case node == "" || a.n > 1:
		node = r.dataNode(p.group, a.n/2)
	}
	if node == "" || node == r.cfg.Node {
		return nil, nil, to.changed, errNoLeader
	}
	out, err := r.pageThere(ctx, node, p)
	if err == nil {
		out.node = node
	}
	return out, func() {}, to.changed, err
}

// patience is how long a read waits for this node's replica to catch up before
// it goes to another one.
const patience = 250 * time.Millisecond

// sharedMeter is a meter for several goroutines.
type sharedMeter struct {
	mu    sync.Mutex
	meter *answerMeter
}

func (m *sharedMeter) Take(n int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.meter.Take(n)
}

// give back what is no longer kept.
func (m *sharedMeter) give(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.meter.give(n)
}
