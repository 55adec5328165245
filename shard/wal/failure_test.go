package wal

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/raft"

	"kvd/shard/raftlog/raftlogtest"
	"kvd/shard/wal/vfs"
)

// After a failed write or sync nothing more is written by anybody, and reads go on. Opened again, all that was
// acknowledged is there.
func TestFailedWriteIsTheLast(t *testing.T) {
	disk := errors.New("input/output error")
	for _, kind := range []vfs.Kind{vfs.OpWrite, vfs.OpSync} {
		fs := new(vfs.Memory)
		l := open(t, memoryOptions(fs))
		s, other := openReplica(t, l, ID{1, 1}, ReplicaOptions{}), openReplica(t, l, ID{2, 1}, ReplicaOptions{})
		must(t, s.StoreLogs(raftlogtest.Entries(1, 10, 1)))
		fs.Inject(func(op vfs.Op) error {
			if op.Kind == kind {
				return disk
			}
			return nil
		})
		if err := s.StoreLogs(raftlogtest.Entries(11, 12, 1)); !errors.Is(err, ErrFailed) || !errors.Is(err, disk) {
			t.Errorf("the failing write: %v", err)
		}
		fs.Inject(nil)
		for name, write := range map[string]func() error{
			"StoreLogs":   func() error { return s.StoreLogs(raftlogtest.Entries(11, 12, 1)) },
			"DeleteRange": func() error { return s.DeleteRange(1, 5) },
			"Reset":       s.Reset,
			"Set":         func() error { return s.Set([]byte("k"), nil) },
			"vote":        func() error { return s.SetUint64(keyVoteTerm, 5) },
			"other":       func() error { return other.StoreLogs(raftlogtest.Entries(1, 1, 1)) },
			"Create":      func() error { return l.Create(ID{3, 1}) },
			"Err":         other.Err,
		} {
			if err := write(); !errors.Is(err, ErrFailed) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s after a failure: %v", name, err)
			}
		}
		must(t, s.GetLog(10, new(raft.Log)))
		if last, _ := s.LastIndex(); last != 10 {
			t.Errorf("last %d", last)
		}
		must(t, l.Close())
		again := fs.Kill()
		l = open(t, memoryOptions(again))
		last := l.Status().Replicas[0].Last
		if last != 10 && last != 12 {
			t.Errorf("opened again: last %d", last)
		}
		again = again.Crash(1) // what was found must stay, although it was in memory only
		must(t, l.Close())
		l = open(t, memoryOptions(again))
		if now := l.Status().Replicas[0].Last; now != last {
			t.Errorf("after a power cut: last %d, was %d", now, last)
		}
		must(t, l.Close())
	}
}

// What does not fit in a segment gets a larger one.
func TestLargeBatch(t *testing.T) {
	o := memoryOptions(new(vfs.Memory))
	for range 2 {
		l := open(t, o)
		s := openReplica(t, l, ID{1, 1}, ReplicaOptions{CacheBytes: -1})
		last, err := s.LastIndex()
		must(t, err)
		for i := last + 1; i < last+5; i++ {
			must(t, s.StoreLog(&raft.Log{Index: i, Data: []byte(strings.Repeat(fmt.Sprint(i%10), int(i)*testSegmentBytes/2))}))
		}
		for i := uint64(1); i < last+5; i++ {
			var e raft.Log
			must(t, s.GetLog(i, &e))
			if len(e.Data) != int(i)*testSegmentBytes/2 || e.Data[len(e.Data)-1] != byte('0'+i%10) {
				t.Errorf("entry %d: %d bytes", i, len(e.Data))
			}
		}
		must(t, l.Close())
	}
}

// With a full disk the log takes what fits into the files it has. What does not is a failed write; nothing is torn.
func TestFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := new(vfs.Memory)
		l := open(t, memoryOptions(fs))
		s := openReplica(t, l, ID{1, 1}, ReplicaOptions{})
		fs.SetCapacity(3 * testSegmentBytes)
		var stored uint64
		var err error
		for i := uint64(1); ; i++ {
			if err = s.StoreLog(&raft.Log{Index: i, Data: make([]byte, 5000)}); err != nil {
				break
			}
			stored = i
		}
		if !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("full: %v", err)
		}
		if stored < 2*testSegmentBytes/8192-4 {
			t.Errorf("full after %d entries", stored)
		}
		must(t, l.Close())
		fs.SetCapacity(0)
		l = open(t, memoryOptions(fs))
		defer l.Close()
		if last := l.Status().Replicas[0].Last; last != stored {
			t.Errorf("last %d, want %d", last, stored)
		}
	})
}
