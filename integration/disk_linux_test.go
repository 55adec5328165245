package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"kvd/integration/cluster"
)

// smallDisk mounts a file system of its own for a test.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("a small disk cannot be mounted (%v): this test needs root, with CAP_SYS_ADMIN", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// fill takes all space of a disk but some bytes, at once. It returns how to give it back.
func fill(t *testing.T, disk string, leave int64) (free func()) {
	t.Helper()
	var fs syscall.Statfs_t
	must(t, syscall.Statfs(disk, &fs))
	file, err := os.Create(filepath.Join(disk, "filler"))
	must(t, err)
	for size := int64(fs.Bavail)*fs.Bsize - leave; size > 0; size -= fs.Bsize { // somebody else may take some meanwhile
		if err = syscall.Fallocate(int(file.Fd()), 0, 0, size); !errors.Is(err, syscall.ENOSPC) {
			break
		}
	}
	must(t, err)
	must(t, file.Close())
	return func() { must(t, os.Remove(file.Name())) }
}

func TestStartOnAFullDisk(t *testing.T) {
	t.Parallel()
	disk := smallDisk(t, "8m")
	fill(t, disk, 0)
	c := cluster.New(t, cluster.Config{Nodes: 1, Dirs: map[string]string{"n1": filepath.Join(disk, "n1")}})
	refusesToStart(t, c.Node("n1"), filepath.Join(disk, "n1"), "no space left", "make room")
}

// With little space left writes are refused, reads and deletions go on, and with space writes do again.
func TestLittleSpace(t *testing.T) {
	t.Parallel()
	disk := smallDisk(t, "400m")
	c := cluster.Run(t, cluster.Config{Nodes: 1, Args: quick, Dirs: map[string]string{"n1": filepath.Join(disk, "n1")}})
	data := pairs("little", 0, 20)
	write(t, c, "n1", data)
	cl := client(t, c, "n1")
	free := fill(t, disk, 100<<20)
	eventually(t, "writes are refused", func(ctx context.Context) (bool, error) {
		_, err := cl.Put(ctx, "more", "x")
		if err != nil && !errors.Is(err, rpctypes.ErrNoSpace) {
			return false, err
		}
		return err != nil, nil
	})
	read(t, c, "n1", data)
	_, err := cl.Delete(liveness(t), data[0].key)
	must(t, err)
	free()
	write(t, c, "n1", pairs("again", 0, 5))
	read(t, c, "n1", data[1:])
}

// A disk fills to the last byte under load: nothing that was acknowledged is lost, and the node comes back when
// there is room. A follower cannot refuse what it is sent, so it ends, and the others go on. A leader may notice
// in time and refuse writes instead.
func TestDiskFillsWhileRunning(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"follower", "leader"} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			testDiskFills(t, role == "leader")
		})
	}
}

func testDiskFills(t *testing.T, lead bool) {
	disk := smallDisk(t, "400m")
	c := cluster.Run(t, cluster.Config{Args: shortLog, Dirs: map[string]string{"n1": filepath.Join(disk, "n1")}})
	makeLeader(t, c, map[bool]string{true: "n1", false: "n2"}[lead])
	var l ledger
	ctx, cancel := context.WithCancel(liveness(t))
	defer cancel()
	wait := load(ctx, t, c, &l, "full")
	eventually(t, "some writes", func(context.Context) (bool, error) { return l.count() > 200, nil })
	free := fill(t, disk, 0)

	eventually(t, "n1 ends, or refuses writes", func(ctx context.Context) (bool, error) {
		if !c.Node("n1").Running() {
			return true, nil
		}
		_, err := client(t, c, "n1").Put(ctx, "another", "x")
		return lead && errors.Is(err, rpctypes.ErrNoSpace), err
	})
	if n := c.Node("n1"); !n.Running() {
		code, err := n.Exit(liveness(t))
		must(t, err)
		refused(t, code, n.Log.Life(), "no space left", "make room")
		before := l.count()
		eventually(t, "the others go on", func(context.Context) (bool, error) { return l.count() > before+200, nil })
	}
	free()
	must(t, c.Restart(liveness(t), "n1"))
	before := l.count()
	eventually(t, "all go on", func(context.Context) (bool, error) { return l.count() > before+200, nil })
	cancel()
	wait()
	verify(t, c, &l)
	caughtUp(t, c, "n1", leader(t, c))
	sameEverywhere(t, c)
	t.Logf("%d acknowledged writes are there", l.count())
}

// makeLeader moves the leadership to a node.
func makeLeader(t *testing.T, c *cluster.Cluster, name string) {
	t.Helper()
	eventually(t, name+" leads", func(ctx context.Context) (bool, error) {
		now, err := c.Leader(ctx)
		if err != nil || now == name {
			return now == name, err
		}
		status, err := c.Status(ctx, name)
		if err != nil {
			return false, err
		}
		_, err = client(t, c, now).MoveLeader(ctx, status.Header.MemberId)
		return false, err
	})
}
