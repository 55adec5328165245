package node

import (
	"context"
	"errors"

	"kvd/placement/sequencer"
	"kvd/server"
	"kvd/transport"
)

// sequence starts what hands out revisions, where keys are in shards: a server
// for whenever this node leads group 0, and a client for its replicas and
// reads.
func (n *Node) sequence() {
	s := sequencer.NewServer(sequencer.ServerConfig{
		Group0: n.Replica(), Logger: n.log, Registerer: n.cfg.Registry, Faults: n.cfg.SequencerFaults,
	})
	c := sequencer.NewClient(sequencer.ClientConfig{
		Node: n.cfg.Name, Group0: n.Replica(), Server: s, Peers: n.transport, Logger: n.log, Registerer: n.cfg.Registry,
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sequencer, n.sequences = s, c
}

// stopSequence is for when no replica uses it any more.
func (n *Node) stopSequence() {
	n.mu.Lock()
	server, client := n.sequencer, n.sequences
	n.mu.Unlock()
	if client != nil {
		client.Close()
		server.Close()
	}
}

// handleSequencer answers the other nodes' clients.
func (n *Node) handleSequencer() {
	n.transport.Handle(sequencer.Method, func(ctx context.Context, from transport.Peer, payload []byte) ([]byte, error) {
		n.mu.Lock()
		s := n.sequencer
		n.mu.Unlock()
		if s == nil {
			return nil, errNotSequencing
		}
		return s.Handle(ctx, from.Node, payload)
	})
}

var errNotSequencing = errors.New("this node does not hand out revisions: it is starting, or its cluster has no shards")

// revisions implements server.Revisions.
type revisions struct{ n *Node }

var _ server.Revisions = revisions{}

func (r revisions) Latest(ctx context.Context) (int64, error) {
	r.n.mu.Lock()
	c := r.n.sequences
	r.n.mu.Unlock()
	if c == nil {
		return 0, errNotSequencing
	}
	return c.Latest(ctx)
}
