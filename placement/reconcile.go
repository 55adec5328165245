package placement

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"kvd/fsm"
	"kvd/ring"
	"kvd/shard"
)

// ErrConflict: the cluster map changed at the same time; look again.
var ErrConflict = errors.New("placement: the cluster map changed meanwhile")

// Config is what a Reconciler works with. The zero value of a field means its
// default.
type Config struct {
	Node        string // this node's name
	Incarnation uint64 // and which life of its directory
	Weight      float64
	Replica     *shard.Replica // of group 0
	// Founders are written to the map when it is empty.
	Founders []Member
	// Cluster is what a new cluster with shards begins with; nil: no shards.
	Cluster *ClusterConfig
	// DownAfter is the silence after which a node is down and its replicas are
	// rebuilt elsewhere; 30 s.
	DownAfter time.Duration
	// SuspectAfter is the silence after which nothing is built on what a node
	// was; 3 s, or half of DownAfter if that is less.
	SuspectAfter time.Duration
	ReportEvery  time.Duration // 1 s, or a third of SuspectAfter if that is less
	Every        time.Duration // between looks when nothing is reported; 500 ms
	Host         Host          // nil: no shards on this node
	Peers        Peers         // nil: a node alone
	Logger       *slog.Logger
	Registerer   prometheus.Registerer // nil: metrics are not registered

	// stepped is called after every step of a shard, by tests.
	stepped func(ShardStep)
}

func (c *Config) setDefaults() {
	or := func(d *time.Duration, value time.Duration) {
		if *d == 0 {
			*d = value
		}
	}
	or(&c.DownAfter, 30*time.Second)
	or(&c.SuspectAfter, min(3*time.Second, c.DownAfter/2))
	or(&c.ReportEvery, min(time.Second, c.SuspectAfter/3))
	or(&c.Every, 500*time.Millisecond)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Reconciler is one node's part in the placement. It reports the node's replicas
// to group 0's leader, carries out what that one asks for, and while this node
// is the leader itself it brings all groups towards the cluster map, and the map
// towards the ring. A new leader goes on where the last one stopped: everything
// it does follows from the map and from what it has observed itself.
type Reconciler struct {
	cfg     Config
	metrics *metrics
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	tasks   sync.WaitGroup
	seen    observations
	current atomic.Pointer[known] // as the loop has read it last; nil = not yet
	wake    chan struct{}         // capacity 1
	nudged  chan struct{}         // capacity 1

	asked atomic.Uint64 // the latest term of group 0 in which a step was asked of this node
	woken atomic.Bool   // since the last plan
	rest  rest          // the loop's own

	mu        sync.Mutex
	ring      *ring.Ring // of ringNodes
	ringNodes []Member
	groups    map[uint64]*progress
	probing   map[string]bool // by node
	running   int             // steps under way
}

// known is the map as it was read while this node led group 0 in a term.
type known struct {
	*Map
	term uint64
}

// progress is how a group's steps go on.
type progress struct {
	busy   bool          // a step is under way
	failed error         // why the last one failed; nil = it did not
	pause  time.Duration // before the next try
	next   time.Time     // of a try
	active time.Time     // when the last step ended
	probed time.Time
}

// Start begins to report and to reconcile.
func Start(cfg Config) *Reconciler {
	cfg.setDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	r := &Reconciler{
		cfg: cfg, metrics: newMetrics(cfg.Registerer), ctx: ctx, cancel: cancel,
		seen: observations{suspectAfter: cfg.SuspectAfter, downAfter: cfg.DownAfter},
		wake: make(chan struct{}, 1), nudged: make(chan struct{}, 1),
		groups: make(map[uint64]*progress), probing: make(map[string]bool),
	}
	r.tasks.Go(func() { r.run(ctx) })
	if cfg.Node != "" {
		r.tasks.Go(func() { r.reporting(ctx) })
	}
	return r
}

// Close stops everything; a step under way may still take effect. Idempotent.
func (r *Reconciler) Close() {
	r.cancel()
	r.tasks.Wait()
	r.metrics.Leave()
}

func (r *Reconciler) wakeUp() {
	r.woken.Store(true)
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// A burst of reports does not make as many plans: after each look the loop
// rests, for longer the longer the look has taken.
const leastPause, mostPause = 2 * time.Millisecond, 250 * time.Millisecond

func (r *Reconciler) run(ctx context.Context) {
	said := ""
	for ctx.Err() == nil {
		changed := r.cfg.Replica.LeaderChanged() // before looking
		start := time.Now()
		wait, err := r.look(ctx)
		rest := min(max(leastPause, 4*time.Since(start)), mostPause)
		switch {
		case err == nil:
			said = ""
		case ctx.Err() == nil && !errors.Is(err, shard.ErrNotLeader) && err.Error() != said:
			said = err.Error()
			r.cfg.Logger.Warn("the cluster's placement could not be looked at or changed", "error", err)
		}
		pause(ctx, rest, nil, nil)
		pause(ctx, wait-rest, r.wake, changed)
	}
}

// pause waits for d, or for one of the channels.
func pause(ctx context.Context, d time.Duration, a, b <-chan struct{}) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-a:
	case <-b:
	case <-ctx.Done():
	}
}

