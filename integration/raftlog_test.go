package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvd/integration/cluster"
	"kvd/node"
)

var raftLogs = []string{node.RaftLogShared, node.RaftLogBolt}

// logStatus is what `kvd log status` says of a node that does not run.
func logStatus(t *testing.T, n *cluster.Node) (status node.LogStatus) {
	t.Helper()
	code, output := kvd(t, nil, "log", "status", "--data-dir", n.Dir, "--write-out", "json")
	if code != 0 {
		t.Fatalf("kvd log status ended with %d: %s", code, output)
	}
	must(t, json.Unmarshal([]byte(output), &status))
	return status
}

// convert brings the logs of a node that does not run into the other form, and back and there again.
func convert(t *testing.T, n *cluster.Node, to string) {
	t.Helper()
	before := logStatus(t, n)
	for _, kind := range []string{to, before.Kind, to} {
		if code, output := kvd(t, nil, "log", "convert", "--data-dir", n.Dir, "--to", kind); code != 0 {
			t.Fatalf("kvd log convert ended with %d: %s", code, output)
		}
	}
	after := logStatus(t, n)
	for _, s := range []*node.LogStatus{&before, &after} {
		for i := range s.Replicas {
			s.Replicas[i].SizeBytes = 0
		}
	}
	if after.Kind != to || !slices.Equal(after.Replicas, before.Replicas) || len(after.Replicas) == 0 {
		t.Fatalf("%s has %+v after a conversion from %+v to %s", n.Name, after, before, to)
	}
}

// Under load one node after the other is killed, its log converted, and it goes on; then all at once. What was
// acknowledged is there.
func TestConvertBetweenRuns(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, sharded(3, 6, 3, append(shortLog, "--raft-log="+node.RaftLogBolt)...))
	must(t, c.KillAll())
	c.Drop("--raft-log=" + node.RaftLogBolt)
	start(t, c, c.Names()...)
	var l ledger
	ctx, cancel := context.WithCancel(liveness(t))
	defer cancel()
	wait := load(ctx, t, c, &l, "converted")
	more := func(n int) {
		t.Helper()
		before := l.count()
		eventually(t, "more writes", func(context.Context) (bool, error) { return l.count() > before+n, nil })
	}
	for _, name := range c.Names() {
		more(200)
		must(t, c.Node(name).Kill())
		if code, output := kvd(t, nil, "start", "--data-dir", c.Node(name).Dir, "--name", name, "--raft-log", node.RaftLogShared,
			"--strategy=consistent", "--shards=6", "--replication-factor=3"); code == 0 || !strings.Contains(output, "kvd log convert") {
			t.Errorf("started with the log that the directory has not: %d, %s", code, output)
		}
		convert(t, c.Node(name), node.RaftLogShared)
		start(t, c, name)
		awaitHome(t, c, name)
	}
	more(200)
	must(t, c.KillAll())
	for _, name := range c.Names() {
		convert(t, c.Node(name), node.RaftLogBolt)
	}
	start(t, c, c.Names()...)
	more(200)
	cancel()
	wait()
	verify(t, c, &l)
	sameInEveryShard(t, c)
	t.Logf("all %d acknowledged writes are there", l.count())
}

// Replicas of shards are made and deleted while nodes are killed: the shared log of each ends with those that its
// directories have.
func TestReplicasComeAndGoInTheSharedLog(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, sharded(4, 8, 2, with("--down-after=3s", "--raft-log="+node.RaftLogShared)...))
	data := pairs("moving", 0, 60)
	write(t, c, "n1", data)
	for _, name := range []string{"n4", "n2"} {
		must(t, c.Node(name).Kill())
		awaitShards(t, c, others(c, name)[0], eachShard(copied(2)))
		start(t, c, name)
		view := awaitHome(t, c, name)
		onDisk(t, c, view)
	}
	for _, name := range c.Names() {
		read(t, c, name, data)
	}
	must(t, c.KillAll())
	for _, name := range c.Names() {
		n := c.Node(name)
		var have []string
		for _, r := range logStatus(t, n).Replicas {
			if r.Group > 0 {
				_, number, _ := strings.Cut(r.ID, "/")
				have = append(have, fmt.Sprintf("%d/%s", r.Group, number))
			}
		}
		var want []string
		dirs, err := filepath.Glob(filepath.Join(n.Dir, "groups", "*", "*", "state.db"))
		must(t, err)
		for _, dir := range dirs {
			path, err := filepath.Rel(filepath.Join(n.Dir, "groups"), filepath.Dir(dir))
			must(t, err)
			want = append(want, path)
		}
		slices.Sort(have)
		slices.Sort(want)
		if !slices.Equal(have, want) || len(want) == 0 {
			t.Errorf("%s has the logs of %v and the directories of %v", name, have, want)
		}
	}
}

