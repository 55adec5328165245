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

// watchDisplacement ends a node that has left the cluster, or whose place in it
// was given to another data directory while it was down: its replica is no
// longer a member, no leader talks to it, and it would wait for ever.
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
		if n.hasLeft(ctx) {
			n.cfg.OnFatal(fmt.Errorf(
				"node %q has left the cluster: stop it; to let it join again, remove %s and start it with --join", n.cfg.Name, n.cfg.DataDir))
			return
		}
	}
}

// hasLeft asks the others whether this node, which has been a member, is one
// no more.
func (n *Node) hasLeft(ctx context.Context) bool {
	for _, name := range n.acquaintances() {
		attempt, cancel := context.WithTimeout(ctx, pingTimeout)
		answer, err := n.transport.Call(attempt, name, methodLeft, []byte(n.cfg.Name))
		cancel()
		if err == nil && len(answer) == 1 {
			return answer[0] == 1
		}
	}
	return false
}

// encodedLeft is 1 if no member of that name is in the map as it is now. A
// former state of the map would prove nothing about a node that joined since.
func (n *Node) encodedLeft(ctx context.Context, name string) ([]byte, error) {
	m, err := n.freshMap(ctx)
	if err != nil {
		return nil, err
	}
	if _, known := m.Member(name); known || len(m.Members) == 0 {
		return []byte{0}, nil
	}
	return []byte{1}, nil
}

// displacedBy asks the other members who this node's successor is; nil if none
// knows of one. What they answer is committed, if perhaps out of date: only a
// later replica of this node's name than its own proves anything.
func (n *Node) displacedBy(ctx context.Context) *placement.Member {
	for _, name := range n.acquaintances() {
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

// acquaintances are the other nodes that this one has heard of, in order.
func (n *Node) acquaintances() []string {
	names := n.cfg.founders()
	for _, m := range n.members() {
		names = append(names, m.Name)
	}
	for name := range n.book.All() {
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(name string) bool { return name == n.cfg.Name })
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
