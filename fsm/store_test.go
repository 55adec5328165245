package fsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/snapshot"
)

// testConfig flushes and compacts in small steps.
func testConfig(path string) Config {
	return Config{Path: path, FlushInterval: time.Millisecond, NoSync: true, InitialMmapBytes: 1 << 20}
}

// open opens a store that is closed, and whose file is checked, when the test ends.
func open(t testing.TB, config Config) *Store {
	t.Helper()
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && s.config.faults.flushFails == nil {
			t.Error(err)
		}
		checkFile(t, config.Path)
	})
	return s
}

// checkFile has bbolt check a closed file.
func checkFile(t testing.TB, path string) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, NoFreelistSync: true})
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = db.Close() }()
	if err := db.View(func(tx *bbolt.Tx) error {
		var all error
		for err := range tx.Check() {
			all = errors.Join(all, err)
		}
		return all
	}); err != nil {
		t.Errorf("%s: %v", path, err)
	}
}

func tempPath(t testing.TB) string { return filepath.Join(t.TempDir(), "state.db") }

// request wraps one of the messages that entries hold.
func request(t testing.TB, m proto.Message) Request {
	t.Helper()
	var r pb.InternalRaftRequest
	switch m := m.(type) {
	case nil:
		return Request{}
	case *pb.PutRequest:
		r.Put = m
	case *pb.DeleteRangeRequest:
		r.DeleteRange = m
	case *pb.TxnRequest:
		r.Txn = m
	case *pb.CompactionRequest:
		r.Compaction = m
	case *pb.LeaseGrantRequest:
		r.LeaseGrant = m
	case *pb.LeaseRevokeRequest:
		r.LeaseRevoke = m
	case *pb.LeaseCheckpointRequest:
		r.LeaseCheckpoint = m
	case decidedIn:
		r.Header = &pb.RequestHeader{ID: m.term, AuthRevision: uint64(m.incarnation)}
		r.LeaseRevoke, _ = m.Message.(*pb.LeaseRevokeRequest)
		r.LeaseCheckpoint, _ = m.Message.(*pb.LeaseCheckpointRequest)
	case leaseStep:
		return m.LeaseCommand.Request()
	default:
		t.Fatalf("no request of type %T", m)
	}
	data, err := proto.Marshal(&r)
	if err != nil {
		t.Fatal(err)
	}
	return Request{Data: data}
}

func entryOf(t testing.TB, messages ...proto.Message) []byte {
	t.Helper()
	var b EntryBuilder
	for _, m := range messages {
		b.Add(request(t, m))
	}
	return b.Bytes()
}

// apply applies messages as the next entry.
func apply(t testing.TB, s *Store, messages ...proto.Message) []Result {
	t.Helper()
	results, err := s.Apply(s.AppliedIndex()+1, 1, entryOf(t, messages...))
	if err != nil {
		t.Fatal(err)
	}
	return results
}

func put(key, value string) *pb.PutRequest {
	return &pb.PutRequest{Key: []byte(key), Value: []byte(value)}
}

