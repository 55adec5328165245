package main

import (
	"errors"
	"fmt"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// script answers the creation of a watch with a list of messages, and its cancellation with another.
type script struct {
	pb.UnimplementedWatchServer
	created, cancelled []*pb.WatchResponse
}

func (s *script) Watch(stream pb.Watch_WatchServer) error {
	for {
		request, err := stream.Recv()
		if err != nil {
			return nil // the client has gone
		}
		answers := s.created
		if request.GetCancelRequest() != nil {
			answers = s.cancelled
		}
		for _, answer := range answers {
			if err := stream.Send(answer); err != nil {
				return nil
			}
		}
	}
}

func serveScript(t *testing.T, s *script) []string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterWatchServer(server, s)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Stop(); <-ended })
	return []string{listener.Addr().String()}
}

func putEvent(key string, version int64) *mvccpb.Event {
	return &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte(key), Version: version, Value: make([]byte, valueBytes)}}
}

func events(all ...*mvccpb.Event) *pb.WatchResponse {
	return &pb.WatchResponse{WatchId: 1, Events: all}
}

// TestAudienceNoticesWhatIsWrong: of two puts each watcher is to be told once, in order, and of nothing else.
func TestAudienceNoticesWhatIsWrong(t *testing.T) {
	one, two, three := putEvent("k", 1), putEvent("k", 2), putEvent("k", 3)
	created, cancelled := &pb.WatchResponse{WatchId: 1, Created: true}, &pb.WatchResponse{WatchId: 1, Canceled: true}
	short := putEvent("k", 2)
	short.Kv.Value = short.Kv.Value[1:]
	for name, test := range map[string]struct {
		told, last []*pb.WatchResponse
		want       string // "": nothing is wrong
	}{
		"right":              {told: []*pb.WatchResponse{created, events(one), events(two)}},
		"right, at once":     {told: []*pb.WatchResponse{created, events(one, two)}},
		"twice":              {told: []*pb.WatchResponse{created, events(one), events(one)}, want: "version 1 of k, of 256 bytes, after version 1"},
		"gap":                {told: []*pb.WatchResponse{created, events(two, three)}, want: "version 2 of k, of 256 bytes, after version 0"},
		"order":              {told: []*pb.WatchResponse{created, events(two), events(one)}, want: "after version 0"},
		"another key":        {told: []*pb.WatchResponse{created, events(one), events(putEvent("l", 2))}, want: "of l"},
		"deletion":           {told: []*pb.WatchResponse{created, events(one), events(&mvccpb.Event{Type: mvccpb.Event_DELETE, Kv: two.Kv})}, want: "DELETE"},
		"short value":        {told: []*pb.WatchResponse{created, events(one), events(short)}, want: "255 bytes"},
		"ended":              {told: []*pb.WatchResponse{created, events(one), {WatchId: 1, Canceled: true, CancelReason: "slow"}}, want: "slow"},
		"another watch":      {told: []*pb.WatchResponse{created, {WatchId: 2, Events: []*mvccpb.Event{one, two}}}, want: "id 2"},
		"before it is there": {told: []*pb.WatchResponse{events(one, two), created}, want: "not there"},
		"too many":           {told: []*pb.WatchResponse{created, events(one, two)}, last: []*pb.WatchResponse{events(three)}, want: "1 events more"},
	} {
		t.Run(name, func(t *testing.T) {
			endpoints := serveScript(t, &script{created: test.told, cancelled: append(test.last, cancelled)})
			a, err := newAudience(t.Context(), endpoints, 1, 1, func(int) string { return "k" })
			if err == nil {
				err = errors.Join(a.await(&a.received, 2, "events are there"), a.end())
			}
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("noticed %v, want %q", err, test.want)
			}
		})
	}
}

func TestNoticesAreRead(t *testing.T) {
	var n notice
	for _, r := range []*pb.WatchResponse{
		{WatchId: 7, Created: true, Header: &pb.ResponseHeader{ClusterId: 1, Revision: 9}},
		{WatchId: 300, Canceled: true, CancelReason: "why", CompactRevision: 4},
		{WatchId: 1, Events: []*mvccpb.Event{putEvent("a", 1), {Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte("b")}, PrevKv: &mvccpb.KeyValue{Key: []byte("c"), Version: 5}}}},
	} {
		data, err := proto.Marshal(r)
		if err == nil {
			err = n.read(data)
		}
		if err != nil {
			t.Fatal(err)
		}
		want := notice{watch: r.WatchId, created: r.Created, canceled: r.Canceled}
		for _, e := range r.Events {
			want.events = append(want.events, event{e.Type, e.Kv.Key, e.Kv.Value, e.Kv.Version})
		}
		if string(n.reason) != r.CancelReason || len(n.events) != len(want.events) || len(want.events) > 0 && !reflect.DeepEqual(n.events, want.events) ||
			n.watch != want.watch || n.created != want.created || n.canceled != want.canceled {
			t.Errorf("%v is read as %+v", r, n)
		}
		if err := n.read(data[:len(data)-1]); err == nil {
			t.Errorf("%v is read without its end", r)
		}
	}
}

// TestLatenessOfLeases: a key that goes before its lease's end, or not at all, is noticed.
func TestLatenessOfLeases(t *testing.T) {
	start := time.Now()
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	all := []leased{{1, 5 * time.Second, "a", at(0)}, {2, 5 * time.Second, "b", at(2)}, {3, 5 * time.Second, "c", at(1)}}
	gone := func(a, b, c int) map[string]time.Time {
		return map[string]time.Time{"a": at(a), "b": at(b), "c": at(c)}
	}
	first, last, err := lateness(all, gone(8, 9, 7))
	if err != nil || first != time.Second || last != 2*time.Second {
		t.Errorf("%v, %v, %v; want 1s and 2s", first, last, err)
	}
	if _, _, err := lateness(all, gone(8, 6, 9)); !errors.Is(err, errWrong) || !strings.Contains(fmt.Sprint(err), "lease 2, of 5s, with key b, ended 1s before") {
		t.Error(err)
	}
	missing := gone(8, 9, 7)
	delete(missing, "c")
	if _, _, err := lateness(all, missing); !errors.Is(err, errWrong) {
		t.Error(err)
	}
}
