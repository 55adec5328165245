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
func (r *router) fetchPage(ctx context.Context, p *pageRequest, node string) (out *page, release func(), err error) {
	here := func(ctx context.Context, replica Replica) error {
		out, release, err = r.pageHere(ctx, replica, p)
		return err
	}
	there := func(ctx context.Context, node string) error {
		release = func() {}
		if out, err = r.pageThere(ctx, node, p); err == nil {
			out.node = node
		}
		return err
	}
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	if p.lead {
		err = r.onLeader(ctx, p.group, here, there)
	} else {
		err = r.onState(ctx, p.group, node, here, there)
	}
	return out, release, err
}

// onLeader has the group's leader answer a read, wherever it is. It ends with
// the answer, a refusal, or when ctx does.
func (r *router) onLeader(ctx context.Context, group uint64, here func(context.Context, Replica) error, there func(context.Context, string) error) error {
	for a := (attempts{router: r}); ; {
		to := r.target(group, &a)
		err := errNoLeader
		attempt, cancel := context.WithTimeout(ctx, a.timeout(minAttempt))
		switch {
		case to.here:
			err = here(attempt, to.replica)
		case to.node != "":
			err = there(attempt, to.node)
		}
		cancel()
		switch {
		case err == nil || isRefusal(err) || errors.Is(err, errPageFull):
			return err
		case !a.again(ctx, to.changed, err):
			return r.readStatus(ctx, err)
		}
	}
}

// onState has a state of the group answer a read: this node's, if it soon has
// what the read needs, or that of node, or those of others in turn. It ends
// with the answer, a refusal, or when ctx does.
func (r *router) onState(ctx context.Context, group uint64, node string, here func(context.Context, Replica) error, there func(context.Context, string) error) error {
	for a := (attempts{router: r}); ; {
		replica := r.cfg.Replica(group)
		err := errNoReplica
		if replica != nil && a.n%2 == 0 && (a.n > 0 || node == "" || !r.behind.isSilent(group)) {
			attempt, cancel := context.WithTimeout(ctx, a.timeout(minAttempt))
			err = here(attempt, replica)
			cancel()
		} else {
			if node == "" || a.n > 1 {
				node = r.dataNode(group, a.n/2)
			}
			if node != "" && node != r.cfg.Node {
				attempt, cancel := context.WithTimeout(ctx, a.timeout(minAttempt))
				err = there(attempt, node)
				cancel()
			}
		}
		// Revisions that are asked for here are known to exist. If this one is
		// in the state's future, the state is behind.
		switch {
		case err == nil || isRefusal(err) && !errors.Is(err, fsm.ErrFutureRevision) || errors.Is(err, errPageFull):
			return err
		case !a.again(ctx, nil, err):
			return r.readStatus(ctx, err)
		}
	}
}

const (
	// minAttempt is how long a read first waits for an answer.
	minAttempt = time.Second
	// patience is how long it waits for this node's state to catch up, if
	// another node has one.
	patience = minAttempt / 2
)

// pinFor pins a state that has applied index, or will have soon.
func pinFor(ctx context.Context, replica Replica, index uint64) (*fsm.Store, func(), error) {
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, max(time.Until(deadline)/2, patience))
		defer cancel()
	}
	state, release, err := replica.AcquireState(ctx, index)
	if err != nil {
		return nil, nil, elsewhere(err)
	}
	return state, release, nil
}

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
