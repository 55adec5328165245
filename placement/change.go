package placement

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// change is one transaction on the map. It takes effect only if the records
// that it depends on are what they were when the map was read: all of it, or
// nothing.
type change struct {
	revision int64
	txn      pb.TxnRequest
}

func (m *Map) change() *change { return &change{revision: m.Revision} }

// unchanged makes the change depend on a record that the map has, or on one that
// it may not have, if maybe.
func (c *change) unchanged(key string, maybe bool) {
	c.txn.Compare = append(c.txn.Compare, &pb.Compare{
		Key: []byte(key), Target: pb.Compare_MOD, Result: pb.Compare_LESS,
		TargetUnion: &pb.Compare_ModRevision{ModRevision: c.revision + 1},
	})
	if !maybe {
		c.txn.Compare = append(c.txn.Compare, created(key, pb.Compare_GREATER))
	}
}

// absent makes the change depend on a record not to be there.
func (c *change) absent(key string) {
	c.txn.Compare = append(c.txn.Compare, created(key, pb.Compare_EQUAL))
}

func created(key string, result pb.Compare_CompareResult) *pb.Compare {
	return &pb.Compare{
		Key: []byte(key), Target: pb.Compare_CREATE, Result: result,
		TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 0},
	}
}

func (c *change) put(key string, record any) {
	value, err := json.Marshal(record)
	if err != nil {
		panic(err) // strings and numbers
	}
	c.txn.Success = append(c.txn.Success, put([]byte(key), value))
}

func (c *change) delete(key string) {
	c.txn.Success = append(c.txn.Success, &pb.RequestOp{
		Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)}},
	})
}

// putMember replaces a member's record.
func (c *change) putMember(m Member) {
	c.unchanged(memberKey(m.Name), false)
	c.put(memberKey(m.Name), m)
}

// putShard replaces a shard's record.
func (c *change) putShard(s Shard) {
	c.unchanged(shardKey(s.Number), false)
	c.put(shardKey(s.Number), s)
}

// putCounter takes the numbers up to n.
func (c *change) putCounter(n uint64) {
	c.unchanged(counterKey, true)
	c.put(counterKey, n)
}

// create is a change that assigns new replicas, each numbered for itself; nil if
// none of them can be. The same shard must not be named twice.
func (m *Map) create(steps []ShardStep) *change {
	c, number := m.change(), m.counter
	for _, step := range steps {
		s, ok := m.shardOf(step.Group)
		member, known := m.Member(step.Node)
		if !ok || !known {
			continue
		}
		number++
		s.Replicas = append(slices.Clone(s.Replicas), Replica{ID: replicaID(step.Node, number, step.Role), Incarnation: member.Incarnation})
		c.putShard(s)
	}
	if number == m.counter {
		return nil
	}
	c.putCounter(number)
	return c
}

// forget is a change that takes a replica out; nil if it is not there.
func (m *Map) forget(ref ReplicaRef) *change {
	s, ok := m.shardOf(ref.Group)
	if !ok || !slices.ContainsFunc(s.Replicas, func(r Replica) bool { return r.ID == ref.ID }) {
		return nil
	}
	s.Replicas = slices.DeleteFunc(slices.Clone(s.Replicas), func(r Replica) bool { return r.ID == ref.ID })
	c := m.change()
	c.putShard(s)
	return c
}

// lose is a change that marks replicas as lost for ever: no incarnation of their
// node has them. Nil if the map does not give them to this incarnation.
func (m *Map) lose(lost []ReplicaRef, incarnation uint64) *change {
	c := m.change()
	for _, s := range m.Shards {
		replicas := slices.Clone(s.Replicas)
		for i, r := range replicas {
			if r.Incarnation == incarnation && slices.Contains(lost, ReplicaRef{s.Group(), r.ID}) {
				replicas[i].Incarnation = 0
			}
		}
		if !slices.Equal(replicas, s.Replicas) {
			s.Replicas = replicas
			c.putShard(s)
		}
	}
	if len(c.txn.Success) == 0 {
		return nil
	}
	return c
}

// remove is a change that deletes a member of which nothing is left. Its number
// in group 0 stays taken.
func (m *Map) remove(member Member) *change {
	c := m.change()
	c.unchanged(memberKey(member.Name), false)
	c.delete(memberKey(member.Name))
	// Whoever gives it a replica meanwhile takes a number.
	c.putCounter(max(m.counter, numberOf(member.Replica)))
	return c
}

// shardOf is the record of a group's shard.
func (m *Map) shardOf(group uint64) (Shard, bool) {
	i, ok := slices.BinarySearchFunc(m.Shards, group, func(s Shard, group uint64) int {
		return int(int64(s.Group()) - int64(group))
	})
	if !ok {
		return Shard{}, false
	}
	return m.Shards[i], true
}

// numberOf is the number in a replica's id; 0 if it is malformed.
func numberOf(id raft.ServerID) uint64 {
	_, number, _ := strings.Cut(strings.TrimSuffix(string(id), "w"), "/")
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// commit carries a change out; ErrConflict if the map is not what it was.
func (r *Reconciler) commit(ctx context.Context, c *change) error {
	done, err := r.txn(ctx, &c.txn)
	if err == nil && !done {
		err = ErrConflict
	}
	return err
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

// fresh reads the map linearizably; shard.ErrNotLeader on other nodes.
func (r *Reconciler) fresh(ctx context.Context) (*Map, error) {
	index, err := r.cfg.Replica.ReadIndex(ctx)
	if err != nil {
		return nil, err
	}
	return loadFrom(ctx, r.cfg.Replica, index)
}

func loadFrom(ctx context.Context, replica *shard.Replica, index uint64) (*Map, error) {
	state, release, err := replica.AcquireState(ctx, index)
	if err != nil {
		return nil, err
	}
	defer release()
	m, err := LoadMap(ctx, state)
	return &m, err
}
