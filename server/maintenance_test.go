package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/fsm"
	"kvd/shard"
	"kvd/snapshot"
)

func TestStatus(t *testing.T) {
	n := startNode(t, nil)
	c := n.client(t)
	if _, err := c.Put(t.Context(), "k", "v"); err != nil {
		t.Fatal(err)
	}
	s, err := c.Status(t.Context(), n.address)
	if err != nil {
		t.Fatal(err)
	}
	if s.Version != "3.7.3" || s.StorageVersion != "3.7.0" || s.Leader != 0xa1 || s.RaftTerm != 7 || s.RaftIndex != 2 ||
		s.RaftAppliedIndex != 1 || s.IsLearner || len(s.Errors) != 0 || s.DbSize == 0 || s.DowngradeInfo == nil {
		t.Fatalf("status %v", s)
	}
	if h := s.Header; h.Revision != 2 || h.ClusterId != 0xc1 || h.MemberId != 0xa1 || h.RaftTerm != 7 {
		t.Fatalf("header %v", h)
	}
	n.replica.elect("", false)
	if s, err = c.Status(t.Context(), n.address); err != nil || s.Leader != 0 || len(s.Errors) != 1 || s.Errors[0] != "etcdserver: no leader" {
		t.Fatalf("without a leader: %v, %v", s, err)
	}
}

func TestHashes(t *testing.T) {
	n := startNode(t, nil)
	c := pb.NewMaintenanceClient(n.dial(t))
	kv := pb.NewKVClient(n.dial(t))
	for _, value := range []string{"1", "2", "3"} {
		if _, err := kv.Put(t.Context(), putData(t, "k", value)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := kv.Compact(t.Context(), &pb.CompactionRequest{Revision: 3}); err != nil {
		t.Fatal(err)
	}
	now, err := c.HashKV(t.Context(), &pb.HashKVRequest{})
	if err != nil || now.HashRevision != 4 || now.CompactRevision != 3 || now.Header.Revision != 4 || now.Header.RaftTerm != 7 {
		t.Fatalf("%v, %v", now, err)
	}
	old, err := c.HashKV(t.Context(), &pb.HashKVRequest{Revision: 3})
	if err != nil || old.HashRevision != 3 || old.Hash == now.Hash {
		t.Fatalf("%v, %v", old, err)
	}
	_, err = c.HashKV(t.Context(), &pb.HashKVRequest{Revision: 2})
	sameStatus(t, err, rpctypes.ErrGRPCCompacted)
	_, err = c.HashKV(t.Context(), &pb.HashKVRequest{Revision: 5})
	sameStatus(t, err, rpctypes.ErrGRPCFutureRev)
	if h, err := c.Hash(t.Context(), &pb.HashRequest{}); err != nil || h.Header.Revision != 4 {
		t.Fatalf("%v, %v", h, err)
	}
	if _, err := c.Defragment(t.Context(), &pb.DefragmentRequest{}); err != nil {
		t.Fatal(err)
	}
	if again, err := c.HashKV(t.Context(), &pb.HashKVRequest{}); err != nil || again.Hash != now.Hash {
		t.Fatalf("after defragmentation: %v, %v", again, err)
	}
}

func TestAlarms(t *testing.T) {
	n := startNode(t, nil)
	c := n.client(t)
	if list, err := c.AlarmList(t.Context()); err != nil || len(list.Alarms) != 0 || list.Header.Revision != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	if _, err := c.AlarmDisarm(t.Context(), &[]clientAlarm{{}}[0]); err != nil {
		t.Fatal(err)
	}
	_, err := pb.NewMaintenanceClient(n.dial(t)).Alarm(t.Context(), &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE})
	if status.Code(err) != codes.Unimplemented {
		t.Fatal(err)
	}
}

func TestMoveLeader(t *testing.T) {
	n := startNode(t, nil)
	c := pb.NewMaintenanceClient(n.dial(t))
	move := func(id uint64) error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := c.MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: id})
		return err
	}
	var transfer error
	elected := "n2"
	n.replica.onTransfer = func(_ context.Context, node string) error {
		if node != "n2" {
			t.Errorf("leadership goes to %q", node)
		}
		if transfer == nil {
			n.replica.elect("", false)
			go n.replica.elect(elected, false)
		}
		return transfer
	}
	sameStatus(t, move(0xdead), rpctypes.ErrGRPCBadLeaderTransferee)
	sameStatus(t, move(0xa3), rpctypes.ErrGRPCBadLeaderTransferee) // a learner
	sameStatus(t, move(0xa1), nil)                                 // leads already
	transfer = shard.ErrNoTarget
	sameStatus(t, move(0xa2), rpctypes.ErrGRPCBadLeaderTransferee)
	transfer = errors.New("it did not catch up")
	sameStatus(t, move(0xa2), errTransferTimeout)
	transfer = nil
	sameStatus(t, move(0xa2), nil)
	sameStatus(t, move(0xa2), rpctypes.ErrGRPCNotLeader)
	n.replica.elect("n1", true)
	elected = "n3"
	if err := move(0xa2); status.Code(err) != codes.Aborted || reasonOf(err) != ReasonOtherLeader {
		t.Fatal(err)
	}
}

