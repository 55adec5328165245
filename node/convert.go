package node

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"

	"github.com/hashicorp/raft"

	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/shard"
)

// ErrNotMoved: what has been written of a log is not what was read.
var ErrNotMoved = errors.New("the converted log differs from the original")

// Conversion says what ConvertLog has done.
type Conversion struct {
	From     string `json:"from"` // kind
	To       string `json:"to"`   // kind; if it is the same, there was nothing to do
	Replicas int    `json:"replicas"`
	Entries  uint64 `json:"entries"`
}

// ConvertLog brings the raft logs of a data directory into the other form: the
// same entries, terms and votes. No node may run in it (bootstrap.ErrInUse).
//
// The old form is in force, and complete, until the new one is on the disk, has
// been read back and compared; then one rename, of identity.json, puts the new
// one in force, and the old one is removed. After a crash in between, the
// next start of the node, or conversion, removes what is not in force.
func ConvertLog(ctx context.Context, dataDir, to string) (Conversion, error) {
	return convertLog(ctx, dataDir, to, func(string) {})
}

// convertLog calls step before each one that a crash could keep from happening.
func convertLog(ctx context.Context, dataDir, to string, step func(string)) (done Conversion, err error) {
	if to != RaftLogShared && to != RaftLogBolt {
		return done, fmt.Errorf("--to: %q is neither %s nor %s", to, RaftLogShared, RaftLogBolt)
	}
	dir, err := bootstrap.OpenOffline(dataDir)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	from, err := kindOf(dir, dataDir)
	if err != nil {
		return done, err
	}
	c := conversion{path: dataDir, dir: dir, step: step, Conversion: Conversion{From: from, To: to}}
	step("clear")
	if err := clearLogs(dataDir, from); err != nil || from == to {
		return c.Conversion, err
	}
	if err := c.move(ctx); err != nil {
		return c.Conversion, err
	}
	step("switch")
	if err := setLog(dir, to); err != nil {
		return c.Conversion, err
	}
	step("remove")
	return c.Conversion, clearLogs(dataDir, to)
}

type conversion struct {
	path string
	dir  *bootstrap.Dir
	step func(string)
	Conversion
}

func (c *conversion) config() logConfig {
	return logConfig{dataDir: c.path, logger: slog.New(slog.DiscardHandler)}
}

// move writes the new form, complete but not in force.
func (c *conversion) move(ctx context.Context) (err error) {
	source, err := openLogs(c.From, c.config())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.close()) }()
	replicas, err := c.replicas(source)
	if err != nil {
		return err
	}
	c.Replicas = len(replicas)
	keys, err := source.keys(replicas)
	if err != nil {
		return err
	}
	err = c.pass(func(target raftLogs) error {
		return c.each(replicas, func(r placement.ReplicaRef) error { return c.write(ctx, r, keys[r], source, target) })
	})
	if err != nil {
		return err
	}
	err = c.pass(func(target raftLogs) error {
		moved, err := target.keys(replicas)
		if err != nil {
			return err
		}
		return c.each(replicas, func(r placement.ReplicaRef) error {
			if !maps.EqualFunc(keys[r], moved[r], bytes.Equal) {
				return fmt.Errorf("%w: stable keys %q instead of %q", ErrNotMoved, moved[r], keys[r])
			}
			return compareEntries(ctx, r, source, target)
		})
	})
	if err != nil {
		return err
	}
	return c.settle(replicas)
}

// pass does something with the new logs, which are closed afterwards.
func (c *conversion) pass(do func(target raftLogs) error) (err error) {
	c.step("open")
	target, err := openLogs(c.To, c.config())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.close()) }()
	if err := do(target); err != nil {
		return err
	}
	c.step("close")
	return nil
}

func (c *conversion) each(replicas []placement.ReplicaRef, do func(placement.ReplicaRef) error) error {
	for _, r := range replicas {
		c.step("replica")
		if err := do(r); err != nil {
			return fmt.Errorf("log of replica %s of group %d: %w", r.ID, r.Group, err)
		}
	}
	return nil
}

// replicas are those with a log that have been used: whatever there is of
// others is made anew when they are.
func (c *conversion) replicas(source raftLogs) ([]placement.ReplicaRef, error) {
	all, err := logsIn(c.path, c.dir, source)
	return slices.DeleteFunc(all, func(r placement.ReplicaRef) bool { return c.dir.MayCreate(r.Group, string(r.ID)) == nil }), err
}

// write copies one replica's log.
func (c *conversion) write(ctx context.Context, r placement.ReplicaRef, keys stableKeys, from, to raftLogs) error {
	if err := os.MkdirAll(replicaDir(c.path, r), 0o700); err != nil {
		return err
	}
	if err := to.create(r); err != nil {
		return err
	}
	return both(r, from, to, func(old, new shard.LogStore) error {
		if err := setKeys(new, keys); err != nil {
			return err
		}
		c.step("entries")
		return batches(ctx, old, func(entries []*raft.Log) error {
			c.Entries += uint64(len(entries))
			return new.StoreLogs(entries)
		})
	})
}

