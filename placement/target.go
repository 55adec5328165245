package placement

import "kvd/ring"

// Slots is how many replicas of each role a shard has when all of total nodes
// live: those that are members and not leaving, down ones included. There are as
// many witnesses as let a shard survive the loss of all but one of its data
// replicas, as far as there are nodes for them and they make the votes odd.
func Slots(cfg ClusterConfig, total int) (data, witnesses int) {
	data = max(0, min(cfg.ReplicationFactor, total))
	if cfg.Witnesses == WitnessesNone {
		return data, 0
	}
	witnesses = min(data-1, total-data)
	if (data+witnesses)%2 == 0 {
		witnesses--
	}
	return data, max(0, witnesses)
}

// Target is where the ring of the live nodes that are not leaving wants the
// shard's replicas, closest first; total is as for Slots. The first nodes hold
// data, the next ones witness: where fewer nodes live than there are slots, the
// witnesses are missing first. It is empty without nodes.
func Target(cfg ClusterConfig, shardNumber int, r *ring.Ring, total int) []TargetReplica {
	data, witnesses := Slots(cfg, total)
	var target []TargetReplica
	for i, node := range r.Order(shardNumber) {
		switch {
		case i < data:
			target = append(target, TargetReplica{Node: node, Role: Data})
		case i < data+witnesses:
			target = append(target, TargetReplica{Node: node, Role: Witness})
		}
	}
	return target
}

// staying counts the members that are not leaving.
func staying(members []Member) (n int) {
	for _, m := range members {
		if !m.Leaving {
			n++
		}
	}
	return n
}
