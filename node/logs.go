package node

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/shard"
	"kvd/shard/wal"
	"kvd/shard/wal/vfs"
)

// Kinds of raft logs.
const (
	RaftLogShared = "shared" // one log for all replicas of a node
	RaftLogBolt   = "boltdb" // a bbolt file for each replica

	// DefaultRaftLog is that of new data directories.
	DefaultRaftLog = RaftLogShared
)

// In a data directory.
const (
	groupsDir = "groups"
	boltFile  = "raft.db" // in a replica's directory
	sharedDir = "log"
)

// raftLogs are the raft logs of a node's replicas.
//
// Whether a replica may be made or must be there is for replicas.json alone to
// say (bootstrap.Dir.MayCreate), because only that file outlives both of what a
// replica consists of, its directory and its log. A replica that is not noted
// there has never been used, whatever a crash has left of it; one that is
// noted and lacks either is lost. So nothing depends on the order in which a
// crash finds the two made or removed.
type raftLogs interface {
	// create makes the empty log of a replica that was never opened. A
	// former attempt may have made it already.
	create(r placement.ReplicaRef) error
	open(r placement.ReplicaRef, guard func() uint64, cacheBytes int) (shard.LogStore, error)
	// missing says what is gone of the log of a replica that was opened;
	// empty if it is there.
	missing(r placement.ReplicaRef) (string, error)
	// keys are the stable keys of logs that are not open, as raft reads them.
	keys(of []placement.ReplicaRef) (map[placement.ReplicaRef]stableKeys, error)
	// remove forgets the log of a replica that is closed. Idempotent.
	remove(r placement.ReplicaRef) error
	// replicas are those that have a log, as far as it is not in their
	// directories.
	replicas() []wal.ID
	// measure fills in the sizes.
	measure(*LogStatus) error
	// freeBytes is what the file system of the logs has left.
	freeBytes() (uint64, error)
	close() error
}

type stableKeys map[string][]byte

// kindOf is the kind of the directory's logs.
func kindOf(dir *bootstrap.Dir, path string) (string, error) {
	switch kind := dir.Log(); kind {
	case "":
		return RaftLogBolt, nil
	case RaftLogShared:
		return kind, nil
	default:
		return "", fmt.Errorf("data directory %s: %w: its raft log is of the kind %q: start the kvd that wrote it", path, bootstrap.ErrVersion, kind)
	}
}

// chooseLog is the kind of the directory's logs from now on: what it has been so
// far, or, if no replica was ever opened in it, what is wanted.
func chooseLog(dir *bootstrap.Dir, path, want string) (string, error) {
	has, err := kindOf(dir, path)
	switch {
	case err != nil:
		return "", err
	case len(dir.Replicas()) == 0:
		want = cmp.Or(want, DefaultRaftLog)
		return want, setLog(dir, want)
	case want != "" && want != has:
		return "", fmt.Errorf("--raft-log: data directory %[1]s has %[2]s, not %[3]s: leave the flag out, or convert it first: kvd log convert --data-dir %[1]s --to %[3]s", path, has, want)
	}
	return has, nil
}

func setLog(dir *bootstrap.Dir, kind string) error {
	if kind == RaftLogBolt {
		kind = "" // as in directories that never knew anything else
	}
	return dir.SetLog(kind)
}

// openLogs opens the logs of the node's directory.
func (n *Node) openLogs() error {
	kind, err := chooseLog(n.dir, n.cfg.DataDir, n.cfg.RaftLog)
	if err != nil {
		return err
	}
	if err := clearLogs(n.cfg.DataDir, kind); err != nil {
		return err
	}
	n.logs, err = openLogs(kind, logConfig{
		dataDir: n.cfg.DataDir, fs: n.cfg.LogFS, segmentBytes: n.cfg.LogSegmentBytes, noSync: n.cfg.NoSync, logger: n.log, registerer: n.cfg.Registry, fatal: n.cfg.OnFatal,
	})
	return err
}

// logConfig says where and how logs are kept.
type logConfig struct {
	dataDir      string
	fs           vfs.FS // of the shared log; nil: the operating system's
	segmentBytes int64  // of the shared log; 0: its default
	noSync       bool
	logger       *slog.Logger
	registerer   prometheus.Registerer // may be nil
	fatal        func(error)           // told why nobody can go on with the shared log; may be nil
}