// compareEntries reads back what write has written.
func compareEntries(ctx context.Context, r placement.ReplicaRef, from, to raftLogs) error {
	return both(r, from, to, func(old, new shard.LogStore) error {
		if err := sameBounds(old, new); err != nil {
			return err
		}
		return batches(ctx, old, func(entries []*raft.Log) error {
			for _, entry := range entries {
				var copied raft.Log
				if err := new.GetLog(entry.Index, &copied); err != nil {
					return fmt.Errorf("%w: entry %d: %w", ErrNotMoved, entry.Index, err)
				}
				if !sameEntry(entry, &copied) {
					return fmt.Errorf("%w: entry %d", ErrNotMoved, entry.Index)
				}
			}
			return nil
		})
	})
}

func sameBounds(old, new shard.LogStore) error {
	first1, err1 := old.FirstIndex()
	last1, err2 := old.LastIndex()
	first2, err3 := new.FirstIndex()
	last2, err4 := new.LastIndex()
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	if first1 != first2 || last1 != last2 {
		return fmt.Errorf("%w: entries %d to %d instead of %d to %d", ErrNotMoved, first2, last2, first1, last1)
	}
	return nil
}

func sameEntry(a, b *raft.Log) bool {
	return a.Index == b.Index && a.Term == b.Term && a.Type == b.Type &&
		bytes.Equal(a.Data, b.Data) && bytes.Equal(a.Extensions, b.Extensions) && a.AppendedAt.Equal(b.AppendedAt)
}

// settle makes the names of the new form durable.
func (c *conversion) settle(replicas []placement.ReplicaRef) error {
	c.step("sync")
	if c.To == RaftLogShared {
		return syncDir(c.path)
	}
	for _, r := range replicas {
		if err := syncPath(replicaDir(c.path, r), c.path); err != nil {
			return err
		}
	}
	return nil
}

// logsIn are the replicas that have a log, in order.
func logsIn(dataDir string, dir *bootstrap.Dir, logs raftLogs) ([]placement.ReplicaRef, error) {
	dirs, err := replicaDirs(dataDir)
	if err != nil {
		return nil, err
	}
	var found []placement.ReplicaRef
	for _, path := range dirs {
		r, ok := refOf(dir, path)
		if !ok {
			continue
		}
		lost, err := logs.missing(r)
		if err != nil {
			return nil, err
		}
		if lost == "" {
			found = append(found, r)
		}
	}
	for _, id := range logs.replicas() { // without a directory: lost, or half removed
		known := slices.ContainsFunc(found, func(r placement.ReplicaRef) bool {
			other, err := logID(r)
			return err == nil && other == id
		})
		if !known {
			found = append(found, placement.ReplicaRef{Group: id.Group, ID: raft.ServerID(bootstrap.ReplicaID(dir.Name(), id.Replica))})
		}
	}
	slices.SortFunc(found, func(a, b placement.ReplicaRef) int {
		return cmp.Or(cmp.Compare(a.Group, b.Group), cmp.Compare(a.ID, b.ID))
	})
	return found, nil
}

// both opens the two logs of a replica for do.
func both(r placement.ReplicaRef, from, to raftLogs, do func(old, new shard.LogStore) error) (err error) {
	old, err := from.open(r, nil, -1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, old.Close()) }()
	new, err := to.open(r, nil, -1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, new.Close()) }()
	return do(old, new)
}

const (
	batchEntries = 256
	batchBytes   = 1 << 20
)

// batches calls do with the entries of a log, in order, some at a time.
func batches(ctx context.Context, log shard.LogStore, do func([]*raft.Log) error) error {
	first, err1 := log.FirstIndex()
	last, err2 := log.LastIndex()
	if err := errors.Join(err1, err2); err != nil || first == 0 {
		return err
	}
	var batch []*raft.Log
	sizeBytes := 0
	for i := first; i <= last; i++ {
		entry := new(raft.Log)
		if err := log.GetLog(i, entry); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		batch = append(batch, entry)
		sizeBytes += len(entry.Data)
		if i < last && len(batch) < batchEntries && sizeBytes < batchBytes {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := do(batch); err != nil {
			return err
		}
		batch, sizeBytes = nil, 0
	}
	return nil
}

// Raft's stable keys.
const (
	keyTerm          = "CurrentTerm"
	keyVoteTerm      = "LastVoteTerm"
	keyVoteCandidate = "LastVoteCand"
)

// setKeys writes stable keys as raft does, the vote in the right order.
func setKeys(to shard.LogStore, keys stableKeys) error {
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		value := keys[key]
		var err error
		switch {
		case key == keyVoteTerm || key == keyVoteCandidate:
		case len(value) == 8:
			err = to.SetUint64([]byte(key), binary.BigEndian.Uint64(value))
		default:
			err = to.Set([]byte(key), value)
		}
		if err != nil {
			return err
		}
	}
	term, voted := keys[keyVoteTerm]
	if !voted {
		return nil
	}
	if len(term) != 8 {
		return fmt.Errorf("a vote's term has %d bytes", len(term))
	}
	if err := to.SetUint64([]byte(keyVoteTerm), binary.BigEndian.Uint64(term)); err != nil {
		return err
	}
	return to.Set([]byte(keyVoteCandidate), keys[keyVoteCandidate])
}
