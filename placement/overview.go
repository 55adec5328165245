package placement

import "github.com/hashicorp/raft"

// Overview is the cluster as group 0's leader sees it: for people.
type Overview struct {
	Config *ClusterConfig  `json:"config"`
	Nodes  []NodeOverview  `json:"nodes"`  // in order of names
	Shards []ShardOverview `json:"shards"` // by number
}

// NodeOverview is one node.
type NodeOverview struct {
	Name     string  `json:"name"`
	State    string  `json:"state"` // alive, suspect, down, leaving
	Weight   float64 `json:"weight"`
	Shards   int     `json:"shards"`  // data replicas on it
	Leaders  int     `json:"leaders"` // shards that it leads
	DiskFree uint64  `json:"disk_free"`
	// Waits says, of a node that leaves, what for.
	Waits string `json:"waits,omitempty"`
}

// ShardOverview is one shard.
type ShardOverview struct {
	Number   int               `json:"number"`
	Leader   string            `json:"leader"` // node; empty = none is known
	State    string            `json:"state"`  // ok, moving, degraded (fewer live voters than wanted), no leader, no quorum
	Replicas []ReplicaOverview `json:"replicas"`
	Target   []TargetReplica   `json:"target"`
	// Tolerates is how many more nodes may fail before the shard stops.
	Tolerates int `json:"tolerates"`
	// Why are sentences: why the shard is where it is, what it waits for and
	// what to do.
	Why []string `json:"why"`
}

// ReplicaOverview is one replica of a shard.
type ReplicaOverview struct {
	ID     raft.ServerID `json:"id"`
	Node   string        `json:"node"`
	Role   Role          `json:"role"`
	State  string        `json:"state"` // creating, learner, voter, removing, lost; unknown without a leader
	Alive  bool          `json:"alive"`
	Match  uint64        `json:"match"`  // on it, as far as the leader has measured
	Commit uint64        `json:"commit"` // of the group
}

// TargetReplica is where the ring wants a replica to be now.
type TargetReplica struct {
	Node string `json:"node"`
	Role Role   `json:"role"`
}
