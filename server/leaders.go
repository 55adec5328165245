package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"kvd/shard"
)

// leaders remembers the nodes that lead groups of which this node has no
// replica to ask. What it says may be old: whoever is asked knows better.
type leaders struct {
	mu    sync.Mutex
	nodes map[uint64]string
}

func (l *leaders) get(group uint64) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.nodes[group]
}

func (l *leaders) learn(group uint64, node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nodes == nil {
		l.nodes = make(map[uint64]string)
	}
	l.nodes[group] = node
}

// forget does nothing if another node has been learnt of meanwhile.
func (l *leaders) forget(group uint64, node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nodes[group] == node {
		delete(l.nodes, group)
	}
}

// target is where an attempt of a request goes.
type target struct {
	node    string          // thought to lead; "" = nobody is
	here    bool            // it is this node
	replica Replica         // this node's; nil = none
	changed <-chan struct{} // closed when replica hears of another leader; nil without one
}

// target finds the leader of a group: the attempt before may have been told who
// leads; else this node's replica knows best, then what other nodes have said;
// without any of it, those that have the data are asked in turn. So they are
// every other time in any case, as a replica that was removed may believe in its
// last leader for long, and as long as the one who leads is silent.
func (r *router) target(group uint64, a *attempts) target {
	t := target{replica: r.cfg.Replica(group)}
	if t.replica != nil {
		t.changed = t.replica.LeaderChanged() // before looking who leads
		leader := t.replica.Leader()
		t.node = leader.Node
		t.here = leader.Self || leader.Node == r.cfg.Node
	}
	switch {
	case !r.sharded || t.here:
	case a.hint != "":
		t.node = a.hint
	case t.node == "":
		t.node = r.guess(group, a.n)
	case a.n%2 == 1 || r.quiet.isSilent(t.node):
		t.node = cmp.Or(r.guess(group, a.n/2), t.node)
	}
	return t
}

// guess names another node.
func (r *router) guess(group uint64, attempt int) string {
	if node := r.leaders.get(group); node != "" && !r.quiet.isSilent(node) {
		return node
	}
	return r.dataNode(group, attempt)
}

// dataNode is the attempt-th of the other nodes that have data of the group, if
// possible one that is not silent.
func (r *router) dataNode(group uint64, attempt int) string {
	nodes := r.cfg.Groups.Nodes(group)
	fallback := ""
	for i := range nodes {
		node := nodes[(attempt+i)%len(nodes)]
		switch {
		case node == r.cfg.Node:
		case !r.quiet.isSilent(node):
			return node
		case fallback == "":
			fallback = node
		}
	}
	return fallback
}

// movedError is ErrNotLeader of a node that knows, or thinks to know, a leader.
type movedError struct{ node string }

func (e *movedError) Error() string { return fmt.Sprintf("%v: node %s is", shard.ErrNotLeader, e.node) }

func (e *movedError) Unwrap() error { return shard.ErrNotLeader }

// maxNodeName is how long a node's name may be.
const maxNodeName = 63

// ask calls a node that is thought to lead the group, and remembers what comes
// of it.
func (r *router) ask(ctx context.Context, group uint64, node, method string, payload []byte) (code, []byte, error) {
	c, body, err := r.call(ctx, node, method, payload)
	switch {
	case !r.sharded:
	case err != nil && !errors.Is(ctx.Err(), context.Canceled), c == codeNotLeader, c == codeMalformed:
		r.leaders.forget(group, node)
	case err == nil:
		r.leaders.learn(group, node)
	}
	if err == nil && c == codeNotLeader {
		return c, nil, r.moved(group, node, string(body))
	}
	return c, body, err
}

// askAnyone calls a node that need not lead.
func (r *router) askAnyone(ctx context.Context, _ uint64, node, method string, payload []byte) (code, []byte, error) {
	return r.call(ctx, node, method, payload)
}

// moved takes a hint by the node that does not lead.
func (r *router) moved(group uint64, node, hint string) error {
	if !r.sharded || hint == "" || len(hint) > maxNodeName || hint == node || hint == r.cfg.Node || r.quiet.isSilent(hint) {
		return shard.ErrNotLeader
	}
	r.leaders.learn(group, hint)
	return &movedError{hint}
}

// hint is who leads the group as far as this node knows; empty in answers to
// nodes that all have replicas of their own.
func (r *router) hint(group uint64, replica Replica) []byte {
	if !r.sharded {
		return nil
	}
	node := ""
	if replica != nil {
		node = replica.Leader().Node
	}
	if node == "" {
		node = r.leaders.get(group)
	}
	return []byte(node[:min(len(node), maxNodeName)])
}

// attempts paces the attempts of one request.
type attempts struct {
	router *router
	n      int    // the present one, from 0
	hint   string // where the one before was told to go
	slow   int    // how many have used up their time
	began  time.Time
	limit  time.Duration // of the present one; 0 = none
}

// again reports when it is time for another attempt after one that failed with
// err; false when ctx is done or the router closed. A first hint is followed at
// once: the nodes may send a request in circles while they elect.
func (a *attempts) again(ctx context.Context, changed <-chan struct{}, err error) bool {
	var moved *movedError
	follow := a.hint == "" && errors.As(err, &moved)
	a.hint = ""
	if follow {
		a.hint = moved.node
	}
	if a.limit > 0 && time.Since(a.began) >= a.limit {
		a.slow++
	}
	a.limit = 0
	a.n++
	if !follow && !a.router.wait(ctx, changed, a.n-1) || ctx.Err() != nil {
		return false
	}
	a.router.metrics.retries.Inc()
	return true
}

// timeout bounds the attempt that begins now and may be repeated elsewhere, so
// that a node that neither answers nor disconnects does not use up the request's
// time. It grows from least, for what takes long everywhere.
func (a *attempts) timeout(least time.Duration) time.Duration {
	a.began, a.limit = time.Now(), least<<min(a.slow, 10)
	return a.limit
}

// hasLeader reports whether this node knows a leader of the group that all clients depend on.
func (r *router) hasLeader() bool {
	replica := r.cfg.Replica(userGroup)
	return replica != nil && replica.Leader().Node != ""
}
