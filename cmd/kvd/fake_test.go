package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/server/kvdpb"
)

// TestMain gives commands the patience that a busy machine asks for.
func TestMain(m *testing.M) {
	if err := errors.Join(os.Setenv("KVD_DIAL_TIMEOUT", "1m"), os.Setenv("KVD_COMMAND_TIMEOUT", "1m")); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// fakeServer answers as little of etcd's API as the commands need, and records what was asked.
type fakeServer struct {
	pb.UnimplementedKVServer
	pb.UnimplementedMaintenanceServer
	pb.UnimplementedClusterServer
	pb.UnimplementedLeaseServer
	pb.UnimplementedWatchServer
	kvdpb.UnimplementedAdminServer

	addr   string
	member uint64
	leader uint64
	fail   error  // answer of every request for keys
	hang   bool   // requests for keys get no answer
	backup []byte // what Snapshot sends
	// views are the answers about shards, one after the other; the last one stays. Without one, there are no shards.
	views  []*kvdpb.ShardsResponse
	refuse error // answer of every request to change members
	// ignored is how many streams of keep-alives get no answer.
	ignored atomic.Int32
	ended   atomic.Bool // there is no lease any more
	// watches are what one watch after the other is sent, none if that is not implemented; then there is no leader, and after the last one nothing more.
	watches [][]*pb.WatchResponse
	seen    chan struct{} // received from before there is no leader; nil = at once
	errors  []string

	asked    chan struct{} // signalled by every request for keys
	mu       sync.Mutex
	requests []proto.Message
	pairs    map[string]string
	forget   string // a key that is acknowledged and not kept
}

func startFake(t *testing.T) *fakeServer {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeServer{addr: listener.Addr().String(), member: 0xa1, leader: 0xa1, pairs: make(map[string]string), asked: make(chan struct{}, 1)}
	server := grpc.NewServer()
	pb.RegisterKVServer(server, f)
	pb.RegisterMaintenanceServer(server, f)
	pb.RegisterClusterServer(server, f)
	pb.RegisterLeaseServer(server, f)
	pb.RegisterWatchServer(server, f)
	kvdpb.RegisterAdminServer(server, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return f
}

func (f *fakeServer) header() *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: 0xc1, MemberId: f.member, Revision: 7, RaftTerm: 3}
}

// answer records a request and says whether and how it fails.
func (f *fakeServer) answer(ctx context.Context, request proto.Message) error {
	f.mu.Lock()
	f.requests = append(f.requests, request)
	f.mu.Unlock()
	select {
	case f.asked <- struct{}{}:
	default:
	}
	if f.hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return f.fail
}

// all are the requests of one type.
func all[R proto.Message](f *fakeServer) (of []R) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.requests {
		if r, ok := r.(R); ok {
			of = append(of, r)
		}
	}
	return of
}

// last is the latest request.
func (f *fakeServer) last() proto.Message {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.requests) == 0 {
		return nil
	}
	return f.requests[len(f.requests)-1]
}

func (f *fakeServer) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	if err := f.answer(ctx, r); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if string(r.GetKey()) != f.forget {
		f.pairs[string(r.GetKey())] = string(r.GetValue())
	}
	return &pb.PutResponse{Header: f.header()}, nil
}

func (f *fakeServer) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := f.answer(ctx, r); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &pb.RangeResponse{Header: f.header()}
	for key, value := range f.pairs {
		if k := []byte(key); bytes.Equal(k, r.GetKey()) || bytes.Compare(r.GetKey(), k) <= 0 && bytes.Compare(k, r.GetRangeEnd()) < 0 {
			resp.Count++
			resp.Kvs = append(resp.Kvs, &mvccpb.KeyValue{Key: k, Value: []byte(value), CreateRevision: 2, ModRevision: 5, Version: 3})
		}
	}
	return resp, nil
}

func (f *fakeServer) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	return &pb.DeleteRangeResponse{Header: f.header(), Deleted: 2}, f.answer(ctx, r)
}

func (f *fakeServer) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	return &pb.TxnResponse{Header: f.header(), Succeeded: true}, f.answer(ctx, r)
}

func (f *fakeServer) Compact(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	return &pb.CompactionResponse{Header: f.header()}, f.answer(ctx, r)
}

func (f *fakeServer) Status(context.Context, *pb.StatusRequest) (*pb.StatusResponse, error) {
	return &pb.StatusResponse{Header: f.header(), Version: "3.7.0", DbSize: 20480, Leader: f.leader, RaftIndex: 12, RaftTerm: 3, RaftAppliedIndex: 11, Errors: f.errors}, nil
}

func (f *fakeServer) Alarm(context.Context, *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	return &pb.AlarmResponse{Header: f.header()}, nil
}

func (f *fakeServer) MoveLeader(ctx context.Context, r *pb.MoveLeaderRequest) (*pb.MoveLeaderResponse, error) {
	return &pb.MoveLeaderResponse{Header: f.header()}, f.answer(ctx, r)
}

func (f *fakeServer) Snapshot(_ *pb.SnapshotRequest, stream grpc.ServerStreamingServer[pb.SnapshotResponse]) error {
	rest := uint64(len(f.backup))
	for chunk := range bytes.SplitSeq(f.backup, []byte("|")) {
		rest -= uint64(len(chunk))
		if err := stream.Send(&pb.SnapshotResponse{Header: f.header(), Version: "3.7.0", Blob: chunk, RemainingBytes: rest}); err != nil {
			return err
		}
	}
	sum := sha256.Sum256(bytes.ReplaceAll(f.backup, []byte("|"), nil))
	if f.fail != nil {
		return f.fail
	}
	if f.forget != "" {
		sum[0]++
	}
	return stream.Send(&pb.SnapshotResponse{Blob: sum[:]})
}

