package placement

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Why a change of the members is refused.
var (
	// ErrUnknownMember: no member has that name.
	ErrUnknownMember = errors.New("placement: no such member")
	// ErrMemberExists: another node is a member under that name.
	ErrMemberExists = errors.New("placement: the name is taken")
	// ErrTooFew: too few members would be left. It may be forced.
	ErrTooFew = errors.New("placement: too few live nodes would remain")
	// ErrLast: it is the only member. It cannot be forced.
	ErrLast = errors.New("placement: it is the only member")
	// ErrQuorum: the rest would have no quorum. It cannot be forced.
	ErrQuorum = errors.New("placement: the remaining members would have no quorum")
)

// Members reads the map's members linearizably. It must be called on group 0's
// leader.
func (r *Reconciler) Members(ctx context.Context) ([]Member, error) {
	m, err := r.fresh(ctx)
	if err != nil {
		return nil, err
	}
	return m.Members, nil
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
	r.wakeUp()
	r.cfg.Logger.Info("a member came back without its data", "member", old.Name, "replaces", string(old.Replica), "replica", string(next.Replica))
	return next, nil
}

// Reports says whether a member has reported lately, as this incarnation, to this
// node as group 0's leader.
func (r *Reconciler) Reports(m Member) bool { return r.seen.node(m, time.Now()).Alive }

// Join makes a node a member, and returns its record and what the cluster agrees
// on (nil in a cluster without shards). It may be repeated. ErrMemberExists if
// another incarnation of that name is a member: that one is replaced (Replace)
// or removed (Leave). It must be called on group 0's leader.
func (r *Reconciler) Join(ctx context.Context, name string, incarnation uint64, weight float64) (Member, *ClusterConfig, error) {
	m, err := r.fresh(ctx)
	if err != nil {
		return Member{}, nil, err
	}
	if len(m.Members) == 0 {
		return Member{}, nil, fmt.Errorf("%w: the cluster is being founded", ErrConflict)
	}
	if member, ok := m.Member(name); ok {
		if member.Incarnation != incarnation {
			return Member{}, nil, fmt.Errorf("%w: %s", ErrMemberExists, name)
		}
		return member, m.Config, nil
	}
	// Founders have number 1; the counter has those of members that have left.
	number := max(m.counter, 1) + 1
	member := Member{Name: name, Incarnation: incarnation, Replica: replicaID(name, number, Data)}
	if m.Config != nil && weightOf(weight) != 1 {
		member.Weight = weightOf(weight)
	}
	c := m.change()
	c.absent(memberKey(name))
	c.put(memberKey(name), member)
	c.putCounter(number)
	if err := r.commit(ctx, c); err != nil {
		return Member{}, nil, err
	}
	r.wakeUp()
	r.cfg.Logger.Info("a node joins", "member", name, "replica", string(member.Replica))
	return member, m.Config, nil
}

// Leave begins to drain a member: its replicas go elsewhere, and when nothing of
// it is left, it is no member any more. It may be repeated. Without force it is
// refused with ErrTooFew if fewer nodes would live than each shard is to have
// copies; with force, shards may be left with fewer copies. It must be called on
// group 0's leader.
func (r *Reconciler) Leave(ctx context.Context, name string, force bool) error {
	m, err := r.fresh(ctx)
	if err != nil {
		return err
	}
	member, ok := m.Member(name)
	switch {
	case !ok:
		return fmt.Errorf("%w: %s", ErrUnknownMember, name)
	case member.Leaving:
		return nil
	}
	remaining, alive, err := r.remaining(ctx, m, name)
	if err != nil {
		return err
	}
	if remaining == 0 {
		return fmt.Errorf("%w: %s", ErrLast, name)
	}
	if votes := min(remaining, votesOf(m.Config, remaining)); 2*alive <= votes {
		return fmt.Errorf("%w: of the %d others, %d are known to be alive", ErrQuorum, remaining, alive)
	}
	if m.Config != nil && alive < m.Config.ReplicationFactor && !force {
		return fmt.Errorf("%w: %d of the %d others are alive, and each shard is to have %d copies: add a node first, or use force to live with fewer copies",
			ErrTooFew, alive, remaining, m.Config.ReplicationFactor)
	}
	member.Leaving = true
	c := m.change()
	c.putMember(member)
	for _, other := range m.Members { // those that were counted must not leave at the same time
		c.unchanged(memberKey(other.Name), false)
	}
	if err := r.commit(ctx, c); err != nil {
		return err
	}
	r.wakeUp()
	r.cfg.Logger.Info("a member is leaving", "member", name, "force", force)
	return nil
}

// remaining counts the members that stay besides one, and those of them that are
// alive, once each has had the time to report to this leader.
func (r *Reconciler) remaining(ctx context.Context, m *Map, except string) (remaining, alive int, err error) {
	for {
		now := time.Now()
		remaining, alive = 0, 0
		waits := false
		for _, member := range m.Members {
			if member.Name == except || member.Leaving {
				continue
			}
			remaining++
			switch {
			case r.seen.node(member, now).Alive:
				alive++
			case r.seen.silence(member, now) < r.cfg.SuspectAfter:
				waits = true
			}
		}
		if !waits {
			return remaining, alive, nil
		}
		pause(ctx, 20*time.Millisecond, nil, nil)
		if err := ctx.Err(); err != nil {
			return remaining, alive, err
		}
	}
}

// ReplaceMember lets one member leave for another that has joined already. It
// must be called on group 0's leader.
func (r *Reconciler) ReplaceMember(ctx context.Context, old, new string) error {
	m, err := r.fresh(ctx)
	if err != nil {
		return err
	}
	next, ok := m.Member(new)
	switch {
	case old == new:
		return fmt.Errorf("%w: %s cannot replace itself", ErrMemberExists, new)
	case !ok:
		return fmt.Errorf("%w: %s: start it with --join first", ErrUnknownMember, new)
	case next.Leaving:
		return fmt.Errorf("%w: %s is leaving", ErrUnknownMember, new)
	}
	return r.Leave(ctx, old, false)
}

// Overview describes the cluster as this node sees it as group 0's leader.
func (r *Reconciler) Overview(ctx context.Context) (Overview, error) {
	m, err := r.fresh(ctx)
	if err != nil {
		return Overview{}, err
	}
	return r.overview(m, time.Now())
}
