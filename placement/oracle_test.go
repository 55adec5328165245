package placement

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

// What the world must never see. Nothing here uses the planner's code; it judges
// by what is true, and excuses the planner only what nobody can have measured
// yet: what happened in the last few seconds.

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

// violation is what broken panics with.
type violation struct{ error }

// misfortune ends a run that nobody could have saved: disks were lost in the few
// seconds in which nobody can know, while the group changed its members.
type misfortune struct{}

func (w *world) broken(format string, args ...any) {
	panic(violation{fmt.Errorf("%s\n%s", fmt.Sprintf(format, args...), strings.Join(w.history, "\n"))})
}

// oracleElected: whoever leads has every committed entry.
func (w *world) oracleElected(g *group) {
	if n := len(g.committed); int(g.leader.last()) < n || !slices.Equal(g.leader.log[:n], g.committed) {
		w.broken("acknowledged entries of group %d are lost: %s leads with a log of %d, %d are committed", g.number, g.leader.id, g.leader.last(), n)
	}
}

// oracleCommitted: nothing that was committed changes.
func (w *world) oracleCommitted(g *group) {
	log := g.leader.log[:g.leader.commit]
	n := min(len(log), len(g.committed))
	if !slices.Equal(log[:n], g.committed[:n]) {
		w.broken("group %d commits something else than before", g.number)
	}
	for _, e := range log[n:] {
		for _, m := range e.config {
			delete(g.removed, m.ID)
		}
	}
	before := g.committedConfiguration()
	if len(log) > n {
		g.committed = log
	}
	after := g.committedConfiguration()
	for _, m := range before {
		if !slices.ContainsFunc(after, func(a shard.Member) bool { return a.ID == m.ID }) {
			g.removed[m.ID] = true
		}
	}
	w.oracleKept(g)
}

// oracleKept: what is committed can still be brought to a data replica that
// votes: one that has not lost its files has it, or has enough for a witness to
// give it the rest.
func (w *world) oracleKept(g *group) {
	commit := uint64(len(g.committed))
	for _, m := range g.committedConfiguration() {
		d := g.replicas[m.ID]
		if !m.Voter || RoleOf(m.ID) != Data || d == nil || d.lost {
			continue
		}
		if has(d, g.committed) {
			return
		}
		for _, m := range g.committedConfiguration() {
			if x := g.replicas[m.ID]; m.Voter && RoleOf(m.ID) == Witness && x != nil && !x.lost && has(x, g.committed) && x.first <= agrees(d, g.committed)+1 {
				return
			}
		}
	}
	w.broken("the %d acknowledged entries of group %d are on no data replica, and no witness can give one what it lacks", commit, g.number)
}

func has(r *replica, entries []*entry) bool { return agrees(r, entries) == uint64(len(entries)) }

// agrees is how many of the entries the replica has.
func agrees(r *replica, entries []*entry) uint64 {
	n := min(len(r.log), len(entries))
	if n == 0 || r.log[n-1] == entries[n-1] { // equal there, so equal before
		return uint64(n)
	}
	for n > 0 && r.log[n-1] != entries[n-1] {
		n--
	}
	return uint64(n)
}

// seen reports whether somebody may still think that the replica lives.
func (w *world) seen(r *replica) bool {
	if r == nil {
		return false
	}
	if r.lost {
		return w.clock-r.lostAt <= excuse
	}
	n := w.nodes[r.node]
	return n.incarnation == r.incarnation && w.seenNode(n)
}

// excuse is for how many seconds nobody can know.
const excuse = 4

func (w *world) seenNode(n *machine) bool {
	return n.up && !n.isolated || w.clock-n.downSince <= excuse
}

// current reports whether the replica is seen and lacks few entries. Without
// Check, reports may be older than some writes.
func (w *world) current(g *group, id raft.ServerID) bool {
	r, lag := g.replicas[id], uint64(64)
	if !w.checked {
		lag = 1000
	}
	return w.seen(r) && r.last() > 0 && r.last()+lag >= g.leader.commit
}

