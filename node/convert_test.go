package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"kvd/node/bootstrap"
	"kvd/placement"
)

const (
	convertDirEnv  = "KVD_CONVERT_DIR"
	convertToEnv   = "KVD_CONVERT_TO"
	convertStopEnv = "KVD_CONVERT_STOP" // the number of the step before which the process ends
	stoppedCode    = 42
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(convertDirEnv); dir != "" {
		stop, _ := strconv.Atoi(os.Getenv(convertStopEnv))
		steps := 0
		_, err := convertLog(context.Background(), dir, os.Getenv(convertToEnv), func(step string) {
			if steps++; steps == stop {
				fmt.Print(step)
				os.Exit(stoppedCode)
			}
		})
		if err != nil {
			fmt.Print(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// content is all that a directory's logs say.
type content struct {
	keys    stableKeys
	entries []raft.Log
}

func contents(t *testing.T, dataDir string) (all map[placement.ReplicaRef]content) {
	t.Helper()
	dir, err := bootstrap.OpenOffline(dataDir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	kind, err := kindOf(dir, dataDir)
	if err != nil {
		t.Fatal(err)
	}
	logs, err := openLogs(kind, logConfig{dataDir: dataDir})
	if err != nil {
		t.Fatal(err)
	}
	defer logs.close()
	replicas, err := logsIn(dataDir, dir, logs)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := logs.keys(replicas)
	if err != nil {
		t.Fatal(err)
	}
	all = make(map[placement.ReplicaRef]content)
	for _, r := range replicas {
		c := content{keys: keys[r]}
		log, err := logs.open(r, nil, -1)
		if err != nil {
			t.Fatal(err)
		}
		err = batches(context.Background(), log, func(entries []*raft.Log) error {
			for _, entry := range entries {
				e := *entry
				e.AppendedAt = e.AppendedAt.UTC().Round(0)
				c.entries = append(c.entries, e)
			}
			return nil
		})
		if err := errors.Join(err, log.Close()); err != nil {
			t.Fatal(err)
		}
		all[r] = c
	}
	return all
}

// worked is the directory of a node with shards that has worked.
func worked(t *testing.T, raftLog string) (dataDir string) {
	inTown(t, 1, func(w *town) {
		w.shards, w.copies, w.raftLog = 3, 1, raftLog
		w.start("n1")
		w.awaitReady("n1")
		for i := range 40 {
			kvPut(t, w.nodes["n1"], fmt.Sprint("k", i), fmt.Sprint("v", i))
		}
		w.stop("n1")
		dataDir = filepath.Join(w.dir, "n1")
	})
	return dataDir
}

// works starts a node on a copy of a directory and checks what it has.
func works(t *testing.T, dataDir, raftLog string) {
	t.Helper()
	inTown(t, 1, func(w *town) {
		w.shards, w.copies, w.raftLog = 3, 1, raftLog
		if err := os.CopyFS(filepath.Join(w.dir, "n1"), os.DirFS(dataDir)); err != nil {
			t.Fatal(err)
		}
		w.start("n1")
		if w.nodes["n1"] == nil {
			delete(w.nodes, "n1")
			return
		}
		w.awaitReady("n1")
		for i := range 40 {
			if got := kvGet(t, w.nodes["n1"], fmt.Sprint("k", i)); got != fmt.Sprint("v", i) {
				t.Errorf("k%d = %q", i, got)
			}
		}
		if lost := w.nodes["n1"].groups.Lost(); len(lost) > 0 {
			t.Errorf("%v are lost", lost)
		}
		kvPut(t, w.nodes["n1"], "more", "x")
	})
}

// logFiles are the files of the kind of logs that is, or is not, in force.
func logFiles(t *testing.T, dataDir string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dataDir, func(path string, _ os.DirEntry, err error) error {
		if base := filepath.Base(path); base == boltFile || base == sharedDir {
			found = append(found, base)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// There and back: the same entries, votes and keys; and a node works on each.
func TestConvertedLogsAreTheSame(t *testing.T) {
	dataDir := worked(t, RaftLogBolt)
	want := contents(t, dataDir)
	if len(want) != 4 || len(want[placement.ReplicaRef{Group: 1, ID: "n1/2"}].entries) < 5 || len(want[placement.ReplicaRef{ID: "n1/1"}].keys) != 3 {
		t.Fatalf("the node has not worked: %v", want)
	}
	entries := uint64(0)
	for _, c := range want {
		entries += uint64(len(c.entries))
	}
	ctx := context.Background()
	for _, c := range []struct {
		from, to string
		files    int
	}{{RaftLogBolt, RaftLogShared, 1}, {RaftLogShared, RaftLogBolt, 4}, {RaftLogBolt, RaftLogShared, 1}} {
		done, err := ConvertLog(ctx, dataDir, c.to)
		if want := (Conversion{c.from, c.to, 4, entries}); err != nil || done != want {
			t.Fatalf("%+v, %v; want %+v", done, err, want)
		}
		if got := contents(t, dataDir); !reflect.DeepEqual(got, want) {
			t.Errorf("%s has %v, not %v", c.to, got, want)
		}
		if files := logFiles(t, dataDir); len(files) != c.files {
			t.Errorf("%s left %v", c.to, files)
		}
		status, err := ReadLogStatus(dataDir)
		if err != nil || status.Kind != c.to || len(status.Replicas) != 4 || status.SizeBytes == 0 {
			t.Errorf("status %+v, %v", status, err)
		}
		for _, r := range status.Replicas {
			had := want[placement.ReplicaRef{Group: r.Group, ID: raft.ServerID(r.ID)}]
			if last := had.entries[len(had.entries)-1]; r.Last != last.Index || r.Term != last.Term || r.Vote != r.ID || r.SizeBytes == 0 {
				t.Errorf("status of %+v", r)
			}
		}
		if again, err := ConvertLog(ctx, dataDir, c.to); err != nil || again != (Conversion{From: c.to, To: c.to}) {
			t.Errorf("again: %+v, %v", again, err)
		}
		works(t, dataDir, "")
	}
}

// A process that ends before any step leaves a directory from which the node
// starts, with all that it had.
func TestAConversionThatIsKilled(t *testing.T) {
	for _, to := range []string{RaftLogShared, RaftLogBolt} {
		t.Run(to, func(t *testing.T) {
			from := RaftLogBolt
			if to == RaftLogBolt {
				from = RaftLogShared
			}
			origin := worked(t, from)
			want := contents(t, origin)
			seen := make(map[string]bool)
			for stop := 1; ; stop++ {
				dataDir := filepath.Join(t.TempDir(), "n1")
				if err := os.CopyFS(dataDir, os.DirFS(origin)); err != nil {
					t.Fatal(err)
				}
				child := exec.Command(os.Args[0])
				child.Env = append(os.Environ(), convertDirEnv+"="+dataDir, convertToEnv+"="+to, fmt.Sprintf("%s=%d", convertStopEnv, stop))
				step, err := child.Output()
				if err != nil && child.ProcessState.ExitCode() != stoppedCode {
					t.Fatalf("step %d: %v: %s", stop, err, step)
				}
				if got := contents(t, dataDir); !reflect.DeepEqual(got, want) {
					t.Fatalf("ended before step %d, %s: %v instead of %v", stop, step, got, want)
				}
				if first := !seen[string(step)]; first || err == nil {
					seen[string(step)] = true
					works(t, dataDir, "")
				}
				if err == nil {
					break
				}
				if _, err := ConvertLog(context.Background(), dataDir, to); err != nil {
					t.Fatalf("again after step %d, %s: %v", stop, step, err)
				}
				if got := contents(t, dataDir); !reflect.DeepEqual(got, want) {
					t.Fatalf("again after step %d, %s: %v instead of %v", stop, step, got, want)
				}
			}
			for _, step := range []string{"clear", "open", "replica", "entries", "close", "sync", "switch", "remove"} {
				if !seen[step] {
					t.Errorf("never ended before %q: %v", step, seen)
				}
			}
		})
	}
}

// What of the other form lies about is never taken for what is in force.
func TestLeftoversOfTheOtherFormAreRemoved(t *testing.T) {
	for _, kind := range []string{RaftLogShared, RaftLogBolt} {
		dataDir := worked(t, kind)
		for _, path := range []string{filepath.Join(sharedDir, "x"), filepath.Join(groupsDir, "0", boltFile), filepath.Join(groupsDir, "2", "3", boltFile)} {
			path = filepath.Join(dataDir, path)
			if (filepath.Base(path) == boltFile) == (kind == RaftLogBolt) {
				continue
			}
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("old"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		inTown(t, 1, func(w *town) {
			w.shards, w.copies = 3, 1
			w.dir = filepath.Dir(dataDir)
			w.start("n1")
			w.awaitReady("n1")
		})
		if files, want := logFiles(t, dataDir), map[string]int{RaftLogShared: 1, RaftLogBolt: 4}[kind]; len(files) != want {
			t.Errorf("%s: there are %v", kind, files)
		}
	}
}

// The shared log can be on a disk of its own, whose directory stays.
func TestTheSharedLogOnAnotherDisk(t *testing.T) {
	inTown(t, 1, func(w *town) {
		other, dataDir := filepath.Join(w.dir, "disk"), filepath.Join(w.dir, "n1")
		link := filepath.Join(dataDir, sharedDir)
		if err := errors.Join(os.MkdirAll(filepath.Join(other, "lost+found"), 0o700), os.MkdirAll(dataDir, 0o700), os.Symlink(other, link)); err != nil {
			t.Fatal(err)
		}
		w.raftLog = RaftLogShared
		w.start("n1")
		w.awaitReady("n1")
		kvPut(t, w.nodes["n1"], "k", "v")
		w.stop("n1")
		want := contents(t, dataDir)
		for _, to := range []string{RaftLogBolt, RaftLogShared} {
			if _, err := ConvertLog(context.Background(), dataDir, to); err != nil {
				t.Fatal(err)
			}
			if got := contents(t, dataDir); !reflect.DeepEqual(got, want) {
				t.Errorf("%s has %v, not %v", to, got, want)
			}
			files, err := os.ReadDir(other)
			if target, lerr := os.Readlink(link); err != nil || lerr != nil || target != other || (len(files) > 1) != (to == RaftLogShared) {
				t.Errorf("with %s the other disk has %v, %v; %v", to, files, err, lerr)
			}
		}
		w.start("n1")
		w.awaitReady("n1")
		if got := kvGet(t, w.nodes["n1"], "k"); got != "v" {
			t.Errorf("k = %q", got)
		}
	})
}

// A directory keeps the kind of log that it has; one that has none yet takes
// what is wanted.
func TestTheFlagAndTheDirectory(t *testing.T) {
	for _, kind := range []string{RaftLogShared, RaftLogBolt} {
		other := RaftLogShared
		if kind == RaftLogShared {
			other = RaftLogBolt
		}
		inTown(t, 1, func(w *town) {
			w.raftLog = other // nothing has come of it
			cfg := w.config("n1", "n1")
			cfg.setDefaults()
			dir, err := bootstrap.Open(cfg.DataDir, cfg.settings())
			if err != nil {
				t.Fatal(err)
			}
			_, err = chooseLog(dir, cfg.DataDir, other)
			if err := errors.Join(err, dir.Close()); err != nil {
				t.Fatal(err)
			}
			w.raftLog = kind
			w.start("n1")
			w.awaitReady("n1")
			kvPut(t, w.nodes["n1"], "k", "v")
			if _, err := ConvertLog(context.Background(), cfg.DataDir, other); !errors.Is(err, bootstrap.ErrInUse) {
				t.Errorf("converting under a node: %v", err)
			}
			if _, err := ReadLogStatus(cfg.DataDir); !errors.Is(err, bootstrap.ErrInUse) {
				t.Errorf("looking under a node: %v", err)
			}
			w.stop("n1")
			w.raftLog = other
			if _, err = Start(context.Background(), w.config("n1", "n1")); err == nil ||
				!strings.Contains(err.Error(), "kvd log convert --data-dir "+cfg.DataDir+" --to "+other) || strings.Contains(err.Error(), "\n") {
				t.Errorf("started with the other log: %v", err)
			}
			w.raftLog = ""
			w.start("n1")
			w.awaitReady("n1")
			if got := kvGet(t, w.nodes["n1"], "k"); got != "v" {
				t.Errorf("k = %q", got)
			}
		})
	}
}

// A crash between a replica's log and the note that it is in use leaves a log
// that is taken as new if nothing is in it, and never if something is.
func TestAHalfMadeReplicaOfTheSharedLog(t *testing.T) {
	g := bareGroupsOf(t, RaftLogShared)
	fresh, used, gone := placement.ReplicaRef{Group: 1, ID: "n1/2"}, placement.ReplicaRef{Group: 1, ID: "n1/3w"}, placement.ReplicaRef{Group: 1, ID: "n1/4"}
	for _, r := range []placement.ReplicaRef{fresh, used, gone} {
		if err := g.n.logs.create(r); err != nil {
			t.Fatal(err)
		}
	}
	log, err := g.n.logs.open(used, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(log.SetUint64([]byte(keyTerm), 4), log.Close(), g.n.logs.remove(gone), g.n.logs.remove(gone)); err != nil {
		t.Fatal(err)
	}
	if err := g.n.logs.create(fresh); err != nil {
		t.Errorf("a new one: %v", err)
	}
	for _, r := range []placement.ReplicaRef{used, gone} {
		if err := g.n.logs.create(r); !errors.Is(err, errReplicaLost) {
			t.Errorf("%s is made anew: %v", r.ID, err)
		}
	}
	if err := g.scan(); err != nil {
		t.Fatal(err)
	}
	m := &placement.Map{Shards: []placement.Shard{{Replicas: []placement.Replica{{ID: used.ID}}}}}
	if surplus := g.surplus(m); !reflect.DeepEqual(surplus, []placement.ReplicaRef{fresh}) {
		t.Errorf("%v are surplus", surplus)
	}
	if err := g.deleteOne(fresh); err != nil {
		t.Error(err)
	}
	if left := g.n.logs.replicas(); len(left) != 1 || left[0].Replica != 3 {
		t.Errorf("%v are left", left)
	}
	if lost, err := g.n.logs.missing(used); lost != "" || err != nil {
		t.Errorf("the one that is there is missing: %q, %v", lost, err)
	}
	if lost, err := g.n.logs.missing(fresh); lost == "" || err != nil {
		t.Errorf("the one that was deleted is there: %v", err)
	}
}
