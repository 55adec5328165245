package server

import (
	"bytes"
	"context"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// userGroup serves the key space.
const userGroup = 0

// kv is etcd's key-value service.
type kv struct {
	pb.UnsafeKVServer
	router *router
}

var _ pb.KVServer = (*kv)(nil)

func newKV(r *router) *kv { return &kv{router: r} }

// fill completes a response's header. The state machine has set the revision.
func (r *router) fill(h *pb.ResponseHeader) {
	h.ClusterId = r.cfg.Cluster.ClusterID()
	h.MemberId = r.cfg.Cluster.MemberID()
	if replica := r.cfg.Replica(userGroup); replica != nil {
		h.RaftTerm = replica.Leader().Term
	}
}

// Range reads keys, linearizably unless the request says otherwise.
func (s *kv) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := checkRange(r); err != nil {
		return nil, err
	}
	read := s.rangeHere
	if s.router.sharded {
		read = s.rangeSharded
	}
	resp, err := read(ctx, r)
	if err != nil {
		return nil, err
	}
	s.router.fill(resp.Header)
	return resp, nil
}

// rangeHere reads from this node's state, which has all keys.
func (s *kv) rangeHere(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	state, release, err := s.router.acquire(ctx, userGroup, r.Serializable)
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, answered := s.router.answers.metered(ctx)
	defer answered()
	resp, err := state.Range(ctx, fsm.User, r)
	if err != nil {
		return nil, refusal(err)
	}
	return resp, nil
}

// RangeStream reads keys in chunks of about the size of a request, all at the
// revision of the first one. The header, the total count and whether there is
// more than the limit come with the last chunk.
func (s *kv) RangeStream(r *pb.RangeRequest, stream grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
	if err := checkRangeStream(r); err != nil {
		return err
	}
	if s.router.sharded {
		return s.streamSharded(r, stream)
	}
	ctx := stream.Context()
	limit := r.Limit
	if limit == 0 {
		limit = math.MaxInt64
	}
	page := proto.CloneOf(r)
	page.SortTarget = pb.RangeRequest_KEY // pages follow each other by key, and another target alone would sort them
	page.Limit = min(firstChunkKeys, limit)
	sent, revision := int64(0), int64(0)
	for {
		chunk, err := s.readPage(ctx, page)
		if err != nil {
			return err
		}
		if revision == 0 {
			revision = chunk.Header.Revision
			page.Serializable = true // this node has applied the revision now
			if page.Revision <= 0 {  // newest, as in etcd
				page.Revision = revision
			}
		}
		sent += int64(len(chunk.Kvs))
		if chunk.More {
			page.Key = append(bytes.Clone(chunk.Kvs[len(chunk.Kvs)-1].Key), 0)
		}
		out := &pb.RangeResponse{Kvs: chunk.Kvs}
		last := !chunk.More || sent == limit
		if last {
			out.Header = &pb.ResponseHeader{Revision: revision}
			s.router.fill(out.Header)
			out.More = chunk.More
			if out.Count, err = s.total(ctx, page, chunk, sent); err != nil {
				return err
			}
		}
		if err := stream.Send(&pb.RangeStreamResponse{RangeResponse: out}); err != nil || last {
			return err
		}
		page.Limit = min(nextChunkKeys(page.Limit, proto.Size(chunk), s.router.cfg.MaxRequestBytes), limit-sent)
	}
}

// readPage reads one chunk. The state is not pinned from chunk to chunk, while
// a slow client takes its time: the revision is what holds them together.
func (s *kv) readPage(ctx context.Context, page *pb.RangeRequest) (*pb.RangeResponse, error) {
	state, release, err := s.router.acquire(ctx, userGroup, page.Serializable)
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, answered := s.router.answers.metered(ctx)
	defer answered()
	resp, err := state.RangePage(ctx, fsm.User, page)
	if err != nil {
		return nil, refusal(err)
	}
	return resp, nil
}

// total is how many keys a streamed range has: those sent and those from where
// the next page would begin.
func (s *kv) total(ctx context.Context, page *pb.RangeRequest, last *pb.RangeResponse, sent int64) (int64, error) {
	switch {
	case page.CountOnly:
		return last.Count, nil
	case !last.More:
		return sent, nil
	}
	rest, err := s.readPage(ctx, &pb.RangeRequest{
		Key: page.Key, RangeEnd: page.RangeEnd, Revision: page.Revision, CountOnly: true, Serializable: true,
	})
	return sent + rest.GetCount(), err
}

const firstChunkKeys = 10

// nextChunkKeys steers a chunk's size towards target, give or take a factor of
// two, by the size of the one before.
func nextChunkKeys(keys int64, sizeBytes, target int) int64 {
	switch {
	case sizeBytes < target/2:
		return keys * 2
	case sizeBytes > target*2:
		return max(keys/2, 1)
	}
	return keys
}

func checkRangeStream(r *pb.RangeRequest) error {
	if err := checkRange(r); err != nil {
		return err
	}
	byKey := r.SortTarget == pb.RangeRequest_KEY && r.SortOrder == pb.RangeRequest_ASCEND
	if r.SortOrder != pb.RangeRequest_NONE && !byKey {
		return status.Error(codes.Unimplemented, "RangeStream does not support custom sort orders")
	}
	if r.MinModRevision != 0 || r.MaxModRevision != 0 || r.MinCreateRevision != 0 || r.MaxCreateRevision != 0 {
		return status.Error(codes.Unimplemented, "RangeStream does not support revision filters")
	}
	return nil
}

