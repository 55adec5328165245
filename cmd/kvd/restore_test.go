package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/fsm"
)

func TestSnapshotRestore(t *testing.T) {
	backup, dir := makeBackup(t), filepath.Join(t.TempDir(), "n1.kvd")
	if err := os.MkdirAll(filepath.Join(dir+".restoring", "left by a crash"), 0o700); err != nil {
		t.Fatal(err)
	}
	code, out, errOut := kvd(t, "", "snapshot", "restore", backup, "--data-dir", dir, "--peers", "n1=127.0.0.1:1,n2=127.0.0.1:2")
	if want := "Restored 1 keys at revision 3 to " + dir + "\n"; code != exitOK || out != want || errOut != "" {
		t.Fatalf("exit code %d, printed %q and %q", code, out, errOut)
	}
	if entries, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(entries) != 1 {
		t.Errorf("beside the directory there is more: %v, %v", entries, err)
	}
	store, err := fsm.Open(fsm.Config{Path: filepath.Join(dir, "groups", "0", "state.db"), NoSync: true, InitialMmapBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	for revision, want := range map[int64]string{2: "hello", 3: "hello again"} {
		got, err := store.Range(t.Context(), fsm.User, &pb.RangeRequest{Key: []byte("greeting"), Revision: revision})
		if err != nil || len(got.GetKvs()) != 1 || string(got.GetKvs()[0].GetValue()) != want {
			t.Errorf("at revision %d there is %v, %v; want %q", revision, got, err, want)
		}
	}
	if meta, ok := store.SnapshotMeta(); !ok || meta.ClusterID == 0xc1 || len(meta.Configuration.Servers) != 1 || meta.Configuration.Servers[0].ID != "n1/1" {
		t.Errorf("the state belongs to %+v", meta)
	}
	store.Close()

	code, _, errOut = kvd(t, "", "snapshot", "restore", backup, "--data-dir", dir)
	if code != exitFailed || !strings.Contains(errOut, "not empty") {
		t.Errorf("over another node: exit code %d, %s", code, errOut)
	}
}

func TestRestoreOfADamagedBackupLeavesNothing(t *testing.T) {
	backup, dir := makeBackup(t), filepath.Join(t.TempDir(), "n1.kvd")
	if err := os.Truncate(backup, 3000); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := kvd(t, "", "snapshot", "restore", backup, "--data-dir", dir); code != exitDataLost {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	for _, path := range []string{dir, dir + ".restoring"} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}
