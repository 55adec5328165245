package transport

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// link is this node's side of the connection to one peer: it dials when there is something to send and
// no connection, and not more often than its backoff allows.
type link struct {
	t    *Transport
	node string

	mu       sync.Mutex
	conn     *conn         // nil = not connected
	dialing  chan struct{} // closed when the attempt under way ends; nil = none
	err      error         // of the last attempt
	failures int           // since the last success
	retryAt  time.Time
	probing  bool // somebody finds out whether the process is dead
	dead     bool // it is
}

// link returns the link to a node, a new one if need be.
func (t *Transport) link(node string) *link {
	t.mu.RLock()
	l := t.links[node]
	t.mu.RUnlock()
	if l != nil {
		return l
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if l = t.links[node]; l == nil {
		l = &link{t: t, node: node}
		t.links[node] = l
	}
	return l
}

// address finds where a node listens.
func (t *Transport) address(node string) (string, error) {
	if addr, ok := t.cfg.Resolve(node); ok {
		return addr, nil
	}
	if self := t.cfg.Identity(); self.Node == node {
		return self.PeerAddr, nil
	}
	return "", fmt.Errorf("%w: %s: its address is not known", ErrUnreachable, node)
}

// get returns the connection to the peer. It waits for an attempt to connect, at most DialTimeout, and
// fails at once while a failed attempt is too recent. Its errors are definite.
func (l *link) get(ctx context.Context) (*conn, error) {
	l.mu.Lock()
	if l.conn != nil {
		c := l.conn
		l.mu.Unlock()
		return c, nil
	}
	if l.dialing == nil && time.Now().Before(l.retryAt) {
		err := l.err
		l.mu.Unlock()
		return nil, err
	}
	l.mu.Unlock()
	return l.dialNow(ctx)
}

// dialNow is get without regard to earlier failures.
func (l *link) dialNow(ctx context.Context) (*conn, error) {
	l.mu.Lock()
	if l.conn != nil {
		c := l.conn
		l.mu.Unlock()
		return c, nil
	}
	if l.dialing == nil {
		l.dialing = make(chan struct{})
		if !l.t.spawn(l.dial) {
			close(l.dialing)
			l.dialing, l.err = nil, fmt.Errorf("%w: %w", ErrUnreachable, ErrClosed)
			err := l.err
			l.mu.Unlock()
			return nil, err
		}
	}
	dialing := l.dialing
	l.mu.Unlock()

	select {
	case <-dialing:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %s: %w", ErrUnreachable, l.node, ctx.Err())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return nil, l.err
	}
	return l.conn, nil
}

// dial makes one attempt to connect and, if it succeeds, serves the connection until it ends.
func (l *link) dial() {
	c, err := l.connect()
	if err != nil {
		l.done(nil, err)
		return
	}
	if !l.t.attach(c) {
		l.done(nil, fmt.Errorf("%w: %w", ErrUnreachable, ErrClosed))
		return
	}
	l.done(c, nil)
	c.readLoop()
	l.t.detach(c)
	l.lost(c)
	l.t.suspect(l.node)
}

func (l *link) connect() (*conn, error) {
	addr, err := l.t.address(l.node)
	if err != nil {
		return nil, err
	}
	w, peer, err := l.t.dial(l.t.ctx, addr, l.node, purposePeer)
	if err != nil {
		return nil, err
	}
	return newConn(l.t, w, hello{purpose: purposePeer, from: peer}, true), nil
}

// done ends the attempt to connect.
func (l *link) done(c *conn, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.dialing)
	l.dialing, l.conn = nil, c
	if c != nil {
		l.t.log.Info("connected to peer", "node", l.node, "remote", c.wire.RemoteAddr())
		l.err, l.failures, l.dead = nil, 0, false
		return
	}
	if l.failures%30 == 0 { // about every 30 s
		l.t.log.Warn("cannot connect to peer", "node", l.node, "error", err)
	}
	l.err = err
	l.retryAt = time.Now().Add(min(l.t.cfg.RetryMin<<min(l.failures, 16), l.t.cfg.RetryMax))
	l.failures++
}

// lost notes that the connection broke. A short pause keeps a peer that accepts and closes from being
// dialed in a tight loop.
func (l *link) lost(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn = nil
	l.err = fmt.Errorf("%w: %s: the connection broke: %w", ErrUnreachable, l.node, c.cause())
	l.retryAt = time.Now().Add(l.t.cfg.RetryMin)
}

// revive ends the backoff for a node that has just shown itself to be alive.
func (t *Transport) revive(node string) {
	t.mu.RLock()
	l := t.links[node]
	t.mu.RUnlock()
	if l != nil {
		l.mu.Lock()
		l.retryAt, l.failures, l.dead = time.Time{}, 0, false
		l.mu.Unlock()
	}
}
