package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/placement"
	"kvd/ring"
	"kvd/shard"
	"kvd/transport"
)

// methodAdmin carries an adminRequest to group 0's leader.
const methodAdmin = "node.admin"

// adminPatience bounds how long a request waits for group 0 to have a leader.
const adminPatience = 5 * time.Second

// adminRequest is one of the things that only group 0's leader can do.
type adminRequest struct {
	Do    string `json:"do"` // adminOverview, ...
	Name  string `json:"name,omitempty"`
	New   string `json:"new,omitempty"`
	Force bool   `json:"force,omitempty"`
}

const (
	adminOverview = "overview"
	adminLeave    = "leave"
	adminReplace  = "replace"
)

// adminAnswer is the outcome, or the gRPC status of a refusal.
type adminAnswer struct {
	Overview  *placement.Overview `json:"overview,omitempty"`
	Code      codes.Code          `json:"code,omitempty"`
	Message   string              `json:"message,omitempty"`
	NotLeader bool                `json:"not_leader,omitempty"` // nothing was done: ask the leader
}

func (n *Node) handleAdministration() {
	n.transport.Handle(methodAdmin, func(ctx context.Context, _ transport.Peer, payload []byte) ([]byte, error) {
		var request adminRequest
		if err := json.Unmarshal(payload, &request); err != nil {
			return nil, fmt.Errorf("malformed request: %w", err)
		}
		return json.Marshal(n.administer(ctx, request))
	})
	for _, method := range placement.Methods {
		n.transport.Handle(method, func(ctx context.Context, from transport.Peer, payload []byte) ([]byte, error) {
			r := n.placement()
			if r == nil {
				return nil, errors.New("this node is not a member yet")
			}
			return r.Handle(ctx, method, from.Node, payload)
		})
	}
}

// administer does it here, if this node leads group 0.
func (n *Node) administer(ctx context.Context, request adminRequest) adminAnswer {
	r := n.placement()
	if r == nil {
		return adminAnswer{NotLeader: true}
	}
	var answer adminAnswer
	var err error
	switch request.Do {
	case adminOverview:
		var view placement.Overview
		view, err = r.Overview(ctx)
		answer.Overview = &view
	case adminLeave:
		err = r.Leave(ctx, request.Name, request.Force)
	case adminReplace:
		err = r.ReplaceMember(ctx, request.Name, request.New)
	default:
		err = status.Errorf(codes.Unimplemented, "kvd: %.50q is unknown to this node's version", request.Do)
	}
	if errors.Is(err, shard.ErrNotLeader) || errors.Is(err, placement.ErrConflict) {
		return adminAnswer{NotLeader: true}
	}
	if err != nil {
		s, _ := status.FromError(adminError(err))
		return adminAnswer{Code: s.Code(), Message: s.Message()}
	}
	return answer
}

// onLeader has group 0's leader do it, and waits for there to be one. What it
// does may be done twice.
func (n *Node) onLeader(ctx context.Context, request adminRequest) (adminAnswer, error) {
	patience := adminPatience
	if end, ok := ctx.Deadline(); ok {
		patience = min(patience, time.Until(end)*4/5) // the caller is to hear the reason
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	payload, err := json.Marshal(request)
	if err != nil {
		return adminAnswer{}, err
	}
	for {
		answer, reason := n.tryLeader(ctx, request, payload)
		if reason == "" {
			if answer.Code != codes.OK {
				return adminAnswer{}, status.Error(answer.Code, answer.Message)
			}
			return answer, nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return adminAnswer{}, status.Errorf(codes.Unavailable, "kvd: group 0, which has the cluster map, does not answer: %s: start enough of its nodes, and try again", reason)
		}
	}
}

// tryLeader asks whoever is thought to lead group 0; reason says why to ask
// again.
func (n *Node) tryLeader(ctx context.Context, request adminRequest, payload []byte) (answer adminAnswer, reason string) {
	replica := n.Replica()
	if replica == nil {
		return answer, "this node is starting"
	}
	switch leader := replica.Leader(); leader.Node {
	case "":
		return answer, "it has no leader"
	case n.cfg.Name:
		answer = n.administer(ctx, request)
	default:
		reply, err := n.transport.Call(ctx, leader.Node, methodAdmin, payload)
		if err == nil {
			err = json.Unmarshal(reply, &answer)
		}
		if err != nil {
			return answer, fmt.Sprintf("its leader, %s: %v", leader.Node, err)
		}
	}
	if answer.NotLeader {
		return answer, "its leader changes"
	}
	return answer, ""
}

func (n *Node) overview(ctx context.Context) (placement.Overview, error) {
	answer, err := n.onLeader(ctx, adminRequest{Do: adminOverview})
	if err != nil || answer.Overview == nil {
		return placement.Overview{}, err
	}
	return *answer.Overview, nil
}

// Leave makes a member leave the cluster, once its replicas are elsewhere. It
// may be asked of any node, and repeated. It refuses when too few nodes would
// remain for all copies, unless forced. Errors are gRPC statuses.
func (n *Node) Leave(ctx context.Context, name string, force bool) error {
	return n.leave(ctx, name, force)
}

func (n *Node) leave(ctx context.Context, name string, force bool) error {
	_, err := n.onLeader(ctx, adminRequest{Do: adminLeave, Name: name, Force: force})
	return err
}

func (n *Node) replaceMember(ctx context.Context, old, next string) error {
	_, err := n.onLeader(ctx, adminRequest{Do: adminReplace, Name: old, New: next})
	return err
}

func (n *Node) locate(key []byte) (tag []byte, shardNumber int, group uint64) {
	tag = ring.Tag(key)
	if n.cfg.Strategy == StrategyConsistent {
		shardNumber = ring.ShardOf(key, n.cfg.Shards)
		group = placement.GroupOf(shardNumber)
	}
	return tag, shardNumber, group
}

// membership implements server.Members.
type membership struct{ n *Node }

func (m membership) Leave(ctx context.Context, name string, force bool) error {
	return m.n.leave(ctx, name, force)
}
