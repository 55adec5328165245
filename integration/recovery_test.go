package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
)

// A node that was away for a thousand writes gets them from the log.
func TestCatchUpByLog(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: quick})
	lead := leader(t, c)
	late := others(c, lead)[0]
	must(t, c.Node(late).Kill())
	data := pairs("log", 0, 1000)
	write(t, c, lead, data)
	must(t, c.StartNodes(liveness(t), late))
	caughtUp(t, c, late, lead)
	if installs := metric(t, c, late, "kvd_shard_snapshot_installs_total"); installs != 0 {
		t.Fatalf("%v snapshots were installed", installs)
	}
	holdsAll(t, c, late, "log/", data)
	t.Logf("%s was down for %d writes and caught up by log", late, len(data))
}

// holdsAll compares a node's own state, without asking anybody, with pairs under a prefix.
func holdsAll(t *testing.T, c *cluster.Cluster, name, prefix string, want []pair) {
	t.Helper()
	resp, err := client(t, c, name).Get(liveness(t), prefix, clientv3.WithPrefix(), clientv3.WithSerializable())
	must(t, err)
	got := make(map[string]string)
	for _, kv := range resp.Kvs {
		got[string(kv.Key)] = string(kv.Value)
	}
	for _, p := range want {
		if got[p.key] != p.value {
			t.Fatalf("%s holds %.60q for %s, not %.60q (%d of %d keys)", name, got[p.key], p.key, p.value, len(got), len(want))
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%s holds %d keys, not %d", name, len(got), len(want))
	}
}

// shortLog makes nodes forget log entries soon.
var shortLog = with("--snapshot-entries=100", "--trailing-entries=20")

// writePastTheLog writes until the leader's log no longer holds what a node that is down would need next, and
// returns what it wrote.
func writePastTheLog(t *testing.T, c *cluster.Cluster, lead string, needs float64, valueBytes int) []pair {
	t.Helper()
	var data []pair
	padding := strings.Repeat(".", valueBytes)
	for range 40 {
		next := pairs("snapshot", len(data), len(data)+100)
		for i := range next {
			next[i].value += padding
		}
		write(t, c, lead, next)
		data = append(data, next...)
		if metric(t, c, lead, "kvd_shard_first_log_index") > needs {
			return data
		}
	}
	t.Fatalf("after %d writes %s's log still begins at %v", len(data), lead, metric(t, c, lead, "kvd_shard_first_log_index"))
	return nil
}

// A node that was away until after the log was truncated gets a snapshot.
func TestSnapshotInstall(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: shortLog})
	lead := leader(t, c)
	late := others(c, lead)[0]
	needs := metric(t, c, late, "kvd_shard_last_log_index") + 1
	must(t, c.Node(late).Kill())
	data := writePastTheLog(t, c, lead, needs, 0)
	must(t, c.StartNodes(liveness(t), late))
	caughtUp(t, c, late, lead)
	if installs := metric(t, c, late, "kvd_shard_snapshot_installs_total"); installs == 0 {
		t.Fatal("no snapshot was installed")
	}
	holdsAll(t, c, late, "snapshot/", data)
	more := pairs("afterwards", 0, 20)
	write(t, c, late, more)
	caughtUp(t, c, late, lead)
	holdsAll(t, c, late, "afterwards/", more)
	must(t, c.Restart(liveness(t), late))
	caughtUp(t, c, late, lead)
	holdsAll(t, c, late, "snapshot/", data)
	t.Logf("%s was down past the truncation of the log (%d writes) and was given a snapshot", late, len(data))
}

// A node that is killed while it receives a snapshot starts with what it had, and is given another.
func TestKillInTheMiddleOfAnInstall(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: shortLog, Links: true})
	lead := leader(t, c)
	late := others(c, lead)[0]
	before := pairs("before", 0, 10)
	write(t, c, late, before)
	needs := metric(t, c, late, "kvd_shard_last_log_index") + 1
	must(t, c.Node(late).Kill())
	data := writePastTheLog(t, c, lead, needs, 16<<10)

	for _, name := range others(c, late) { // several seconds for the transfer, whoever sends it
		c.Link(name, late).Slow(1 << 20)
	}
	must(t, c.Node(late).Start())
	eventually(t, "a staged snapshot grows", func(context.Context) (bool, error) { return stagedBytes(t, c.Node(late)) > 256<<10, nil })
	must(t, c.Node(late).Kill())
	staged := stagedBytes(t, c.Node(late))
	if staged == 0 || c.Node(late).Log.Contains("ready to serve client requests") {
		t.Fatalf("killed too late: %d bytes staged", staged)
	}
	c.HealAll()
	must(t, c.StartNodes(liveness(t), late))
	caughtUp(t, c, late, lead)
	if installs := metric(t, c, late, "kvd_shard_snapshot_installs_total"); installs == 0 {
		t.Fatal("no snapshot was installed")
	}
	holdsAll(t, c, late, "snapshot/", data)
	holdsAll(t, c, late, "before/", before)
	if left := stagedBytes(t, c.Node(late)); left != 0 {
		t.Fatalf("%d bytes of temporary files are left", left)
	}
	t.Logf("killed %s with %d bytes of a snapshot received; it recovered", late, staged)
}

// stagedBytes is the size of a node's temporary files.
func stagedBytes(t *testing.T, n *cluster.Node) (total int64) {
	files, err := filepath.Glob(filepath.Join(n.Dir, "groups", "*", "*.tmp*"))
	must(t, err)
	for _, file := range files {
		if info, err := os.Stat(file); err == nil { // it may just have been renamed
			total += info.Size()
		}
	}
	return total
}

