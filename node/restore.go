package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"

	"kvd/fsm"
	"kvd/node/bootstrap"
	"kvd/shard"
	"kvd/shard/raftlog"
	"kvd/snapshot"
)

// ErrNotEmpty: a backup is only restored into a directory that is empty or does not exist.
var ErrNotEmpty = errors.New("not empty")

// restoreSuffix marks a directory in which a restore is, or was, under way.
const restoreSuffix = ".restoring"

// Restore makes cfg.DataDir the directory of the first node of a new cluster, with the clients' keys, revisions and
// history of a backup. The other nodes of cfg.Peers join it when they start with empty directories. The directory
// appears when it is complete and on the disk; one that a crash left half made is made anew. It returns what the
// backup says about itself; errors are ErrNotEmpty, those of snapshot.Stage, and the file system's.
func Restore(ctx context.Context, cfg Config, backup io.Reader) (snapshot.Meta, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return snapshot.Meta{}, err
	}
	target, err := filepath.Abs(cfg.DataDir)
	if err != nil {
		return snapshot.Meta{}, err
	}
	// Fails unless it is empty; it is made again by the rename.
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return snapshot.Meta{}, fmt.Errorf("data directory %s: %w: choose another --data-dir (%w)", cfg.DataDir, ErrNotEmpty, err)
	}
	work := target + restoreSuffix
	if err := os.RemoveAll(work); err != nil {
		return snapshot.Meta{}, err
	}
	meta, err := restoreInto(ctx, work, cfg.settings(), backup)
	if err != nil {
		return snapshot.Meta{}, errors.Join(err, os.RemoveAll(work))
	}
	if err := os.Rename(work, target); err != nil {
		return snapshot.Meta{}, errors.Join(err, os.RemoveAll(work))
	}
	return meta, syncDir(filepath.Dir(target))
}

func restoreInto(ctx context.Context, dir string, set bootstrap.Settings, backup io.Reader) (meta snapshot.Meta, err error) {
	d, record, err := bootstrap.Found(dir, set)
	if err != nil {
		return meta, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	self, _ := record.Member(set.Name)
	group := filepath.Join(dir, "groups", "0")
	if err := os.MkdirAll(group, 0o700); err != nil {
		return meta, err
	}
	staged, err := snapshot.Stage(ctx, backup, group)
	if err != nil {
		return meta, err
	}
	state := filepath.Join(group, shard.StateFile)
	if err := staged.Commit(state); err != nil {
		return meta, err
	}
	// The new cluster's history begins as raft's own bootstrap would make it begin: with this configuration as its
	// first entry, of term 1. This node alone votes until the others have come in.
	first := snapshot.Meta{
		ClusterID: record.ClusterID, Group: group0, Index: 1, Term: 1, ConfigurationIndex: 1,
		Configuration: raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(self.Replica), Address: raft.ServerAddress(self.Replica)}}},
	}
	if err := fsm.Adopt(state, first); err != nil {
		return meta, err
	}
	log, err := raftlog.Open(raftlog.Options{Path: filepath.Join(group, logFile)})
	if err != nil {
		return meta, err
	}
	if err := log.Close(); err != nil {
		return meta, err
	}
	if err := syncPath(group, dir); err != nil {
		return meta, err
	}
	return staged.Meta, d.MarkCreated(group0, self.Replica)
}

// syncPath makes the names from path up to, and in, root durable.
func syncPath(path, root string) error {
	root = filepath.Clean(root)
	for path = filepath.Clean(path); ; {
		if err := syncDir(path); err != nil || path == root || path == filepath.Dir(path) {
			return err
		}
		path = filepath.Dir(path)
	}
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
