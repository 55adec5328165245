package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/snapshot"
)

// blobs collects a backup.
type blobs struct {
	grpc.ServerStream
	ctx context.Context
	bytes.Buffer
	first int64 // announced size
}

func (b *blobs) Context() context.Context { return b.ctx }

func (b *blobs) Send(m *pb.SnapshotResponse) error {
	if b.Len() == 0 {
		b.first = int64(m.RemainingBytes) + int64(len(m.Blob))
	}
	b.Write(m.Blob)
	return nil
}

// backup takes one by way of a node and opens it as the state of group 0.
func (w *world) backup(t *testing.T, node string) (*fsm.Store, snapshot.Meta) {
	t.Helper()
	path, meta := w.backupFile(t, node)
	store, err := fsm.Open(fsm.Config{Path: path, NoSync: true, InitialMmapBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	return store, meta
}

// backupFile is the state file of a backup that is taken by way of a node.
func (w *world) backupFile(t *testing.T, node string) (path string, meta snapshot.Meta) {
	t.Helper()
	b := &blobs{ctx: t.Context()}
	if err := w.servers[node].maintenance.Snapshot(&pb.SnapshotRequest{}, b); err != nil {
		t.Fatal(err)
	}
	all := b.Bytes()
	body, digest := all[:len(all)-sha256.Size], all[len(all)-sha256.Size:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], digest) || int64(len(body)) != b.first {
		t.Fatalf("%d bytes of %d, or a wrong digest", len(body), b.first)
	}
	dir := t.TempDir()
	staged, err := snapshot.Stage(t.Context(), bytes.NewReader(body), dir)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "state.db")
	if err := staged.Commit(path); err != nil {
		t.Fatal(err)
	}
	for _, s := range w.servers {
		if left, err := os.ReadDir(s.cfg.TempDir); err != nil || len(left) != 0 {
			t.Errorf("a backup left %v, %v", left, err)
		}
	}
	return path, staged.Meta
}

// compareBackup holds a backup against one store with all keys, at every
// revision that can be read.
func compareBackup(ctx context.Context, w *world, one, store *fsm.Store, meta snapshot.Meta) error {
	if meta.Revision != w.newest || meta.ClusterID != 0xc1 || meta.CompactRevision != one.CompactRevision(fsm.User) || store.Revision(fsm.User) != w.newest {
		return fmt.Errorf("%+v: the newest revision is %d, compacted are %d", meta, w.newest, one.CompactRevision(fsm.User))
	}
	for revision := max(meta.CompactRevision, 1); revision <= meta.Revision; revision++ {
		r := proto.CloneOf(wholeRange)
		r.Revision = revision
		want, err1 := one.RangeAt(ctx, fsm.User, r, w.newest)
		got, err2 := store.Range(ctx, fsm.User, r)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		if !proto.Equal(got, want) {
			return fmt.Errorf("at %d: %v\nwant %v", revision, got, want)
		}
	}
	return nil
}

func fillAtRandom(t *testing.T, w *world, g *requests, steps int) *oneStore {
	one := newOneStore(w)
	for range steps {
		r := g.write()
		if _, err := w.do(t.Context(), w.anyKV(g.Rand), r); err == nil && r.Compaction != nil {
			g.compacted = r.Compaction.Revision
		}
	}
	return one
}

func TestBackupOfAllShardsIsThatOfOneStore(t *testing.T) {
	for round := range 4 {
		w := newWorld(t, 3, 5, 2, nil)
		for _, s := range w.servers {
			s.router.sizes.mergeBytes, s.router.sizes.pageBytes = 1, 1
		}
		one := fillAtRandom(t, w, &requests{Rand: seeded(t), w: w, compacted: -1}, 100*round)
		store, meta := w.backup(t, "n2")
		if err := compareBackup(t.Context(), w, one.store, store, meta); err != nil {
			t.Fatal(err)
		}
	}
}

