package shard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/fsm"
	"kvd/shard/raftlog/raftlogtest"
	"kvd/snapshot"
)

// threeVoters is the configuration that logEntry has at index 1.
func threeVoters() raft.Configuration {
	var c raft.Configuration
	for _, id := range []string{"n1/1", "n2/1", "n3/1"} {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id)})
	}
	return c
}

// logEntry is the entry at an index of a history in which each puts the key k.
func logEntry(index, term uint64, value string) *raft.Log {
	if index == 1 {
		return &raft.Log{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(threeVoters())}
	}
	var b fsm.EntryBuilder
	b.Add(putRequest("k", fmt.Sprint(value, index)))
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: b.Bytes()}
}

// makeState writes the state that has applied that history up to an index.
func makeState(t *testing.T, path string, group, clusterID, index, term uint64, value string) {
	t.Helper()
	store, err := fsm.Open(fsm.Config{Path: path, Group: group, ClusterID: clusterID, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	for i := uint64(1); i <= index; i++ {
		entry := logEntry(i, term, value)
		if i == 1 {
			err = store.ApplyConfiguration(1, 1, threeVoters())
		} else {
			_, err = store.Apply(i, term, entry.Data)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
}

// makeStream is the snapshot of such a state, and how a leader announces it.
func makeStream(t *testing.T, group, clusterID, index, term uint64) (*raft.InstallSnapshotRequest, []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), StateFile)
	makeState(t, path, group, clusterID, index, term, "new")
	store, err := fsm.Open(fsm.Config{Path: path, Group: group, ClusterID: clusterID, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	snapshots := snapshot.NewStore(store, snapshot.Config{})
	defer func() { _ = snapshots.Close() }()
	meta, reader, err := snapshots.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	data, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	return &raft.InstallSnapshotRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax},
		Term:      term, LastLogIndex: meta.Index, LastLogTerm: meta.Term, Size: meta.Size,
	}, data
}

// lone opens n1's replica with a log from first to last, whose entries have the
// given term, and no reachable peers: nothing but the test moves it.
func (c *cluster) lone(first, last, term uint64) *Replica {
	c.t.Helper()
	log := &testLog{Memory: raftlogtest.NewMemory()}
	for i := first; i <= last; i++ {
		if err := log.InmemStore.StoreLog(logEntry(i, term, "old")); err != nil {
			c.t.Fatal(err)
		}
	}
	for key, value := range map[string]uint64{"CurrentTerm": 3, "LastVoteTerm": 3} {
		if err := log.SetUint64([]byte(key), value); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := log.Set([]byte("LastVoteCand"), []byte("n2/1")); err != nil {
		c.t.Fatal(err)
	}
	c.members = []string{"n1"}
	c.logs[string(c.id("n1", 1))] = log
	return c.start("n1", 1, nil)
}

// reopened is the replica after the node has been restarted.
func (c *cluster) reopened() *Replica {
	c.stop("n1")
	return c.start("n1", 1, nil)
}

func bounds(t *testing.T, r *Replica) [2]uint64 {
	t.Helper()
	first, err1 := r.log.FirstIndex()
	last, err2 := r.log.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return [2]uint64{first, last}
}

// keepsVotes fails if term or vote are not what lone has set.
func keepsVotes(t *testing.T, r *Replica) {
	t.Helper()
	term, err1 := r.log.GetUint64([]byte("CurrentTerm"))
	voted, err2 := r.log.GetUint64([]byte("LastVoteTerm"))
	candidate, err3 := r.log.Get([]byte("LastVoteCand"))
	if err := errors.Join(err1, err2, err3); err != nil || term != 3 || voted != 3 || string(candidate) != "n2/1" {
		t.Errorf("term %d, vote for %q in %d, %v: forgotten", term, candidate, voted, err)
	}
}

// What an install does is a matter of what the log holds at the snapshot's
// index, and of nothing else.
func TestInstall(t *testing.T) {
	const at, term = 10, 3
	for _, tc := range []struct {
		name        string
		first, last uint64
		logTerm     uint64
		replaced    bool
		log         [2]uint64 // afterwards
	}{
		{name: "empty log", replaced: true},
		{name: "log ends before", first: 1, last: 5, logTerm: term, replaced: true},
		{name: "log ends just before", first: 1, last: 9, logTerm: term, replaced: true},
		{name: "log ends there", first: 1, last: 10, logTerm: term, log: [2]uint64{1, 10}},
		{name: "log goes on: what follows may be acknowledged", first: 1, last: 20, logTerm: term, log: [2]uint64{1, 20}},
		{name: "divergent log ends there", first: 1, last: 10, logTerm: 2, replaced: true},
		{name: "divergent log goes on", first: 1, last: 20, logTerm: 2, replaced: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			request, data := makeStream(t, 3, 7, at, term)
			bubble(t, 0, nil, func(c *cluster) {
				r := c.lone(tc.first, tc.last, tc.logTerm)
				if tc.last == 0 {
					r = c.reopened()
				}
				before := r.life.Load()
				answer, err := r.install(context.Background(), request, bytes.NewReader(data))
				if err != nil || !answer.Success {
					t.Fatalf("answer %+v, %v", answer, err)
				}
				check := func(r *Replica) {
					t.Helper()
					if got := bounds(t, r); got != tc.log {
						t.Errorf("log %v, want %v", got, tc.log)
					}
					keepsVotes(t, r)
					if !tc.replaced {
						return
					}
					if got := c.get(r, "k", at); got != "new10" {
						t.Errorf("state has %q", got)
					}
					if s := r.Status(); s.AppliedIndex != at || s.DurableIndex != at || len(s.Members) != 3 {
						t.Errorf("status %+v", s)
					}
				}
				if replaced := r.life.Load().state != before.state; replaced != tc.replaced {
					t.Errorf("state replaced: %v", replaced)
				}
				check(r)
				check(c.reopened())
			})
		})
	}
}

// An install that was under way for long must not take back what was applied.
func TestAStaleInstallIsAnsweredAndDropped(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		name, leader := c.leader()
		c.mustPut(leader, "k", "old")
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		if err := leader.life.Load().state.store.Flush(ctx, 1<<62); err != nil {
			t.Fatal(err)
		}
		meta, reader, err := leader.life.Load().snapshots.Open("")
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(reader)
		if err := errors.Join(err, reader.Close()); err != nil {
			t.Fatal(err)
		}
		c.mustPut(leader, "k", "new")
		_, follower := c.follower(name)
		index, err := leader.ReadIndex(ctx)
		if err != nil || c.get(follower, "k", index) != "new" {
			t.Fatalf("the follower is behind: %v", err)
		}
		request := &raft.InstallSnapshotRequest{Term: leader.Status().Term, LastLogIndex: meta.Index, LastLogTerm: meta.Term, Size: meta.Size}
		before, log := follower.life.Load(), bounds(t, follower)
		for _, body := range []io.Reader{bytes.NewReader(data), failingReader{}} { // the second proves that it is not even read
			answer, err := follower.install(ctx, request, body)
			if err != nil || !answer.Success || answer.Term != request.Term {
				t.Errorf("answer %+v, %v", answer, err)
			}
		}
		if follower.life.Load() != before || bounds(t, follower) != log || c.get(follower, "k", index) != "new" {
			t.Error("a stale install has changed the replica")
		}
		request.Term--
		if answer, err := follower.install(ctx, request, failingReader{}); err != nil || answer.Success || answer.Term != request.Term+1 {
			t.Errorf("to a deposed leader: %+v, %v", answer, err)
		}
	})
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errors.New("must not be read") }

