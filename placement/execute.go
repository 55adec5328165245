package placement

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"kvd/fsm"
	"kvd/shard"
)

// The methods that Handle answers.
const (
	MethodReport = "placement.report" // a Report to group 0's leader, answered with a ReportAnswer
	MethodStep   = "placement.step"   // a step to the node of the group's leader, answered with its report
	MethodProbe  = "placement.probe"  // groups; answered with a report of them
)

// Methods are those that Handle answers.
var Methods = []string{MethodReport, MethodStep, MethodProbe}

const (
	// stepTimeout bounds a step, and a look.
	stepTimeout = 5 * time.Second
	// proofTimeout bounds the wait for a quorum that is to take an entry.
	proofTimeout, proofInterval = time.Second, 5 * time.Millisecond
	// maxSteps bounds the steps under way at the same time.
	maxSteps = 32
	// A step that failed is planned anew after a pause, which doubles.
	leastRetry, mostRetry = 20 * time.Millisecond, 2 * time.Second
	// A group on the move is asked how it gets on in shorter intervals than it
	// is reported: more often the shorter it has stood still.
	leastProbe, mostProbe = 20 * time.Millisecond, time.Second
	// activeFor is how long a group counts as on the move after a step.
	activeFor = 2 * time.Second
)

// stepRequest asks the leader of a group for a step.
type stepRequest struct {
	Term uint64    `json:"term"` // of group 0, in which it was planned
	Step ShardStep `json:"step"`
}

