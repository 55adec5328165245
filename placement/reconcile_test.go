package placement

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"kvd/fsm"
	"kvd/shard"
	"kvd/shard/raftlog"
	"kvd/transport"
)

// leader opens a group of one replica, n1/1, and waits until it serves.
func leader(t *testing.T) *shard.Replica {
	t.Helper()
	network := transport.NewMemoryNetwork()
	listener, err := network.Listen("n1")
	if err != nil {
		t.Fatal(err)
	}
	node, err := transport.New(transport.Config{
		Identity: func() transport.Peer { return transport.Peer{ClusterID: 7, Node: "n1", Incarnation: 1} },
		Listener: listener, Dial: network.Dialer("n1"),
		Resolve: func(node string) (string, bool) { return node, true },
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r, err := shard.Open(shard.Config{
		ClusterID: 7, Replica: "n1/1", Dir: dir,
		Bootstrap: &raft.Configuration{Servers: []raft.Server{{ID: "n1/1", Address: "n1/1"}}},
		NewTransport: func(install shard.InstallFunc) (shard.Transport, error) {
			return node.Group(0, "n1/1", transport.InstallFunc(install))
		},
		OpenLog: func(guard func() uint64) (shard.LogStore, error) {
			return raftlog.Open(raftlog.Options{Path: filepath.Join(dir, "raft.db"), Guard: guard, NoSync: true})
		},
		State:            fsm.Config{NoSync: true},
		HeartbeatTimeout: 50 * time.Millisecond, ElectionTimeout: 50 * time.Millisecond,
		OnFatal: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), node.Close()); err != nil {
			t.Error(err)
		}
	})
	for changed := r.LeaderChanged(); !r.Serving(); changed = r.LeaderChanged() {
		if r.Serving() {
			break
		}
		<-changed
	}
	return r
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// founded is a Reconciler over a group whose map has n1 alone.
func founded(t *testing.T) (*Reconciler, *shard.Replica) {
	t.Helper()
	replica := leader(t)
	r := Start(Config{Replica: replica, Founders: []Member{{Name: "n1", Incarnation: 1, Replica: "n1/1"}}, Every: 5 * time.Millisecond})
	t.Cleanup(r.Close)
	await(t, r, func(members []Member) bool { return len(members) == 1 })
	return r, replica
}

func await(t *testing.T, r *Reconciler, good func([]Member) bool) {
	t.Helper()
	ctx := within(t)
	for {
		members, err := r.Members(ctx)
		if err == nil && good(members) {
			return
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("members are %+v, %v", members, err)
		}
	}
}

func TestFoundingIsDoneOnceAndWhole(t *testing.T) {
	r, replica := founded(t)
	// One who comes later, with other founders, changes nothing.
	late := &Reconciler{cfg: Config{Replica: replica, Founders: []Member{{Name: "n0", Replica: "n0/1"}, {Name: "n1", Incarnation: 9, Replica: "n1/1"}}}}
	late.seen.begin(1)
	ctx := within(t)
	if done, err := late.found(ctx, time.Now()); !done || err != nil {
		t.Fatal(done, err)
	}
	members, err := r.Members(ctx)
	if want := (Member{Name: "n1", Incarnation: 1, Replica: "n1/1"}); err != nil || len(members) != 1 || members[0] != want {
		t.Errorf("members %+v, %v", members, err)
	}
	if _, err := (&Reconciler{cfg: Config{Replica: replica}}).found(ctx, time.Now()); err != nil {
		t.Errorf("without founders: %v", err)
	}
}

func TestReplaceComparesAndSwaps(t *testing.T) {
	r, replica := founded(t)
	r.Close() // n1 must stay what it is, so that it can answer
	ctx := within(t)
	old := Member{Name: "n1", Incarnation: 1, Replica: "n1/1"}
	if _, err := r.Replace(ctx, Member{Name: "n1", Incarnation: 2, Replica: "n1/1"}, 3); !errors.Is(err, ErrConflict) {
		t.Errorf("of a member that the map has differently: %v", err)
	}
	if _, err := r.Replace(ctx, Member{Name: "n2", Incarnation: 1, Replica: "n2/1"}, 3); !errors.Is(err, ErrConflict) {
		t.Errorf("of a member that the map does not have: %v", err)
	}
	// Of many at once with different incarnations, one wins.
	var all sync.WaitGroup
	wins := make(chan Member, 10)
	for i := range cap(wins) {
		all.Go(func() {
			next, err := r.Replace(ctx, old, uint64(10+i))
			switch {
			case err == nil:
				wins <- next
			case !errors.Is(err, ErrConflict):
				t.Error(err)
			}
		})
	}
	all.Wait()
	close(wins)
	if len(wins) != 1 {
		t.Fatalf("%d have replaced the same member", len(wins))
	}
	winner := <-wins
	members, err := r.Members(ctx)
	if err != nil || len(members) != 1 || members[0] != winner || winner.Replica != "n1/2" {
		t.Errorf("members %+v, %v; the winner is %+v", members, err, winner)
	}
	if !replica.Serving() {
		t.Error("the leader has stepped down")
	}
}

func TestTheReconcilerAddsWhomTheMapNames(t *testing.T) {
	r, replica := founded(t)
	if _, err := r.Replace(within(t), Member{Name: "n1", Incarnation: 1, Replica: "n1/1"}, 2); err != nil {
		t.Fatal(err)
	}
	ctx := within(t)
	for {
		members := replica.Status().Members
		if len(members) == 2 {
			if m := members[1]; m.ID != "n1/2" || m.Voter || !members[0].Voter {
				t.Errorf("members %+v", members)
			}
			return // it never answers, so it is never promoted, and n1/1 stays
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("members %+v", members)
		}
	}
}

func TestCloseOfTheReconcilerIsIdempotent(t *testing.T) {
	r, _ := founded(t)
	r.Close()
	r.Close()
}
