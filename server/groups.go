package server

import "context"

// Groups says which Raft groups have the clients' keys, and where they are. It
// is asked at every request, so it must be cheap, and may change. A nil Groups
// is one group, 0, that has all keys and a replica on every node.
type Groups interface {
	// Sharded reports whether keys are spread over several groups, whose
	// revisions come from Revisions. It never changes.
	Sharded() bool
	// Group is the group of a key, the same for keys with equal ring.Tag. It
	// never changes, and is one of All as soon as that is not empty.
	Group(key []byte) uint64
	// Lease is the group that is a lease's home. Like Group it never changes.
	Lease(id int64) uint64
	// All lists the groups that have keys, in ascending order; empty as long as
	// this node does not know the cluster map. The caller must not change it.
	All() []uint64
	// Nodes lists the nodes that have a data replica of a group, the one to be
	// asked first in front; empty if none is known. This node may be among them.
	Nodes(group uint64) []string
}

// Revisions orders the writes of all groups.
type Revisions interface {
	// Latest is the last revision handed out, by whoever was confirmed to do so
	// after the call began. It tries again until ctx ends.
	Latest(ctx context.Context) (int64, error)
}

// Members changes the members of the cluster.
type Members interface {
	// Leave begins to take a node out of the cluster, and returns when that
	// cannot be forgotten any more. Its errors are told to the client: gRPC
	// statuses as they are, all others as a refusal.
	Leave(ctx context.Context, node string, force bool) error
}

// everything is the Groups of one group that every node has.
type everything struct{}

var onlyGroup = []uint64{userGroup}

func (everything) Sharded() bool         { return false }
func (everything) Group([]byte) uint64   { return userGroup }
func (everything) Lease(int64) uint64    { return userGroup }
func (everything) All() []uint64         { return onlyGroup }
func (everything) Nodes(uint64) []string { return nil }