func openLogs(kind string, c logConfig) (raftLogs, error) {
	if kind == RaftLogBolt {
		return boltLogs{c}, nil
	}
	noSync := c.noSync && c.fs == nil
	if c.fs == nil {
		c.fs = vfs.OS
	}
	dir := filepath.Join(c.dataDir, sharedDir)
	log, err := wal.Open(wal.Options{Dir: dir, FS: c.fs, SegmentBytes: c.segmentBytes, NoSync: noSync, Logger: c.logger, Registerer: c.registerer})
	if err != nil {
		return nil, damagedLog(c.dataDir, err)
	}
	shared := &sharedLogs{log: log, fs: c.fs, dir: dir}
	if c.fatal != nil {
		shared.fatal = func(err error) { c.fatal(damagedLog(c.dataDir, err)) }
	}
	return shared, nil
}

// damagedLog says what to do about a log that cannot be trusted. It is all
// replicas' log: none of them may go on under its id.
func damagedLog(dataDir string, err error) error {
	if !errors.Is(err, wal.ErrCorrupt) {
		return err
	}
	return fmt.Errorf("data directory %s is damaged: %w: delete its contents so that the node rejoins its cluster with an empty one, or restore a backup if it was alone; an older copy of the directory loses writes", dataDir, err)
}

// clearLogs removes what there is of the other kind: it is older, or of a
// conversion that was not finished.
func clearLogs(dataDir, kind string) error {
	if kind == RaftLogBolt {
		return clearShared(filepath.Join(dataDir, sharedDir))
	}
	dirs, err := replicaDirs(dataDir)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := os.Remove(filepath.Join(dir, boltFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// clearShared removes the files of a shared log, and the directory unless it is
// where another disk begins.
func clearShared(dir string) error {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, f := range files {
		if f.Name() != "lost+found" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, f.Name())))
		}
	}
	if info, lerr := os.Lstat(dir); err == nil && lerr == nil && info.IsDir() {
		_ = os.Remove(dir)
	}
	return err
}

// replicaDirs are the directories of all replicas in a data directory, whether
// they are in use or not.
func replicaDirs(dataDir string) (dirs []string, err error) {
	groups, err := os.ReadDir(filepath.Join(dataDir, groupsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, group := range groups {
		number, err := strconv.ParseUint(group.Name(), 10, 64)
		if err != nil {
			continue
		}
		dir := filepath.Join(dataDir, groupsDir, group.Name())
		if number == group0 {
			dirs = append(dirs, dir)
			continue
		}
		replicas, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, r := range replicas {
			dirs = append(dirs, filepath.Join(dir, r.Name()))
		}
	}
	return dirs, nil
}

// refOf is the replica whose directory path is; false if it is none's.
func refOf(dir *bootstrap.Dir, path string) (r placement.ReplicaRef, ok bool) {
	number := filepath.Base(path)
	group, err := strconv.ParseUint(filepath.Base(filepath.Dir(path)), 10, 64)
	if err != nil { // group 0's
		r.ID = raft.ServerID(dir.Replica())
		return r, r.ID != ""
	}
	r = placement.ReplicaRef{Group: group, ID: raft.ServerID(dir.Name() + "/" + number)}
	_, err = logID(r)
	return r, err == nil
}

// replicaDir is the directory of a replica in a data directory.
func replicaDir(dataDir string, r placement.ReplicaRef) string {
	group := filepath.Join(dataDir, groupsDir, strconv.FormatUint(r.Group, 10))
	if r.Group == group0 {
		return group
	}
	_, number, _ := strings.Cut(string(r.ID), "/")
	return filepath.Join(group, number)
}

// missingFile returns the path of a file that is certainly not there, or empty:
// bbolt would take it for new.
func missingFile(path string) (string, error) {
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist), err == nil && info.Size() == 0:
		return path, nil
	default:
		return "", err
	}
}

// missing names what a replica that was opened is not itself without. What
// cannot be looked at may be there.
func (n *Node) missing(r placement.ReplicaRef) (string, error) {
	lost, err := missingFile(filepath.Join(replicaDir(n.cfg.DataDir, r), shard.StateFile))
	if lost != "" || err != nil {
		return lost, err
	}
	return n.logs.missing(r)
}

// freeBytes is what the disk that has less room, of those under the data
// directory and under its logs, has left.
func (n *Node) freeBytes() (uint64, error) {
	data, err1 := freeBytes(n.cfg.DataDir)
	logs, err2 := n.logs.freeBytes()
	return min(data, logs), errors.Join(err1, err2)
}