func TestAnInstallThatDoesNotFitIsRefused(t *testing.T) {
	right, data := makeStream(t, 3, 7, 10, 3)
	_, otherGroup := makeStream(t, 4, 7, 10, 3)
	_, otherCluster := makeStream(t, 3, 8, 10, 3)
	announced := *right
	announced.LastLogIndex = 11
	bubble(t, 0, nil, func(c *cluster) {
		r := c.lone(1, 5, 3)
		before := r.life.Load()
		for name, tc := range map[string]struct {
			request *raft.InstallSnapshotRequest
			data    []byte
		}{
			"of another group":   {right, otherGroup},
			"of another cluster": {right, otherCluster},
			"not as announced":   {&announced, data},
			"truncated":          {right, data[:len(data)/2]},
			"damaged":            {right, append(append(bytes.Clone(data[:len(data)/2]), data[len(data)/2]^1), data[len(data)/2+1:]...)},
		} {
			if answer, err := r.install(context.Background(), tc.request, bytes.NewReader(tc.data)); err == nil {
				t.Errorf("%s: answered %+v", name, answer)
			}
			if r.life.Load() != before || bounds(t, r) != [2]uint64{1, 5} {
				t.Errorf("%s: it has changed the replica", name)
			}
			if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "*.tmp")); len(left) > 0 {
				t.Errorf("%s: left %v", name, left)
			}
		}
	})
}