// Put writes one key.
func (s *kv) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	return s.put(ctx, r, func() ([]byte, error) { return proto.Marshal(&pb.InternalRaftRequest{Put: r}) })
}

// put is Put with the encoding of what goes to the log.
func (s *kv) put(ctx context.Context, r *pb.PutRequest, encode func() ([]byte, error)) (*pb.PutResponse, error) {
	if err := checkPut(r); err != nil {
		return nil, err
	}
	group, err := s.router.groupOf(r.Key)
	if err != nil {
		return nil, err
	}
	data, err := encode()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	resp, err := proposeData[pb.PutResponse](ctx, s.router, group, data, true)
	if r.Lease != 0 && s.router.mustAttach(err) {
		resp, err = attaching(ctx, s.router, group, []int64{r.Lease}, func(ctx context.Context) (*pb.PutResponse, error) {
			return proposeData[pb.PutResponse](ctx, s.router, group, data, true)
		})
	}
	if err != nil {
		return nil, err
	}
	s.router.fill(resp.Header)
	return resp, nil
}

// DeleteRange deletes keys. Those of several shards are not deleted at once.
func (s *kv) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if err := checkDelete(r); err != nil {
		return nil, err
	}
	resp, err := s.deleteSharded(ctx, r)
	if err != nil {
		return nil, err
	}
	s.router.fill(resp.Header)
	return resp, nil
}

// Txn runs a transaction; one that only reads is not replicated.
func (s *kv) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if err := checkTxn(r, s.router.cfg.MaxTxnOps); err != nil {
		return nil, err
	}
	group, none, err := s.router.groupOfTxn(r)
	var resp *pb.TxnResponse
	switch {
	case err != nil:
		resp, err = s.txnAcross(ctx, r, err)
	case none:
		resp, err = s.txnOfNothing(ctx, r)
	case isReadOnly(r):
		resp, err = s.readTxn(ctx, group, r)
	default:
		resp, err = s.writeTxn(ctx, group, r)
	}
	if err != nil {
		return nil, err
	}
	s.router.fill(resp.Header)
	return resp, nil
}

func (s *kv) writeTxn(ctx context.Context, group uint64, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	data, err := proto.Marshal(&pb.InternalRaftRequest{Txn: r})
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	resp, err := proposeData[pb.TxnResponse](ctx, s.router, group, data, grows(r))
	if s.router.mustAttach(err) {
		return attaching(ctx, s.router, group, leasesOfTxn(r), func(ctx context.Context) (*pb.TxnResponse, error) {
			return proposeData[pb.TxnResponse](ctx, s.router, group, data, grows(r))
		})
	}
	return resp, err
}

func (s *kv) readTxn(ctx context.Context, group uint64, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if s.router.sharded {
		return s.router.readTxnSharded(ctx, group, r)
	}
	state, release, err := s.router.acquire(ctx, userGroup, isSerializable(r))
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, answered := s.router.answers.metered(ctx)
	defer answered()
	resp, err := state.ReadTxn(ctx, fsm.User, r)
	if err != nil {
		return nil, refusal(err)
	}
	return resp, nil
}

// Compact forgets what was overwritten before a revision. If physical, it
// returns when this node has deleted it from its file.
func (s *kv) Compact(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	compact := s.compactAlone
	if s.router.sharded {
		compact = s.compactSharded
	}
	resp, err := compact(ctx, r)
	if err != nil {
		return nil, err
	}
	if r.Physical {
		if err := s.awaitCompacted(ctx, r.Revision); err != nil {
			return nil, err
		}
	}
	s.router.fill(resp.Header)
	return resp, nil
}

func (s *kv) compactAlone(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	return propose[pb.CompactionResponse](ctx, s.router, userGroup, &pb.InternalRaftRequest{Compaction: r}, false)
}

// awaitCompacted waits as long as the client does: deleting takes its time.
func (s *kv) awaitCompacted(ctx context.Context, revision int64) error {
	for _, group := range s.router.cfg.Groups.All() {
		if s.router.sharded && s.router.cfg.Replica(group) == nil {
			continue
		}
		if err := s.awaitGroupCompacted(ctx, group, revision); err != nil {
			return err
		}
	}
	return nil
}

func (s *kv) awaitGroupCompacted(ctx context.Context, group uint64, revision int64) error {
	// This node may be behind the one that applied the compaction.
	state, release, err := s.router.acquire(ctx, group, false)
	if err != nil {
		return err
	}
	defer release()
	if err := state.WaitCompacted(ctx, fsm.User, revision); err != nil {
		return refusal(err)
	}
	return nil
}

// message is a pointer to a response type.
type message[T any] interface {
	*T
	proto.Message
}

// propose replicates a request on a group. request is marshalled here, once.
func propose[T any, P message[T]](ctx context.Context, r *router, group uint64, request *pb.InternalRaftRequest, grows bool) (P, error) {
	data, err := proto.Marshal(request)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return proposeData[T, P](ctx, r, group, data, grows)
}

// proposeData is propose for a request that is marshalled already.
func proposeData[T any, P message[T]](ctx context.Context, r *router, group uint64, data []byte, grows bool) (P, error) {
	resp, err := r.propose(ctx, &write{
		group:   group,
		request: fsm.Request{Space: fsm.User, Data: data},
		grows:   grows,
		answer:  func() proto.Message { return P(new(T)) },
	})
	if err != nil {
		return nil, err
	}
	typed, ok := resp.(P)
	if !ok {
		return nil, kvdError(codes.Internal, ReasonInternal, "the state machine's answer has another type")
	}
	return typed, nil
}
