package server

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/snapshot"
)

// propose has a group's leader apply a request.
func (w *world) propose(group uint64, request fsm.Request) proto.Message {
	w.t.Helper()
	s := w.shards[group]
	result, err := s.replicas[s.leader].Propose(w.t.Context(), request)
	if err := errors.Join(err, result.Err); err != nil {
		w.t.Fatal(err)
	}
	return result.Response
}

func (w *world) command(group uint64, r *pb.InternalRaftRequest) proto.Message {
	w.t.Helper()
	data, err := proto.Marshal(r)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.propose(group, fsm.Request{Space: fsm.User, Data: data})
}

// putLeased puts a key with a lease, which it makes known to the key's group.
func (w *world) putLeased(key string, lease int64) {
	home, group := w.Lease(lease), w.Group([]byte(key))
	if group != home {
		about := w.propose(home, fsm.LeaseCommand{Kind: fsm.LeaseRegister, ID: lease, Group: group}.Request()).(*pb.LeaseTimeToLiveResponse)
		w.propose(group, fsm.LeaseCommand{Kind: fsm.LeaseAttach, ID: lease, Incarnation: about.TTL, Revision: about.Header.Revision}.Request())
	}
	w.command(group, &pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte(key), Value: []byte("v"), Lease: lease}})
}

// end revokes a lease.
func (w *world) end(lease int64) {
	home := w.Lease(lease)
	about := w.propose(home, fsm.LeaseCommand{Kind: fsm.LeaseEnd, ID: lease}.Request()).(*pb.LeaseTimeToLiveResponse)
	for _, group := range w.groups {
		if group != home {
			w.propose(group, fsm.LeaseCommand{Kind: fsm.LeaseDrop, ID: lease, Incarnation: about.TTL}.Request())
		}
	}
	s := w.shards[home]
	forget := fsm.LeaseCommand{Kind: fsm.LeaseForget, ID: lease, Incarnation: about.TTL}.Request()
	result, err := s.replicas[s.leader].Propose(w.t.Context(), forget)
	if err != nil || result.Err != nil && !errors.Is(result.Err, fsm.ErrLeaseNotFound) { // the node that leads home ends it, too
		w.t.Fatal(err, result.Err)
	}
}

// A backup of shards has every lease once, with its keys in all shards. A lease that ends after the cut, while keys of
// it are in the backup, soon ends in the restored state too.
func TestBackupHasTheLeasesOfAllShards(t *testing.T) {
	w := newWorld(t, 3, 3, 2, nil)
	n := 4 * leasesPerPage // more than a page in each shard
	for i := range n {
		id := int64(i + 1)
		w.command(w.Lease(id), &pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{ID: id, TTL: 9900 + id}})
	}
	w.command(w.Lease(22), &pb.InternalRaftRequest{LeaseCheckpoint: &pb.LeaseCheckpointRequest{Checkpoints: []*pb.LeaseCheckpoint{{ID: 22, Remaining_TTL: 5000}}}})
	keys := map[int64][]string{}
	for i := range 200 {
		key, lease := fmt.Sprintf("k%03d", i), int64(i%20+1)
		w.putLeased(key, lease)
		keys[lease] = append(keys[lease], key)
	}
	w.putLeased("gone", 21)
	w.end(21)
	ending := int64(1)
	for w.Lease(ending) != 3 { // n2 has no replica of it
		ending++
	}
	var once sync.Once
	w.onCall = func(_, _, method string) (error, error) {
		if method == methodLeases {
			once.Do(func() { w.end(ending) }) // the cut has been made
		}
		return nil, nil
	}
	path, meta := w.backupFile(t, "n2")
	if err := fsm.Adopt(path, snapshot.Meta{Index: 1, Term: 1}); err != nil {
		t.Fatal(err)
	}
	store, err := fsm.Open(fsm.Config{Path: path, NoSync: true, InitialMmapBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	all := store.Leases()
	if len(all) != n-1 {
		t.Fatalf("%d leases, want %d", len(all), n-1)
	}
	for _, got := range all {
		want := fsm.LeaseInfo{ID: got.ID, TTL: 9900 + got.ID, Incarnation: meta.Revision, Home: true, Keys: len(keys[got.ID])}
		switch got.ID {
		case ending:
			want.TTL = 60 // whatever it was
		case 22:
			want.Remaining = 5000
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
		var of []string
		for _, key := range store.LeaseKeys(got.ID, 0) {
			of = append(of, string(key))
		}
		if !slices.Equal(of, keys[got.ID]) {
			t.Errorf("lease %d has the keys %q, want %q", got.ID, of, keys[got.ID])
		}
	}
}
