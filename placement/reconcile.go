package placement

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// ErrConflict: the cluster map changed at the same time; look again.
var ErrConflict = errors.New("placement: the cluster map changed meanwhile")

// Config is what a Reconciler works with.
type Config struct {
	Replica *shard.Replica // of group 0
	// Founders are written to the map when it is empty.
	Founders []Member
	Every    time.Duration // between looks; 500 ms
	Logger   *slog.Logger
}

// Reconciler brings group 0's members towards the cluster map while this node
// leads it. A new leader goes on where the last one stopped.
type Reconciler struct {
	cfg    Config
	cancel context.CancelFunc
	done   chan struct{}
}

// Start begins to reconcile.
func Start(cfg Config) *Reconciler {
	if cfg.Every == 0 {
		cfg.Every = 500 * time.Millisecond
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Reconciler{cfg: cfg, cancel: cancel, done: make(chan struct{})}
	go r.run(ctx)
	return r
}

// Close stops reconciling; a step under way may still take effect.
func (r *Reconciler) Close() {
	r.cancel()
	<-r.done
}

func (r *Reconciler) run(ctx context.Context) {
	defer close(r.done)
	ticker := time.NewTicker(r.cfg.Every)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		// One step follows the other at once: between a node's old vote and its
		// next one the group bears fewer failures.
		for again := true; again && r.cfg.Replica.Serving(); {
			var err error
			if again, err = r.step(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, shard.ErrNotLeader) {
				r.cfg.Logger.Warn("the group's members could not be changed yet", "error", err)
			}
		}
	}
}

// step carries out at most one change and reports whether it did. It blocks
// while the change commits, so one change is in flight at a time.
func (r *Reconciler) step(ctx context.Context) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// This node serves, so its own state has everything that earlier leaders
	// committed; raft refuses the step if the configuration has moved on.
	members, err := r.members(ctx, 0)
	if err != nil {
		return false, err
	}
	if len(members) == 0 {
		return false, r.found(ctx)
	}
	status := r.cfg.Replica.Status()
	view := View{Members: members, Group: status.Members, Commit: status.CommitIndex, Match: make(map[raft.ServerID]uint64)}
	for _, m := range status.Members {
		view.Match[m.ID] = r.cfg.Replica.Match(m.ID)
	}
	step, ok := Plan(view)
	if !ok {
		return false, nil
	}
	r.cfg.Logger.Info("changing the group's members", "step", string(step.Action), "replica", string(step.Replica))
	switch step.Action {
	case AddLearner:
		_, err = r.cfg.Replica.AddLearner(ctx, step.Replica, status.ConfigurationIndex)
	case Promote:
		_, err = r.cfg.Replica.Promote(ctx, step.Replica, status.ConfigurationIndex)
	case Remove:
		_, err = r.cfg.Replica.Remove(ctx, step.Replica, status.ConfigurationIndex)
	}
	return err == nil, err
}

// found writes the founders into an empty map, all or none.
func (r *Reconciler) found(ctx context.Context) error {
	txn := &pb.TxnRequest{}
	for _, m := range r.cfg.Founders {
		key := []byte(memberKey(m.Name))
		txn.Compare = append(txn.Compare, &pb.Compare{
			Key: key, Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL,
			TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 0},
		})
		txn.Success = append(txn.Success, put(key, m.encode()))
	}
	if len(txn.Success) == 0 {
		return nil
	}
	_, err := r.txn(ctx, txn)
	return err
}

// Members reads the map linearizably. It must be called on group 0's leader.
func (r *Reconciler) Members(ctx context.Context) ([]Member, error) {
	index, err := r.cfg.Replica.ReadIndex(ctx)
	if err != nil {
		return nil, err
	}
	return r.members(ctx, index)
}

// Replace gives a member that lost its data directory the replica id of its
// new incarnation, if the map still has the old one. It must be called on
// group 0's leader, by someone who knows that the old incarnation is gone.
func (r *Reconciler) Replace(ctx context.Context, old Member, incarnation uint64) (Member, error) {
	next, err := old.next(incarnation)
	if err != nil {
		return Member{}, err
	}
	key := []byte(memberKey(old.Name))
	done, err := r.txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{
			Key: key, Target: pb.Compare_VALUE, Result: pb.Compare_EQUAL,
			TargetUnion: &pb.Compare_Value{Value: old.encode()},
		}},
		Success: []*pb.RequestOp{put(key, next.encode())},
	})
	if err != nil {
		return Member{}, err
	}
	if !done {
		return Member{}, ErrConflict
	}
	r.cfg.Logger.Info("a member came back without its data", "member", old.Name, "replaces", string(old.Replica), "replica", string(next.Replica))
	return next, nil
}

func put(key, value []byte) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: value}}}
}

func (r *Reconciler) txn(ctx context.Context, txn *pb.TxnRequest) (succeeded bool, err error) {
	data, err := proto.Marshal(&pb.InternalRaftRequest{Txn: txn})
	if err != nil {
		return false, fmt.Errorf("placement: encode a change of the map: %w", err)
	}
	result, err := r.cfg.Replica.Propose(ctx, fsm.Request{Space: fsm.System, Data: data})
	if err != nil {
		return false, err
	}
	if result.Err != nil {
		return false, result.Err
	}
	return result.Response.(*pb.TxnResponse).Succeeded, nil
}

func (r *Reconciler) members(ctx context.Context, index uint64) ([]Member, error) {
	state, release, err := r.cfg.Replica.AcquireState(ctx, index)
	if err != nil {
		return nil, err
	}
	defer release()
	return Load(ctx, state)
}

// Load reads the map from a node's own state, as it is, in order of names.
func Load(ctx context.Context, state *fsm.Store) ([]Member, error) {
	end := []byte(memberPrefix)
	end[len(end)-1]++
	answer, err := state.Range(ctx, fsm.System, &pb.RangeRequest{Key: []byte(memberPrefix), RangeEnd: end})
	if err != nil {
		return nil, err
	}
	members := make([]Member, 0, len(answer.Kvs))
	for _, kv := range answer.Kvs {
		m, err := decodeMember(kv.Value)
		if err != nil {
			return nil, err
		}
		members = append(members, m)
	}
	return members, nil
}