// lastBatch is the last segment of a node's shared log, and where the last block that is in use begins.
func lastBatch(t *testing.T, n *cluster.Node) (path string, offset int64) {
	t.Helper()
	segments, err := filepath.Glob(filepath.Join(n.Dir, "log", "*.segment"))
	must(t, err)
	const block = 4096
	for _, path := range slices.Backward(segments) {
		content, err := os.ReadFile(path)
		must(t, err)
		for offset := len(content) - block; offset > 0; offset -= block {
			if slices.ContainsFunc(content[offset:offset+block], func(b byte) bool { return b != 0 }) {
				return path, int64(offset)
			}
		}
	}
	t.Fatalf("the log of %s is empty", n.Name)
	return "", 0
}

// tear leaves a batch behind the last one as a power cut would: its beginning is there, its end is not.
func tear(t *testing.T, n *cluster.Node) {
	t.Helper()
	path, end := lastBatch(t, n)
	const block = 4096
	content, err := os.ReadFile(path)
	must(t, err)
	begin := end
	for ; begin > 0 && !bytes.HasPrefix(content[begin:], []byte("batc")); begin -= block {
	}
	if begin == 0 || end+2*block > int64(len(content)) {
		t.Fatalf("%s: the last batch is from %d to %d of %d", path, begin, end, len(content))
	}
	must(t, overwrite(path, end+block, func(b []byte) {
		copy(b, content[begin:begin+block])
		clear(b[50:])
	}))
}

func flip(t *testing.T, path string, offset int64) {
	t.Helper()
	must(t, overwrite(path, offset, func(b []byte) { b[0] ^= 0x40 }))
}

// The end of what a power cut left of the last write is no damage: the node starts, and gets what it lacks from the
// others. After a clean stop, or before the last write, it is: the node says so and stops, and comes back with an
// empty directory, as docs/operations.md says.
func TestATornAndADamagedSharedLog(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: with("--raft-log=" + node.RaftLogShared)})
	lead := leader(t, c)
	n := c.Node(others(c, lead)[0])
	data := pairs("torn", 0, 300)
	write(t, c, lead, data)
	caughtUp(t, c, n.Name, lead)

	must(t, n.Kill())
	tear(t, n)
	start(t, c, n.Name)
	if !n.Log.Contains("the last write to the raft log was interrupted") {
		t.Error("a torn write is not mentioned")
	}
	caughtUp(t, c, n.Name, leader(t, c))
	holdsAll(t, c, n.Name, "torn/", data)

	code, err := n.Stop(liveness(t))
	if code != 0 || err != nil {
		t.Fatalf("exit code %d, %v", code, err)
	}
	path, offset := lastBatch(t, n)
	flip(t, path, offset+50)
	damaged := []string{n.Dir, filepath.Base(path), "damaged", "delete its contents"}
	refusesToStart(t, n, damaged...)
	code, output := kvd(t, nil, "log", "status", "--data-dir", n.Dir)
	refused(t, code, output, damaged...)
	if code != 5 {
		t.Errorf("exit code %d of kvd log status", code)
	}
	flip(t, path, offset+50) // sound again
	start(t, c, n.Name)

	must(t, n.Kill())
	flip(t, path, offset/2/4096*4096+50)
	refusesToStart(t, n, damaged...)
	must(t, n.Wipe())
	start(t, c, n.Name)
	caughtUp(t, c, n.Name, leader(t, c))
	holdsAll(t, c, n.Name, "torn/", data)
	sameEverywhere(t, c)
}