// A log that cannot be read is no reason to throw it away.
func TestAnInstallDoesNotReplaceALogThatItCannotRead(t *testing.T) {
	request, data := makeStream(t, 3, 7, 10, 3)
	bubble(t, 0, nil, func(c *cluster) {
		r := c.lone(1, 20, 3)
		c.logs["n1/1"].breakReads(true)
		if answer, err := r.install(context.Background(), request, bytes.NewReader(data)); err == nil {
			t.Errorf("answered %+v", answer)
		}
		c.logs["n1/1"].breakReads(false)
		if got := bounds(t, r); got != [2]uint64{1, 20} {
			t.Errorf("log %v", got)
		}
	})
}

// hookReader does something once, before its first byte.
type hookReader struct {
	io.Reader
	before func()
}

func (h *hookReader) Read(b []byte) (int, error) {
	if h.before != nil {
		h.before()
		h.before = nil
	}
	return h.Reader.Read(b)
}

// Raft goes on while a snapshot arrives. What it has appended by then counts.
func TestEntriesThatArriveDuringAnInstallStay(t *testing.T) {
	request, data := makeStream(t, 3, 7, 10, 3)
	bubble(t, 0, nil, func(c *cluster) {
		r := c.lone(1, 5, 3)
		before := r.life.Load()
		body := &hookReader{bytes.NewReader(data), func() {
			for i := uint64(6); i <= 20; i++ {
				if err := c.logs["n1/1"].InmemStore.StoreLog(logEntry(i, 3, "old")); err != nil {
					t.Error(err)
				}
			}
		}}
		answer, err := r.install(context.Background(), request, body)
		if err != nil || !answer.Success {
			t.Fatalf("answer %+v, %v", answer, err)
		}
		if after := r.life.Load(); after == before || after.state != before.state || bounds(t, r) != [2]uint64{1, 20} {
			t.Error("entries that came meanwhile are lost")
		}
		if _, release, err := r.AcquireState(context.Background(), 0); err != nil {
			t.Error(err)
		} else {
			release()
		}
	})
}

func TestOneInstallAtATime(t *testing.T) {
	request, data := makeStream(t, 3, 7, 10, 3)
	bubble(t, 0, nil, func(c *cluster) {
		r := c.lone(1, 5, 3)
		var second error
		body := &hookReader{bytes.NewReader(data), func() {
			_, second = r.install(context.Background(), request, failingReader{})
		}}
		if answer, err := r.install(context.Background(), request, body); err != nil || !answer.Success {
			t.Errorf("the first: %+v, %v", answer, err)
		}
		if !errors.Is(second, ErrBusy) {
			t.Errorf("the second: %v", second)
		}
	})
}

func TestAnInstallEndsWithTheReplica(t *testing.T) {
	request, data := makeStream(t, 3, 7, 10, 3)
	bubble(t, 0, nil, func(c *cluster) {
		r := c.lone(1, 5, 3)
		_, err := r.install(context.Background(), request, &hookReader{bytes.NewReader(data), func() { c.stop("n1") }})
		if !errors.Is(err, ErrClosed) {
			t.Errorf("install into a closed replica: %v", err)
		}
		r = c.start("n1", 1, nil)
		if got := bounds(t, r); got != [2]uint64{1, 5} || r.Status().AppliedIndex != 0 {
			t.Errorf("log %v, applied %d", got, r.Status().AppliedIndex)
		}
	})
}

// A leader may stream to a replica in the moment in which it starts.
func TestAnInstallBeforeRaftIsOpenIsRefused(t *testing.T) {
	var got error
	tune := func(cfg *Config) {
		connect := cfg.NewTransport
		cfg.NewTransport = func(install InstallFunc) (Transport, error) {
			_, got = install(context.Background(), &raft.InstallSnapshotRequest{}, failingReader{})
			return connect(install)
		}
	}
	bubble(t, 1, tune, func(c *cluster) {
		if !errors.Is(got, ErrBusy) {
			t.Errorf("install while raft opens: %v", got)
		}
	})
}