func TestComparisonOfBackupsSeesFaults(t *testing.T) {
	for name, plant := range map[string]func(*faults){
		"a group is missed": func(f *faults) { f.missShard = true },
		"gates are skipped": func(f *faults) { f.skipGates = true },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 3, 5, 2, func(c *Config) { plant(&c.faults) })
			one := fillAtRandom(t, w, &requests{Rand: seeded(t), w: w, compacted: -1}, 200)
			store, meta := w.backup(t, "n2")
			if compareBackup(t.Context(), w, one.store, store, meta) == nil {
				t.Fatal("the fault does not show")
			}
		})
	}
}

// Writes and compactions go on while a backup is taken: it is what was there
// when it began, and a compaction beyond that makes it begin again.
func TestBackupWhileWritesGoOn(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	for i := range 50 {
		w.put("n1", fmt.Sprint("k", i), "old")
	}
	var once sync.Once
	compact := false
	w.onCall = func(_, _, method string) (error, error) {
		if method != methodRows {
			return nil, nil
		}
		once.Do(func() {
			for i := range 50 {
				w.put("n1", fmt.Sprint("k", i), "new")
			}
			if compact {
				if _, err := w.kv("n1").Compact(t.Context(), &pb.CompactionRequest{Revision: w.newest}); err != nil {
					t.Error(err)
				}
			}
		})
		return nil, nil
	}
	store, meta := w.backup(t, "n2")
	all, err := store.Range(t.Context(), fsm.User, wholeRange)
	if err != nil || all.Count != 50 || meta.Revision != 51 {
		t.Fatalf("%d keys at %d, %v", all.GetCount(), meta.Revision, err)
	}
	for _, kv := range all.Kvs {
		if string(kv.Value) != "old" {
			t.Fatalf("%v", kv)
		}
	}
	once, compact = sync.Once{}, true
	if _, meta = w.backup(t, "n3"); meta.CompactRevision < 51 || meta.Revision <= meta.CompactRevision {
		t.Fatalf("%+v", meta)
	}
}