// again is the pause after a change that is likely to allow another one.
const again = leastPause

// look does what can be done now and returns when to look again at the latest.
func (r *Reconciler) look(ctx context.Context) (wait time.Duration, err error) {
	wait = r.cfg.Every
	term, leads := r.observing()
	if !leads {
		r.forgetProgress()
		r.rest = rest{}
		r.metrics.count(nil)
		return wait, nil
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	m, err := r.load(ctx, term)
	if err != nil {
		return wait, err
	}
	now := time.Now()
	if len(m.Members) == 0 {
		if done, err := r.found(ctx, now); !done || err != nil {
			return min(wait, 100*time.Millisecond), err
		}
		return again, nil
	}
	r.seen.look(m.Members, now)
	r.seen.prune(m.Shards)
	r.metrics.count(r.seen.states(m.Members, now))
	if changed, err := r.tend(ctx, m); changed || err != nil {
		return min(wait, again), err
	}
	r.startGroup0(m, now)
	if m.Config == nil || r.resting(m, now) {
		return r.patience(wait, now), nil
	}
	view, err := r.view(m, now)
	if err != nil {
		return wait, err
	}
	plan := PlanShards(view)
	if changed, err := r.startSteps(ctx, term, plan, view, now); changed || err != nil {
		return min(wait, again), err
	}
	moving := r.probe(view, now)
	r.rest = rest{at: now, quiet: len(plan) == 0 && !moving, revision: m.Revision, nodes: view.Nodes}
	return r.patience(wait, now), nil
}

// rest is what the last plan found.
type rest struct {
	at       time.Time
	quiet    bool // nothing to do, and no group on the move
	revision int64
	nodes    map[string]NodeView
}

// mostRest bounds how long nothing is planned because nothing has changed.
const mostRest = 5 * time.Second

// resting reports whether a plan is not worth making: there was nothing to do,
// and nothing that matters has changed since.
func (r *Reconciler) resting(m *Map, now time.Time) bool {
	woken := r.woken.Swap(false)
	return r.rest.quiet && !woken && now.Sub(r.rest.at) < mostRest && m.Revision == r.rest.revision &&
		maps.Equal(r.rest.nodes, r.seen.views(m.Members, now))
}

// load reads the map from this node's own state: it serves, so the state has
// everything that earlier leaders have committed.
func (r *Reconciler) load(ctx context.Context, term uint64) (*Map, error) {
	state, release, err := r.cfg.Replica.AcquireState(ctx, 0)
	if err != nil {
		return nil, err
	}
	defer release()
	if k := r.current.Load(); k != nil && k.Revision == state.Revision(fsm.System) {
		r.current.Store(&known{k.Map, term})
		return k.Map, nil
	}
	m, err := LoadMap(ctx, state)
	if err != nil {
		return nil, err
	}
	r.current.Store(&known{&m, term})
	return &m, nil
}

// view is what the shards' steps are planned from.
func (r *Reconciler) view(m *Map, now time.Time) (ClusterView, error) {
	v := ClusterView{Map: *m, Nodes: r.seen.views(m.Members, now), Groups: r.seen.groups(m.Members, now)}
	var usable []Member
	for _, member := range m.Members {
		if !v.Nodes[member.Name].Down && !member.Leaving {
			usable = append(usable, Member{Name: member.Name, Weight: weightOf(member.Weight)})
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ring == nil || !slices.Equal(usable, r.ringNodes) {
		next, err := newRing(*m.Config, usable)
		if err != nil {
			return v, err
		}
		r.ring, r.ringNodes = next, usable
	}
	v.Ring = r.ring
	return v, nil
}

// tend brings the map up to date with what the members say of themselves, and
// deletes those that have left. It makes at most one change and reports whether.
func (r *Reconciler) tend(ctx context.Context, m *Map) (changed bool, err error) {
	var c *change
	for _, member := range m.Members {
		report, ok := r.seen.latest(member)
		switch {
		case c != nil:
		case ok && m.Config != nil && weightOf(report.Weight) != weightOf(member.Weight):
			r.cfg.Logger.Info("a node's weight is another", "node", member.Name, "weight", weightOf(report.Weight), "was", weightOf(member.Weight))
			member.Weight = weightOf(report.Weight)
			c = m.change()
			c.putMember(member)
		case ok && len(report.Lost) > 0:
			if c = m.lose(report.Lost, member.Incarnation); c != nil {
				r.cfg.Logger.Warn("a node has lost replicas: they will be rebuilt", "node", member.Name, "replicas", len(report.Lost))
			}
		case member.Leaving && r.gone(m, member):
			r.cfg.Logger.Info("a member has left", "member", member.Name)
			c = m.remove(member)
		}
	}
	if c == nil {
		return false, nil
	}
	err = r.commit(ctx, c)
	if errors.Is(err, ErrConflict) {
		err = nil // what it became is looked at again
	}
	return true, err
}

// gone reports whether nothing of a member is left in any group.
func (r *Reconciler) gone(m *Map, member Member) bool {
	for _, s := range m.Shards {
		if slices.ContainsFunc(s.Replicas, func(r Replica) bool { return r.Node() == member.Name }) {
			return false
		}
	}
	status := r.cfg.Replica.Status()
	return status.ConfigurationCommitted && !slices.ContainsFunc(status.Members, func(g shard.Member) bool { return g.Node == member.Name })
}

// Votes in group 0, at most: of a cluster with shards, and of one without.
const mapVoters, fullVoters = 5, 7

// votesOf is how many votes group 0 is to have when so many members stay. Where
// it has the map alone, that is an odd number: one more bears no more failures,
// and a member without a vote can take over that of a dead one.
func votesOf(cfg *ClusterConfig, members int) int {
	switch {
	case cfg == nil:
		return fullVoters
	case members <= 2:
		return 2
	}
	return min(mapVoters, members-1+members%2)
}

// staying counts the members that are not leaving.
func (m *Map) staying() (n int) {
	for _, member := range m.Members {
		if !member.Leaving {
			n++
		}
	}
	return n
}

// startGroup0 begins the next step of group 0 itself, which this node leads.
func (r *Reconciler) startGroup0(m *Map, now time.Time) {
	replica := r.cfg.Replica
	status := replica.Status()
	if !status.ConfigurationCommitted {
		return
	}
	view := View{
		Members: m.Members, Group: status.Members, Leader: status.Replica, Commit: status.CommitIndex,
		Match: make(map[raft.ServerID]uint64), MaxVoters: votesOf(m.Config, m.staying()), Holding: make(map[string]bool),
	}
	for id, f := range replica.Followers() {
		view.Match[id] = f.Match
	}
	if r.cfg.Node != "" {
		view.Nodes = r.seen.views(m.Members, now)
	}
	for _, s := range m.Shards {
		for _, held := range s.Replicas {
			view.Holding[held.Node()] = true
		}
	}
	step, ok := Plan(view)
	if !ok {
		return
	}
	r.start(0, now, func(ctx context.Context) error {
		r.cfg.Logger.Info("changing the group's members", "step", string(step.Action), "replica", string(step.Replica), "why", step.Why)
		if err := proveQuorum(ctx, replica, step.Action, step.Replica); err != nil {
			return err
		}
		return carryOut(ctx, replica, step.Action, step.Replica, status.ConfigurationIndex)
	})
}
