package server

import (
	"context"
	"testing"
	"testing/synctest"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// A client that was told of a write by the leader is told so by its watches' progress, too, although its node lags.
func TestProgressCountsWhatIsNotHereYet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		replica := newFakeReplica(openStore(t), shard.Leader{Node: "n1", ID: "n1/1", Term: 7, Self: true})
		s := newTestServer(t, testConfig(replica, &fakePeers{}))
		follows := s.router.newWatches(t.Context(), func(watchDelivery) error { return nil })
		defer follows.close()
		if _, err := follows.add(1, watchSpec{key: []byte("a")}); err != nil {
			t.Fatal(err)
		}
		data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}})
		if err != nil {
			t.Fatal(err)
		}
		replica.onReadIndex = func(context.Context) (uint64, error) {
			index := replica.store.AppliedIndex() + 1
			go func() { // what the leader has committed arrives
				if _, err := replica.apply(fsm.Request{Data: data}); err != nil {
					t.Error(err)
				}
			}()
			return index, nil
		}
		if revision, err := follows.progress(t.Context()); err != nil || revision != 2 {
			t.Fatalf("progress to %d, %v", revision, err)
		}
		replica.elect("", false)
		if revision, err := follows.progress(t.Context()); err != nil || revision != 2 {
			t.Fatalf("without a leader: progress to %d, %v", revision, err)
		}
	})
}
