package fsm

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/snapshot"
)

func witnessConfig(t *testing.T) Config {
	config := testConfig(tempPath(t))
	config.Witness, config.Group, config.ClusterID = true, 3, 7
	return config
}

func configurationOf(id raft.ServerID) raft.Configuration {
	return raft.Configuration{Servers: []raft.Server{{ID: id, Address: raft.ServerAddress(id)}}}
}

func TestWitnessKeepsTheIndexAlone(t *testing.T) {
	config := witnessConfig(t)
	s := open(t, config)
	if err := s.ApplyConfiguration(1, 1, configurationOf("n1/1")); err != nil {
		t.Fatal(err)
	}
	for i, data := range [][]byte{entryOf(t, put("a", "1")), []byte("of a version that nobody knows"), nil} {
		results, err := s.Apply(uint64(i+2), 2, data)
		if results != nil || err != nil {
			t.Errorf("got %v, %v", results, err)
		}
	}
	if err := s.Flush(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	want := snapshot.Meta{ClusterID: 7, Group: 3, Index: 4, Term: 2, Configuration: configurationOf("n1/1"), ConfigurationIndex: 1, Revision: 1, CompactRevision: -1}
	for range 2 {
		if meta, ok := s.SnapshotMeta(); !ok || fmt.Sprint(meta) != fmt.Sprint(want) {
			t.Errorf("snapshot %v, want %v", meta, want)
		}
		if s.AppliedIndex() != 4 || s.DurableIndex() != 4 {
			t.Errorf("applied %d, durable %d", s.AppliedIndex(), s.DurableIndex())
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, config)
	}
	if err := s.Defragment(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, config)
	if meta, _ := s.SnapshotMeta(); fmt.Sprint(meta) != fmt.Sprint(want) {
		t.Errorf("defragmented to %v, want %v", meta, want)
	}
}

func TestWitnessAnswersNothing(t *testing.T) {
	s := open(t, witnessConfig(t))
	if _, err := s.Apply(1, 1, entryOf(t, put("a", "1"))); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	ctx, r := t.Context(), &pb.RangeRequest{Key: []byte("a")}
	for name, call := range map[string]func() error{
		"Range":         func() error { _, err := s.Range(ctx, User, r); return err },
		"RangePageAt":   func() error { _, err := s.RangePageAt(ctx, System, r, 9); return err },
		"ReadTxn":       func() error { _, err := s.ReadTxn(ctx, User, rangeAt("a", 0)); return err },
		"HashKV":        func() error { _, _, _, err := s.HashKV(ctx, 0); return err },
		"Hash":          func() error { _, err := s.Hash(ctx); return err },
		"ViewSnapshot":  func() error { return s.ViewSnapshot(ctx, nil) },
		"WaitCompacted": func() error { return s.WaitCompacted(ctx, User, 1) },
	} {
		if err := call(); !errors.Is(err, ErrWitness) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Adopt(s.config.Path, snapshot.Meta{Index: 1}); !errors.Is(err, ErrWitness) {
		t.Errorf("Adopt: %v", err)
	}
}

func TestFilesKeepTheirRole(t *testing.T) {
	for _, config := range []Config{witnessConfig(t), testConfig(tempPath(t))} {
		s := open(t, config)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		config.Witness = !config.Witness
		if _, err := Open(config); !errors.Is(err, ErrWrongRole) {
			t.Errorf("opened as a witness: %t: %v", config.Witness, err)
		}
	}
}

func TestInstallMeta(t *testing.T) {
	config := witnessConfig(t)
	config.FlushInterval = time.Hour
	s := open(t, config)
	if _, err := s.Apply(5, 1, nil); err != nil {
		t.Fatal(err)
	}
	meta := snapshot.Meta{ClusterID: 7, Group: 3, Index: 90, Term: 4, Configuration: configurationOf("n1/2"), ConfigurationIndex: 80, Revision: 1000, CompactRevision: 900, Keys: 7}
	for name, change := range map[string]func(m *snapshot.Meta){
		"group":   func(m *snapshot.Meta) { m.Group = 4 },
		"cluster": func(m *snapshot.Meta) { m.ClusterID = 8 },
	} {
		foreign := meta
		change(&foreign)
		if err := s.InstallMeta(foreign); !errors.Is(err, ErrForeignState) || s.AppliedIndex() != 5 {
			t.Errorf("of another %s: %v, applied %d", name, err, s.AppliedIndex())
		}
	}
	if err := s.InstallMeta(meta); err != nil {
		t.Fatal(err)
	}
	want := meta
	want.Revision, want.CompactRevision, want.Keys = 1, -1, 0
	check := func(s *Store) {
		t.Helper()
		if got, ok := s.SnapshotMeta(); !ok || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("durable is %v, want %v", got, want)
		}
		if c, index := s.Configuration(); index != 80 || fmt.Sprint(c) != fmt.Sprint(want.Configuration) || s.AppliedIndex() != 90 {
			t.Errorf("applied %d, configuration %d %v", s.AppliedIndex(), index, c)
		}
	}
	check(s)
	crashed := config
	crashed.Path = tempPath(t)
	copyFile(t, s, crashed.Path) // what a crash leaves
	check(open(t, crashed))
	stale := meta
	stale.Index, stale.Term, stale.Configuration, stale.ConfigurationIndex = 89, 3, configurationOf("n9/1"), 79
	if err := s.InstallMeta(stale); err != nil {
		t.Error(err)
	}
	check(s)
	if _, err := s.Apply(91, 4, nil); err != nil || s.AppliedIndex() != 91 {
		t.Errorf("the next entry: %v", err)
	}
}

func TestInstallMetaThatCannotBeWrittenFails(t *testing.T) {
	disk := errors.New("the disk is gone")
	config := witnessConfig(t)
	config.faults.flushFails = func() error { return disk }
	s := open(t, config)
	if err := s.InstallMeta(snapshot.Meta{Group: 3, Index: 9, Term: 1}); !errors.Is(err, disk) {
		t.Errorf("got %v", err)
	}
	if s.DurableIndex() != 0 {
		t.Errorf("durable at %d", s.DurableIndex())
	}
}

func TestDataCannotBeSkipped(t *testing.T) {
	s := open(t, testConfig(tempPath(t)))
	if err := s.InstallMeta(snapshot.Meta{Index: 9, Term: 1}); !errors.Is(err, ErrNotWitness) || s.AppliedIndex() != 0 {
		t.Errorf("got %v, applied %d", err, s.AppliedIndex())
	}
}