func TestReadersKeepTheStateThatWasReplaced(t *testing.T) {
	request, data := makeStream(t, 3, 7, 10, 3)
	bubble(t, 0, nil, func(c *cluster) {
		makeState(t, c.statePath("n1/1"), 3, 7, 4, 3, "old")
		r := c.lone(1, 5, 3)
		old, release, err := r.AcquireState(context.Background(), 4)
		if err != nil {
			t.Fatal(err)
		}
		waited := make(chan error, 1)
		go func() { // waits in the old life for what only the new one has
			state, release, err := r.AcquireState(context.Background(), 10)
			if err == nil {
				if state == old {
					err = errors.New("got the old state")
				}
				release()
			}
			waited <- err
		}()
		time.Sleep(time.Millisecond)
		if _, err := r.install(context.Background(), request, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		if err := <-waited; err != nil {
			t.Errorf("a reader that waited over the install: %v", err)
		}
		answer, err := old.Range(context.Background(), fsm.User, &pb.RangeRequest{Key: []byte("k")})
		if err != nil || len(answer.Kvs) != 1 || string(answer.Kvs[0].Value) != "old4" {
			t.Errorf("the old state answers %v, %v", answer, err)
		}
		if old.Err() != nil {
			t.Error("closed under its reader")
		}
		release()
		if !errors.Is(old.Err(), fsm.ErrClosed) {
			t.Error("still open after its last reader")
		}
		// The file has the name of the state now, not that under which it came.
		state, release, err := r.AcquireState(context.Background(), 10)
		if err != nil {
			t.Fatal(err)
		}
		err = state.Defragment(context.Background())
		release()
		if err != nil {
			t.Errorf("defragment: %v", err)
		}
		if got := c.get(c.reopened(), "k", 10); got != "new10" {
			t.Errorf("after a restart: %q", got)
		}
	})
}

func TestAWatchGoesOnInTheStateThatReplacesItsOwn(t *testing.T) {
	request, data := makeStream(t, 3, 7, 10, 3)
	bubble(t, 0, nil, func(c *cluster) {
		makeState(t, c.statePath("n1/1"), 3, 7, 4, 3, "old")
		r := c.lone(1, 4, 3)
		var values []string
		// take watches the state of an index from a revision on, and returns where the watch goes on.
		take := func(index uint64, from int64) (*fsm.Feed, int64) {
			state, release, err := r.AcquireState(context.Background(), index)
			if err != nil {
				t.Fatal(err)
			}
			defer release()
			feed := state.NewFeed(1 << 20)
			if err := feed.Watch(1, []byte("k"), nil, from); err != nil {
				t.Fatal(err)
			}
			all, err := feed.Take(context.Background(), 1<<20, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range all {
				for _, e := range d.Events {
					values = append(values, string(e.Kv.Value))
				}
			}
			return feed, feed.Next(1)
		}
		old, next := take(4, 2)
		defer old.Close()
		if _, err := r.install(context.Background(), request, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-old.Done():
		default:
			t.Fatal("the feed of the old state does not know")
		}
		feed, _ := take(10, next)
		defer feed.Close()
		if got := fmt.Sprint(values); got != "[old2 old3 old4 new5 new6 new7 new8 new9 new10]" {
			t.Errorf("got %s", got)
		}
	})
}

func (c *cluster) statePath(id string) string {
	dir := filepath.Join(c.dir, id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		c.t.Fatal(err)
	}
	return filepath.Join(dir, StateFile)
}

// Every mixture of state and log that a crash can leave between the steps of an
// install, and those that only damage can.
func TestLogAndStateAreMadeToFitAtStart(t *testing.T) {
	for _, tc := range []struct {
		name        string
		state       uint64 // index, in term 3; 0 = none
		first, last uint64
		logTerm     uint64
		installing  uint64
		want        [2]uint64
		err         error
	}{
		{name: "new replica"},
		{name: "log without state", first: 1, last: 5, logTerm: 3, want: [2]uint64{1, 5}},
		{name: "crash before the swap", state: 4, first: 1, last: 5, logTerm: 3, want: [2]uint64{1, 5}},
		{name: "crash before the reset: log ends before", state: 10, first: 1, last: 5, logTerm: 3, installing: 10},
		{name: "crash before the reset: divergent log", state: 10, first: 1, last: 20, logTerm: 2, installing: 10},
		{name: "crash in the reset: its beginning is left", state: 10, first: 1, last: 10, logTerm: 2, installing: 10},
		{name: "crash after the reset", state: 10},
		{name: "log goes on", state: 10, first: 3, last: 20, logTerm: 3, want: [2]uint64{3, 20}},
		{name: "log begins just behind", state: 10, first: 11, last: 20, logTerm: 3, want: [2]uint64{11, 20}},
		{name: "old log", state: 10, first: 1, last: 9, logTerm: 3, err: ErrLogBehind},
		{name: "old log, after an installation", state: 10, first: 5, last: 9, logTerm: 3, installing: 4, err: ErrLogBehind},
		{name: "another's log", state: 10, first: 1, last: 20, logTerm: 2, err: ErrLogBehind},
		{name: "gap", state: 10, first: 12, last: 20, logTerm: 3, err: ErrLogGap},
		{name: "gap without state", first: 2, last: 20, logTerm: 3, err: ErrLogGap},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			leftover := filepath.Join(dir, "snapshot-1.tmp")
			if err := os.WriteFile(leftover, []byte("half"), 0o600); err != nil {
				t.Fatal(err)
			}
			if tc.state > 0 {
				makeState(t, filepath.Join(dir, StateFile), 3, 7, tc.state, 3, "new")
			}
			log := &testLog{Memory: raftlogtest.NewMemory()}
			for i := tc.first; i > 0 && i <= tc.last; i++ {
				if err := log.InmemStore.StoreLog(logEntry(i, tc.logTerm, "old")); err != nil {
					t.Fatal(err)
				}
			}
			if tc.installing > 0 {
				if err := log.SetUint64(keyInstalling, tc.installing); err != nil {
					t.Fatal(err)
				}
			}
			err := Create(Config{
				Group: 3, ClusterID: 7, Replica: "n1/1", Dir: dir, State: fsm.Config{NoSync: true},
				NewTransport: func(InstallFunc) (Transport, error) { return nil, errors.New("not used") },
				OpenLog:      func(guard func() uint64) (LogStore, error) { log.Guard(guard); return log, nil },
			})
			if !errors.Is(err, tc.err) {
				t.Fatalf("opened with %v, want %v", err, tc.err)
			}
			if tc.err != nil {
				return
			}
			if got := bounds(t, &Replica{log: log}); got != tc.want {
				t.Errorf("log %v, want %v", got, tc.want)
			}
			if _, err := os.Stat(leftover); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a staged file is left: %v", err)
			}
		})
	}
}