// What a crash has left of backups goes away, and nothing else.
func TestLeftoversOfBackups(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"kvd-backup-123", "groups"} {
		if err := os.MkdirAll(filepath.Join(dir, name, "state"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	newWorld(t, 1, 1, 1, func(c *Config) { c.TempDir = dir })
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "groups" {
		t.Fatalf("%v, %v", left, err)
	}
}

func TestANodeWithoutRoomSaysSoAndMakesNoBackup(t *testing.T) {
	w := newWorld(t, 3, 5, 2, func(c *Config) { c.NoSpace = func() bool { return true } })
	err := w.servers["n1"].maintenance.Snapshot(&pb.SnapshotRequest{}, &blobs{ctx: t.Context()})
	sameStatus(t, err, rpctypes.ErrGRPCNoSpace)
	if resp, err := w.servers["n1"].maintenance.Status(t.Context(), &pb.StatusRequest{}); err != nil || len(resp.Errors) != 1 || !strings.Contains(resp.Errors[0], "disk is nearly full") {
		t.Errorf("status: %v, %v", resp, err)
	}
	w = newWorld(t, 3, 5, 2, func(c *Config) { c.TempDir = filepath.Join(c.TempDir, "missing") })
	if err := w.servers["n1"].maintenance.Snapshot(&pb.SnapshotRequest{}, &blobs{ctx: t.Context()}); err == nil {
		t.Fatal("a backup without a place for it")
	}
}

// Every node gives the same digest of a revision, which differs between
// revisions, and finds a replica that has diverged.
func TestHashOfAllShards(t *testing.T) {
	w := newWorld(t, 3, 5, 2, nil)
	for i := range 40 {
		w.put("n1", fmt.Sprint("k", i%20), fmt.Sprint(i))
	}
	hash := func(node string, revision int64) *pb.HashKVResponse {
		t.Helper()
		resp, err := w.servers[node].maintenance.HashKV(t.Context(), &pb.HashKVRequest{Revision: revision})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	for _, revision := range []int64{0, 41, 30} {
		first := hash("n1", revision)
		for _, node := range w.nodes {
			if got := hash(node, revision); got.Hash != first.Hash || got.HashRevision != first.HashRevision || got.CompactRevision != -1 || got.Header.Revision != 41 {
				t.Errorf("at %d %s says %v, n1 %v", revision, node, got, first)
			}
		}
	}
	if hash("n1", 41).Hash != hash("n1", 0).Hash || hash("n1", 41).Hash == hash("n1", 40).Hash {
		t.Error("the revision does not matter")
	}
	_, err := w.servers["n1"].maintenance.HashKV(t.Context(), &pb.HashKVRequest{Revision: 42})
	sameStatus(t, err, rpctypes.ErrGRPCFutureRev)
	if _, err := w.kv("n1").Compact(t.Context(), &pb.CompactionRequest{Revision: 35}); err != nil {
		t.Fatal(err)
	}
	_, err = w.servers["n2"].maintenance.HashKV(t.Context(), &pb.HashKVRequest{Revision: 34})
	sameStatus(t, err, rpctypes.ErrGRPCCompacted)
	compacted := hash("n1", 38)
	if compacted.CompactRevision != 35 {
		t.Errorf("%v", compacted)
	}
	s := w.shards[1] // on n1 and n2
	s.mu.Lock()
	r := s.replicas["n2"]
	s.mu.Unlock()
	if _, _, err := r.AcquireState(t.Context(), uint64(len(s.log))); err != nil {
		t.Fatal(err)
	}
	r.change(func(r *shardReplica) { r.pinned-- })
	r.store = openShardStore(t, 1) // has nothing
	if hash("n2", 38).Hash == compacted.Hash {
		t.Error("a replica that has lost its keys does not show")
	}
	if hash("n3", 38).Hash != compacted.Hash {
		t.Error("n3 asks n1, which leads")
	}
}

// Nodes that compute digests for each other do not wait in a circle.
func TestHashesOfAllNodesAtOnce(t *testing.T) {
	w := newWorld(t, 3, 6, 1, func(c *Config) { c.MaxHashes = 1 })
	for i := range 20 {
		w.put("n1", fmt.Sprint("k", i), "v")
	}
	var asking sync.WaitGroup
	for range 5 {
		for _, node := range w.nodes {
			asking.Go(func() {
				if _, err := w.servers[node].maintenance.HashKV(t.Context(), &pb.HashKVRequest{}); err != nil {
					t.Error(err)
				}
			})
		}
	}
	asking.Wait()
}

func TestStatusOfShards(t *testing.T) {
	w := newWorld(t, 3, 6, 2, nil)
	w.put("n1", w.keyIn(1, "k"), strings.Repeat("v", 1000))
	m := w.servers["n1"].maintenance
	resp, err := m.Status(t.Context(), &pb.StatusRequest{})
	if err != nil || resp.Leader != 0xa1 || resp.Header.Revision != 2 || resp.RaftTerm != 7 || len(resp.Errors) != 0 {
		t.Fatalf("%v, %v", resp, err)
	}
	zero, _ := w.zero.store.SizeBytes()
	sum := zero
	for _, group := range w.groups {
		if r := w.shards[group].replicas["n1"]; r != nil {
			size, _ := r.store.SizeBytes()
			sum += size
		}
	}
	if resp.DbSize != sum || sum <= zero {
		t.Errorf("size %d, want %d", resp.DbSize, sum)
	}
	w.shards[1].elect("")
	if resp, err = m.Status(t.Context(), &pb.StatusRequest{}); err != nil || len(resp.Errors) != 1 || !strings.Contains(resp.Errors[0], "shards of this node have no leader: 1") {
		t.Errorf("%v, %v", resp, err)
	}
	if _, err := m.Defragment(t.Context(), &pb.DefragmentRequest{}); err != nil {
		t.Error(err)
	}
	before, err := m.Hash(t.Context(), &pb.HashRequest{})
	if err != nil || before.Header.Revision != 2 {
		t.Errorf("%v, %v", before, err)
	}
	w.put("n1", w.keyIn(4, "k"), "v") // led by n1
	after, err := m.Hash(t.Context(), &pb.HashRequest{})
	if err != nil || after.Hash == before.Hash {
		t.Errorf("%v, %v", after, err)
	}
}

// leavers are the Members of a test.
type leavers struct {
	err  error
	left []string
}

func (l *leavers) Leave(_ context.Context, node string, force bool) error {
	if force {
		return errors.New("forced")
	}
	l.left = append(l.left, node)
	return l.err
}

func TestMemberRemove(t *testing.T) {
	l := &leavers{}
	n := startNode(t, func(c *Config) { c.Members, c.LeaveWait = l, 10*time.Millisecond })
	c := n.client(t)
	resp, err := c.MemberRemove(t.Context(), 0xa2)
	if err != nil || len(resp.Members) != 3 || resp.Header.MemberId != 0xa1 || fmt.Sprint(l.left) != "[n2]" {
		t.Fatalf("%v, %v: %v", resp, err, l.left)
	}
	remove := func(id uint64) error {
		_, err := pb.NewClusterClient(n.dial(t)).MemberRemove(t.Context(), &pb.MemberRemoveRequest{ID: id})
		return err
	}
	sameStatus(t, remove(0xdead), rpctypes.ErrGRPCMemberNotFound)
	l.err = errors.New("two nodes would be left, and three are needed")
	if err := remove(0xa2); status.Code(err) != codes.FailedPrecondition || reasonOf(err) != ReasonMembership || !strings.Contains(err.Error(), "three are needed") {
		t.Fatal(err)
	}
	l.err = rpctypes.ErrGRPCUnhealthy
	sameStatus(t, remove(0xa2), rpctypes.ErrGRPCUnhealthy)
	l.err = fmt.Errorf("no leader: %w", context.DeadlineExceeded)
	if err := remove(0xa2); status.Code(err) != codes.DeadlineExceeded {
		t.Fatal(err)
	}
}

// shrinking is a cluster in which a member is listed a few times more after it has been asked to leave.
type shrinking struct {
	fakeCluster
	mu    sync.Mutex
	lists int // that still have the member; not counted before it is asked to leave
	left  bool
}

func (s *shrinking) Leave(context.Context, string, bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = true
	return nil
}

func (s *shrinking) Members() []Member {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.fakeCluster.Members()
	if !s.left {
		return all
	}
	if s.lists--; s.lists >= 0 {
		return all
	}
	return slices.DeleteFunc(all, func(m Member) bool { return m.ID == 0xa2 })
}

func TestMemberRemoveAnswersWithWhoIsLeft(t *testing.T) {
	s := &shrinking{lists: 3}
	n := startNode(t, func(c *Config) { c.Cluster, c.Members, c.LeaveWait = s, s, time.Minute })
	if resp, err := n.client(t).MemberRemove(t.Context(), 0xa2); err != nil || len(resp.Members) != 2 {
		t.Fatalf("%v, %v", resp, err)
	}
}

// Services beyond etcd's are served beside them.
func TestFurtherServices(t *testing.T) {
	called := 0
	n := startNode(t, func(c *Config) {
		c.Services = func(r grpc.ServiceRegistrar) {
			called++
			r.RegisterService(&grpc.ServiceDesc{ServiceName: "kvd.test.Service", HandlerType: (*any)(nil)}, nil)
		}
	})
	if _, ok := n.grpc.GetServiceInfo()["kvd.test.Service"]; !ok || called != 2 {
		t.Fatalf("registered %d times", called)
	}
}
