package node

import (
	"context"
	"time"

	"kvd/transport"
)

const (
	methodReach = "node.reach" // answered with 1 if the one who answers reaches the one who asks, else 0
	// reachCheck is how often a node that leads asks whether it is reached.
	reachCheck = 2 * time.Second
	// maxUnreached is how often in a row nobody reaches it before it leads no more.
	maxUnreached = 3
)

// watchReach hands over what this node leads if it reaches others, but none of
// them reaches it: its address is wrong, or a firewall is in the way. Such a
// leader would keep its followers for ever, and what clients of other nodes want
// of it would never arrive.
func (n *Node) watchReach(ctx context.Context) {
	ticker := time.NewTicker(reachCheck)
	defer ticker.Stop()
	for unreached := 0; ; {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		leads := n.leads()
		if leads == 0 || n.reached(ctx) {
			unreached = 0
			continue
		}
		if unreached++; unreached < maxUnreached {
			continue
		}
		n.log.Error("this node reaches others, but none of them reaches it, so it gives away what it leads: look at its address in their --peers, at --advertise-peer, and at firewalls",
			"advertise", n.cfg.AdvertisePeer, "groups", leads)
		n.handOver()
	}
}

// leads is how many groups this node leads.
func (n *Node) leads() (count int) {
	for _, r := range append(n.Shards(), n.Replica()) {
		if r != nil && r.Serving() {
			count++
		}
	}
	return count
}

// reached reports whether another node reaches this one; also if this one
// reaches none, which leads no group for long, and if it does not know.
func (n *Node) reached(ctx context.Context) bool {
	answered := false
	for _, name := range n.acquaintances() {
		attempt, cancel := context.WithTimeout(ctx, 2*pingTimeout)
		answer, err := n.transport.Call(attempt, name, methodReach, nil)
		cancel()
		if err != nil || len(answer) != 1 {
			continue
		}
		if answered = true; answer[0] == 1 {
			return true
		}
	}
	return !answered
}

func (n *Node) handleReach() {
	n.transport.Handle(methodReach, func(ctx context.Context, from transport.Peer, _ []byte) ([]byte, error) {
		if n.pings(ctx, from.Node, from.Incarnation) {
			return []byte{1}, nil
		}
		return []byte{0}, nil
	})
}
