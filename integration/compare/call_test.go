package compare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
)

// call is one request, and where it goes.
type call struct {
	request proto.Message
	stream  bool // a RangeRequest that is sent to RangeStream
	node    int  // the node that is asked, modulo the number of nodes
}

func (c call) String() string {
	name := string(c.request.ProtoReflect().Descriptor().Name())
	if c.stream {
		name += " (stream)"
	}
	const maxText = 500
	text := prototext.MarshalOptions{}.Format(c.request)
	if len(text) > maxText {
		text = fmt.Sprintf("%s... (%d bytes)", text[:maxText], len(text))
	}
	return fmt.Sprintf("node %d: %s {%s}", c.node, name, text)
}

// answer is what a client sees of a call's outcome.
type answer struct {
	response proto.Message // nil when refused
	code     codes.Code
	message  string
}

func (a answer) String() string {
	if a.response == nil {
		return fmt.Sprintf("%v: %q", a.code, a.message)
	}
	return prototext.MarshalOptions{Multiline: true}.Format(a.response)
}

// client talks to every node of one server under comparison.
type client struct {
	conns []*grpc.ClientConn
	tag   string // if the server has shards: the keys' {tag}
}

// dial connects to the nodes at the endpoints. options come after its own.
func dial(endpoints []string, options ...grpc.DialOption) (*client, error) {
	options = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
	}, options...)
	c := &client{}
	for _, endpoint := range endpoints {
		conn, err := grpc.NewClient(endpoint, options...)
		if err != nil {
			c.close()
			return nil, err
		}
		c.conns = append(c.conns, conn)
	}
	return c, nil
}

func (c *client) close() {
	for _, conn := range c.conns {
		conn.Close()
	}
}

// callTimeout is long: a call may wait for an election, and no answer is ever expected to be a timeout.
const callTimeout = 20 * time.Second

// ask sends one call and waits for its answer.
func (c *client) ask(ctx context.Context, what call) answer {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn := c.conns[what.node%len(c.conns)]
	if len(c.conns) > 1 && readsLocally(what.request) {
		if err := c.catchUp(ctx, conn); err != nil {
			return refusal(fmt.Errorf("catching up before a local read: %w", err))
		}
	}
	response, err := send(ctx, conn, what)
	if err != nil {
		return refusal(err)
	}
	return answer{response: response}
}

// catchUp brings what a node will read from its own state up to the last acknowledged write. A node without the keys of
// a shard reads those from another one.
func (c *client) catchUp(ctx context.Context, conn *grpc.ClientConn) error {
	conns := []*grpc.ClientConn{conn}
	if c.tag != "" {
		conns = c.conns
	}
	for _, conn := range conns {
		if _, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(c.tag + "\x00"), CountOnly: true}); err != nil {
			return err
		}
	}
	return nil
}

// latest is the newest revision of all keys.
func (c *client) latest(ctx context.Context) (int64, error) {
	response, err := pb.NewKVClient(c.conns[0]).Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, CountOnly: true})
	return response.GetHeader().GetRevision(), err
}

// readsLocally tells whether the request may be answered from a node's own, possibly old, state.
func readsLocally(request proto.Message) bool {
	switch r := request.(type) {
	case *pb.RangeRequest:
		return r.Serializable
	case *pb.TxnRequest:
		for _, op := range append(r.Success[:len(r.Success):len(r.Success)], r.Failure...) {
			if o := op.GetRequestRange(); o == nil || !o.Serializable {
				return false
			}
		}
		return true
	case *pb.HashKVRequest, *pb.LeaseLeasesRequest:
		return true
	}
	return false
}

func send(ctx context.Context, conn *grpc.ClientConn, what call) (proto.Message, error) {
	kv := pb.NewKVClient(conn)
	switch r := what.request.(type) {
	case *pb.RangeRequest:
		if what.stream {
			return collect(kv.RangeStream(ctx, r))
		}
		return kv.Range(ctx, r)
	case *pb.PutRequest:
		return kv.Put(ctx, r)
	case *pb.DeleteRangeRequest:
		return kv.DeleteRange(ctx, r)
	case *pb.TxnRequest:
		return kv.Txn(ctx, r)
	case *pb.CompactionRequest:
		return kv.Compact(ctx, r)
	case *pb.HashKVRequest:
		return pb.NewMaintenanceClient(conn).HashKV(ctx, r)
	default:
		return sendLease(ctx, pb.NewLeaseClient(conn), what)
	}
}

func sendLease(ctx context.Context, lease pb.LeaseClient, what call) (proto.Message, error) {
	switch r := what.request.(type) {
	case *pb.LeaseGrantRequest:
		return lease.LeaseGrant(ctx, r)
	case *pb.LeaseRevokeRequest:
		return lease.LeaseRevoke(ctx, r)
	case *pb.LeaseTimeToLiveRequest:
		return lease.LeaseTimeToLive(ctx, r)
	case *pb.LeaseLeasesRequest:
		return lease.LeaseLeases(ctx, r)
	case *pb.LeaseKeepAliveRequest:
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := lease.LeaseKeepAlive(ctx)
		if err != nil {
			return nil, err
		}
		if err := stream.Send(r); err != nil {
			return nil, err
		}
		return stream.Recv()
	default:
		panic(fmt.Sprintf("no method for %T", r))
	}
}

// collect merges a stream into one response. How a server cuts the stream is its own affair, but only the last
// piece may carry the header, more and the count.
func collect(stream pb.KV_RangeStreamClient, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	merged := &pb.RangeResponse{}
	for {
		piece, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return merged, nil
		}
		if err != nil {
			return nil, err
		}
		if merged.Header != nil || merged.More || merged.Count != 0 {
			return nil, errors.New("a piece after the one with the header")
		}
		proto.Merge(merged, piece.RangeResponse)
	}
}

func headerOf(response proto.Message) *pb.ResponseHeader {
	return response.(interface{ GetHeader() *pb.ResponseHeader }).GetHeader()
}

func refusal(err error) answer {
	s := status.Convert(err)
	return answer{code: s.Code(), message: s.Message()}
}

// difference describes how two answers to the same call differ, "" if they don't. Set aside are the ids of cluster
// and member and the raft term, which must be there but are each server's own.
func difference(want, got answer) string {
	if want.code != got.code || want.message != got.message {
		return fmt.Sprintf("want %v: %q\ngot  %v: %q", want.code, want.message, got.code, got.message)
	}
	if want.response == nil {
		return ""
	}
	want.response, got.response = proto.Clone(want.response), proto.Clone(got.response)
	var diffs []string
	for name, a := range map[string]answer{"want": want, "got": got} {
		if flaw := setAside(a.response); flaw != "" {
			diffs = append(diffs, name+": "+flaw)
		}
	}
	if !proto.Equal(want.response, got.response) {
		diffs = append(diffs, cmp.Diff(want.response, got.response, protocmp.Transform()))
	}
	return strings.Join(diffs, "\n")
}

// setAside clears what may differ and says what is missing.
func setAside(response proto.Message) string {
	header := headerOf(response)
	if header == nil {
		return "no header"
	}
	complete := header.ClusterId != 0 && header.MemberId != 0 && header.RaftTerm != 0
	header.ClusterId, header.MemberId, header.RaftTerm = 0, 0, 0
	if !complete {
		return "no cluster id, member id or raft term in the header"
	}
	return ""
}
