package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

var (
	_ raft.Transport   = (*Group)(nil)
	_ raft.WithPreVote = (*Group)(nil)
	_ raft.WithClose   = (*Group)(nil)
)

const (
	maxInbox     = 1024 // raft messages of a group that wait for its main loop
	smallMessage = 4096 // bytes of a raft message that a full inbox still takes, as all heartbeats and votes are
	maxAnswers   = 16   // raft messages of a group that its main loop has but not answered
	maxReplicas  = 128  // bytes of a replica id
)

// InstallFunc receives a snapshot. data yields exactly req.Size bytes and then io.EOF, or an error if the
// stream broke off. ctx ends when the sender gives up or the Transport closes. One call runs at a time per
// replica. The Group may be closed and opened again meanwhile.
type InstallFunc func(ctx context.Context, req *raft.InstallSnapshotRequest, data io.Reader) (*raft.InstallSnapshotResponse, error)

// replicaKey names a replica on this node.
type replicaKey struct {
	group   uint64
	replica string
}

// Group is the raft.Transport of one replica. Its raft messages share the node-pair connections with
// those of all other groups.
type Group struct {
	t         *Transport
	key       replicaKey
	install   InstallFunc
	ctx       context.Context // ends with Close
	cancel    context.CancelFunc
	tasks     sync.WaitGroup
	consumer  chan raft.RPC
	acked     chan struct{}
	deaths    chan struct{}
	judge     atomic.Pointer[func(*raft.RequestPreVoteRequest) *raft.RequestPreVoteResponse]
	suspended atomic.Bool

	mu         sync.Mutex
	inbox      []inbound
	next       int // of the inbox
	inboxBytes int
	wake       chan struct{} // capacity 1: the inbox is not empty

	peersMu   sync.Mutex
	peers     map[raft.ServerID]progress
	pipelines []*pipeline // replaced, never changed in place but at its end
}

// progress is what the answers of a peer have shown in the newest term.
type progress struct {
	term  uint64
	acked time.Time
	match uint64
}

// inbound is a raft message from a peer.
type inbound struct {
	rpc     raft.RPC
	result  chan raft.RPCResponse
	conn    *conn // nil: nobody waits for the answer
	id      uint64
	size    int
	arrived time.Time
	timeout time.Duration // the sender has given up after this
	still   func() bool   // whether raft is to get it after all; nil = yes
}

// Group opens the transport of a replica of a raft group on this node. local is "<node>/<number>".
// Messages for replicas that are not open are refused and counted.
func (t *Transport) Group(id uint64, local raft.ServerAddress, install InstallFunc) (*Group, error) {
	if _, err := nodeOf(local); err != nil {
		return nil, err
	}
	if install == nil {
		return nil, errors.New("transport: a Group needs an InstallFunc")
	}
	g := &Group{t: t, key: replicaKey{id, string(local)}, install: install,
		consumer: make(chan raft.RPC), acked: make(chan struct{}, 1), deaths: make(chan struct{}, 1),
		wake: make(chan struct{}, 1), peers: map[raft.ServerID]progress{}}
	g.ctx, g.cancel = context.WithCancel(t.ctx)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		g.cancel()
		return nil, ErrClosed
	}
	if t.groups[g.key] != nil {
		g.cancel()
		return nil, fmt.Errorf("group %d: replica %s: %w", id, local, errDuplicate)
	}
	t.groups[g.key] = g
	g.tasks.Go(g.feed)
	return g, nil
}

// nodeOf returns the node of a replica id.
func nodeOf(replica raft.ServerAddress) (string, error) {
	i := strings.LastIndexByte(string(replica), '/')
	if i < 1 || len(replica) > maxReplicas {
		return "", fmt.Errorf("replica id %q: want <node>/<number>", replica)
	}
	return string(replica[:i]), nil
}

// Close implements raft.WithClose. Everything that waits in the Group fails; a running InstallFunc goes on.
func (g *Group) Close() error {
	g.t.mu.Lock()
	if g.t.groups[g.key] == g {
		delete(g.t.groups, g.key)
	}
	g.t.mu.Unlock()
	g.cancel()
	g.tasks.Wait()
	return nil
}

