package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"kvd/fsm"
	"kvd/node/bootstrap"
	"kvd/placement"
	"kvd/shard"
	"kvd/shard/raftlog"
	"kvd/shard/wal"
	"kvd/snapshot"
)

// localMap reads the map from this node's own state of group 0, as it is; nil
// if it has the given revision. applied is the index that the state had applied.
func (n *Node) localMap(ctx context.Context, known int64) (m *placement.Map, applied uint64, err error) {
	state, release, err := n.Replica().AcquireState(ctx, 0)
	if err != nil {
		return nil, 0, err
	}
	defer release()
	applied = state.AppliedIndex()
	if state.Revision(fsm.System) == known {
		return nil, applied, nil
	}
	loaded, err := placement.LoadMap(ctx, state)
	return &loaded, applied, err
}

// awaitApplied waits until this node's state of group 0 has applied an index,
// or for as long as patience.
func (n *Node) awaitApplied(ctx context.Context, index uint64, patience time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, release, err := n.Replica().AcquireState(ctx, index)
	if err == nil {
		release()
		return
	}
	<-ctx.Done() // the state may have failed at once
}

// freshMap reads the map linearizably.
func (n *Node) freshMap(ctx context.Context) (*placement.Map, error) {
	ctx, cancel := context.WithTimeout(ctx, freshPatience)
	defer cancel()
	state, release, err := n.server.AcquireSystem(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	m, err := placement.LoadMap(ctx, state)
	return &m, err
}

// groups are this node's replicas of shards. They are opened, closed and
// deleted as the cluster map says, which this node's replica of group 0 has.
type groups struct {
	n       *Node
	flushes *fsm.Flushes                              // shared by the states
	pace    *fsm.Pace                                 // shared by the states, group 0's too
	streams *snapshot.Limit                           // shared by the replicas and backups
	current atomic.Pointer[placement.Map]             // as this node knows it
	routes  atomic.Pointer[routes]                    // by the same
	usable  atomic.Pointer[map[uint64]*shard.Replica] // by group: voters with state

	mu      sync.Mutex
	open    map[placement.ReplicaRef]*shard.Replica
	lost    map[placement.ReplicaRef]bool // assigned to this node, but its files are gone or damaged
	onDisk  map[placement.ReplicaRef]bool // directories that exist
	closing bool
}

const (
	// maxOpenings bounds how many replicas are opened or deleted at a time.
	maxOpenings = 4
	// usableInterval is how often replicas are asked whether they are members.
	usableInterval = 500 * time.Millisecond
	// freshPatience bounds a linearizable read of the map.
	freshPatience = 5 * time.Second
)

func newGroups(n *Node) *groups {
	g := &groups{
		n: n, flushes: fsm.NewFlushes(flushesAtOnce), pace: fsm.NewPace(compactionRests), streams: snapshot.NewLimit(streamsAtOnce, streamBytes),
		open: make(map[placement.ReplicaRef]*shard.Replica), lost: make(map[placement.ReplicaRef]bool), onDisk: make(map[placement.ReplicaRef]bool),
	}
	g.follow(&placement.Map{})
	g.usable.Store(&map[uint64]*shard.Replica{})
	return g
}

// dirOf is the directory of a replica.
func (g *groups) dirOf(r placement.ReplicaRef) string { return replicaDir(g.n.cfg.DataDir, r) }

// scan finds the directories and the logs that an earlier life of this node has
// left.
func (g *groups) scan() error {
	dirs, err := replicaDirs(g.n.cfg.DataDir)
	if err != nil {
		return err
	}
	known := make(map[wal.ID]bool)
	for _, dir := range dirs {
		r, ok := refOf(g.n.dir, dir)
		if !ok || r.Group == group0 {
			continue
		}
		g.onDisk[r] = true
		id, _ := logID(r)
		known[id] = true
	}
	for _, id := range g.n.logs.replicas() {
		if id.Group != group0 && !known[id] {
			g.onDisk[placement.ReplicaRef{Group: id.Group, ID: raft.ServerID(bootstrap.ReplicaID(g.n.cfg.Name, id.Replica))}] = true
		}
	}
	return nil
}

// run follows the map until ctx ends.
func (g *groups) run(ctx context.Context) {
	settled := int64(-1) // revision of the map
	said := ""
	var led map[uint64]bool // as group 0's leader was told
	for ctx.Err() == nil {
		m, applied, err := g.n.localMap(ctx, settled)
		if err == nil && m != nil {
			g.follow(m)
			if err = g.settle(ctx, m); err == nil {
				settled = m.Revision
			}
		}
		if err == nil {
			said = ""
		} else if ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			g.n.log.Warn("this node's replicas are not yet what the cluster map says", "error", err)
		}
		g.refreshUsable()
		if now := g.led(); !maps.Equal(now, led) {
			led = now
			g.nudge()
		}
		g.n.awaitApplied(ctx, applied+1, usableInterval)
	}
}

