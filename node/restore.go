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
	meta, err := restoreInto(ctx, work, cfg, backup)
	if err != nil {
		return snapshot.Meta{}, errors.Join(err, os.RemoveAll(work))
	}
	if err := os.Rename(work, target); err != nil {
		return snapshot.Meta{}, errors.Join(err, os.RemoveAll(work))
	}
	return meta, syncDir(filepath.Dir(target))
}

func restoreInto(ctx context.Context, dir string, cfg Config, backup io.Reader) (meta snapshot.Meta, err error) {
	d, record, err := bootstrap.Found(dir, cfg.settings())
	if err != nil {
		return meta, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	kind, err := chooseLog(d, dir, cfg.RaftLog)
	if err != nil {
		return meta, err
	}
	logs, err := openLogs(kind, logConfig{dataDir: dir, logger: cfg.Logger})
	if err != nil {
		return meta, err
	}
	defer func() { err = errors.Join(err, logs.close()) }()
	group := replicaDir(dir, placement.ReplicaRef{Group: group0}) // a staged file can only be renamed within its directory
	if err := os.MkdirAll(group, 0o700); err != nil {
		return meta, err
	}
	staged, err := snapshot.Stage(ctx, backup, group)
	if err != nil {
		return meta, err
	}
	defer func() { err = errors.Join(err, staged.Discard()) }()
	r := restoration{dir: d, logs: logs, path: dir, record: record, home: cfg.Name}
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
	logs   raftLogs
	path   string
	record *bootstrap.Record
	home   string // the node's name
}

// full makes the backup the state of group 0.
func (r restoration) full(staged *snapshot.Staged) error {
	ref := r.group0()
	state := filepath.Join(replicaDir(r.path, ref), shard.StateFile)
	if err := staged.Commit(state); err != nil {
		return err
	}
	if err := fsm.Adopt(state, r.first(ref)); err != nil {
		return err
	}
	return r.replica(ref)
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
	leases, err := r.leases(ctx, staged.Path)
	if err != nil {
		return err
	}
	for part := range slices.Chunk(shards, shardsAtOnce) {
		if err := r.split(ctx, staged, part, leases); err != nil {
			return err
		}
	}
	return nil
}

// shardsAtOnce bounds the files that a pass over the backup writes.
const shardsAtOnce = 64

// map0 is the state of group 0 with the map of the new cluster.
func (r restoration) map0(founding fsm.Request) (err error) {
	ref := r.group0()
	first := r.first(ref)
	state, err := fsm.Open(fsm.Config{Path: filepath.Join(replicaDir(r.path, ref), shard.StateFile), Group: group0, ClusterID: first.ClusterID})
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
	return r.replica(ref)
}

// leases are the tables of leases of the shards: each lease at its home, and as
// a guest where else there are keys of it.
func (r restoration) leases(ctx context.Context, path string) (map[int][]fsm.LeaseInfo, error) {
	named := make(map[int64][]int) // shards with keys of a lease, ascending
	all, err := fsm.RestoredLeases(ctx, path, func(key []byte, id int64) {
		n := ring.ShardOf(key, r.record.Shards)
		if i, known := slices.BinarySearch(named[id], n); !known {
			named[id] = slices.Insert(named[id], i, n)
		}
	})
	tables := make(map[int][]fsm.LeaseInfo)
	for _, lease := range all {
		home := ring.ShardOfLease(lease.ID, r.record.Shards)
		for _, n := range named[lease.ID] {
			if n != home {
				lease.Groups = append(lease.Groups, placement.GroupOf(n))
				tables[n] = append(tables[n], fsm.LeaseInfo{ID: lease.ID, Incarnation: lease.Incarnation})
			}
		}
		tables[home] = append(tables[home], lease)
	}
	return tables, err
}

// split writes the states of some of the shards, in one pass over the backup.
func (r restoration) split(ctx context.Context, staged *snapshot.Staged, part []placement.Shard, leases map[int][]fsm.LeaseInfo) (err error) {
	builders := make(map[int]*fsm.Builder, len(part))
	defer func() {
		for _, b := range builders {
			err = errors.Join(err, b.Discard())
		}
	}()
	for _, s := range part {
		dir := replicaDir(r.path, founder(s))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if builders[s.Number], err = fsm.NewBuilder(filepath.Join(dir, shard.StateFile)); err != nil {
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
		first := r.first(founder(s))
		first.Revision, first.CompactRevision, first.Keys = max(meta.Revision, 1), meta.CompactRevision, -1
		if err := builders[s.Number].AddLeases(leases[s.Number]); err != nil {
			return err
		}
		if err := builders[s.Number].Finish(first); err != nil {
			return err
		}
		if err := r.replica(founder(s)); err != nil {
			return err
		}
	}
	return nil
}

// founder is the only replica of a shard yet.
func founder(s placement.Shard) placement.ReplicaRef {
	return placement.ReplicaRef{Group: s.Group(), ID: s.Founders[0]}
}

func (r restoration) group0() placement.ReplicaRef {
	self, _ := r.record.Member(r.home)
	return placement.ReplicaRef{Group: group0, ID: raft.ServerID(self.Replica)}
}

// first is how the history of a group begins, as raft's own bootstrap would
// make it begin: with this configuration as its first entry, of term 1. This
// node alone votes until the others have come in.
func (r restoration) first(ref placement.ReplicaRef) snapshot.Meta {
	return snapshot.Meta{
		ClusterID: r.record.ClusterID, Group: ref.Group, Index: 1, Term: 1, ConfigurationIndex: 1,
		Configuration: raft.Configuration{Servers: []raft.Server{{ID: ref.ID, Address: raft.ServerAddress(ref.ID)}}},
	}
}

// replica adds an empty log to a state, and makes both durable.
func (r restoration) replica(ref placement.ReplicaRef) error {
	if err := r.logs.create(ref); err != nil {
		return err
	}
	log, err := r.logs.open(ref, nil, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(log.Close(), syncPath(replicaDir(r.path, ref), r.path)); err != nil {
		return err
	}
	return r.dir.MarkCreated(ref.Group, string(ref.ID))
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
