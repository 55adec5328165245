package cluster

import (
	"context"
	"errors"
	"strings"
	"testing"
)

// shell is a node whose process is a shell script.
func shell(t *testing.T, script string) *Node {
	dir := t.TempDir()
	log, err := newLog(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{Name: "n1", Dir: dir, Log: log, binary: "/bin/sh", args: func() []string { return []string{"-c", script} }}
	t.Cleanup(func() { n.Kill(); log.file.Close() })
	return n
}

func TestNodeLives(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), Liveness)
	defer cancel()
	n := shell(t, "echo "+readyLine+"; exec sleep 1000")
	for range 2 {
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		if err := n.WaitLogged(ctx); err != nil {
			t.Fatal(err)
		}
		if err := n.Start(); err == nil {
			t.Fatal("started twice")
		}
		if err := errors.Join(n.Pause(), n.Kill()); err != nil {
			t.Fatal(err)
		}
		if code, err := n.Exit(ctx); err != nil || code != -1 || n.Running() {
			t.Fatalf("exit %d, %v, running %t", code, err, n.Running())
		}
	}
	if err := errors.Join(n.Kill(), n.Pause(), n.Resume(), n.Wipe()); err != nil {
		t.Fatalf("of a dead node: %v", err)
	}
}

func TestNodeThatExits(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), Liveness)
	defer cancel()
	n := shell(t, "echo 'the disk is gone' >&2; exit 3")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	err := n.WaitLogged(ctx)
	if !errors.Is(err, ErrExited) || !strings.Contains(err.Error(), "the disk is gone") {
		t.Fatal(err)
	}
	if code, err := n.Exit(ctx); code != 3 || err != nil {
		t.Fatalf("exit %d, %v", code, err)
	}
}

func TestNodeWhosePortIsTaken(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), Liveness)
	defer cancel()
	n := shell(t, "")
	n.args = func() []string {
		return []string{"-c", "test -e " + n.Dir + "/again && echo " + readyLine + " && exec sleep 1000; touch " + n.Dir + "/again; echo address already in use; exit 1"}
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitLogged(ctx); err != nil || n.Starts() != 2 {
		t.Fatalf("%d starts: %v", n.Starts(), err)
	}
}

func TestLogForgetsTheBeginningOnly(t *testing.T) {
	n := shell(t, "")
	n.Log.Write([]byte("first life\n"))
	n.Log.begin()
	n.Log.Write([]byte("second life\n"))
	if n.Log.Contains("first") || !n.Log.Contains("second") || n.Log.Tail(2) != "first life\nsecond life" {
		t.Fatal(n.Log.Tail(5))
	}
	line := strings.Repeat("x", 1023) + "\n"
	for range 2 * maxLogBytes / len(line) {
		n.Log.Write([]byte(line))
	}
	n.Log.Write([]byte("end\n"))
	if len(n.Log.text) > 2*maxLogBytes || n.Log.Contains("second life") || !n.Log.Contains("end") {
		t.Fatalf("%d bytes in memory", len(n.Log.text))
	}
}

func TestCertificates(t *testing.T) {
	certs, err := NewCertificates(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if cfg, err := certs.ClientConfig(true); err != nil || len(cfg.Certificates) != 1 {
		t.Fatal(err)
	}
}

func TestMetricsOfAMisspeltName(t *testing.T) {
	if _, err := (Metrics{}).Sum("kvd_nothing"); err == nil {
		t.Fatal("no error")
	}
}
