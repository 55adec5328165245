package node

import (
	"time"

	"kvd/placement"
	"kvd/ring"
	"kvd/server"
)

// keyspace says which group serves which key; it implements server.Groups. In
// `full` that is group 0. The groups are known from the settings, before the
// map says where they are: requests that come so early wait.
type keyspace struct {
	shards int // 0 in `full`
	all    []uint64
	groups *groups
}

var _ server.Groups = keyspace{}

func newKeyspace(shards int, g *groups) keyspace {
	k := keyspace{shards: shards, groups: g}
	for n := range shards {
		k.all = append(k.all, placement.GroupOf(n))
	}
	if shards == 0 {
		k.all = []uint64{group0}
	}
	return k
}

func (k keyspace) Sharded() bool { return k.shards > 0 }

func (k keyspace) Group(key []byte) uint64 {
	if k.shards == 0 {
		return group0
	}
	return placement.GroupOf(ring.ShardOf(key, k.shards))
}

func (k keyspace) Lease(id int64) uint64 {
	if k.shards == 0 {
		return group0
	}
	return placement.GroupOf(ring.ShardOfLease(id, k.shards))
}

func (k keyspace) All() []uint64 { return k.all }

func (k keyspace) Nodes(group uint64) []string {
	if k.shards == 0 {
		return nil
	}
	return (*k.groups.routes.Load())[group]
}

// routes are the nodes that hold data of each group, by the map as this node
// knows it.
type routes map[uint64][]string

func routesOf(m *placement.Map) *routes {
	r := make(routes, len(m.Shards))
	for _, s := range m.Shards {
		for _, replica := range s.Replicas {
			member, known := m.Member(replica.Node())
			if replica.Role() == placement.Data && known && member.Incarnation == replica.Incarnation {
				r[s.Group()] = append(r[s.Group()], replica.Node())
			}
		}
	}
	return &r
}

// minLeaseTTL is how many seconds a lease has at least, as in etcd: a holder that is there must be able to renew it
// through an election.
func minLeaseTTL(election time.Duration) int64 {
	return int64((election*3/2 + time.Second - 1) / time.Second)
}