// Handle answers one of the Methods for the node that calls.
func (r *Reconciler) Handle(ctx context.Context, method, from string, payload []byte) ([]byte, error) {
	var answer any
	var err error
	switch method {
	case MethodReport:
		var report Report
		if err = json.Unmarshal(payload, &report); err != nil {
			return nil, fmt.Errorf("placement: malformed report of %s: %w", from, err)
		}
		if report.Node != from {
			return nil, fmt.Errorf("placement: %s reports as %q", from, report.Node)
		}
		answer, err = r.accept(report)
	case MethodStep:
		var request stepRequest
		if err = json.Unmarshal(payload, &request); err != nil {
			return nil, fmt.Errorf("placement: malformed step of %s: %w", from, err)
		}
		answer, err = r.obey(ctx, request)
	case MethodProbe:
		var groups []uint64
		if err = json.Unmarshal(payload, &groups); err != nil {
			return nil, fmt.Errorf("placement: malformed probe of %s: %w", from, err)
		}
		answer = r.build(groups)
	default:
		err = fmt.Errorf("placement: unknown method %q", method)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(answer)
}

// errStaleStep: the step was planned by a leader of group 0 that has been
// replaced.
var errStaleStep = errors.New("placement: planned by a former leader")

// obey carries out a step of a group that a replica on this node leads, if its
// own measurements allow it.
func (r *Reconciler) obey(ctx context.Context, request stepRequest) (Report, error) {
	step := request.Step
	if request.Term < r.cfg.Replica.Leader().Term || !r.isLatest(request.Term) {
		return Report{}, errStaleStep
	}
	replica := r.leading(step.Group)
	if replica == nil {
		return Report{}, shard.ErrNotLeader
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	if err := Check(step, describe(replica)); err != nil {
		return Report{}, err
	}
	err := proveQuorum(ctx, replica, step.Action, step.Replica)
	if err != nil {
		return Report{}, err
	}
	if err = Check(step, describe(replica)); err != nil {
		return Report{}, err
	}
	if step.Action == Forget {
		err = confirmExcluded(ctx, replica, step.Replica)
	} else {
		err = carryOut(ctx, replica, step.Action, step.Replica, step.Prev)
	}
	return Report{Node: r.cfg.Node, Incarnation: r.cfg.Incarnation, Groups: []GroupReport{describe(replica)}}, err
}

// isLatest reports whether no later leader of group 0 than that of the term has
// asked this node for a step. Its own replica of group 0 may not know that one.
func (r *Reconciler) isLatest(term uint64) bool {
	for {
		latest := r.asked.Load()
		if term <= latest {
			return term == latest
		}
		if r.asked.CompareAndSwap(latest, term) {
			return true
		}
	}
}

// leading is this node's replica that leads the group; nil if none does.
func (r *Reconciler) leading(group uint64) *shard.Replica {
	for ref, replica := range r.replicas() {
		if ref.Group == group && replica.Serving() {
			return replica
		}
	}
	return nil
}

// proveQuorum writes an empty entry and waits until a majority of the voters that
// the group is to have after the step has it; of a transfer, until the next
// leader has it. That a replica had nearly everything, and answers heartbeats, is
// not enough: raft sends entries to one that comes back only after a pause of up
// to ten seconds, and for as long the group, once it depended on it, would take
// no writes.
func proveQuorum(ctx context.Context, replica *shard.Replica, action Action, id raft.ServerID) error {
	if action != Promote && action != Remove && action != Transfer {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	if _, err := replica.Propose(ctx, fsm.Request{}); err != nil {
		return err
	}
	status := replica.Status()
	for {
		has := map[raft.ServerID]bool{status.Replica: true}
		for follower, f := range replica.Followers() {
			has[follower] = f.Match >= status.CommitIndex
		}
		lacking := lacking(status.Members, has, action, id)
		if len(lacking) == 0 {
			return nil
		}
		pause(ctx, proofInterval, nil, nil)
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %s %s: too many of the voters do not take entries yet: %s", ErrRefused, action, id, some(lacking))
		}
	}
}

// lacking are the voters after the step that do not have the entry, if too few
// others have it.
func lacking(members []shard.Member, has map[raft.ServerID]bool, action Action, id raft.ServerID) (lacking []string) {
	if action == Transfer {
		if !has[id] {
			lacking = append(lacking, string(id))
		}
		return lacking
	}
	voters := 0
	for _, m := range members {
		if (m.Voter || m.ID == id) && !(action == Remove && m.ID == id) {
			voters++
			if !has[m.ID] {
				lacking = append(lacking, string(m.ID))
			}
		}
	}
	if 2*(voters-len(lacking)) > voters {
		return nil
	}
	return lacking
}

// carryOut changes a group on its leader and returns when that is committed and
// applied there.
func carryOut(ctx context.Context, replica *shard.Replica, action Action, id raft.ServerID, prev uint64) error {
	var index uint64
	var err error
	switch action {
	case AddLearner:
		index, err = replica.AddLearner(ctx, id, prev)
	case Promote:
		index, err = replica.Promote(ctx, id, prev)
	case Remove:
		index, err = replica.Remove(ctx, id, prev)
	case Transfer:
		return replica.TransferLeadership(ctx, shard.NodeOf(id))
	default:
		return fmt.Errorf("placement: %q is not a change of members", action)
	}
	if err != nil {
		return err
	}
	_, release, err := replica.AcquireState(ctx, index)
	if err == nil {
		release()
	}
	return err
}

// confirmExcluded proves that the group's committed configuration does not have
// the replica: its node will delete it. What a leader that has been replaced
// remembers proves nothing, so leadership is confirmed, after the look.
func confirmExcluded(ctx context.Context, replica *shard.Replica, id raft.ServerID) error {
	status := replica.Status()
	if !status.ConfigurationCommitted || slices.ContainsFunc(status.Members, func(m shard.Member) bool { return m.ID == id }) {
		return fmt.Errorf("placement: %s may still be a member of group %d", id, status.Group)
	}
	_, err := replica.ReadIndex(ctx)
	return err
}

// start runs a step of a group beside the loop, unless one is under way or has
// failed a moment ago.
func (r *Reconciler) start(group uint64, now time.Time, step func(context.Context) error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.progress(group)
	if p.busy || now.Before(p.next) || r.running >= maxSteps {
		return false
	}
	p.busy = true
	r.running++
	r.tasks.Go(func() {
		ctx, cancel := context.WithTimeout(r.ctx, stepTimeout)
		defer cancel()
		err := step(ctx)
		r.ended(group, err, time.Now())
		r.wakeUp()
	})
	return true
}

func (r *Reconciler) ended(group uint64, err error, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
	p := r.progress(group)
	if err != nil && r.ctx.Err() == nil && !errors.Is(err, shard.ErrNotLeader) && (p.failed == nil || p.failed.Error() != err.Error()) {
		r.cfg.Logger.Warn("a group could not be changed yet", "group", group, "error", err)
	}
	p.busy, p.failed, p.active = false, err, now
	if err == nil {
		p.pause, p.next = 0, time.Time{}
		return
	}
	r.metrics.failures.Inc()
	p.pause = min(max(2*p.pause, leastRetry), mostRetry)
	p.next = now.Add(p.pause)
}

// progress is a group's; the caller has r.mu.
func (r *Reconciler) progress(group uint64) *progress {
	p := r.groups[group]
	if p == nil {
		p = &progress{}
		r.groups[group] = p
	}
	return p
}

// forgetProgress lets a later leadership of this node begin afresh.
func (r *Reconciler) forgetProgress() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for group, p := range r.groups {
		if !p.busy {
			delete(r.groups, group)
		}
	}
}

// startSteps writes new replicas to the map and begins the other steps. It
// reports whether the map has changed.
func (r *Reconciler) startSteps(ctx context.Context, term uint64, plan []ShardStep, view ClusterView, now time.Time) (changed bool, err error) {
	var creates []ShardStep
	for _, step := range plan {
		switch leader := view.Groups[step.Group].Leader; {
		case view.tooSoon(step):
		case step.Action == Create && !r.busy(step.Group):
			creates = append(creates, step)
		case step.Action != Create && leader != nil:
			request := stepRequest{Term: term, Step: step}
			r.start(step.Group, now, func(ctx context.Context) error {
				return r.request(ctx, &view.Map, shard.NodeOf(leader.Replica), request)
			})
		}
	}
	c := view.Map.create(creates)
	if c == nil {
		return false, nil
	}
	if err := r.commit(ctx, c); err != nil {
		return true, err
	}
	for _, step := range creates {
		r.took(step)
	}
	return true, nil
}

// tooSoon reports whether the step would undo what an earlier leader has begun
// in the place of a node that this one has not listened to for long enough: a
// new leader calls nobody down yet, and a copy that is half made for a node that
// is dead would be thrown away, and made again.
func (v *ClusterView) tooSoon(step ShardStep) bool {
	s, ok := v.Map.shardOf(step.Group)
	leader := v.Groups[step.Group].Leader
	if !ok || leader == nil || v.Nodes[step.Node].Down {
		return false
	}
	member, ok := v.Map.Member(step.Node)
	standsIn := ok && !member.Leaving && slices.Contains(s.Replicas, Replica{ID: step.Replica, Incarnation: member.Incarnation})
	in := slices.IndexFunc(leader.Leading.Members, func(m shard.Member) bool { return m.ID == step.Replica })
	switch {
	case !standsIn:
		return false
	case step.Action == Forget:
		// One that was a member is on its way out, not in.
		if own, ok := v.Groups[step.Group].Reports[step.Replica]; !ok || own.Last > 0 || own.Applied > 0 {
			return false
		}
	case step.Action != Remove || in < 0 || leader.Leading.Members[in].Voter:
		return false
	}
	return slices.ContainsFunc(Target(*v.Map.Config, s.Number, v.Ring, staying(v.Map.Members)), func(t TargetReplica) bool {
		return !v.Nodes[t.Node].Alive
	})
}

// busy reports whether a step of the group is under way.
func (r *Reconciler) busy(group uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.groups[group]
	return p != nil && p.busy
}

// took is told of every step of a shard that has taken effect.
func (r *Reconciler) took(step ShardStep) {
	r.cfg.Logger.Info("changed a shard's replicas", "step", string(step.Action), "group", step.Group, "replica", string(step.Replica), "node", step.Node, "role", string(step.Role), "why", step.Why)
	r.metrics.steps.WithLabelValues(string(step.Action)).Inc()
	if r.cfg.stepped != nil {
		r.cfg.stepped(step)
	}
}

// request has the group's leader carry out a step, and takes in what it reports
// after it.
func (r *Reconciler) request(ctx context.Context, m *Map, node string, request stepRequest) error {
	var report Report
	var err error
	if node == r.cfg.Node {
		report, err = r.obey(ctx, request)
	} else {
		err = r.call(ctx, node, MethodStep, request, &report)
	}
	if err != nil {
		return err
	}
	step := request.Step
	r.seen.accept(report, false, time.Now())
	if step.Action == Forget {
		c := m.forget(ReplicaRef{step.Group, step.Replica})
		if c == nil {
			return nil
		}
		if err := r.commit(ctx, c); err != nil {
			return err
		}
	}
	r.took(step)
	return nil
}

// probe asks the nodes of the groups that are on the move how they get on: an
// ordinary report would come up to a second later.
// It reports whether any group is on the move.
func (r *Reconciler) probe(view ClusterView, now time.Time) (any bool) {
	due := make(map[string][]uint64) // groups by node
	r.mu.Lock()
	for _, s := range view.Map.Shards {
		if !r.moving(s, view.Groups[s.Group()], now) {
			continue
		}
		any = true
		p := r.progress(s.Group())
		if now.Sub(p.probed) < r.probeInterval(s, p, now) {
			continue
		}
		p.probed = now
		for _, replica := range s.Replicas {
			node := replica.Node()
			if view.Nodes[node].Alive && !slices.Contains(due[node], s.Group()) {
				due[node] = append(due[node], s.Group())
			}
		}
	}
	for node := range due {
		if r.probing[node] {
			delete(due, node)
		} else {
			r.probing[node] = true
		}
	}
	r.mu.Unlock()
	for node, groups := range due {
		r.tasks.Go(func() { r.probeNode(node, groups) })
	}
	return any
}

func (r *Reconciler) probeNode(node string, groups []uint64) {
	ctx, cancel := context.WithTimeout(r.ctx, reportTimeout)
	defer cancel()
	var report Report
	var err error
	if node == r.cfg.Node {
		report = r.build(groups)
	} else {
		err = r.call(ctx, node, MethodProbe, groups, &report)
	}
	r.mu.Lock()
	delete(r.probing, node)
	r.mu.Unlock()
	if err == nil && report.Node == node {
		r.seen.accept(report, false, time.Now())
		r.wakeUp()
	}
}

// moving reports whether a group is about to change. The caller has r.mu.
func (r *Reconciler) moving(s Shard, g GroupView, now time.Time) bool {
	p := r.groups[s.Group()]
	if p != nil && (p.busy || now.Sub(p.active) < activeFor) {
		return true
	}
	if g.Leader == nil || !g.Leader.Leading.Committed || len(g.Leader.Leading.Members) != len(s.Replicas) {
		return true
	}
	return slices.ContainsFunc(g.Leader.Leading.Members, func(m shard.Member) bool { return !m.Voter })
}

func (r *Reconciler) probeInterval(s Shard, p *progress, now time.Time) time.Duration {
	still := now.Sub(maxTime(p.active, r.seen.lastChange(s.Group(), s.Replicas)))
	return min(max(still/8, leastProbe), mostProbe)
}

// patience is how long to wait for something to happen.
func (r *Reconciler) patience(most time.Duration, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait := most
	for _, p := range r.groups {
		switch {
		case p.busy: // wakes the loop
		case now.Before(p.next):
			wait = min(wait, p.next.Sub(now))
		case now.Sub(p.active) < activeFor:
			wait = min(wait, leastProbe)
		}
	}
	return max(wait, leastPause)
}