func get(t testing.TB, s *Store, key string) string {
	t.Helper()
	resp, err := s.Range(t.Context(), User, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

func TestPutIsReadBackAtOnceAndAfterReopening(t *testing.T) {
	config := testConfig(tempPath(t))
	s, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	if rev := s.Revision(User); rev != 1 {
		t.Errorf("an empty store is at revision %d", rev)
	}
	results := apply(t, s, put("a", "1"), put("b", "2"), nil, put("a", "3"))
	for i, want := range []int64{2, 3, 0, 4} {
		if results[i].Err != nil {
			t.Fatal(results[i].Err)
		}
		if want == 0 {
			if results[i].Response != nil {
				t.Errorf("the empty request got %v", results[i].Response)
			}
			continue
		}
		if rev := results[i].Response.(*pb.PutResponse).Header.Revision; rev != want {
			t.Errorf("put %d has revision %d, want %d", i, rev, want)
		}
	}
	if got := get(t, s, "a"); got != "3" {
		t.Errorf("a is %q", got)
	}
	index, digest := s.Digest()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := s.Apply(2, 1, entryOf(t)); !errors.Is(err, ErrClosed) {
		t.Errorf("Apply after Close: %v", err)
	}
	s = open(t, config)
	if s.AppliedIndex() != 1 || s.DurableIndex() != 1 || s.Revision(User) != 4 {
		t.Errorf("reopened at applied %d, durable %d, revision %d", s.AppliedIndex(), s.DurableIndex(), s.Revision(User))
	}
	if i, d := s.Digest(); i != index || d != digest {
		t.Errorf("digest %d:%x became %d:%x", index, digest, i, d)
	}
	if got := get(t, s, "a") + get(t, s, "b"); got != "32" {
		t.Errorf("a and b are %q", got)
	}
}

func TestAppliedEntriesAreSkipped(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	apply(t, s, put("a", "1"))
	for range 2 {
		results, err := s.Apply(1, 1, entryOf(t, put("a", "2")))
		if results != nil || err != nil {
			t.Errorf("got %v, %v", results, err)
		}
	}
	if get(t, s, "a") != "1" {
		t.Error("an applied entry was applied again")
	}
}

func TestFlushMakesDurable(t *testing.T) {
	config := testConfig(tempPath(t))
	config.FlushInterval = time.Hour
	s := open(t, config)
	if _, ok := s.SnapshotMeta(); ok {
		t.Error("an empty store has a snapshot")
	}
	if err := s.ViewSnapshot(t.Context(), nil); err == nil {
		t.Error("an empty store can be viewed")
	}
	c := raft.Configuration{Servers: []raft.Server{{ID: "n1/1", Address: "n1/1"}, {ID: "n2/1", Address: "n2/1", Suffrage: raft.Nonvoter}}}
	if err := s.ApplyConfiguration(1, 1, c); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(3, 2, entryOf(t, put("a", "1"))); err != nil {
		t.Fatal(err)
	}
	if d := s.DurableIndex(); d != 0 {
		t.Fatalf("durable at %d without a flush", d)
	}
	if err := s.Flush(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	want := snapshot.Meta{Index: 3, Term: 2, Configuration: c, ConfigurationIndex: 1, Revision: 2, CompactRevision: -1, Keys: 1}
	meta, ok := s.SnapshotMeta()
	if !ok || fmt.Sprint(meta) != fmt.Sprint(want) {
		t.Errorf("snapshot %v, want %v", meta, want)
	}
	if err := s.ViewSnapshot(t.Context(), func(tx *bbolt.Tx, meta snapshot.Meta) error {
		if fmt.Sprint(meta) != fmt.Sprint(want) || tx.Bucket(spaceBuckets[User]).Stats().KeyN != 1 {
			t.Errorf("snapshot %v", meta)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestWaitApplied(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	ctx, cancel := context.WithCancel(t.Context())
	canceled := make(chan error, 1)
	go func() { canceled <- s.WaitApplied(ctx, 2) }()
	reached := make(chan error, 1)
	go func() { reached <- s.WaitApplied(t.Context(), 1) }()
	apply(t, s, put("a", "1"))
	if err := <-reached; err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-canceled; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	closed := make(chan error, 1)
	go func() { closed <- s.WaitApplied(t.Context(), 2) }()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-closed; !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	config := testConfig(tempPath(t))
	config.Group, config.ClusterID = 1, 7
	s := open(t, config)
	apply(t, s, put("a", "1"))
	if _, err := Open(config); !errors.Is(err, ErrLocked) {
		t.Errorf("a file in use: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	other := config
	other.ClusterID = 8
	if _, err := Open(other); !errors.Is(err, ErrForeignState) {
		t.Errorf("another cluster's file: %v", err)
	}
	other = config
	other.Group = 2
	if _, err := Open(other); !errors.Is(err, ErrForeignState) {
		t.Errorf("another group's file: %v", err)
	}
	other = config
	other.ClusterID = 0
	unknown, err := Open(other)
	if err != nil {
		t.Fatal(err)
	}
	if meta, _ := unknown.SnapshotMeta(); meta.ClusterID != 7 {
		t.Errorf("cluster id became %d", meta.ClusterID)
	}
	if err := unknown.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{}); err == nil {
		t.Error("opened without a path")
	}
	garbage := testConfig(tempPath(t))
	if err := os.WriteFile(garbage.Path, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(garbage); !errors.Is(err, ErrCorruptState) {
		t.Errorf("garbage: %v", err)
	}
}
