package node

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"kvd/node/bootstrap"
	"kvd/placement"
)

// displacementCheck is how often a node that hears of no leader asks whether
// another one has taken its place.
const displacementCheck = 2 * time.Second

// watchDisplacement ends a node whose place in the cluster was given to another
// data directory while it was down: its replica is no longer a member, no
// leader talks to it, and it would wait for ever.
func (n *Node) watchDisplacement(ctx context.Context) {
	ticker := time.NewTicker(displacementCheck)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		if n.Replica().Leader().Node != "" {
			continue
		}
		if by := n.displacedBy(ctx); by != nil {
			n.cfg.OnFatal(fmt.Errorf(
				"the cluster has given the place of node %q to another data directory, as replica %s; this one holds %s: stop this node, or remove %s and start it again while the other is stopped",
				n.cfg.Name, by.Replica, n.outcome().Replica, n.cfg.DataDir))
			return
		}
	}
}

// displacedBy asks the other members who this node's successor is; nil if none
// knows of one. What they answer is committed, if perhaps out of date: only a
// later replica of this node's name than its own proves anything.
func (n *Node) displacedBy(ctx context.Context) *placement.Member {
	names := n.cfg.founders()
	for _, m := range n.members() {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if name == n.cfg.Name {
			continue
		}
		attempt, cancel := context.WithTimeout(ctx, pingTimeout)
		answer, err := n.transport.Call(attempt, name, methodMember, []byte(n.cfg.Name))
		cancel()
		var known placement.Member
		if err == nil && json.Unmarshal(answer, &known) == nil && n.succeeds(known) {
			return &known
		}
	}
	return nil
}

// succeeds reports whether m is a later incarnation of this node.
func (n *Node) succeeds(m placement.Member) bool {
	name, number, err := bootstrap.ParseReplicaID(string(m.Replica))
	_, own, ownErr := bootstrap.ParseReplicaID(n.outcome().Replica)
	return err == nil && ownErr == nil && name == n.cfg.Name && number > own && m.Incarnation != n.dir.Incarnation()
}

// encodedMember is what this node's map says of a member; empty if nothing.
func (n *Node) encodedMember(name string) ([]byte, error) {
	for _, m := range n.members() {
		if m.Name == name {
			return json.Marshal(m)
		}
	}
	return nil, nil
}
