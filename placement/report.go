package placement

import (
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

// Report is what a node tells group 0's leader once a second.
type Report struct {
	Node        string        `json:"node"`
	Incarnation uint64        `json:"incarnation"`
	Weight      float64       `json:"weight"`
	DiskFree    uint64        `json:"disk_free"` // bytes
	Groups      []GroupReport `json:"groups"`    // of every replica on the node, group 0's too
	// Lost are the replicas that the map gives to this incarnation of the node
	// and that it cannot open, because their files are missing or damaged.
	Lost []ReplicaRef `json:"lost,omitempty"`
}

// ReplicaRef names one replica of one group: an id alone names one of group 0
// and may name one of a shard as well.
type ReplicaRef struct {
	Group uint64        `json:"group"`
	ID    raft.ServerID `json:"id"`
}

// GroupReport is one replica's own view.
type GroupReport struct {
	Group              uint64        `json:"group"`
	Replica            raft.ServerID `json:"replica"`
	Term               uint64        `json:"term"`
	Commit             uint64        `json:"commit"`
	Applied            uint64        `json:"applied"`
	Durable            uint64        `json:"durable"` // in the state file
	First              uint64        `json:"first"`   // of the log; 0 if it is empty
	Last               uint64        `json:"last"`
	ConfigurationIndex uint64        `json:"configuration_index"` // of the latest applied configuration
	Leader             raft.ServerID `json:"leader,omitempty"`    // as far as it knows
	// Leading is set while the replica leads the group and serves.
	Leading *Leading `json:"leading,omitempty"`
}

// Leading is what only the leader of a group knows.
type Leading struct {
	Members []shard.Member `json:"members"` // the latest configuration
	// Committed: the configuration is committed, and ConfigurationIndex is its index.
	Committed bool                        `json:"committed"`
	Followers map[raft.ServerID]Following `json:"followers"`
}

// Following is how the leader sees one of the other members.
type Following struct {
	Match uint64        `json:"match"` // highest log index known to be there, in this term; 0 = unknown
	Acked time.Duration `json:"acked"` // since the sending of what it last answered with success; negative = never
}

// ReportAnswer is what group 0's leader answers to a report.
type ReportAnswer struct {
	// Floors are, for each group of which the node has a witness, the index up
	// to which the witness may remove the beginning of its log.
	Floors map[uint64]uint64 `json:"floors,omitempty"`
}
