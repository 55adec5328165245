package node

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/placement"
	"kvd/shard"
	"kvd/shard/wal/vfs"
)

// A sync that fails ends the node at once, and says why; without LogFS's fault
// it starts again with all that it has acknowledged.
func TestAFailedSyncEndsTheNode(t *testing.T) {
	inTown(t, 1, func(w *town) {
		logs := new(vfs.Memory)
		w.raftLog, w.logFS = RaftLogShared, logs
		w.start("n1")
		w.awaitReady("n1")
		kvPut(t, w.nodes["n1"], "k", "v")
		logs.Inject(func(op vfs.Op) error {
			if op.Kind == vfs.OpSync {
				return syscall.EIO
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := w.nodes["n1"].KV().Put(ctx, &pb.PutRequest{Key: []byte("k"), Value: []byte("lost")}); err == nil {
			t.Error("a write that is not durable was acknowledged")
		}
		if err := w.fatalOf("n1"); !errors.Is(err, syscall.EIO) || strings.Contains(err.Error(), "\n") {
			t.Errorf("the node ends with %v", err)
		}
		delete(w.fatal, "n1")
		_ = w.nodes["n1"].Abort() // says again what has failed
		delete(w.nodes, "n1")
		logs.Inject(nil)
		w.start("n1")
		w.awaitReady("n1")
		if got := kvGet(t, w.nodes["n1"], "k"); got == "" {
			t.Error("an acknowledged write is lost")
		}
	})
}

// An entry that is damaged while the node runs ends it with one line, before raft
// panics about it.
func TestADamagedEntryEndsTheNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := new(vfs.Memory)
		var fatal []error
		logs, err := openLogs(RaftLogShared, logConfig{dataDir: "data", fs: disk, fatal: func(err error) { fatal = append(fatal, err) }})
		if err != nil {
			t.Fatal(err)
		}
		defer logs.close()
		r := placement.ReplicaRef{Group: 3, ID: "n1/4w"}
		if err := logs.create(r); err != nil {
			t.Fatal(err)
		}
		log, err := logs.open(r, nil, -1)
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		const marker = "the data of this very entry"
		for i, data := range []string{"before", marker, "after"} {
			if err := log.StoreLog(&raft.Log{Index: uint64(i + 1), Term: 1, Data: []byte(data)}); err != nil {
				t.Fatal(err)
			}
		}
		damage(t, disk, filepath.Join("data", sharedDir), marker)
		var entry raft.Log
		if err := log.GetLog(1, &entry); err != nil || len(fatal) > 0 {
			t.Errorf("a sound entry: %v, %v", err, fatal)
		}
		if err := log.GetLog(4, &entry); err != raft.ErrLogNotFound || len(fatal) > 0 {
			t.Errorf("an entry that is not there: %v, %v", err, fatal)
		}
		began := time.Now()
		if err := log.GetLog(2, &entry); err == nil || time.Since(began) < timeToEnd {
			t.Errorf("a damaged entry: %v, after %v", err, time.Since(began))
		}
		if len(fatal) != 1 || !strings.Contains(fatal[0].Error(), "data directory data is damaged") || strings.Contains(fatal[0].Error(), "\n") {
			t.Errorf("the node ends with %v", fatal)
		}
	})
}

// So does one that the disk does not give back. Without that a leader would try
// for ever to send it.
func TestAnEntryThatCannotBeReadEndsTheNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := new(vfs.Memory)
		var fatal []error
		logs, err := openLogs(RaftLogShared, logConfig{dataDir: "data", fs: disk, fatal: func(err error) { fatal = append(fatal, err) }})
		if err != nil {
			t.Fatal(err)
		}
		defer logs.close()
		r := placement.ReplicaRef{Group: 3, ID: "n1/4"}
		if err := logs.create(r); err != nil {
			t.Fatal(err)
		}
		log, err := logs.open(r, nil, -1)
		if err != nil {
			t.Fatal(err)
		}
		if err := log.StoreLog(&raft.Log{Index: 1, Term: 1, Data: []byte("data")}); err != nil {
			t.Fatal(err)
		}
		disk.Inject(func(op vfs.Op) error {
			if op.Kind == vfs.OpRead {
				return syscall.EIO
			}
			return nil
		})
		var entry raft.Log
		if err := log.GetLog(1, &entry); !errors.Is(err, syscall.EIO) {
			t.Errorf("an entry that cannot be read: %v", err)
		}
		if len(fatal) != 1 || !errors.Is(fatal[0], syscall.EIO) || strings.Contains(fatal[0].Error(), "\n") {
			t.Errorf("the node ends with %v", fatal)
		}
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		if err := log.GetLog(1, &entry); err == nil || len(fatal) != 1 {
			t.Errorf("when it is closed: %v, %v", err, fatal)
		}
	})
}

