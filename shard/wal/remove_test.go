package wal

import (
	"errors"
	"runtime"
	"strings"
	"testing"

	"kvd/shard/wal/vfs"
)

// Whoever cleans while a replica is being removed does not find entries that are nobody's, which would be damage.
func TestCleanBesideRemove(t *testing.T) {
	l := open(t, Options{Dir: "log", FS: new(vfs.Memory), SegmentBytes: testSegmentBytes})
	defer l.Close()
	id := ID{1, 1}
	s := openReplica(t, l, id, ReplicaOptions{})
	for i := range uint64(20) { // more than a file
		must(t, s.StoreLog(makeEntry(1+i, 1, i, 2<<10)))
	}
	must(t, s.Close())
	rep := l.population.replicas[id]
	oldest := l.segments.all()[0]
	if len(l.segments.all()) < 2 || oldest.live.Load() == 0 {
		t.Fatal("nothing is left in a former file")
	}

	rep.mu.RLock() // keeps the removal from being finished
	removed := make(chan error)
	go func() { removed <- l.Remove(id) }()
	for rep.mu.TryRLock() {
		rep.mu.RUnlock()
		runtime.Gosched()
	}
	copied := make(chan error)
	go func() {
		err := l.copyAll(oldest)
		if n := oldest.live.Load(); err == nil && n != 0 {
			err = errors.New("bytes of no replica")
		}
		copied <- err
	}()
	for range 1000 {
		runtime.Gosched() // long enough to look
	}
	rep.mu.RUnlock()
	must(t, <-removed)
	must(t, <-copied)
	must(t, l.Err())
}

// A Store that is opened while its replica is being removed writes nothing: the log could not be read again.
func TestOpenBesideRemove(t *testing.T) {
	fs := new(vfs.Memory)
	o := Options{Dir: "log", FS: fs, SegmentBytes: testSegmentBytes}
	l := open(t, o)
	id := ID{1, 1}
	must(t, l.Create(id))
	var opened *Store
	var once bool
	fs.Inject(func(op vfs.Op) error {
		if op.Kind == vfs.OpWrite && strings.HasSuffix(op.Name, segmentName(1)) && !once { // the removal's
			once = true
			opened, _ = l.Replica(id, ReplicaOptions{})
		}
		return nil
	})
	must(t, l.Remove(id))
	fs.Inject(nil)
	if opened != nil {
		if err := opened.StoreLog(makeEntry(1, 1, 1, 10)); err == nil {
			t.Error("an entry of a replica that was removed has been stored")
		}
		if err := opened.Set([]byte("k"), []byte("v")); err == nil {
			t.Error("a key of a replica that was removed has been stored")
		}
		must(t, opened.Close())
	}
	must(t, l.Close())
	l = open(t, o)
	must(t, l.Close())
}