// Consumer implements raft.Transport.
func (g *Group) Consumer() <-chan raft.RPC { return g.consumer }

// LocalAddr implements raft.Transport.
func (g *Group) LocalAddr() raft.ServerAddress { return raft.ServerAddress(g.key.replica) }

// EncodePeer implements raft.Transport.
func (g *Group) EncodePeer(_ raft.ServerID, addr raft.ServerAddress) []byte { return []byte(addr) }

// DecodePeer implements raft.Transport.
func (g *Group) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

// SetHeartbeatHandler implements raft.Transport. It stores nothing: the heartbeat fast path runs beside
// raft's main loop and can make logs diverge (hashicorp/raft#695), so heartbeats take the usual way.
func (g *Group) SetHeartbeatHandler(func(raft.RPC)) {}

// Suspend makes every raft message that the replica wants to send fail at once, until it is called with
// false. A leader whose disk stalls goes silent by it. Answers are not affected.
func (g *Group) Suspend(on bool) { g.suspended.Store(on) }

// Acked returns when the latest AppendEntries was SENT that the peer has answered with success in the
// given term, the request's own; the zero time if there is none. Only the newest term is remembered.
func (g *Group) Acked(peer raft.ServerID, term uint64) time.Time {
	if p := g.progress(peer); p.term == term {
		return p.acked
	}
	return time.Time{}
}

// MatchIndex returns up to which index the peer's log is known to be this replica's, from answers in the
// given term; 0 if nothing is known.
func (g *Group) MatchIndex(peer raft.ServerID, term uint64) uint64 {
	if p := g.progress(peer); p.term == term {
		return p.match
	}
	return 0
}

func (g *Group) progress(peer raft.ServerID) progress {
	g.peersMu.Lock()
	defer g.peersMu.Unlock()
	return g.peers[peer]
}

// AckNotify returns a channel of capacity 1 that gets a value whenever Acked has changed.
func (g *Group) AckNotify() <-chan struct{} { return g.acked }

// record notes the answer to a request that was sent at the given time.
func (g *Group) record(peer raft.ServerID, sent time.Time, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) {
	if !resp.Success || resp.Term != req.Term {
		return
	}
	if g.t.faults.ackedAtAnswer {
		sent = time.Now()
	}
	match := req.PrevLogEntry
	if n := len(req.Entries); n > 0 {
		match = req.Entries[n-1].Index
	}
	g.peersMu.Lock()
	p := g.peers[peer]
	if p.term < req.Term {
		p = progress{term: req.Term}
	}
	newer := p.term == req.Term && sent.After(p.acked)
	if newer {
		p.acked = sent
	}
	if p.term == req.Term {
		p.match = max(p.match, match)
		g.peers[peer] = p
	}
	g.peersMu.Unlock()
	if newer {
		select {
		case g.acked <- struct{}{}:
		default:
		}
	}
}

// isHeartbeat tells raft's heartbeats from its other AppendEntries.
func isHeartbeat(r *raft.AppendEntriesRequest) bool {
	return len(r.Entries) == 0 && r.PrevLogEntry == 0 && r.PrevLogTerm == 0 && r.LeaderCommitIndex == 0
}

// AppendEntries implements raft.Transport. Entries beyond Config.MaxAppendBytes are taken out of args:
// raft goes on after those that args holds when the call returns.
func (g *Group) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	g.fit(args)
	sent := time.Now() // before anything of it can leave
	timeout := g.t.cfg.RPCTimeout
	if isHeartbeat(args) {
		timeout = g.t.cfg.HeartbeatTimeout
	}
	if err := g.roundTrip(target, timeout, args, resp); err != nil {
		return err
	}
	g.record(id, sent, args, resp)
	return nil
}

// fit shortens the entries to what one message should hold, but leaves one. A message that took longer
// than RPCTimeout on a slow link would be sent over and over.
func (g *Group) fit(args *raft.AppendEntriesRequest) {
	size := overheadBytes
	for i, e := range args.Entries {
		if size += entryBytes(e); i > 0 && (size > g.t.cfg.MaxAppendBytes || i >= maxEntries) {
			args.Entries = args.Entries[:i]
			return
		}
	}
}

