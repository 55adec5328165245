package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/fsm"
)

// maxParallelWrites of one request, to different shards.
const maxParallelWrites = 8

// deleteSharded deletes a range that may have keys in all shards, shard by
// shard: each deletes its keys at once and at a revision of its own.
func (s *kv) deleteSharded(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	group, one, err := s.router.groupOfRange(r.Key, r.RangeEnd)
	if err != nil {
		return nil, err
	}
	request := &pb.InternalRaftRequest{DeleteRange: r}
	if one {
		return propose[pb.DeleteRangeResponse](ctx, s.router, group, request, false)
	}
	d := deletion{meter: s.router.answers.meter(), sum: &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{}}}
	defer d.meter.release()
	err = s.router.inShards(ctx, func(ctx context.Context, group uint64) error {
		resp, err := propose[pb.DeleteRangeResponse](ctx, s.router, group, request, false)
		return d.add(resp, err)
	})
	switch {
	case err != nil:
		return nil, err
	case d.dropped:
		return nil, refusal(fsm.ErrAnswerDropped)
	}
	slices.SortFunc(d.sum.PrevKvs, func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) })
	return d.sum, nil
}

// deletion sums up what shards have deleted.
type deletion struct {
	mu      sync.Mutex
	meter   *answerMeter
	sum     *pb.DeleteRangeResponse
	dropped bool // some previous values were too much to be kept
}

func (d *deletion) add(resp *pb.DeleteRangeResponse, err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if reasonOf(err) == ReasonAnswerDropped {
		d.dropped = true
		return nil
	}
	if err != nil {
		return err
	}
	d.sum.Header.Revision = max(d.sum.Header.Revision, resp.Header.GetRevision())
	d.sum.Deleted += resp.Deleted
	if d.dropped = d.dropped || d.meter.Take(sizeOf(resp.PrevKvs)) != nil; d.dropped {
		d.sum.PrevKvs = nil
		return nil
	}
	d.sum.PrevKvs = append(d.sum.PrevKvs, resp.PrevKvs...)
	return nil
}

// inShards writes in all groups, each for itself. When one fails, no others
// are begun.
func (r *router) inShards(ctx context.Context, write func(context.Context, uint64) error) error {
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	all := r.cfg.Groups.All()
	var (
		mu     sync.Mutex
		done   int
		failed error
	)
	_ = inParallel(ctx, maxParallelWrites, all, func(_ context.Context, group uint64) error {
		err := write(ctx, group) // the others' failure is no reason to leave this one open
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err == nil:
			done++
		case failed == nil || mayBeDone(err):
			failed = err
		}
		return err
	})
	switch {
	case done == len(all):
		return nil
	case failed == nil: // ctx ended in between
		failed = r.readStatus(ctx, ctx.Err())
	}
	if done == 0 {
		return failed
	}
	return kvdError(codes.Unavailable, ReasonPartial, fmt.Sprintf(
		"the request was executed in %d of %d shards, and perhaps in others: repeat it (%s)", done, len(all), status.Convert(failed).Message()))
}

// mayBeDone tells failed writes of unknown outcome.
func mayBeDone(err error) bool {
	return errors.Is(err, rpctypes.ErrGRPCTimeoutDueToLeaderFail) || errors.Is(err, rpctypes.ErrGRPCCanceled)
}

// compactSharded compacts all groups, which may have been compacted already in
// an attempt that did not come to its end.
func (s *kv) compactSharded(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	if _, err := s.router.groupOf(nil); err != nil {
		return nil, err
	}
	newest, err := s.router.latest(ctx)
	switch {
	case err != nil:
		return nil, err
	case r.Revision > newest:
		return nil, rpctypes.ErrGRPCFutureRev
	}
	var (
		mu        sync.Mutex
		compacted int // groups that had not been
	)
	err = s.router.inShards(ctx, func(ctx context.Context, group uint64) error {
		_, err := propose[pb.CompactionResponse](ctx, s.router, group, &pb.InternalRaftRequest{Compaction: r}, false)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case errors.Is(err, rpctypes.ErrGRPCCompacted):
			return nil
		case err == nil:
			compacted++
		}
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case compacted == 0:
		return nil, rpctypes.ErrGRPCCompacted
	}
	return &pb.CompactionResponse{Header: &pb.ResponseHeader{Revision: newest}}, nil
}
