package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/snapshot"
)

// makeBackup makes the backup of a cluster in which greeting was put twice.
func makeBackup(t *testing.T) (path string) {
	t.Helper()
	dir := t.TempDir()
	store, err := fsm.Open(fsm.Config{Path: filepath.Join(dir, "state.db"), ClusterID: 0xc1, NoSync: true, InitialMmapBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := store.ApplyConfiguration(1, 1, raft.Configuration{Servers: []raft.Server{
		{ID: "n1/1", Address: "n1/1"}, {ID: "n2/3", Address: "n2/3", Suffrage: raft.Nonvoter},
	}}); err != nil {
		t.Fatal(err)
	}
	for i, value := range []string{"hello", "hello again"} {
		data, err := proto.Marshal(&pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte("greeting"), Value: []byte(value)}})
		if err != nil {
			t.Fatal(err)
		}
		var entry fsm.EntryBuilder
		entry.Add(fsm.Request{Data: data})
		if _, err := store.Apply(uint64(i+2), 7, entry.Bytes()); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Flush(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "backup")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	err = store.ViewSnapshot(t.Context(), func(tx *bbolt.Tx, meta snapshot.Meta) error {
		_, err := snapshot.WriteStream(context.Background(), file, tx, meta)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSnapshotStatus(t *testing.T) {
	path := makeBackup(t)
	code, out, errOut := kvd(t, "", "snapshot", "status", path)
	if code != exitOK || errOut != "" {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	for _, want := range []string{"cluster     00000000000000c1\n", "revision    3\n", "compacted   never\n", "keys        1\n", "raft index  3\n",
		"raft term   7\n", "members     n1, n2 (learner)\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("printed %q, want %q in it", out, want)
		}
	}
	if code, out, _ := kvd(t, "", "snapshot", "status", path, "-w", "json"); code != exitOK || !strings.Contains(out, `"revision":3,"compact_revision":-1,"keys":1`) {
		t.Errorf("exit code %d, printed %s", code, out)
	}
}

func TestDamagedBackups(t *testing.T) {
	path := makeBackup(t)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := append([]byte(nil), whole...)
	flipped[len(flipped)/2]++
	for name, c := range map[string]struct {
		content []byte
		code    int
	}{
		"cut":     {whole[:len(whole)/2], exitDataLost},
		"flipped": {flipped, exitDataLost},
		"foreign": {[]byte("something else, and long enough to have a header of its own, or so it seems to be"), exitFailed},
	} {
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		code, out, errOut := kvd(t, "", "snapshot", "status", path)
		if code != c.code || out != "" || !strings.Contains(errOut, path) {
			t.Errorf("%s: exit code %d, want %d; printed %q and %q", name, code, c.code, out, errOut)
		}
	}
}