// slotsOf says how many data replicas and voters there are to be.
func (w *world) slotsOf(total int) (data, voters int) {
	r := min(w.config.ReplicationFactor, total)
	if w.config.Witnesses == WitnessesNone {
		return r, r
	}
	best := 0
	for witnesses := 1; witnesses <= w.config.ReplicationFactor-1 && witnesses <= total-w.config.ReplicationFactor; witnesses++ {
		if (w.config.ReplicationFactor+witnesses)%2 == 1 {
			best = witnesses
		}
	}
	return r, r + best
}

func votersOf(config []shard.Member) []shard.Member {
	return slices.DeleteFunc(slices.Clone(config), func(m shard.Member) bool { return !m.Voter })
}

func countIf(config []shard.Member, is func(shard.Member) bool) int {
	n := 0
	for _, m := range config {
		if is(m) {
			n++
		}
	}
	return n
}

func find(config []shard.Member, id raft.ServerID) (shard.Member, bool) {
	i := slices.IndexFunc(config, func(m shard.Member) bool { return m.ID == id })
	if i < 0 {
		return shard.Member{}, false
	}
	return config[i], true
}

// doubled are the voters of nodes with more than one that has its files.
func (w *world) doubled(g *group, config []shard.Member) (ids []raft.ServerID) {
	voters := slices.DeleteFunc(votersOf(config), func(m shard.Member) bool { return g.replicas[m.ID].lost })
	for _, m := range voters {
		if countIf(voters, func(o shard.Member) bool { return o.Node == m.Node }) > 1 {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// oracleChanged judges a change of members that takes effect.
func (w *world) oracleChanged(p *pendingStep, g *group, before, after []shard.Member) {
	w.oracleQuorum(g, before, after)
	if r := g.replicas[p.step.Replica]; p.step.Action != Remove || r == nil || !r.lost {
		w.oracleBears(g, before, after)
	}
	if twice := w.doubled(g, before); len(twice) > 0 && !w.stuck(g, twice, before) && (p.step.Action != Remove || !slices.Contains(twice, p.step.Replica)) {
		w.broken("%s %s while %v vote on one node", p.step.Action, p.step.Replica, twice)
	}
	switch p.step.Action {
	case AddLearner:
		if r := g.replicas[p.step.Replica]; g.removed[p.step.Replica] && r != nil && r.last() > 0 {
			w.broken("%s is added again after it was removed", p.step.Replica)
		}
	case Promote:
		w.oraclePromoted(p, g, before, after)
	case Remove:
		if m, ok := find(before, p.step.Replica); ok && m.Voter {
			w.oracleRemoved(p, g, m, before, after)
		}
	}
}

// stuck reports whether a node's second vote cannot leave yet.
func (w *world) stuck(g *group, twice []raft.ServerID, before []shard.Member) bool {
	for _, id := range twice {
		rest := slices.DeleteFunc(votersOf(before), func(m shard.Member) bool { return m.ID == id })
		if 2*countIf(rest, func(m shard.Member) bool { return w.reachable(g.replicas[m.ID]) && !w.nodes[m.Node].muted }) > len(rest) && RoleOf(id) == Witness {
			return false
		}
	}
	return true
}

// oracleQuorum: no change without a live quorum, before or after.
func (w *world) oracleQuorum(g *group, before, after []shard.Member) {
	for _, config := range [][]shard.Member{before, after} {
		voters := votersOf(config)
		live := countIf(voters, func(m shard.Member) bool { return w.seen(g.replicas[m.ID]) })
		if 2*live <= len(voters) {
			w.broken("group %d changes its members while %d of %d voters live", g.number, live, len(voters))
		}
		if keep := countIf(voters, func(m shard.Member) bool { return !g.replicas[m.ID].lost }); 2*keep <= len(voters) {
			panic(misfortune{})
		}
	}
}

// oracleBears: no change lets a quorum be without the data, but for that of
// replicas that are lost already.
func (w *world) oracleBears(g *group, before, after []shard.Member) {
	data, bears := w.bears(g, after)
	if _, before := w.bears(g, before); !bears && before {
		w.broken("group %d may lose all %d data replicas among %d voters and still have a quorum", g.number, data, len(votersOf(after)))
	}
}

// bears reports whether as many voters as a quorum can do without may be lost
// without losing all data. Replicas that are known to be lost already are none.
func (w *world) bears(g *group, config []shard.Member) (data int, ok bool) {
	voters := votersOf(config)
	data = countIf(voters, func(m shard.Member) bool { return RoleOf(m.ID) == Data && !w.knownLost(g.replicas[m.ID]) })
	return data, data > len(voters)-(len(voters)/2+1)
}

// oraclePromoted: only what is in the group, has caught up and belongs there.
func (w *world) oraclePromoted(p *pendingStep, g *group, before, after []shard.Member) {
	id := p.step.Replica
	if _, in := find(before, id); !in {
		w.broken("%s gets a vote without having been a learner", id)
	}
	if !w.current(g, id) {
		w.broken("%s gets a vote and has not caught up: %s", id, w.describe(g))
	}
	if !slices.ContainsFunc(w.shards[g.number-1].Replicas, func(r Replica) bool { return r.ID == id }) {
		w.broken("%s gets a vote, and the map does not have it", id)
	}
	twice := w.doubled(g, after)
	witnesses := slices.DeleteFunc(slices.Clone(twice), func(id raft.ServerID) bool { return RoleOf(id) != Witness })
	if slices.Contains(twice, id) && (len(twice) != 2 || len(witnesses) != 1 || RoleOf(id) != Data) {
		w.broken("%v vote on one node", twice)
	}
}

// oracleRemoved: no live copy goes while too few would be left, and no dead
// voter before another one has its place.
func (w *world) oracleRemoved(p *pendingStep, g *group, m shard.Member, before, after []shard.Member) {
	data, voters := w.slotsOf(p.total)
	r := g.replicas[m.ID]
	isData := func(m shard.Member) bool { return m.Voter && RoleOf(m.ID) == Data }
	lives := r != nil && w.runs(r) && w.clock-w.nodes[r.node].upSince > excuse && w.current(g, m.ID)
	copies := countIf(after, func(m shard.Member) bool { return isData(m) && w.current(g, m.ID) })
	if lives && isData(m) && copies < data {
		w.broken("%s is a live copy and goes, and %d of %d are left: %s", m.ID, copies, data, w.describe(g))
	}
	follows := slices.ContainsFunc(before, func(o shard.Member) bool {
		same := o.Node == m.Node && o.ID != m.ID
		return same && r.lost && o.Voter || (same || r.lost && !o.Voter) && w.current(g, o.ID)
	})
	twice := w.doubled(g, before)
	needed := len(twice) > 0 && w.stuck(g, twice, before) && (r.lost || w.members[r.node].Leaving)
	if w.seen(r) || follows || needed || slices.Contains(twice, m.ID) {
		return
	}
	waits := slices.ContainsFunc(before, func(o shard.Member) bool {
		return !o.Voter && RoleOf(o.ID) == Witness && w.current(g, o.ID)
	})
	if isData(m) && copies >= data && waits {
		return // the witness gets the vote next: it could bring all but this one up to date
	}
	if len(votersOf(after)) < voters {
		w.broken("%s is dead and goes, and %d of %d voters are left", m.ID, len(votersOf(after)), voters)
	}
	if isData(m) && countIf(after, isData) < data {
		w.broken("%s is dead and goes, and %d of %d data replicas are left", m.ID, countIf(after, isData), data)
	}
}

func (w *world) knownLost(r *replica) bool {
	m, ok := w.members[r.node]
	n := w.nodes[r.node]
	return r.lost && w.clock-r.lostAt > excuse && (!ok || m.Incarnation != r.incarnation || n.up && n.incarnation == r.incarnation)
}

func (w *world) describe(g *group) string {
	var b strings.Builder
	fmt.Fprintf(&b, "leader %v, %d committed", g.leader.id, len(g.committed))
	for _, r := range sortedReplicas(g) {
		n := w.nodes[r.node]
		fmt.Fprintf(&b, "; %s has %d..%d, commit %d, lost %v, up %v, isolated %v since %d", r.id, r.first, r.last(), r.commit, r.lost, n.up, n.isolated, n.downSince)
	}
	return b.String()
}

func (w *world) oracleTransferred(g *group, to *replica) {
	if RoleOf(to.id) != Data {
		w.broken("%s is to lead group %d and has no data", to.id, g.number)
	}
}

// oracleForgotten: not while any configuration that may come into force has it.
func (w *world) oracleForgotten(g *group, id raft.ServerID) {
	if _, in := find(g.committedConfiguration(), id); in {
		w.broken("%s is forgotten and in the committed configuration", id)
	}
	config, _ := g.leader.configuration()
	if _, in := find(config, id); in {
		w.broken("%s is forgotten and in the latest configuration", id)
	}
}

// oraclePlanned judges a step by what it says.
func (w *world) oraclePlanned(p *pendingStep) {
	s := p.step
	if s.Prev == 0 {
		w.broken("a step without a configuration: %+v", s)
	}
	if len(s.Why) < 20 || strings.Contains(s.Why, "%!") || strings.Contains(s.Why, "  ") {
		w.broken("no sentence for people: %q", s.Why)
	}
	mapped := slices.ContainsFunc(p.record.Replicas, func(r Replica) bool { return r.ID == s.Replica })
	switch s.Action {
	case Create:
		if s.Replica != "" || s.Node == "" || s.Role == "" {
			w.broken("%+v", s)
		}
	case AddLearner, Promote, Forget, Transfer:
		if !mapped {
			w.broken("%s %s, which the map does not have", s.Action, s.Replica)
		}
	}
}

// oracleSettled: everything is where the ring wants it, and nothing else is
// anywhere, but for dead replicas that nothing can replace.
func (w *world) oracleSettled() {
	v := w.view()
	data, voters := w.slotsOf(w.staying())
	for i, g := range w.groups {
		var want []string
		for at, node := range v.Ring.Order(i) {
			switch {
			case at < data:
				want = append(want, node+" "+string(Data))
			case at < voters:
				want = append(want, node+" "+string(Witness))
			}
		}
		if !w.serves(g) {
			w.broken("group %d has no leader that serves", g.number)
		}
		w.oracleShardSettled(g, want, voters, v)
		if len(want) > 0 && g.leader.node+" data" != want[0] && RoleOf(g.leader.id) == Data && w.first(g, want) != g.leader.id {
			w.broken("%s leads group %d, which wants %v", g.leader.id, g.number, want)
		}
	}
}

// first is the first data replica of those wanted.
func (w *world) first(g *group, want []string) raft.ServerID {
	for _, node := range want {
		for _, m := range g.committedConfiguration() {
			if m.Voter && m.Node+" data" == node && RoleOf(m.ID) == Data && w.runs(g.replicas[m.ID]) {
				return m.ID
			}
		}
	}
	return ""
}

func (w *world) oracleShardSettled(g *group, want []string, voters int, v ClusterView) {
	config := g.committedConfiguration()
	has := make(map[string]bool)
	for _, m := range config {
		key := m.Node + " " + string(RoleOf(m.ID))
		r := g.replicas[m.ID]
		switch {
		case slices.Contains(want, key) && m.Voter && !has[key] && !r.lost:
			has[key] = true
		case m.Voter && len(want) < voters && (!w.runs(r) || w.members[m.Node].Leaving):
			// stays until there is another node for it
		default:
			w.broken("group %d has %s and wants %v: %+v", g.number, m.ID, want, ExplainShards(v))
		}
	}
	if len(has) != len(want) {
		w.broken("group %d has %v and wants %v: %+v", g.number, config, want, ExplainShards(v))
	}
	if n := len(w.shards[g.number-1].Replicas); n != len(config) {
		w.broken("group %d has %d members and the map %d replicas", g.number, len(config), n)
	}
}