// damage changes a byte of where a text is in a directory's files.
func damage(t *testing.T, disk *vfs.Memory, dir, text string) {
	t.Helper()
	names, err := disk.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		file, err := disk.Open(filepath.Join(dir, name), false)
		if err != nil {
			continue
		}
		size, err := file.Size()
		if err != nil {
			t.Fatal(err)
		}
		content := make([]byte, size)
		if _, err := file.ReadAt(content, 0); err != nil && size > 0 {
			t.Fatal(err)
		}
		if at := strings.Index(string(content), text); at >= 0 {
			if _, err := file.WriteAt([]byte{'T'}, int64(at)); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%q is nowhere", text)
}

// A replica of a shard whose log is gone has forgotten what it acknowledged: it
// is never opened again, and another one takes its place.
func TestAReplicaWithoutItsLogIsReplaced(t *testing.T) {
	inTown(t, 3, func(w *town) {
		w.shards, w.copies, w.raftLog = 1, 3, RaftLogShared
		all := []string{"n1", "n2", "n3"}
		w.start(all...)
		w.awaitReady(all...)
		kvPut(t, w.nodes["n1"], "k", "v")
		var was placement.ReplicaRef
		for was = range w.nodes["n3"].groups.Replicas() {
		}
		w.stop("n3")
		logs, err := openLogs(RaftLogShared, logConfig{dataDir: filepath.Join(w.dir, "n3")})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(logs.remove(was), logs.close()); err != nil {
			t.Fatal(err)
		}
		w.start("n3")
		w.awaitReady("n3")
		usable := func() *shard.Replica { return (*w.nodes["n3"].groups.usable.Load())[was.Group] }
		for range 600 {
			if r := usable(); r != nil && len(w.nodes["n3"].logs.replicas()) == 2 {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		if r := usable(); r == nil || r.Status().Replica == was.ID {
			t.Errorf("no other replica has taken the place of %s", was.ID)
		}
		if dirs, err := os.ReadDir(filepath.Dir(replicaDir(w.nodes["n3"].cfg.DataDir, was))); err != nil || len(dirs) != 1 {
			t.Errorf("of the group's replicas there are %v, %v", dirs, err)
		}
		if got := kvGet(t, w.nodes["n3"], "k"); got != "v" {
			t.Errorf("k = %q", got)
		}
	})
}

// What is free is what the fuller of the two disks has.
func TestFreeSpaceIsThatOfTheLogsDiskToo(t *testing.T) {
	disk := new(vfs.Memory)
	const capacity = 100 << 20
	disk.SetCapacity(capacity)
	dir := t.TempDir()
	for kind, most := range map[string]uint64{RaftLogShared: capacity, RaftLogBolt: math.MaxUint64} {
		logs, err := openLogs(kind, logConfig{dataDir: dir, fs: disk})
		if err != nil {
			t.Fatal(err)
		}
		n := &Node{cfg: Config{DataDir: dir}, logs: logs}
		data, err1 := freeBytes(dir)
		free, err2 := n.freeBytes()
		if err := errors.Join(err1, err2, logs.close()); err != nil {
			t.Fatal(err)
		}
		if free == 0 || free > most || kind == RaftLogBolt && free < data/2 {
			t.Errorf("%s: %d are free, %d under the data", kind, free, data)
		}
	}
}
