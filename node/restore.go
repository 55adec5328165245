package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/hashicorp/raft"

	"kvd/fsm"
	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/ring"
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
	group := filepath.Join(dir, "groups", "0") // a staged file can only be renamed within its directory
	if err := os.MkdirAll(group, 0o700); err != nil {
		return meta, err
	}
	staged, err := snapshot.Stage(ctx, backup, group)
	if err != nil {
		return meta, err
	}
	defer func() { err = errors.Join(err, staged.Discard()) }()
	r := restoration{dir: d, path: dir, record: record, home: set.Name}
	if record.Strategy == StrategyConsistent {
		err = r.shards(ctx, staged)
	} else {
		err = r.full(staged)
	}
	return staged.Meta, err
}

// restoration is a backup on its way into the directory of a new cluster's
// first node.
type restoration struct {
	dir    *bootstrap.Dir
	path   string
	record *bootstrap.Record
	home   string // the node's name
}

// full makes the backup the state of group 0.
func (r restoration) full(staged *snapshot.Staged) error {
	id := r.member().Replica
	group := filepath.Join(r.path, "groups", "0")
	state := filepath.Join(group, shard.StateFile)
	if err := staged.Commit(state); err != nil {
		return err
	}
	if err := fsm.Adopt(state, r.first(group0, id)); err != nil {
		return err
	}
	return r.replica(group0, id, group)
}

// shards makes the backup the states of as many shards as there are to be, all
// on this node: the others get their replicas when they come in.
func (r restoration) shards(ctx context.Context, staged *snapshot.Staged) error {
	c := r.record.Common
	cfg := placement.ClusterConfig{Strategy: c.Strategy, Shards: c.Shards, ReplicationFactor: c.ReplicationFactor, Witnesses: c.Witnesses}
	var members []placement.Member
	for _, m := range r.record.Members {
		members = append(members, placement.Member{Name: m.Name, Incarnation: m.Incarnation, Replica: raft.ServerID(m.Replica)})
	}
	shards, founding, err := placement.Restored(members, cfg, r.home, staged.Meta.Revision)
	if err != nil {
		return err
	}
	if err := r.map0(founding); err != nil {
		return err
	}
	for part := range slices.Chunk(shards, shardsAtOnce) {
		if err := r.split(ctx, staged, part); err != nil {
			return err
		}
	}
	return nil
}

// shardsAtOnce bounds the files that a pass over the backup writes.
const shardsAtOnce = 64

// map0 is the state of group 0 with the map of the new cluster.
func (r restoration) map0(founding fsm.Request) (err error) {
	id := r.member().Replica
	group := filepath.Join(r.path, "groups", "0")
	first := r.first(group0, id)
	state, err := fsm.Open(fsm.Config{Path: filepath.Join(group, shard.StateFile), Group: group0, ClusterID: first.ClusterID})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()
	if err := state.ApplyConfiguration(first.Index, first.Term, first.Configuration); err != nil {
		return err
	}
	var entry fsm.EntryBuilder
	entry.Add(founding)
	results, err := state.Apply(first.Index+1, first.Term, entry.Bytes())
	if err != nil {
		return err
	}
	if results[0].Err != nil {
		return results[0].Err
	}
	if err := state.Flush(context.Background(), first.Index+1); err != nil {
		return err
	}
	return r.replica(group0, id, group)
}

// split writes the states of some of the shards, in one pass over the backup.
func (r restoration) split(ctx context.Context, staged *snapshot.Staged, part []placement.Shard) (err error) {
	builders := make(map[int]*fsm.Builder, len(part))
	defer func() {
		for _, b := range builders {
			err = errors.Join(err, b.Discard())
		}
	}()
	for _, s := range part {
		if err := os.MkdirAll(r.shardDir(s), 0o700); err != nil {
			return err
		}
		if builders[s.Number], err = fsm.NewBuilder(filepath.Join(r.shardDir(s), shard.StateFile)); err != nil {
			return err
		}
	}
	meta, err := fsm.SplitFile(ctx, staged.Path, func(key []byte) *fsm.Builder {
		return builders[ring.ShardOf(key, r.record.Shards)]
	})
	if err != nil {
		return err
	}
	for _, s := range part {
		id := string(s.Founders[0])
		first := r.first(s.Group(), id)
		first.Revision, first.CompactRevision, first.Keys = max(meta.Revision, 1), meta.CompactRevision, -1
		if err := builders[s.Number].Finish(first); err != nil {
			return err
		}
		if err := r.replica(s.Group(), id, r.shardDir(s)); err != nil {
			return err
		}
	}
	return nil
}

func (r restoration) shardDir(s placement.Shard) string {
	return replicaDir(r.path, placement.ReplicaRef{Group: s.Group(), ID: s.Founders[0]})
}

func (r restoration) member() bootstrap.Member {
	self, _ := r.record.Member(r.home)
	return self
}

// first is how the history of a group begins, as raft's own bootstrap would
// make it begin: with this configuration as its first entry, of term 1. This
// node alone votes until the others have come in.
func (r restoration) first(group uint64, id string) snapshot.Meta {
	return snapshot.Meta{
		ClusterID: r.record.ClusterID, Group: group, Index: 1, Term: 1, ConfigurationIndex: 1,
		Configuration: raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(id), Address: raft.ServerAddress(id)}}},
	}
}

// replica adds an empty log to a state, and makes both durable.
func (r restoration) replica(group uint64, id, dir string) error {
	log, err := raftlog.Open(raftlog.Options{Path: filepath.Join(dir, logFile)})
	if err != nil {
		return err
	}
	if err := log.Close(); err != nil {
		return err
	}
	if err := syncPath(dir, r.path); err != nil {
		return err
	}
	return r.dir.MarkCreated(group, id)
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
