package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/shard"
	"kvd/transport"
)

// bareGroups are the groups of a node n1 of which nothing runs.
func bareGroups(t *testing.T) *groups { return bareGroupsOf(t, "") }

func bareGroupsOf(t *testing.T, raftLog string) *groups {
	t.Helper()
	cfg := Config{Name: "n1", DataDir: t.TempDir(), RaftLog: raftLog, Strategy: StrategyConsistent, Shards: 1, ReplicationFactor: 1, NoSync: true}
	cfg.setDefaults()
	dir, err := bootstrap.Open(cfg.DataDir, cfg.settings())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	n := &Node{cfg: cfg, log: cfg.Logger, dir: dir}
	if err := n.openLogs(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.logs.close() })
	n.groups = newGroups(n)
	return n.groups
}

// A replica whose files are damaged is marked as lost in the map, long before
// its group has replaced it. What is left of it may be all that is left.
func TestADamagedReplicasFilesStayUntilItIsForgotten(t *testing.T) {
	g := bareGroups(t)
	ref := placement.ReplicaRef{Group: 1, ID: "n1/2"}
	if err := os.MkdirAll(g.dirOf(ref), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := g.scan(); err != nil {
		t.Fatal(err)
	}
	with := func(replicas ...placement.Replica) *placement.Map {
		return &placement.Map{Shards: []placement.Shard{{Founders: []raft.ServerID{ref.ID}, Replicas: replicas}}}
	}
	own := g.n.dir.Incarnation()
	for name, m := range map[string]*placement.Map{
		"its own": with(placement.Replica{ID: ref.ID, Incarnation: own}),
		"lost":    with(placement.Replica{ID: ref.ID}),
	} {
		if surplus := g.surplus(m); len(surplus) != 0 {
			t.Errorf("%s: %v would be deleted", name, surplus)
		}
	}
	if surplus := g.surplus(with(placement.Replica{ID: "n2/3", Incarnation: 5})); len(surplus) != 1 {
		t.Errorf("forgotten: %v would be deleted", surplus)
	}

	g.lost[ref] = true
	if err := g.settle(context.Background(), with(placement.Replica{ID: ref.ID})); err != nil {
		t.Fatal(err)
	}
	if lost := g.Lost(); len(lost) != 0 {
		t.Errorf("reports %v again, which the map has taken notice of", lost)
	}
}

// Only files that are certainly not there are lost.
func TestAReplicaThatCannotBeLookedAtIsNotLost(t *testing.T) {
	g := bareGroups(t)
	id := raft.ServerID("n1/2")
	dir := g.dirOf(placement.ReplicaRef{Group: 1, ID: id})
	if err := g.n.dir.MarkCreated(1, string(id)); err != nil {
		t.Fatal(err)
	}
	cfg := g.n.replicaConfig(placement.ReplicaRef{Group: 1, ID: id}, 0)
	if _, err := g.n.openReplicaFiles(cfg); !errors.Is(err, errReplicaLost) || strings.Contains(err.Error(), "delete the directory") {
		t.Errorf("without files, which are made anew elsewhere: %v", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(shard.StateFile, filepath.Join(dir, shard.StateFile)); err != nil { // leads nowhere
		t.Fatal(err)
	}
	if _, err := g.n.openReplicaFiles(cfg); err == nil || errors.Is(err, errReplicaLost) {
		t.Errorf("with a file that cannot be looked at: %v", err)
	}
}

// A node that comes without its data while its name is still leaving waits, and
// is then a new member. In the former one's place it would have to leave.
func TestWhoComesWhileItsNameIsLeavingJoinsAfterwards(t *testing.T) {
	inTown(t, 3, func(w *town) {
		w.shards = 2
		w.start("n1", "n2", "n3")
		w.awaitReady("n1", "n2", "n3")
		w.stop("n3")
		ctx, cancel := context.WithTimeout(w.t.Context(), 2*time.Minute)
		defer cancel()
		if err := w.nodes["n1"].Leave(ctx, "n3", false); err != nil {
			w.t.Error(err)
			return
		}
		cfg := w.config("n3", "n3 again")
		cfg.Join, cfg.Peers = w.peers["n1"], nil
		n, err := Start(ctx, cfg)
		if err != nil {
			w.t.Error(err)
			return
		}
		w.nodes["n3"] = n
		w.awaitReady("n3")
		time.Sleep(2 * time.Minute)
		if m := n.members(); len(m) != 3 || m[2].Leaving || m[2].Incarnation != n.dir.Incarnation() {
			w.t.Errorf("members %+v", m)
		}
	})
}

// A node that closes while it opens hundreds of replicas does not open them all.
func TestNothingIsBegunAfterTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var begun atomic.Int32
	err := each(ctx, make([]placement.ReplicaRef, 1000), func(placement.ReplicaRef) error {
		begun.Add(1)
		cancel()
		return nil
	})
	if n := begun.Load(); n > maxOpenings || !errors.Is(err, context.Canceled) {
		t.Errorf("%d were begun: %v", n, err)
	}
}

// However many nodes have come and gone, those that come are found.
func TestNodesThatHaveLeftTakeNoRoomInTheBook(t *testing.T) {
	inTown(t, 2, func(w *town) {
		w.start("n1", "n2")
		w.awaitReady("n1", "n2")
		n := w.nodes["n1"]
		time.Sleep(10 * time.Second) // the map is written
		for i := range 2 * bootstrap.MaxMembers {
			name := fmt.Sprintf("node%d", i)
			n.learn(transport.Peer{ClusterID: n.dir.ClusterID(), Node: name, PeerAddr: name + ":1"})
			if addr, ok := n.resolve(name); !ok || addr != name+":1" {
				w.t.Errorf("%s is at %q", name, addr)
				return
			}
		}
		if known := n.book.Lookup("n2"); known.Peer != "n2:1" {
			w.t.Errorf("a member is at %+v", known)
		}
		if known := n.addressesOf(n.members()); len(known) != 2 {
			w.t.Errorf("one that joins is told of %v", known)
		}
	})
}

// One who was replaced while nobody heard it, and comes back, does not draw the
// messages of its successor to itself.
func TestWhoWasReplacedIsNotTakenForItsSuccessor(t *testing.T) {
	inTown(t, 4, func(w *town) {
		cfg := w.config("n4", "n4")
		delete(w.peers, "n4") // which others know from what it says only
		w.start("n1", "n2", "n3")
		w.awaitReady("n1", "n2", "n3")
		time.Sleep(10 * time.Second)
		cfg.Join, cfg.Peers = w.peers["n1"], nil
		ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
		defer cancel()
		n4, err := Start(ctx, cfg)
		if err != nil {
			w.t.Error(err)
			return
		}
		time.Sleep(10 * time.Second)
		n := w.nodes["n1"]
		at := func(want string) {
			w.t.Helper()
			if addr, ok := n.resolve("n4"); !ok || addr != want {
				w.t.Errorf("n4 is at %q, want %q", addr, want)
			}
		}
		at("n4:1")
		next := transport.Peer{ClusterID: n.dir.ClusterID(), Node: "n4", Incarnation: 99, PeerAddr: "n4:2"}
		n.learn(next)
		at("n4:1")
		former := n.members()[3]
		if err := n4.Close(); err != nil {
			w.t.Error(err)
		}
		for _, leader := range w.nodes {
			if leader.Replica().Serving() {
				if _, err := leader.placement().Replace(ctx, former, next.Incarnation); err != nil {
					w.t.Error(err)
				}
			}
		}
		time.Sleep(time.Second)
		at("n4:2")
		n.learn(transport.Peer{ClusterID: next.ClusterID, Node: "n4", Incarnation: former.Incarnation, PeerAddr: "n4:1"})
		at("n4:2")
	})
}

// One ping that is lost costs no node its place.
func TestWhoReportedAMomentAgoKeepsItsPlace(t *testing.T) {
	inTown(t, 3, func(w *town) {
		w.start("n1", "n2", "n3")
		w.awaitReady("n1", "n2", "n3")
		time.Sleep(10 * time.Second)
		var leader *Node
		for _, n := range w.nodes {
			if n.Replica().Serving() {
				leader = n
			}
		}
		name := map[bool]string{true: "n2", false: "n3"}[leader.cfg.Name == "n3"]
		cfg := w.config(name, name+" again")
		cfg.setDefaults()
		dir, err := bootstrap.Open(cfg.DataDir, cfg.settings())
		if err != nil {
			w.t.Error(err)
			return
		}
		defer dir.Close()
		payload, err := bootstrap.NewRejoinRequest(dir, bootstrap.Rejoin{ClusterID: leader.dir.ClusterID()}).Encode()
		if err != nil {
			w.t.Error(err)
			return
		}
		w.network.Isolate(w.peers[name])
		if answer := leader.admit(w.t.Context(), payload); answer.Refused != bootstrap.StillReports {
			w.t.Errorf("answered %+v", answer)
		}
		w.network.HealAll()
		time.Sleep(10 * time.Second)
	})
}
