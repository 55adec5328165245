package transport

import (
	"errors"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
)

// A process is proven dead when no connection with it is left and its address refuses new ones: the machine is
// there and says that nobody listens. That is all that counts. Silence, a timeout, a connection that only breaks
// may be the network's doing, and somebody behind it may be alive and lead. Those who listen to the verdict ask
// others for theirs before they act (Group.JudgePreVotes), since even a refusal may come from something in between.

const (
	// refusals is how many attempts in a row have to be refused: one may meet a process that is just starting.
	refusals = 2
	// A process that is killed loses its connections before its last one is closed; probes bounds how long
	// that may take, and a process that is started again meanwhile is alive.
	probes     = 20
	probePause = 10 * time.Millisecond
)

// suspect finds out whether a node's process is dead, after a connection with it broke.
func (t *Transport) suspect(node string) {
	if _, ok := t.cfg.Resolve(node); !ok {
		return
	}
	l := t.link(node)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.probing || l.dead {
		return
	}
	l.probing = t.spawn(l.probe)
}

// probe dials until there is a verdict or a connection, and gives up soon.
func (l *link) probe() {
	refused, begun := 0, time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for range probes {
		select {
		case <-timer.C:
		case <-l.t.ctx.Done():
		}
		_, err := l.dialNow(l.t.ctx)
		switch {
		case err == nil || l.t.ctx.Err() != nil:
			refused = 0
		case errors.Is(err, syscall.ECONNREFUSED) || l.t.faults.silenceIsDeath:
			refused++
		default:
			refused = 0
		}
		if err == nil || refused >= refusals && !l.t.hears(l.node) || time.Since(begun) > l.t.cfg.DialTimeout {
			break
		}
		timer.Reset(probePause)
	}
	l.mu.Lock()
	l.probing = false
	l.dead = refused >= refusals && l.conn == nil && !l.t.hears(l.node)
	dead := l.dead
	l.mu.Unlock()
	if dead {
		l.t.log.Info("the process of a peer is dead: its address refuses connections", "node", l.node)
		l.t.tellDeath()
	}
}

// hears reports whether a connection that the node has dialed is alive.
func (t *Transport) hears(node string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for c := range t.conns {
		if !c.dialed && c.purpose == purposePeer && c.peer.Node == node && c.cause() == nil {
			return true
		}
	}
	return false
}

func (t *Transport) tellDeath() {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, g := range t.groups {
		select {
		case g.deaths <- struct{}{}:
		default:
		}
	}
}

// Dead reports whether the process of the peer's node is proven dead: all connections with it broke, and then its
// address refused new ones. It holds until there is a connection again.
func (g *Group) Dead(peer raft.ServerID) bool {
	node, err := nodeOf(raft.ServerAddress(peer))
	if err != nil {
		return false
	}
	g.t.mu.RLock()
	l := g.t.links[node]
	g.t.mu.RUnlock()
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

// DeathNotify returns a channel of capacity 1 that gets a value whenever a node is found Dead.
func (g *Group) DeathNotify() <-chan struct{} { return g.deaths }

// JudgePreVotes has judge answer requests for a pre-vote in raft's stead; what it returns nil for goes to raft, as
// all others do. It is called in the order in which messages arrive, one at a time.
func (g *Group) JudgePreVotes(judge func(*raft.RequestPreVoteRequest) *raft.RequestPreVoteResponse) {
	g.judge.Store(&judge)
}

// Stand tells this replica's own raft to stand for election at once, as a leader tells the one it hands over to, if
// still says so when raft has taken what came before.
func (g *Group) Stand(still func() bool) {
	self := []byte(g.key.replica)
	req := &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: self, Addr: self}}
	result := make(chan raft.RPCResponse, 1)
	g.push(inbound{rpc: raft.RPC{Command: req, RespChan: result}, result: result, arrived: time.Now(), timeout: g.t.cfg.HeartbeatTimeout, still: still})
}

// handled answers what does not go to raft. The answer takes its place among raft's.
func (g *Group) handled(in *inbound) bool {
	req, ok := in.rpc.Command.(*raft.RequestPreVoteRequest)
	judge := g.judge.Load()
	if !ok || judge == nil {
		return false
	}
	resp := (*judge)(req)
	if resp != nil {
		in.result <- raft.RPCResponse{Response: resp}
	}
	return resp != nil
}
