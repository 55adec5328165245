package server

import (
	"context"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// A client that was told of a write by the leader is told so by its watches' progress, too, although its node lags.
func TestProgressCountsWhatIsNotHereYet(t *testing.T) {
	n := startNode(t, nil)
	follows := n.router.newWatches(t.Context(), func(watchDelivery) error { return nil })
	defer follows.close()
	if _, err := follows.add(1, watchSpec{key: []byte("a")}); err != nil {
		t.Fatal(err)
	}
	data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}})
	if err != nil {
		t.Fatal(err)
	}
	n.replica.onReadIndex = func(context.Context) (uint64, error) {
		index := n.replica.store.AppliedIndex() + 1
		go func() { // what the leader has committed arrives
			if _, err := n.replica.apply(fsm.Request{Data: data}); err != nil {
				t.Error(err)
			}
		}()
		return index, nil
	}
	if revision, err := follows.progress(t.Context()); err != nil || revision != 2 {
		t.Fatalf("progress to %d, %v", revision, err)
	}
	n.replica.elect("", false)
	if revision, err := follows.progress(t.Context()); err != nil || revision != 2 {
		t.Fatalf("without a leader: progress to %d, %v", revision, err)
	}
}
