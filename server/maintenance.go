package server

import (
	"context"
	"errors"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/api/v3/version"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/fsm"
	"kvd/shard"
)

// maintenance is etcd's maintenance service. Nearly everything concerns this
// node's replicas; what is about the whole key space says so. Where there is
// one leader, it is group 0's.
type maintenance struct {
	pb.UnsafeMaintenanceServer
	router  *router
	backups chan struct{} // one per snapshot being sent
	hashes  chan struct{} // one per digest being computed
}

var _ pb.MaintenanceServer = (*maintenance)(nil)

func newMaintenance(r *router) *maintenance {
	return &maintenance{router: r, backups: make(chan struct{}, r.cfg.MaxSnapshotStreams), hashes: make(chan struct{}, r.cfg.MaxHashes)}
}

// local pins this node's state as it is.
func (s *maintenance) local(ctx context.Context) (*fsm.Store, func(), error) {
	return s.router.acquire(ctx, userGroup, true)
}

// header is complete but for the revision.
func (s *maintenance) header(revision int64) *pb.ResponseHeader {
	h := &pb.ResponseHeader{Revision: revision}
	s.router.fill(h)
	return h
}

// Status describes this node. It answers without a leader too.
func (s *maintenance) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	replica := s.router.cfg.Replica(userGroup)
	if replica == nil {
		return nil, notJoined()
	}
	state, release, err := s.local(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	now := replica.Status()
	allocated, inUse := state.SizeBytes()
	revision := state.Revision(fsm.User)
	leaderless := 0
	err = s.eachShard(ctx, func(_ uint64, replica Replica, state *fsm.Store) error {
		more, used := state.SizeBytes()
		allocated, inUse = allocated+more, inUse+used
		revision = max(revision, state.Revision(fsm.User))
		if replica.Leader().Node == "" {
			leaderless++
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	resp := &pb.StatusResponse{
		Header:           s.header(revision),
		Version:          version.Version,
		StorageVersion:   storageVersion,
		DbSize:           allocated,
		DbSizeInUse:      inUse,
		RaftIndex:        now.CommitIndex,
		RaftAppliedIndex: now.AppliedIndex,
		RaftTerm:         now.Term,
		IsLearner:        isLearner(now),
		DowngradeInfo:    &pb.DowngradeInfo{},
	}
	if leader, ok := s.router.memberNamed(now.Leader.Node); ok {
		resp.Leader = leader.ID
	} else {
		resp.Errors = append(resp.Errors, rpctypes.ErrorDesc(rpctypes.ErrGRPCNoLeader))
	}
	if leaderless > 0 {
		resp.Errors = append(resp.Errors, fmt.Sprintf("kvd: shards of this node have no leader: %d", leaderless))
	}
	if s.router.cfg.NoSpace() {
		resp.Errors = append(resp.Errors, "kvd: the disk is nearly full: what this node leads takes no writes but deletes")
	}
	return resp, nil
}

// eachShard calls f for every shard of which this node has a replica, in order,
// with its state as it is. Without shards it does nothing.
func (s *maintenance) eachShard(ctx context.Context, f func(group uint64, replica Replica, state *fsm.Store) error) error {
	if !s.router.sharded {
		return nil
	}
	for _, group := range s.router.cfg.Groups.All() {
		replica := s.router.cfg.Replica(group)
		if replica == nil {
			continue
		}
		state, release, err := replica.AcquireState(ctx, 0)
		if errors.Is(err, shard.ErrClosed) { // moved to another node just now
			continue
		}
		if err != nil {
			return s.router.readStatus(ctx, err)
		}
		err = f(group, replica, state)
		release()
		if err != nil {
			return err
		}
	}
	return nil
}

// storageVersion is the etcd release whose data model kvd has.
var storageVersion = version.V3_7.String()

func isLearner(s shard.Status) bool {
	for _, m := range s.Members {
		if m.ID == s.Replica {
			return !m.Voter
		}
	}
	return false
}

func (r *router) memberNamed(node string) (Member, bool) {
	for _, m := range r.cfg.Cluster.Members() {
		if m.Name == node && node != "" {
			return m, true
		}
	}
	return Member{}, false
}

// Alarm lists no alarms: kvd has none that must be raised or disarmed by hand.
func (s *maintenance) Alarm(ctx context.Context, r *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	if r.Action == pb.AlarmRequest_ACTIVATE && r.Alarm != pb.AlarmType_NONE {
		return nil, unsupported("raising alarms is")
	}
	return &pb.AlarmResponse{Header: s.header(s.revision(ctx))}, nil
}

// revision is this node's current one, 0 if it has no state.
func (s *maintenance) revision(ctx context.Context) int64 {
	state, release, err := s.local(ctx)
	if err != nil {
		return 0
	}
	defer release()
	revision := state.Revision(fsm.User)
	_ = s.eachShard(ctx, func(_ uint64, _ Replica, state *fsm.Store) error {
		revision = max(revision, state.Revision(fsm.User))
		return nil
	})
	return revision
}

// Defragment gives space that the states' files do not need back to the disk.
func (s *maintenance) Defragment(ctx context.Context, _ *pb.DefragmentRequest) (*pb.DefragmentResponse, error) {
	state, release, err := s.local(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	err = state.Defragment(ctx)
	if err == nil {
		err = s.eachShard(ctx, func(_ uint64, _ Replica, state *fsm.Store) error { return state.Defragment(ctx) })
	}
	if err != nil {
		s.router.cfg.Logger.Warn("defragmentation failed", "error", err)
		return nil, refusal(err)
	}
	return &pb.DefragmentResponse{}, nil
}

// toHash pins this node's state for one of the few digests, each of which reads
// all of it, that may be computed at a time.
func (s *maintenance) toHash(ctx context.Context) (*fsm.Store, func(), error) {
	select {
	case s.hashes <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, refusal(ctx.Err())
	}
	state, release, err := s.local(ctx)
	if err != nil {
		<-s.hashes
		return nil, nil, err
	}
	return state, func() {
		release()
		<-s.hashes
	}, nil
}

// Hash is a digest of everything this node stores.
func (s *maintenance) Hash(ctx context.Context, _ *pb.HashRequest) (*pb.HashResponse, error) {
	state, release, err := s.toHash(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	revision := state.Revision(fsm.User)
	hash, err := state.Hash(ctx)
	if err != nil {
		return nil, refusal(err)
	}
	if s.router.sharded {
		var sum shardHash
		sum.add(userGroup, hash)
		err = s.eachShard(ctx, func(group uint64, _ Replica, state *fsm.Store) error {
			revision = max(revision, state.Revision(fsm.User))
			hash, err := state.Hash(ctx)
			sum.add(group, hash)
			return err
		})
		if err != nil {
			return nil, refusal(err)
		}
		hash = sum.crc
	}
	return &pb.HashResponse{Header: s.header(revision), Hash: hash}, nil
}

// HashKV is a digest of the key space up to a revision; equal on all members.
func (s *maintenance) HashKV(ctx context.Context, r *pb.HashKVRequest) (*pb.HashKVResponse, error) {
	state, release, err := s.toHash(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if s.router.sharded {
		return s.hashShards(ctx, r.Revision)
	}
	hash, compacted, hashed, err := state.HashKV(ctx, r.Revision)
	if err != nil {
		return nil, refusal(err)
	}
	return &pb.HashKVResponse{
		Header: s.header(state.Revision(fsm.User)), Hash: hash, CompactRevision: compacted, HashRevision: hashed,
	}, nil
}

// MoveLeader hands the leadership to a member. As in etcd, it must be sent to
// the leader.
func (s *maintenance) MoveLeader(ctx context.Context, r *pb.MoveLeaderRequest) (*pb.MoveLeaderResponse, error) {
	replica := s.router.cfg.Replica(userGroup)
	if replica == nil {
		return nil, notJoined()
	}
	if !replica.Leader().Self {
		return nil, rpctypes.ErrGRPCNotLeader
	}
	target, ok := s.router.memberByID(r.TargetID)
	if !ok || target.Learner {
		return nil, rpctypes.ErrGRPCBadLeaderTransferee
	}
	if target.Name == s.router.cfg.Node {
		return &pb.MoveLeaderResponse{}, nil
	}
	ctx, cancel := s.router.withDeadline(ctx)
	defer cancel()
	switch err := replica.TransferLeadership(ctx, target.Name); {
	case errors.Is(err, shard.ErrNotLeader):
		return nil, rpctypes.ErrGRPCNotLeader
	case errors.Is(err, shard.ErrNoTarget):
		return nil, rpctypes.ErrGRPCBadLeaderTransferee
	case err != nil:
		s.router.cfg.Logger.Warn("leadership transfer failed", "to", target.Name, "error", err)
		return nil, errTransferTimeout
	}
	if err := awaitLeader(ctx, replica, target.Name); err != nil {
		return nil, err
	}
	return &pb.MoveLeaderResponse{}, nil
}

// errTransferTimeout has etcd's text and, as there, no code of its own.
var errTransferTimeout = status.Error(codes.Unknown, "etcdserver: request timed out, leader transfer took too long")

// awaitLeader waits until this node has heard that another one leads.
func awaitLeader(ctx context.Context, replica Replica, node string) error {
	for {
		changed := replica.LeaderChanged()
		leader := replica.Leader()
		switch {
		case leader.Node == node:
			return nil
		case leader.Node != "" && !leader.Self:
			return kvdError(codes.Aborted, ReasonOtherLeader, fmt.Sprintf("node %s was elected instead", leader.Node))
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errTransferTimeout
		}
	}
}

func (r *router) memberByID(id uint64) (Member, bool) {
	for _, m := range r.cfg.Cluster.Members() {
		if m.ID == id {
			return m, true
		}
	}
	return Member{}, false
}

// Downgrade is not supported.
func (s *maintenance) Downgrade(context.Context, *pb.DowngradeRequest) (*pb.DowngradeResponse, error) {
	return nil, unsupported("downgrading through the etcd API is")
}