// RequestVote implements raft.Transport.
func (g *Group) RequestVote(_ raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return g.roundTrip(target, g.t.cfg.RPCTimeout, args, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (g *Group) RequestPreVote(_ raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return g.roundTrip(target, g.t.cfg.RPCTimeout, args, resp)
}

// TimeoutNow implements raft.Transport.
func (g *Group) TimeoutNow(_ raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return g.roundTrip(target, g.t.cfg.RPCTimeout, args, resp)
}

// usable says why the Group may not send.
func (g *Group) usable() error {
	if g.ctx.Err() != nil {
		return ErrClosed
	}
	if g.suspended.Load() {
		return ErrSuspended
	}
	return nil
}

// connect returns the connection to the node of a replica.
func (g *Group) connect(target raft.ServerAddress) (*conn, error) {
	if err := g.usable(); err != nil {
		return nil, err
	}
	node, err := nodeOf(target)
	if err != nil {
		return nil, err
	}
	return g.t.link(node).get(g.ctx)
}

// roundTrip sends a raft message and waits for its answer.
func (g *Group) roundTrip(target raft.ServerAddress, timeout time.Duration, req, resp any) error {
	c, err := g.connect(target)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(timeout)
	s, err := g.send(c, target, timeout, req, true)
	if err != nil {
		return err
	}
	payload, err := s.wait(g.ctx.Done(), deadline)
	if err != nil {
		return err
	}
	return decodeResponse(payload, resp)
}

// sent is a raft message that waits for its answer.
type sent struct {
	c  *conn
	id uint64
	p  *pending
}

// send queues a raft message. If the queue is full it may wait for room, at most for the timeout.
func (g *Group) send(c *conn, target raft.ServerAddress, timeout time.Duration, req any, wait bool) (sent, error) {
	if err := g.usable(); err != nil {
		return sent{}, err
	}
	s := sent{c, c.lastID.Add(1), g.t.pending.Get().(*pending)}
	m := outgoing{lane: laneControl, kind: kindRaftRequest, id: s.id}
	if r, ok := req.(*raft.AppendEntriesRequest); ok && !isHeartbeat(r) {
		m.lane, m.group = laneSmall, g.key.group+1
		if wait {
			m.wait, m.most = g.ctx.Done(), timeout
		}
	}
	frame := appendString(appendUint(newFrame(), g.key.group), target)
	frame = appendUint(append(frame, byte(typeOf(req))), uint64(timeout))
	m.frame = appendRequest(slices.Grow(frame, requestBytes(req)), req)
	if err := c.submit(m, s.p); err != nil {
		g.t.pending.Put(s.p)
		return sent{}, err
	}
	return s, nil
}

// wait returns the answer, or fails when stop is closed or at the deadline. It is called once.
func (s sent) wait(stop <-chan struct{}, deadline time.Time) ([]byte, error) {
	if s.p.timer == nil {
		s.p.timer = time.NewTimer(time.Until(deadline))
	} else {
		s.p.timer.Reset(time.Until(deadline))
	}
	var a answer
	select {
	case a = <-s.p.answer:
	case <-stop:
		a = s.giveUp(ErrClosed)
	case <-s.p.timer.C:
		a = s.giveUp(fmt.Errorf("%s: %w", s.c.peer.Node, ErrTimeout))
	}
	s.p.timer.Stop() // before anybody else has it
	s.c.t.pending.Put(s.p)
	return a.payload, a.err
}

func (s sent) giveUp(err error) answer {
	if s.c.abandon(s.id) {
		return answer{err: err}
	}
	return <-s.p.answer
}

// serveRaft puts an incoming raft message into the inbox of its group.
func (c *conn) serveRaft(m message) error {
	d := decoder{b: m.payload}
	group, replica, t, timeout := d.uint(), d.bytes(), messageType(d.byte()), time.Duration(d.uint())
	if d.bad || c.dialed || t == typeInstallSnapshot {
		return fmt.Errorf("%w: raft message", errMalformed)
	}
	req, err := decodeRequest(t, d.b)
	if err != nil {
		return err
	}
	c.t.mu.RLock()
	g := c.t.groups[replicaKey{group, string(replica)}]
	c.t.mu.RUnlock()
	if g == nil {
		c.t.metrics.dropped.WithLabelValues("unknown_replica").Inc()
		return c.reply(kindRaftResponse, m.id, appendError(newFrame(), ErrUnknownReplica))
	}
	result := make(chan raft.RPCResponse, 1)
	in := inbound{rpc: raft.RPC{Command: req, RespChan: result}, result: result, conn: c, id: m.id, size: requestBytes(req), arrived: time.Now(), timeout: timeout}
	if !g.push(in) {
		c.t.metrics.dropped.WithLabelValues("inbox_full").Inc()
		return c.reply(kindRaftResponse, m.id, appendError(newFrame(), ErrBusy))
	}
	return nil
}

// push adds to the inbox, unless it is full: a raft main loop that is stuck must not block the
// connection, which other groups share.
func (g *Group) push(in inbound) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	full := g.inboxBytes >= g.t.cfg.InboxBytes && in.size > smallMessage
	if full || len(g.inbox)-g.next >= maxInbox {
		return false
	}
	g.inboxBytes += in.size
	if g.next > 0 && len(g.inbox) == cap(g.inbox) {
		n := copy(g.inbox, g.inbox[g.next:])
		clear(g.inbox[n:])
		g.inbox, g.next = g.inbox[:n], 0
	}
	if g.inbox = append(g.inbox, in); len(g.inbox)-g.next > 1 {
		return true // feed knows
	}
	select {
	case g.wake <- struct{}{}:
	default:
	}
	return true
}

// feed hands the inbox to raft, in order, and sends its answers back, in order.
func (g *Group) feed() {
	var open []inbound // handed over and not answered
	for {
		in, ok := g.head(len(open) == 0)
		if ok && g.handled(&in) {
			g.pop(in)
			open = append(open, in)
			continue
		}
		var take chan<- raft.RPC
		if ok && len(open) < maxAnswers {
			take = g.consumer
		}
		var answer <-chan raft.RPCResponse
		if len(open) > 0 {
			answer = open[0].result
		}
		select {
		case take <- in.rpc:
			g.pop(in)
			open = append(open, in)
		case r := <-answer:
			open[0].reply(r)
			open = slices.Delete(open, 0, 1)
		case <-g.wake:
		case <-g.ctx.Done():
			return
		}
	}
}

// reply sends the answer to where the message came from.
func (in *inbound) reply(r raft.RPCResponse) {
	if in.conn == nil {
		return
	}
	if err := in.conn.reply(kindRaftResponse, in.id, appendRaftAnswer(newFrame(), r)); err != nil {
		in.conn.fail(err)
	}
}

// head is the next message for raft. Those that nobody waits for any more are dropped, and one of this replica's
// own, which may have become pointless, waits until raft is done with all before it.
func (g *Group) head(idle bool) (inbound, bool) {
	for {
		g.mu.Lock()
		if g.next == len(g.inbox) {
			g.mu.Unlock()
			return inbound{}, false
		}
		in := g.inbox[g.next]
		g.mu.Unlock()
		switch {
		case time.Since(in.arrived) > in.timeout:
			g.t.metrics.dropped.WithLabelValues("expired").Inc()
		case in.still != nil && !idle:
			return inbound{}, false
		case in.still == nil || in.still():
			return in, true
		}
		g.pop(in)
	}
}

func (g *Group) pop(in inbound) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.inbox[g.next] = inbound{}
	g.next++
	g.inboxBytes -= in.size
	if g.next < len(g.inbox) {
		return
	}
	g.inbox, g.next = g.inbox[:0], 0
	if cap(g.inbox) > 4*maxAnswers {
		g.inbox = nil
	}
}

func appendRaftAnswer(frame []byte, r raft.RPCResponse) []byte {
	if r.Error != nil {
		return appendFailure(frame, r.Error)
	}
	return appendResponse(append(frame, byte(statusOK)), r.Response)
}