func TestMembers(t *testing.T) {
	n := startNode(t, nil)
	c := n.client(t)
	members, err := c.MemberList(t.Context())
	if err != nil || len(members.Members) != 3 {
		t.Fatalf("%v, %v", members, err)
	}
	if m := members.Members[0]; m.Name != "n1" || m.ID != 0xa1 || m.ClientURLs[0] != "http://n1:2379" || m.PeerURLs[0] != "http://n1:2380" || m.IsLearner {
		t.Fatalf("member %v", m)
	}
	if !members.Members[2].IsLearner || members.Header.Revision != 0 || members.Header.ClusterId != 0xc1 || members.Header.RaftTerm != 7 {
		t.Fatalf("%v", members)
	}
	_, err = c.MemberAdd(t.Context(), []string{"http://x:1"})
	wantUnsupported(t, err)
	_, err = c.MemberRemove(t.Context(), 1)
	wantUnsupported(t, err)
	_, err = c.MemberUpdate(t.Context(), 1, []string{"http://x:1"})
	wantUnsupported(t, err)
	_, err = c.MemberPromote(t.Context(), 1)
	wantUnsupported(t, err)
	_, err = pb.NewMaintenanceClient(n.dial(t)).Downgrade(t.Context(), &pb.DowngradeRequest{})
	wantUnsupported(t, err)
}

// A backup is complete, checked, and holds everything acknowledged before it.
func TestSnapshot(t *testing.T) {
	n := startNode(t, nil)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	kv := pb.NewKVClient(n.dial(t))
	for range 50 {
		value := make([]byte, random.IntN(20_000))
		for i := range value {
			value[i] = byte(random.Uint32())
		}
		if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: value[:min(8, len(value))], Value: value}); err != nil && len(value) > 0 {
			t.Fatal(err)
		}
	}
	stream, err := pb.NewMaintenanceClient(n.dial(t)).Snapshot(t.Context(), &pb.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var all bytes.Buffer
	first, messages := int64(-1), 0
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all.Write(m.Blob)
		if first < 0 {
			first = int64(m.RemainingBytes) + int64(len(m.Blob))
		}
		if want := max(0, first-int64(all.Len())); int64(m.RemainingBytes) != want {
			t.Fatalf("message %d announces %d remaining bytes, want %d", messages, m.RemainingBytes, want)
		}
		if m.Version != "3.7.0" {
			t.Fatalf("message %d is of version %q", messages, m.Version)
		}
		messages++
	}
	if all.Len()%512 != sha256.Size || messages < 3 {
		t.Fatalf("%d bytes in %d messages", all.Len(), messages)
	}
	body, digest := all.Bytes()[:all.Len()-sha256.Size], all.Bytes()[all.Len()-sha256.Size:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], digest) {
		t.Fatal("the digest does not match")
	}
	meta, err := snapshot.Verify(t.Context(), bytes.NewReader(body))
	if err != nil || meta.Revision != n.replica.store.Revision(fsm.User) || meta.Index != n.replica.store.AppliedIndex() {
		t.Fatalf("%+v, %v", meta, err)
	}
}