func (g *groups) follow(m *placement.Map) {
	g.current.Store(m)
	g.routes.Store(routesOf(m))
}

// wanted are the replicas that the map gives this node.
func (g *groups) wanted(m *placement.Map) map[placement.ReplicaRef]placement.Shard {
	wanted := make(map[placement.ReplicaRef]placement.Shard)
	for _, s := range m.Shards {
		for _, r := range s.Replicas {
			if r.Node() == g.n.cfg.Name && r.Incarnation == g.n.dir.Incarnation() {
				wanted[placement.ReplicaRef{Group: s.Group(), ID: r.ID}] = s
			}
		}
	}
	return wanted
}

// surplus are the replicas on this node's disk that the map does not have. One
// that it has as lost stays until its group has replaced it: what is left of it
// may be all that is left.
func (g *groups) surplus(m *placement.Map) []placement.ReplicaRef {
	had := make(map[wal.ID]bool) // a log does not say whether it is a witness's
	for _, s := range m.Shards {
		for _, r := range s.Replicas {
			if id, err := logID(placement.ReplicaRef{Group: s.Group(), ID: r.ID}); err == nil {
				had[id] = true
			}
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var surplus []placement.ReplicaRef
	for r := range g.onDisk {
		if id, err := logID(r); err != nil || !had[id] {
			surplus = append(surplus, r)
		}
	}
	return surplus
}

// settle opens what is missing and deletes what is too much.
func (g *groups) settle(ctx context.Context, m *placement.Map) error {
	wanted := g.wanted(m)
	surplus := g.surplus(m)
	var missing []placement.ReplicaRef
	g.mu.Lock()
	for r := range wanted {
		if g.open[r] == nil && !g.lost[r] {
			missing = append(missing, r)
		}
	}
	maps.DeleteFunc(g.lost, func(r placement.ReplicaRef, _ bool) bool {
		_, ok := wanted[r]
		return !ok
	})
	g.mu.Unlock()
	err := each(ctx, missing, func(r placement.ReplicaRef) error { return g.openOne(r, wanted[r]) })
	if len(surplus) > 0 {
		err = errors.Join(err, g.deleteSurplus(ctx, surplus))
	}
	if len(missing)+len(surplus) > 0 {
		g.refreshUsable()
		g.nudge()
	}
	return err
}

// each runs f for all, a few at a time, and joins the errors. When ctx ends, it
// begins no more of them.
func each(ctx context.Context, all []placement.ReplicaRef, f func(placement.ReplicaRef) error) error {
	slices.SortFunc(all, func(a, b placement.ReplicaRef) int {
		return cmp.Or(cmp.Compare(a.Group, b.Group), cmp.Compare(a.ID, b.ID))
	})
	var (
		tasks sync.WaitGroup
		mu    sync.Mutex
		errs  []error
		slots = make(chan struct{}, maxOpenings)
	)
	for _, r := range all {
		slots <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		tasks.Go(func() {
			defer func() { <-slots }()
			if err := f(r); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	tasks.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

// What each of hundreds of shards may use of what they share. Their states need
// not be durable soon, because their logs are; each write to a state costs two
// syncs of the disk.
const (
	shardFlushInterval = 2 * time.Second
	shardMaxLagBytes   = 16 << 20
	shardMmapBytes     = 1 << 30
	shardCacheBytes    = 1 << 20
	flushesAtOnce      = 4
	// compactionRests is how much longer than it works the compaction of all states together rests: a million
	// revisions take about as long as in etcd, and puts do not notice.
	compactionRests = 8
	streamsAtOnce   = 4
	// streamBytes is how much all snapshots and backups of a node send per second.
	streamBytes = 64 << 20
)

// shardConfig describes a replica of a shard.
func (g *groups) shardConfig(r placement.ReplicaRef) shard.Config {
	cfg := g.n.replicaConfig(r, shardCacheBytes)
	cfg.Sequencer = g.n.sequences
	cfg.State.Flushes = g.flushes
	cfg.State.FlushInterval = shardFlushInterval
	cfg.State.MaxLagBytes = shardMaxLagBytes
	cfg.State.InitialMmapBytes = shardMmapBytes
	return cfg
}

// openOne opens one replica, creating it if this node never has. A replica
// whose files are gone or damaged is lost for good: it is reported so, and
// rebuilt under another id.
func (g *groups) openOne(r placement.ReplicaRef, s placement.Shard) error {
	cfg := g.shardConfig(r)
	if slices.Contains(s.Founders, r.ID) {
		cfg.Bootstrap = &raft.Configuration{}
		for _, id := range s.Founders {
			cfg.Bootstrap.Servers = append(cfg.Bootstrap.Servers, raft.Server{ID: id, Address: raft.ServerAddress(id)})
		}
	}
	g.mu.Lock()
	g.onDisk[r] = true
	g.mu.Unlock()
	replica, err := g.n.openReplicaFiles(cfg)
	switch {
	case errors.Is(err, errReplicaLost):
		g.n.log.Error("a replica of a shard is lost: it will be rebuilt under another id", "group", r.Group, "replica", string(r.ID), "error", err)
		g.mu.Lock()
		g.lost[r] = true
		g.mu.Unlock()
		return nil
	case err != nil:
		return fmt.Errorf("open replica %s of group %d: %w", r.ID, r.Group, err)
	}
	g.mu.Lock()
	if g.closing {
		g.mu.Unlock()
		return replica.Close()
	}
	g.open[r] = replica
	g.mu.Unlock()
	g.n.log.Debug("opened a replica", "group", r.Group, "replica", string(r.ID))
	return nil
}

// deleteSurplus deletes replicas that the map does not give to this node. What
// this node knows of the map may be older than the replica, so the leader is
// asked first.
func (g *groups) deleteSurplus(ctx context.Context, surplus []placement.ReplicaRef) error {
	m, err := g.n.freshMap(ctx)
	if err != nil {
		return fmt.Errorf("read the cluster map to delete %d replicas: %w", len(surplus), err)
	}
	now := g.surplus(m)
	return each(ctx, slices.DeleteFunc(surplus, func(r placement.ReplicaRef) bool { return !slices.Contains(now, r) }), g.deleteOne)
}

func (g *groups) deleteOne(r placement.ReplicaRef) error {
	g.mu.Lock()
	replica := g.open[r]
	delete(g.open, r)
	g.mu.Unlock()
	g.refreshUsable()
	var err error
	if replica != nil {
		err = replica.Close()
	}
	if err = errors.Join(err, g.n.logs.remove(r), os.RemoveAll(g.dirOf(r))); err == nil {
		err = g.n.dir.MarkDeleted(r.Group, string(r.ID))
	}
	if err != nil {
		return fmt.Errorf("delete replica %s of group %d: %w", r.ID, r.Group, err)
	}
	_ = os.Remove(filepath.Dir(g.dirOf(r))) // if it is the last one of its group
	g.mu.Lock()
	delete(g.onDisk, r)
	delete(g.lost, r)
	g.mu.Unlock()
	g.n.log.Info("deleted a replica that is no longer this node's", "group", r.Group, "replica", string(r.ID))
	return nil
}

// Replicas implements placement.Host.
func (g *groups) Replicas() map[placement.ReplicaRef]*shard.Replica {
	g.mu.Lock()
	defer g.mu.Unlock()
	return maps.Clone(g.open)
}

// Lost implements placement.Host.
func (g *groups) Lost() []placement.ReplicaRef {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.lost))
}

// DiskFree implements placement.Host.
func (g *groups) DiskFree() uint64 {
	free, err := g.n.freeBytes()
	if err != nil {
		return 0
	}
	return free
}

var _ placement.Host = (*groups)(nil)

// led are the groups that this node leads and serves.
func (g *groups) led() map[uint64]bool {
	led := make(map[uint64]bool)
	for key, replica := range g.Replicas() {
		if replica.Serving() {
			led[key.Group] = true
		}
	}
	return led
}

// nudge has this node report now.
func (g *groups) nudge() {
	if r := g.n.placement(); r != nil {
		r.Nudge()
	}
}

// refreshUsable finds the replicas that can answer clients: members with a vote
// and with state. The others' requests go to other nodes.
func (g *groups) refreshUsable() {
	usable := make(map[uint64]*shard.Replica)
	for key, replica := range g.Replicas() {
		if replica.Witness() {
			continue
		}
		for _, m := range replica.Status().Members {
			if m.ID == key.ID && m.Voter {
				usable[key.Group] = replica
			}
		}
	}
	g.usable.Store(&usable)
}

// close closes all replicas, which must not be opened any more.
func (g *groups) close() error {
	g.mu.Lock()
	g.closing = true
	open := g.open
	g.open = nil
	g.mu.Unlock()
	return each(context.Background(), slices.Collect(maps.Keys(open)), func(r placement.ReplicaRef) error { return open[r].Close() })
}

// errReplicaLost: the replica's files are gone or damaged.
var errReplicaLost = errors.New("the replica's files are missing or damaged")

// openReplicaFiles opens a replica, creating its files if this node has never
// opened it. A replica whose files are lost is never made anew: it has
// forgotten its votes (docs/design.md section 7).
func (n *Node) openReplicaFiles(cfg shard.Config) (*shard.Replica, error) {
	r := placement.ReplicaRef{Group: cfg.Group, ID: cfg.Replica}
	if used := n.dir.MayCreate(r.Group, string(r.ID)); used == nil {
		if err := n.createReplicaFiles(r, cfg); err != nil {
			return nil, err
		}
	} else if lost, err := n.missing(r); err != nil {
		return nil, err
	} else if lost != "" && r.Group != group0 { // what is to be done about used is for group 0 alone
		return nil, fmt.Errorf("%w: %s is missing or empty", errReplicaLost, lost)
	} else if lost != "" {
		return nil, fmt.Errorf("%w: %s is missing or empty: %w", errReplicaLost, lost, used)
	}
	replica, err := shard.Open(cfg)
	if errors.Is(err, raftlog.ErrCorrupt) || errors.Is(err, fsm.ErrCorruptState) || errors.Is(err, shard.ErrLogGap) || errors.Is(err, shard.ErrLogBehind) {
		return nil, fmt.Errorf("%w: %w", errReplicaLost, err)
	}
	return replica, damagedLog(n.cfg.DataDir, err)
}

// createReplicaFiles makes the files of a replica that was never opened.
func (n *Node) createReplicaFiles(r placement.ReplicaRef, cfg shard.Config) error {
	if err := os.RemoveAll(cfg.Dir); err != nil {
		return fmt.Errorf("clear %s: %w", cfg.Dir, err)
	}
	if err := n.logs.create(r); err != nil {
		return err
	}
	if err := errors.Join(shard.Create(cfg), syncPath(cfg.Dir, n.cfg.DataDir)); err != nil {
		return err
	}
	return n.dir.MarkCreated(r.Group, string(r.ID))
}
