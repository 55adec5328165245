package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"kvd/integration/cluster"
)

// A backup is one moment of all shards, though clients write while it is made, and restores into a cluster of
// other nodes, with another number of shards, or with the other strategy: keys, revisions and history are the same.
func TestBackupMovesBetweenShapes(t *testing.T) {
	t.Parallel()
	source := cluster.Run(t, sharded(3, 8, 2))
	data := pairs("backup", 0, 200)
	write(t, source, "n1", pairs("backup", 0, 200))
	cl := client(t, source, "n2")
	var old int64 // a revision in the history
	for round := range 3 {
		resp, err := cl.Put(liveness(t), "history", fmt.Sprint(round))
		must(t, err)
		if round == 1 {
			old = resp.Header.Revision
		}
	}
	lease, err := cl.Grant(liveness(t), 3600)
	must(t, err)
	for i := range 20 {
		_, err := cl.Put(liveness(t), fmt.Sprintf("leased/%02d", i), "x", clientv3.WithLease(lease.ID))
		must(t, err)
	}
	backup := filepath.Join(t.TempDir(), "backup.kvd")
	stop := make(chan struct{})
	done := make(chan int)
	go func() { // one writer: what it wrote up to some moment is in the backup, and nothing after it
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				done <- n
				return
			default:
			}
			if _, err := cl.Put(t.Context(), fmt.Sprintf("sequence/%05d", n), "x"); err != nil {
				n--
			}
		}
	}()
	_, err = source.Run(liveness(t), "n1", "snapshot", "save", backup, "--command-timeout", "60s")
	close(stop)
	written := <-done
	must(t, err)

	for name, flags := range map[string][]string{
		"full":     {"--strategy", "full"},
		"5 shards": {"--strategy", "consistent", "--shards", "5", "--replication-factor", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "n1")
			binary, err := cluster.Binary()
			must(t, err)
			out, err := exec.Command(binary, append([]string{"snapshot", "restore", backup, "--data-dir", dir}, flags...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			c := cluster.Run(t, cluster.Config{Nodes: 1, Args: with(flags...), Dirs: map[string]string{"n1": dir}})
			read(t, c, "n1", data)
			cl := client(t, c, "n1")
			past, err := cl.Get(liveness(t), "history", clientv3.WithRev(old))
			must(t, err)
			if len(past.Kvs) != 1 || string(past.Kvs[0].Value) != "1" || past.Kvs[0].ModRevision != old {
				t.Errorf("at revision %d: %v", old, past.Kvs)
			}
			sequence, err := cl.Get(liveness(t), "sequence/", clientv3.WithPrefix())
			must(t, err)
			for i, kv := range sequence.Kvs {
				if want := fmt.Sprintf("sequence/%05d", i); string(kv.Key) != want {
					t.Fatalf("the backup has %s, but not %s, which was written before", kv.Key, want)
				}
			}
			if len(sequence.Kvs) > written {
				t.Errorf("the backup has %d of %d keys", len(sequence.Kvs), written)
			}
			next, err := cl.Put(liveness(t), "after", "x")
			must(t, err)
			if next.Header.Revision <= sequence.Header.Revision || next.Header.Revision <= past.Kvs[0].ModRevision {
				t.Errorf("the first write has revision %d, the backup %d", next.Header.Revision, sequence.Header.Revision)
			}
			checkRestoredLease(t, cl, lease.ID)
			t.Logf("restored %d keys, %d of a sequence of which %d were written by the end of the backup", len(data), len(sequence.Kvs), written)
		})
	}
	if info, err := os.Stat(backup); err != nil || info.Size() == 0 {
		t.Error(info, err)
	}
}

// checkRestoredLease finds 20 keys attached to a lease, attaches another, and ends it with all of them.
func checkRestoredLease(t *testing.T, cl *clientv3.Client, id clientv3.LeaseID) {
	t.Helper()
	_, err := cl.KeepAliveOnce(liveness(t), id)
	must(t, err)
	_, err = cl.Put(liveness(t), "leased/later", "x", clientv3.WithLease(id))
	must(t, err)
	info, err := cl.TimeToLive(liveness(t), id, clientv3.WithAttachedKeys())
	must(t, err)
	if info.GrantedTTL != 3600 || len(info.Keys) != 21 {
		t.Errorf("restored a lease of %d s with the keys %q", info.GrantedTTL, info.Keys)
	}
	_, err = cl.Revoke(liveness(t), id)
	must(t, err)
	left, err := cl.Get(liveness(t), "leased/", clientv3.WithPrefix())
	must(t, err)
	if left.Count != 0 {
		t.Errorf("%d keys have outlived their lease: %v", left.Count, left.Kvs)
	}
	_, err = cl.Put(liveness(t), "leased/never", "x", clientv3.WithLease(id))
	if !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Errorf("a put with a lease that was revoked: %v", err)
	}
}