func (f *fakeServer) LeaseGrant(ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	return &pb.LeaseGrantResponse{Header: f.header(), ID: 0x1e, TTL: r.GetTTL()}, f.answer(ctx, r)
}

func (f *fakeServer) LeaseRevoke(ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	return &pb.LeaseRevokeResponse{Header: f.header()}, f.answer(ctx, r)
}

// LeaseKeepAlive renews all leases until they have ended.
func (f *fakeServer) LeaseKeepAlive(stream grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
	if f.ignored.Add(-1) >= 0 {
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		ttl := int64(1)
		if f.ended.Load() {
			ttl = 0
		}
		if err := f.answer(stream.Context(), r); err != nil {
			return err
		}
		if err := stream.Send(&pb.LeaseKeepAliveResponse{Header: f.header(), ID: r.GetID(), TTL: ttl}); err != nil {
			return err
		}
	}
}

func (f *fakeServer) LeaseTimeToLive(ctx context.Context, r *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	resp := &pb.LeaseTimeToLiveResponse{Header: f.header(), ID: r.GetID(), TTL: 7, GrantedTTL: 9}
	if r.GetKeys() {
		resp.Keys = [][]byte{[]byte("a"), []byte("b")}
	}
	if r.GetID() == 0xdead {
		resp.TTL, resp.GrantedTTL = -1, 0
	}
	return resp, f.answer(ctx, r)
}

func (f *fakeServer) LeaseLeases(ctx context.Context, r *pb.LeaseLeasesRequest) (*pb.LeaseLeasesResponse, error) {
	return &pb.LeaseLeasesResponse{Header: f.header(), Leases: []*pb.LeaseStatus{{ID: 0x1e}, {ID: 0x1f}}}, f.answer(ctx, r)
}

func (f *fakeServer) Watch(stream grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
	if f.watches == nil {
		return f.UnimplementedWatchServer.Watch(stream)
	}
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := f.answer(stream.Context(), r.GetCreateRequest()); err != nil {
		return err
	}
	f.mu.Lock()
	var send []*pb.WatchResponse
	if len(f.watches) > 0 {
		send, f.watches = f.watches[0], f.watches[1:]
	}
	last := len(f.watches) == 0
	f.mu.Unlock()
	for _, resp := range append([]*pb.WatchResponse{{Header: f.header(), Created: true}}, send...) {
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	if !last {
		if f.seen != nil {
			<-f.seen
		}
		return rpctypes.ErrGRPCNoLeader
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

func (f *fakeServer) MemberList(context.Context, *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	return &pb.MemberListResponse{Header: f.header(), Members: []*pb.Member{
		{ID: f.member, Name: "n1", PeerURLs: []string{"http://127.0.0.1:2380"}, ClientURLs: []string{"http://" + f.addr}},
		{ID: 0xa2, Name: "n2", PeerURLs: []string{"http://10.0.0.2:2380"}},
	}}, nil
}

func (f *fakeServer) Locate(_ context.Context, r *kvdpb.LocateRequest) (*kvdpb.LocateResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.views == nil {
		return &kvdpb.LocateResponse{Tag: r.GetKey()}, nil
	}
	return &kvdpb.LocateResponse{Tag: bytes.Trim(r.GetKey(), "{}"), Shard: 1, Group: 2}, nil
}

func (f *fakeServer) Shards(_ context.Context, r *kvdpb.ShardsRequest) (*kvdpb.ShardsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	if f.views == nil {
		return &kvdpb.ShardsResponse{}, nil
	}
	answer := proto.CloneOf(f.views[0])
	if len(f.views) > 1 {
		f.views = f.views[1:]
	}
	if len(r.GetShards()) > 0 {
		answer.Shards = nil
		for _, s := range f.views[0].GetShards() {
			if s.GetNumber() == r.GetShards()[0] {
				answer.Shards = append(answer.Shards, s)
			}
		}
		if answer.Shards == nil {
			return nil, status.Error(codes.NotFound, "kvd: there is no such shard")
		}
	}
	return answer, nil
}

func (f *fakeServer) RemoveMember(ctx context.Context, r *kvdpb.RemoveMemberRequest) (*kvdpb.RemoveMemberResponse, error) {
	return &kvdpb.RemoveMemberResponse{}, cmp.Or(f.answer(ctx, r), f.refuse)
}

func (f *fakeServer) ReplaceMember(ctx context.Context, r *kvdpb.ReplaceMemberRequest) (*kvdpb.ReplaceMemberResponse, error) {
	return &kvdpb.ReplaceMemberResponse{}, cmp.Or(f.answer(ctx, r), f.refuse)
}

// kvd runs one command line.
func kvd(t *testing.T, in string, args ...string) (code int, out, errOut string) {
	t.Helper()
	return kvdUntil(t.Context(), in, args...)
}

func kvdUntil(ctx context.Context, in string, args ...string) (code int, out, errOut string) {
	var stdout, stderr bytes.Buffer
	code = run(ctx, args, strings.NewReader(in), &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

// deadAddress is a loopback address that refuses connections, and that nobody else gets: it is the client's end of one.
func deadAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.LocalAddr().String()
}

var errTest = errors.New("planted")
