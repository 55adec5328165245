package server

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/fsm"
	"kvd/shard"
)

// shardHash is a digest of the digests of shards.
type shardHash struct{ crc uint32 }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (h *shardHash) add(group uint64, hash uint32) {
	entry := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, group), hash)
	h.crc = crc32.Update(h.crc, castagnoli, entry)
}

// hashShards is HashKV of a sharded key space: of all shards at one revision,
// whichever node is asked. The digest has no meaning for a single store.
func (s *maintenance) hashShards(ctx context.Context, revision int64) (*pb.HashKVResponse, error) {
	for {
		resp, err := s.tryHash(ctx, revision)
		switch {
		case err == nil:
			return resp, nil
		case !errors.Is(err, fsm.ErrCompacted) || revision > 0 || ctx.Err() != nil:
			return nil, refusal(err)
		}
	}
}

func (s *maintenance) tryHash(ctx context.Context, revision int64) (*pb.HashKVResponse, error) {
	c, err := s.router.cuts.take(ctx)
	switch {
	case err != nil:
		return nil, err
	case revision > c.revision:
		return nil, rpctypes.ErrGRPCFutureRev
	case revision <= 0:
		revision = c.revision
	}
	var sum shardHash
	resp := &pb.HashKVResponse{Header: s.header(c.revision), HashRevision: revision, CompactRevision: -1}
	for _, g := range c.gates {
		one, err := s.router.hashOf(ctx, g, revision, c.revision)
		if err != nil {
			return nil, err
		}
		sum.add(g.group, one.hash)
		resp.CompactRevision = max(resp.CompactRevision, one.compacted)
	}
	resp.Hash = sum.crc
	return resp, nil
}

// groupHash is a digest of one group, as fsm's.
type groupHash struct {
	hash      uint32
	compacted int64
}

func (r *router) hashOf(ctx context.Context, g gate, revision, current int64) (sum groupHash, err error) {
	here := func(ctx context.Context, replica Replica) error {
		sum, err = hashHere(ctx, replica, g.index, revision, current)
		return err
	}
	there := func(ctx context.Context, node string) error {
		sum, err = r.hashThere(ctx, node, g, revision, current)
		return err
	}
	return sum, r.onState(ctx, g.group, g.node, slow(ctx, here), slow(ctx, there))
}

// slow gives f all the time that ctx has: it reads a whole state.
func slow[T any](ctx context.Context, f func(context.Context, T) error) func(context.Context, T) error {
	return func(_ context.Context, to T) error { return f(ctx, to) }
}

func hashHere(ctx context.Context, replica Replica, index uint64, revision, current int64) (groupHash, error) {
	state, release, err := replica.AcquireState(ctx, index)
	if err != nil {
		return groupHash{}, elsewhere(err)
	}
	defer release()
	hash, compacted, _, err := state.HashKVAt(ctx, revision, current)
	return groupHash{hash, compacted}, err
}

// The request for a digest and its answer, beside what forward.go says:
//
//	hash:   version 1, group 8, timeout 4 (ms), index 8, revision 8, current 8
//	answer: version 1, code 1 | hash 4, compacted 8
const hashHeader = 37

func (r *router) hashThere(ctx context.Context, node string, g gate, revision, current int64) (groupHash, error) {
	payload := []byte{protocolVersion}
	payload = binary.BigEndian.AppendUint64(payload, g.group)
	payload = binary.BigEndian.AppendUint32(payload, timeoutMillis(ctx))
	payload = binary.BigEndian.AppendUint64(payload, g.index)
	payload = binary.BigEndian.AppendUint64(payload, uint64(revision))
	payload = binary.BigEndian.AppendUint64(payload, uint64(current))
	c, body, err := r.call(ctx, node, methodHash, payload)
	switch {
	case err != nil:
		return groupHash{}, err
	case c == codeRefused:
		return groupHash{}, decodeRefusal(body)
	case c != codeOK:
		return groupHash{}, c.err()
	case len(body) != 12:
		return groupHash{}, errBadAnswer
	}
	return groupHash{binary.BigEndian.Uint32(body), int64(binary.BigEndian.Uint64(body[4:]))}, nil
}

// handleHash computes one digest at a time for other nodes, beside those of
// this node's own clients, so that nodes that wait for each other get on.
func (r *router) handleHash(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	if len(payload) != hashHeader || payload[0] != protocolVersion {
		return answer(codeMalformed), nil
	}
	group := binary.BigEndian.Uint64(payload[1:])
	index, revision := binary.BigEndian.Uint64(payload[13:]), int64(binary.BigEndian.Uint64(payload[21:]))
	current := int64(binary.BigEndian.Uint64(payload[29:]))
	replica := r.ofKeys(group)
	if replica == nil {
		return r.decline(group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMillis(ctx, binary.BigEndian.Uint32(payload[9:]))
	defer cancel()
	select {
	case r.hashing <- struct{}{}:
		defer func() { <-r.hashing }()
	case <-ctx.Done():
		return r.decline(group, replica, shard.ErrNotLeader), nil
	}
	sum, err := hashHere(ctx, replica, index, revision, current)
	if err != nil {
		return r.declineRead(group, replica, err), nil
	}
	reply := binary.BigEndian.AppendUint32(answer(codeOK), sum.hash)
	return binary.BigEndian.AppendUint64(reply, uint64(sum.compacted)), nil
}
