package node

import (
	"kvd/placement"
	"kvd/ring"
	"kvd/server"
)

// keyspace says which group serves which key; it implements server.Groups. In
// `full` that is group 0.
type keyspace struct {
	shards int // 0 in `full`
	groups *groups
}

var _ server.Groups = keyspace{}

func (k keyspace) Sharded() bool { return k.shards > 0 }

func (k keyspace) Group(key []byte) uint64 {
	if k.shards == 0 {
		return group0
	}
	return placement.GroupOf(ring.ShardOf(key, k.shards))
}

func (k keyspace) All() []uint64 {
	if k.shards == 0 {
		return []uint64{group0}
	}
	return k.groups.routes.Load().all
}

func (k keyspace) Nodes(group uint64) []string {
	if k.shards == 0 {
		return nil
	}
	return k.groups.routes.Load().nodes[group]
}

// routes are where the groups of the key space are, by the map as this node
// knows it.
type routes struct {
	all   []uint64
	nodes map[uint64][]string
}

// routesOf lists the nodes that hold data of each group.
func routesOf(m *placement.Map) *routes {
	r := &routes{nodes: make(map[uint64][]string, len(m.Shards))}
	for _, s := range m.Shards {
		r.all = append(r.all, s.Group())
		for _, replica := range s.Replicas {
			member, known := m.Member(replica.Node())
			if replica.Role() == placement.Data && known && member.Incarnation == replica.Incarnation {
				r.nodes[s.Group()] = append(r.nodes[s.Group()], replica.Node())
			}
		}
	}
	return r
}
