package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvd/node"
	"kvd/node/bootstrap"
)

func TestLogCommands(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "n1.kvd")
	if code, _, errOut := kvd(t, "", "snapshot", "restore", makeBackup(t), "--data-dir", dir, "--raft-log", node.RaftLogShared); code != exitOK {
		t.Fatalf("exit code %d: %s", code, errOut)
	}
	show := func() string {
		t.Helper()
		code, out, errOut := kvd(t, "", "log", "status", "--data-dir", dir)
		if code != exitOK || errOut != "" {
			t.Fatalf("exit code %d: %s", code, errOut)
		}
		return out
	}
	if out := show(); !strings.Contains(out, node.RaftLogShared) {
		t.Errorf("a restored directory has %s", out)
	}
	for _, kind := range []string{node.RaftLogBolt, node.RaftLogShared, node.RaftLogBolt} {
		code, out, errOut := kvd(t, "", "log", "convert", "--data-dir", dir, "--to", kind)
		moved := strings.Contains(out, "0 entries of 1 replicas moved") && strings.Contains(out, "to "+kind)
		if already := strings.Contains(out, "has "+kind+" already"); code != exitOK || errOut != "" || !moved && !already {
			t.Errorf("exit code %d, %s, %s", code, out, errOut)
		}
		if out := show(); !strings.Contains(out, kind) || !strings.Contains(out, "n1/1") {
			t.Errorf("after a conversion to %s: %s", kind, out)
		}
	}
	if code, _, errOut := kvd(t, "", "log", "convert", "--data-dir", dir, "--to", "paper"); code != exitUsage || !strings.Contains(errOut, "--to") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	if code, _, errOut := kvd(t, "", "log", "status", "--data-dir", t.TempDir()); code != exitFailed || !strings.Contains(errOut, "no node's directory") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	running, err := bootstrap.OpenOffline(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"status"}, {"convert", "--to", node.RaftLogShared}} {
		code, _, errOut := kvd(t, "", append(append([]string{"log"}, args...), "--data-dir", dir)...)
		if code != exitFailed || !strings.Contains(errOut, "stop the node first") {
			t.Errorf("under a node: exit code %d: %s", code, errOut)
		}
	}
	if err := running.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "groups", "0", "raft.db"), 5000); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := kvd(t, "", "log", "convert", "--data-dir", dir, "--to", node.RaftLogShared); code != exitDataLost {
		t.Errorf("a damaged log: exit code %d: %s", code, errOut)
	}
}
