package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/transport"
)

const (
	methodPing   = "node.ping"   // answered with the incarnation
	methodRejoin = "node.rejoin" // forwarded to group 0's leader
	methodMember = "node.member" // answered with the record of the named member
	methodLeft   = "node.left"   // answered with whether the named one is no member
	pingTimeout  = time.Second
)

// findCluster forms a new cluster with the peers, or finds the one that this
// node is, or was, a member of, or that it is to join.
func (n *Node) findCluster(ctx context.Context) (bootstrap.Outcome, error) {
	if n.cfg.Join != "" && n.dir.ClusterID() == 0 {
		return bootstrap.Outcome{Rejoin: &bootstrap.Rejoin{Via: []string{n.cfg.Join}}}, nil
	}
	return n.formation.Run(ctx)
}

// join makes this node a member of its cluster.
func (n *Node) join(ctx context.Context) error {
	outcome, err := n.findCluster(ctx)
	for said := ""; err == nil && outcome.Rejoin != nil; {
		outcome, err = n.rejoin(ctx, outcome.Rejoin)
		var refused *bootstrap.RefusedError
		if err == nil || errors.As(err, &refused) && !refused.Retryable() {
			break
		}
		if reason := err.Error(); reason != said {
			said = reason
			n.log.Info("waiting to rejoin the cluster", "reason", reason)
		}
		select {
		case <-time.After(time.Second):
			outcome, err = n.findCluster(ctx)
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return err
	}
	n.clusterID.Store(outcome.ClusterID)
	n.memberID.Store(memberID(outcome.ClusterID, outcome.Replica))
	n.mu.Lock()
	defer n.mu.Unlock()
	n.member = outcome
	return nil
}

// rejoin asks the members in turn to let this node in, or back in.
func (n *Node) rejoin(ctx context.Context, r *bootstrap.Rejoin) (bootstrap.Outcome, error) {
	request := bootstrap.NewRejoinRequest(n.dir, *r)
	if r.ClusterID == 0 {
		request = bootstrap.NewJoinRequest(n.dir, n.cfg.Weight)
	}
	payload, err := request.Encode()
	if err != nil {
		return bootstrap.Outcome{}, err
	}
	var errs []error
	for _, addr := range r.Via {
		attempt, cancel := context.WithTimeout(ctx, 10*time.Second)
		answer, err := n.transport.Ask(attempt, addr, bootstrap.MethodRejoin, payload)
		cancel()
		if err == nil {
			var response bootstrap.RejoinResponse
			if response, err = bootstrap.DecodeRejoinResponse(answer); err == nil {
				var outcome bootstrap.Outcome
				if outcome, err = n.formation.CompleteRejoin(response); err == nil {
					n.announceAll(response.Addresses)
					return outcome, nil
				}
			}
		}
		errs = append(errs, fmt.Errorf("%s: %w", addr, err))
	}
	return bootstrap.Outcome{}, oneLine(errs)
}

// announceAll takes over the addresses that the cluster knows.
func (n *Node) announceAll(known map[string]bootstrap.Addresses) {
	for name, addresses := range known {
		if name == n.cfg.Name {
			continue
		}
		n.announce(name, addresses)
	}
}

// addressesOf are those of members, as far as the book has them, and this node's
// own.
func (n *Node) addressesOf(members []placement.Member) map[string]bootstrap.Addresses {
	known := make(map[string]bootstrap.Addresses, len(members))
	for _, m := range members {
		if addresses := n.book.Lookup(m.Name); addresses != (bootstrap.Addresses{}) {
			known[m.Name] = addresses
		}
	}
	known[n.cfg.Name] = bootstrap.Addresses{Peer: n.cfg.AdvertisePeer, Client: n.cfg.AdvertiseClient, HTTP: n.cfg.ListenHTTP}
	return known
}

// oneLine joins errors in one line; a refusal among them can be found.
func oneLine(errs []error) error {
	var joined error
	for _, err := range errs {
		if joined == nil {
			joined = err
		} else {
			joined = fmt.Errorf("%w; %w", joined, err)
		}
	}
	return joined
}

// handleRejoins lets nodes that lost their directories back in, through any
// member.
func (n *Node) handleRejoins() {
	n.transport.Handle(methodPing, func(context.Context, transport.Peer, []byte) ([]byte, error) {
		return binary.BigEndian.AppendUint64(nil, n.dir.Incarnation()), nil
	})
	n.transport.Handle(methodMember, func(_ context.Context, _ transport.Peer, name []byte) ([]byte, error) {
		return n.encodedMember(string(name))
	})
	n.transport.Handle(methodLeft, func(ctx context.Context, _ transport.Peer, name []byte) ([]byte, error) {
		return n.encodedLeft(ctx, string(name))
	})
	n.transport.Handle(methodRejoin, func(ctx context.Context, _ transport.Peer, payload []byte) ([]byte, error) {
		return n.admit(ctx, payload).Encode()
	})
	n.transport.HandleAsk(bootstrap.MethodRejoin, func(ctx context.Context, _ transport.Peer, payload []byte) ([]byte, error) {
		replica := n.Replica()
		if replica == nil {
			return refuse(bootstrap.NotNow, "this node is not a member yet").Encode()
		}
		leader := replica.Leader()
		switch {
		case leader.Node == n.cfg.Name:
			return n.admit(ctx, payload).Encode()
		case leader.Node == "":
			return refuse(bootstrap.NotNow, "the cluster has no leader now").Encode()
		}
		answer, err := n.transport.Call(ctx, leader.Node, methodRejoin, payload)
		if err != nil {
			return refuse(bootstrap.NotNow, "the leader cannot be reached: "+err.Error()).Encode()
		}
		return answer, nil
	})
}

func refuse(reason bootstrap.Reason, detail string) bootstrap.RejoinResponse {
	return bootstrap.Refuse(&bootstrap.RefusedError{Reason: reason, Detail: detail})
}

// admit decides on the leader about a node that wants to rejoin.
func (n *Node) admit(ctx context.Context, payload []byte) bootstrap.RejoinResponse {
	request, err := bootstrap.DecodeRejoinRequest(payload)
	if err != nil {
		return refuse(bootstrap.OtherSettings, err.Error())
	}
	reconciler := n.placement()
	if reconciler == nil {
		return refuse(bootstrap.NotNow, "the leader is starting")
	}
	members, err := reconciler.Members(ctx)
	if err != nil {
		return refuse(bootstrap.NotNow, err.Error())
	}
	if len(members) == 0 {
		return refuse(bootstrap.NotNow, "the leader has not written the cluster map yet")
	}
	judge := bootstrap.Cluster{
		ClusterID: n.dir.ClusterID(), Common: n.cfg.settings().Common,
	}
	current := make(map[string]placement.Member)
	judge.Reporting = func(m bootstrap.Member) bool { return reconciler.Reports(current[m.Name]) || n.answers(ctx, m) }
	for _, m := range members {
		current[m.Name] = m
		judge.Members = append(judge.Members, bootstrap.Member{Name: m.Name, Incarnation: m.Incarnation, Replica: string(m.Replica)})
	}
	old, already, refusal := judge.Judge(request)
	next := current[old.Name]
	switch {
	case refusal != nil && refusal.Reason == bootstrap.UnknownName && request.Join && len(members) >= bootstrap.MaxMembers:
		return refuse(bootstrap.NotNow, fmt.Sprintf("the cluster has %d members, as many as it may", len(members)))
	case refusal != nil && refusal.Reason == bootstrap.UnknownName && request.Join:
		if next, _, err = reconciler.Join(ctx, request.Name, request.Incarnation, request.Weight); err != nil {
			return refuse(bootstrap.NotNow, err.Error())
		}
	case refusal != nil:
		return bootstrap.Refuse(refusal)
	case !already && next.Leaving: // in its place it would have to leave as well
		return refuse(bootstrap.NotNow, fmt.Sprintf("node %q is leaving the cluster: its name is free when it has left", next.Name))
	case !already:
		if next, err = reconciler.Replace(ctx, next, request.Incarnation); err != nil {
			return refuse(bootstrap.NotNow, err.Error())
		}
	}
	return bootstrap.RejoinResponse{
		ClusterID: n.dir.ClusterID(), Replica: string(next.Replica), Record: n.outcome().Record, Addresses: n.addressesOf(members),
	}
}

// answers reports whether exactly that incarnation of a node is alive.
func (n *Node) answers(ctx context.Context, m bootstrap.Member) bool {
	if m.Name == n.cfg.Name {
		return m.Incarnation == n.dir.Incarnation()
	}
	return n.pings(ctx, m.Name, m.Incarnation)
}

// pings reports whether that incarnation of another node can be reached.
func (n *Node) pings(ctx context.Context, name string, incarnation uint64) bool {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	answer, err := n.transport.Call(ctx, name, methodPing, nil)
	return err == nil && len(answer) == 8 && binary.BigEndian.Uint64(answer) == incarnation
}
