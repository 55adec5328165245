package placement

import (
	"context"
	"time"

	"kvd/ring"
)

// foundingWait is how long the leader waits for the founders to say what
// weights they have.
const foundingWait = 3 * time.Second

// found writes what a new cluster begins with into an empty map, all or nothing.
// It is false while the founders have not spoken.
func (r *Reconciler) found(ctx context.Context, now time.Time) (bool, error) {
	if len(r.cfg.Founders) == 0 {
		return true, nil
	}
	members, complete := r.seen.weighed(r.cfg.Founders, now)
	if r.cfg.Cluster != nil && !complete {
		return false, nil
	}
	c, err := founding(members, r.cfg.Cluster)
	if err != nil {
		return false, err
	}
	// Another leader may have been faster; then this changes nothing.
	_, err = r.txn(ctx, &c.txn)
	return true, err
}

// founding is the map of a new cluster. It follows from the members and the
// configuration alone.
func founding(members []Member, cfg *ClusterConfig) (*change, error) {
	c := &change{}
	for _, m := range members {
		c.absent(memberKey(m.Name))
		c.put(memberKey(m.Name), m)
	}
	if cfg == nil {
		return c, nil
	}
	c.absent(configKey)
	c.put(configKey, cfg)
	liveRing, err := newRing(*cfg, members)
	if err != nil {
		return nil, err
	}
	number := uint64(0)
	for _, m := range members {
		number = max(number, numberOf(m.Replica))
	}
	incarnations := make(map[string]uint64, len(members))
	for _, m := range members {
		incarnations[m.Name] = m.Incarnation
	}
	for n := range cfg.Shards {
		s := Shard{Number: n}
		for _, t := range Target(*cfg, n, liveRing, len(members)) {
			number++
			id := replicaID(t.Node, number, t.Role)
			s.Founders = append(s.Founders, id)
			s.Replicas = append(s.Replicas, Replica{ID: id, Incarnation: incarnations[t.Node]})
		}
		c.put(shardKey(n), s)
	}
	c.put(counterKey, number)
	return c, nil
}

// weighed are the founders with the weights that they reported; complete once
// all have, or have had their time.
func (o *observations) weighed(founders []Member, now time.Time) (members []Member, complete bool) {
	o.look(founders, now)
	complete = true
	for _, m := range founders {
		report, ok := o.latest(m)
		if ok && weightOf(report.Weight) != 1 {
			m.Weight = weightOf(report.Weight)
		}
		complete = complete && (ok || o.silence(m, now) >= foundingWait)
		members = append(members, m)
	}
	return members, complete
}

// newRing is the ring of the members on which shards may be.
func newRing(cfg ClusterConfig, members []Member) (*ring.Ring, error) {
	nodes := make([]ring.Node, 0, len(members))
	for _, m := range members {
		nodes = append(nodes, ring.Node{Name: m.Name, Weight: weightOf(m.Weight)})
	}
	return ring.New(ring.Config{Shards: cfg.Shards, Replicas: cfg.ReplicationFactor}, nodes...)
}

// weightOf is the weight that a record or a report means, within the limits of
// the ring: what one node says of itself must not stop the placement of all.
func weightOf(weight float64) float64 {
	if weight == 0 || weight != weight {
		return 1
	}
	return min(max(weight, ring.MinWeight), ring.MaxWeight)
}