// A node that lost its directory comes back under another id, gets everything, and votes again.
func TestWipedNodeRejoins(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: quick})
	data := pairs("wiped", 0, 50)
	write(t, c, "n1", data)
	lead := leader(t, c)
	wiped := others(c, lead)[1]
	oldID := memberID(t, c, lead, wiped)
	must(t, c.Node(wiped).Kill())
	must(t, c.Node(wiped).Wipe())
	must(t, c.StartNodes(liveness(t), wiped))
	eventually(t, "the rejoined node votes", func(ctx context.Context) (bool, error) {
		voter, err := c.Metric(ctx, wiped, "kvd_shard_is_voter")
		return voter == 1, err
	})
	if newID := memberID(t, c, lead, wiped); newID == oldID {
		t.Fatalf("it came back as the member that it was: %x", newID)
	}
	caughtUp(t, c, wiped, leader(t, c))
	holdsAll(t, c, wiped, "wiped/", data)

	// Its vote counts: the others are one too few without it.
	victim := others(c, wiped)[0]
	must(t, c.Node(victim).Kill())
	more := pairs("rejoined", 0, 20)
	write(t, c, wiped, more)
	read(t, c, wiped, append(data, more...))
	t.Logf("%s lost its directory, rejoined and carried the cluster when %s was killed", wiped, victim)
}

// memberID waits until the cluster has three members, all of which vote, and returns the id of one.
func memberID(t *testing.T, c *cluster.Cluster, ask, name string) (id uint64) {
	t.Helper()
	eventually(t, "three voting members", func(ctx context.Context) (bool, error) {
		resp, err := client(t, c, ask).MemberList(ctx)
		if err != nil {
			return false, err
		}
		voters, found := 0, 0
		for _, m := range resp.Members {
			if !m.IsLearner {
				voters++
			}
			if m.Name == name {
				id = m.ID
				found++
			}
		}
		if voters != 3 || found != 1 || len(resp.Members) != 3 {
			return false, fmt.Errorf("members %v", resp.Members)
		}
		return true, nil
	})
	return id
}

// What a wiped node acknowledged it has forgotten: with its old vote it could make a node that never had
// those writes the leader.
func TestWipedNodeDoesNotVoteWithItsOldID(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: quick})
	lead := leader(t, c)
	wiped, behind := others(c, lead)[0], others(c, lead)[1]
	must(t, c.Node(behind).Kill())
	data := pairs("acknowledged", 0, 30) // by the leader and the one that is wiped next
	write(t, c, lead, data)
	must(t, c.Node(wiped).Kill())
	must(t, c.Node(lead).Kill())
	must(t, c.Node(wiped).Wipe())
	must(t, c.Node(wiped).Start())
	must(t, c.Node(behind).Start())

	// Six election timeouts: this cannot be too short, it only gives a fault the time to show.
	deadline := time.Now().Add(3 * time.Second)
	for time.Now().Before(deadline) {
		if name, err := c.Leader(t.Context()); err == nil {
			t.Fatalf("%s leads, elected by a node that has lost what it acknowledged", name)
		}
		time.Sleep(100 * time.Millisecond)
	}
	must(t, c.Node(lead).Start())
	must(t, c.WaitReady(liveness(t), c.Names()...))
	for _, name := range c.Names() {
		read(t, c, name, data)
	}
	t.Logf("%s (behind) and %s (wiped) elected nobody; with %s back nothing was lost", behind, wiped, lead)
}

// A second directory under the name of a node that is alive stays out, and takes its place when that one is gone;
// then the first has to stay out.
func TestTwoNodesOfOneName(t *testing.T) {
	t.Parallel()
	c := cluster.Run(t, cluster.Config{Args: quick})
	data := pairs("twins", 0, 20)
	write(t, c, "n1", data)
	name := others(c, leader(t, c))[0]
	first, address := c.Node(name), c.Node(name).PeerAddr()
	var peers []string
	for _, other := range c.Names() {
		peers = append(peers, other+"="+c.Node(other).PeerAddr())
	}
	dir := filepath.Join(c.Dir, "second")
	launch := func(dir string, flags ...string) *cluster.Cluster {
		args := append([]string{"--name", name, "--peers", strings.Join(peers, ",")}, flags...)
		other := cluster.New(t, cluster.Config{Nodes: 1, Args: with(args...), Dirs: map[string]string{"n1": dir}})
		must(t, other.Node("n1").Start())
		return other
	}

	second := launch(dir)
	eventually(t, "the second has to wait", func(context.Context) (bool, error) {
		return second.Node("n1").Log.Contains("waiting to rejoin"), nil
	})
	read(t, c, name, data)
	must(t, second.Node("n1").Kill())
	must(t, first.Kill())

	second = launch(dir, "--listen-peer", address)
	must(t, second.WaitReady(liveness(t), "n1"))
	read(t, second, "n1", data)

	returned := launch(first.Dir).Node("n1")
	code, err := returned.Exit(liveness(t))
	must(t, err)
	refused(t, code, returned.Log.Life(), name, first.Dir)
	more := pairs("second", 0, 20)
	write(t, second, "n1", more)
	read(t, c, others(c, name)[0], append(data, more...))
	t.Logf("a second %s had to wait until the first was gone; then the first was refused", name)
}