func TestSnapshotsAreBounded(t *testing.T) {
	n := startNode(t, func(c *Config) { c.MaxSnapshotStreams = 1 })
	n.maintenance.backups <- struct{}{} // one is being sent
	c := pb.NewMaintenanceClient(n.dial(t))
	backup := func() error {
		stream, err := c.Snapshot(t.Context(), &pb.SnapshotRequest{})
		for err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	if err := backup(); status.Code(err) != codes.ResourceExhausted || reasonOf(err) != ReasonBusy {
		t.Fatal(err)
	}
	<-n.maintenance.backups
	if _, err := n.client(t).Put(t.Context(), "k", "v"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := backup(); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	if len(n.maintenance.backups) != 0 {
		t.Fatal("a backup that has ended still counts")
	}
}

func TestSnapshotOfNothing(t *testing.T) {
	n := startNode(t, nil)
	stream, err := pb.NewMaintenanceClient(n.dial(t)).Snapshot(t.Context(), &pb.SnapshotRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	sameStatus(t, err, status.Error(codes.Unavailable, "kvd: this node has nothing to back up yet"))
	if reasonOf(err) != ReasonNoState {
		t.Fatal(err)
	}
}

// A client that does not read holds neither a place nor the state for ever.
func TestStalledSnapshotEnds(t *testing.T) {
	n := startNode(t, func(c *Config) { c.SnapshotTimeout = 100 * time.Millisecond })
	kv := pb.NewKVClient(n.dial(t))
	for _, key := range []string{"a", "b", "c", "d"} {
		if _, err := kv.Put(t.Context(), putData(t, key, strings.Repeat(key, 1<<20))); err != nil {
			t.Fatal(err)
		}
	}
	// A window of its own size keeps gRPC from enlarging it.
	stream, err := pb.NewMaintenanceClient(n.dial(t, grpc.WithInitialWindowSize(64<<10))).Snapshot(t.Context(), &pb.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	pinned := func() bool {
		n.replica.mu.Lock()
		defer n.replica.mu.Unlock()
		return n.replica.acquired > 0
	}
	_, err = stream.Recv() // it is under way, or has been given up already
	for deadline := time.Now().Add(time.Minute); pinned() || len(n.maintenance.backups) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the backup is still under way")
		}
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded || reasonOf(err) != ReasonStalled {
		t.Fatal(err)
	}
}

func TestHashesAreBounded(t *testing.T) {
	n := startNode(t, func(c *Config) { c.MaxHashes = 1 })
	c := pb.NewMaintenanceClient(n.dial(t))
	if _, err := n.client(t).Put(t.Context(), "k", "v"); err != nil {
		t.Fatal(err)
	}
	ways := map[string]func(context.Context) error{
		"Hash":   func(ctx context.Context) error { _, err := c.Hash(ctx, &pb.HashRequest{}); return err },
		"HashKV": func(ctx context.Context) error { _, err := c.HashKV(ctx, &pb.HashKVRequest{}); return err },
	}
	for name, hash := range ways {
		n.maintenance.hashes <- struct{}{} // one is being computed
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if err := hash(ctx); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s beside another: %v", name, err)
		}
		cancel()
		done := make(chan error, 1)
		go func() { done <- hash(t.Context()) }()
		<-n.maintenance.hashes
		if err := <-done; err != nil {
			t.Errorf("%s that may have waited: %v", name, err)
		}
		for range 3 { // each gives its place back
			if err := hash(t.Context()); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}