// A learner for which the log begins too late catches up by a snapshot, over
// the network, while writes go on; and then it can be promoted.
func TestALearnerCatchesUpByASnapshot(t *testing.T) {
	tune := func(c *Config) { c.SnapshotEntries, c.TrailingEntries = 50, 10 }
	bubble(t, 3, tune, func(c *cluster) {
		_, leader := c.leader()
		for i := range 200 {
			c.mustPut(leader, fmt.Sprint("k", i), "v")
		}
		time.Sleep(time.Minute) // no stream holds the log any more
		c.mustPut(leader, "last", "x")
		if first, _ := leader.log.FirstIndex(); first <= 1 {
			t.Fatalf("the log still begins at %d", first)
		}
		ctx, cancel := within(30 * time.Second)
		defer cancel()
		index, err := leader.AddLearner(ctx, "n4/1", leader.Status().ConfigurationIndex)
		if err != nil {
			t.Fatal(err)
		}
		c.members = append(c.members, "n4")
		learner := c.start("n4", 1, nil)
		if got := c.get(learner, "k7", index); got != "v" {
			t.Errorf("the learner has k7 = %q", got)
		}
		for leader.Match("n4/1") < index {
			time.Sleep(100 * time.Millisecond)
		}
		if _, err := leader.Promote(ctx, "n4/1", index); err != nil {
			t.Error(err)
		}
		if first := learner.Status().FirstLogIndex; first <= 1 {
			t.Errorf("the learner's log begins at %d: it was not a snapshot", first)
		}
	})
}

// A crash between raft's two writes of a bootstrap must not leave a founder
// that can never start.
func TestAnInterruptedBootstrapIsFinished(t *testing.T) {
	bubble(t, 0, nil, func(c *cluster) {
		c.members = []string{"n1"}
		log := &testLog{Memory: raftlogtest.NewMemory()}
		if err := log.SetUint64([]byte("CurrentTerm"), 1); err != nil {
			t.Fatal(err)
		}
		c.logs["n1/1"] = log
		c.start("n1", 1, c.configuration())
		_, leader := c.leader()
		c.mustPut(leader, "k", "v")
	})
}

// Only such a crash looks like that: a replica that has a later term has run.
func TestAReplicaThatHasRunIsNotBootstrapped(t *testing.T) {
	bubble(t, 0, nil, func(c *cluster) {
		c.members = []string{"n1"}
		log := &testLog{Memory: raftlogtest.NewMemory()}
		if err := log.SetUint64([]byte("CurrentTerm"), 2); err != nil {
			t.Fatal(err)
		}
		c.logs["n1/1"] = log
		r := c.start("n1", 1, c.configuration())
		if got := bounds(t, r); got != [2]uint64{} || r.Status().Term != 2 {
			t.Errorf("log %v, term %d", got, r.Status().Term)
		}
	})
}
