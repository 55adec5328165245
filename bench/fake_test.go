package bench

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"sort"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
)

// fake is a server in this process, that keeps keys in memory and answers as much of etcd's API as workloads need, with
// etcd's own generated code: it does not read the requests as this package writes them.
type fake struct {
	pb.UnimplementedKVServer
	listener *bufconn.Listener
	// before is nil, or called before each request is answered: an error is the answer.
	before func(ctx context.Context, request any) error

	mu       sync.Mutex
	revision int64
	keys     []string // sorted
	pairs    map[string]*mvccpb.KeyValue
	puts     []*pb.PutRequest
	ranges   []*pb.RangeRequest
}

// startFake runs a fake until the test ends; services are further ones.
func startFake(t testing.TB, services ...func(*grpc.Server)) *fake {
	return serveFake(t, grpc.NewServer(), services...)
}

func serveFake(t testing.TB, server *grpc.Server, services ...func(*grpc.Server)) *fake {
	t.Helper()
	f := &fake{listener: bufconn.Listen(1 << 20), revision: 1, pairs: map[string]*mvccpb.KeyValue{}}
	pb.RegisterKVServer(server, f)
	for _, register := range services {
		register(server)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(f.listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return f
}

// options for a short run against f.
func (f *fake) options(w Workload) Options {
	return Options{Endpoints: []string{"fake"}, Workload: w, Dial: f.dial, Clients: 4, Total: 200, Keys: 50}
}

func (f *fake) dial(ctx context.Context, _ string) (net.Conn, error) {
	return f.listener.DialContext(ctx)
}

func (f *fake) header() *pb.ResponseHeader { return &pb.ResponseHeader{Revision: f.revision} }

func (f *fake) hook(ctx context.Context, request any) error {
	if f.before == nil {
		return nil
	}
	return f.before(ctx, request)
}

func (f *fake) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	if err := f.hook(ctx, r); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision++
	return f.put(r), nil
}

func (f *fake) put(r *pb.PutRequest) *pb.PutResponse {
	key := string(r.Key)
	if f.pairs[key] == nil {
		at, _ := slices.BinarySearch(f.keys, key)
		f.keys = slices.Insert(f.keys, at, key)
		f.pairs[key] = &mvccpb.KeyValue{Key: r.Key, CreateRevision: f.revision}
	}
	f.pairs[key].Value, f.pairs[key].ModRevision = r.Value, f.revision
	f.puts = append(f.puts, r)
	return &pb.PutResponse{Header: f.header()}
}

func (f *fake) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := f.hook(ctx, r); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ranges = append(f.ranges, r)
	return f.read(r), nil
}

func (f *fake) read(r *pb.RangeRequest) *pb.RangeResponse {
	response := &pb.RangeResponse{Header: f.header()}
	for i := sort.SearchStrings(f.keys, string(r.Key)); i < len(f.keys); i++ {
		key := f.keys[i]
		inside := key == string(r.Key)
		if len(r.RangeEnd) > 0 {
			inside = bytes.Compare([]byte(key), r.RangeEnd) < 0
		}
		if !inside || r.Limit > 0 && int64(len(response.Kvs)) == r.Limit {
			break
		}
		pair := f.pairs[key]
		response.Kvs = append(response.Kvs, &mvccpb.KeyValue{
			Key: pair.Key, Value: pair.Value, CreateRevision: pair.CreateRevision, ModRevision: pair.ModRevision,
		})
	}
	response.Count = int64(len(response.Kvs))
	return response
}

// Txn understands compare-and-put.
func (f *fake) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if err := f.hook(ctx, r); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	compare := r.Compare[0]
	if len(r.Compare) != 1 || compare.Result != pb.Compare_EQUAL || compare.Target != pb.Compare_MOD {
		return nil, errors.New("not the compare of a compare-and-put")
	}
	var at int64
	if pair := f.pairs[string(compare.Key)]; pair != nil {
		at = pair.ModRevision
	}
	if at == compare.GetModRevision() {
		f.revision++
		put := f.put(r.Success[0].GetRequestPut())
		return &pb.TxnResponse{Header: f.header(), Succeeded: true, Responses: []*pb.ResponseOp{{Response: &pb.ResponseOp_ResponsePut{ResponsePut: put}}}}, nil
	}
	read := f.read(r.Failure[0].GetRequestRange())
	return &pb.TxnResponse{Header: f.header(), Responses: []*pb.ResponseOp{{Response: &pb.ResponseOp_ResponseRange{ResponseRange: read}}}}, nil
}
