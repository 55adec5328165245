package node

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/placement"
	"kvd/ring"
	"kvd/snapshot"
)

// backupOfLeases is the backup of a cluster in which keys came, moved and went with random leases, and what it holds:
// keys and TTLs by lease.
func backupOfLeases(t *testing.T, random *rand.Rand) (backup []byte, keys map[int64][]string, ttls map[int64]int64) {
	t.Helper()
	store, err := fsm.Open(fsm.Config{Path: filepath.Join(t.TempDir(), "state.db"), ClusterID: 0xc1, NoSync: true, InitialMmapBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	}()
	apply := func(r *pb.InternalRaftRequest) error {
		data, err := proto.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var entry fsm.EntryBuilder
		entry.Add(fsm.Request{Data: data})
		results, err := store.Apply(store.AppliedIndex()+1, 1, entry.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		return results[0].Err
	}
	if err := store.ApplyConfiguration(1, 1, raft.Configuration{Servers: []raft.Server{{ID: "n1/1", Address: "n1/1"}}}); err != nil {
		t.Fatal(err)
	}
	of, ttls := map[string]int64{}, map[int64]int64{}
	for range 2000 {
		lease, key := random.Int64N(40), fmt.Sprint("k", random.IntN(200))
		switch n := random.IntN(20); {
		case n < 4 && lease > 0:
			if apply(&pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{ID: lease, TTL: 100 + lease}}) == nil {
				ttls[lease] = 100 + lease
			}
		case n < 5:
			if apply(&pb.InternalRaftRequest{LeaseRevoke: &pb.LeaseRevokeRequest{ID: lease}}) == nil {
				delete(ttls, lease)
				for key, l := range of {
					if l == lease {
						delete(of, key)
					}
				}
			}
		case n < 7:
			if err := apply(&pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)}}); err != nil {
				t.Fatal(err)
			}
			delete(of, key)
		default:
			if apply(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte(key), Value: []byte("v"), Lease: lease}}) == nil {
				of[key] = lease
			}
		}
	}
	keys = map[int64][]string{}
	for key, lease := range of {
		keys[lease] = append(keys[lease], key)
	}
	for lease := range keys {
		slices.Sort(keys[lease])
	}
	if err := store.Flush(t.Context(), store.AppliedIndex()); err != nil {
		t.Fatal(err)
	}
	var stream bytes.Buffer
	if err := store.ViewSnapshot(t.Context(), func(tx *bbolt.Tx, meta snapshot.Meta) error {
		_, err := snapshot.WriteStream(t.Context(), &stream, tx, meta)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return stream.Bytes(), keys, ttls
}

// A restore, into any number of shards or none, keeps the leases and which keys are attached to them. Each lease is at
// its home, which knows where else there are keys of it, and a guest there.
func TestRestoreKeepsLeases(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	for _, shards := range []int{0, 1, 5, 70} {
		backup, keys, ttls := backupOfLeases(t, random)
		dir := filepath.Join(t.TempDir(), "n1.kvd")
		cfg := Config{Name: "n1", DataDir: dir, Peers: map[string]string{"n1": "127.0.0.1:1"}}
		home, shardOf := func(int64) uint64 { return group0 }, func(string) uint64 { return group0 }
		groups := []uint64{group0}
		if shards > 0 {
			cfg.Strategy, cfg.Shards, cfg.ReplicationFactor, groups = StrategyConsistent, shards, 1, nil
			home = func(id int64) uint64 { return placement.GroupOf(ring.ShardOfLease(id, shards)) }
			shardOf = func(key string) uint64 { return placement.GroupOf(ring.ShardOf([]byte(key), shards)) }
			for n := range shards {
				groups = append(groups, placement.GroupOf(n))
			}
		}
		meta, err := Restore(t.Context(), cfg, bytes.NewReader(backup))
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for _, group := range groups {
			err := viewRestored(t, dir, group, func(s *fsm.Store) error {
				for _, l := range s.Leases() {
					want := fsm.LeaseInfo{ID: l.ID, Incarnation: meta.Revision}
					if home(l.ID) == group {
						found++
						want.Home, want.TTL = true, ttls[l.ID]
					}
					var mine []string
					for _, key := range keys[l.ID] {
						if g := shardOf(key); g == group {
							mine = append(mine, key)
						} else if want.Home && !slices.Contains(want.Groups, g) {
							want.Groups = append(want.Groups, g)
						}
					}
					slices.Sort(want.Groups)
					want.Keys = len(mine)
					if !reflect.DeepEqual(l, want) || !want.Home && want.Keys == 0 {
						return fmt.Errorf("%+v, want %+v", l, want)
					}
					var got []string
					for _, key := range s.LeaseKeys(l.ID, 0) {
						got = append(got, string(key))
					}
					if !slices.Equal(got, mine) {
						return fmt.Errorf("lease %d has keys %q, want %q", l.ID, got, mine)
					}
				}
				return nil
			})
			if err != nil {
				t.Errorf("%d shards, group %d: %v", shards, group, err)
			}
		}
		if found != len(ttls) {
			t.Errorf("%d shards: %d leases, want %d", shards, found, len(ttls))
		}
	}
}

// viewRestored opens the state of the only replica of a group.
func viewRestored(t *testing.T, dir string, group uint64, look func(*fsm.Store) error) (err error) {
	t.Helper()
	pattern := filepath.Join(dir, groupsDir, fmt.Sprint(group), "state.db")
	if group != group0 {
		pattern = filepath.Join(dir, groupsDir, fmt.Sprint(group), "*", "state.db")
	}
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) != 1 {
		t.Fatalf("group %d has the states %q, %v", group, paths, err)
	}
	s, err := fsm.Open(fsm.Config{Path: paths[0], Group: group, NoSync: true, InitialMmapBytes: 1 << 20})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	return look(s)
}
