package placement

import (
	"slices"
	"time"
)

func (r *Reconciler) overview(m *Map, now time.Time) (Overview, error) {
	o := Overview{Config: m.Config}
	leaders := make(map[string]int)
	groups := r.seen.groups(m.Members, now)
	for _, s := range m.Shards {
		if leader := groups[s.Group()].Leader; leader != nil {
			leaders[Replica{ID: leader.Replica}.Node()]++
		}
	}
	for _, member := range m.Members {
		n := NodeOverview{Name: member.Name, State: r.nodeState(member, now), Weight: weightOf(member.Weight), Leaders: leaders[member.Name]}
		if report, ok := r.seen.latest(member); ok {
			n.DiskFree = report.DiskFree
		}
		for _, s := range m.Shards {
			if slices.ContainsFunc(s.Replicas, func(r Replica) bool { return r.Node() == member.Name && r.Role() == Data }) {
				n.Shards++
			}
		}
		o.Nodes = append(o.Nodes, n)
	}
	return o, nil
}

func (r *Reconciler) nodeState(m Member, now time.Time) string {
	switch node := r.seen.node(m, now); {
	case m.Leaving:
		return "leaving"
	case node.Down:
		return "down"
	case r.seen.silence(m, now) >= r.cfg.SuspectAfter:
		return "suspect"
	}
	return "alive"
}
