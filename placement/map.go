package placement

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/fsm"
	"kvd/shard"
)

// Role is what a replica does for its group. It is part of the replica's id and
// never changes: a witness that becomes a data replica is another replica.
type Role string

// The roles. A learner is a replica of either role that has no vote yet.
const (
	Data    Role = "data"    // log and state
	Witness Role = "witness" // log only
)

// Witness modes of ClusterConfig.
const (
	WitnessesAuto = "auto"
	WitnessesNone = "0"
)

// ClusterConfig is what the whole cluster agrees on. It is written when the
// cluster is founded, and only for a cluster that has shards.
type ClusterConfig struct {
	Strategy          string `json:"strategy"`
	Shards            int    `json:"shards"`
	ReplicationFactor int    `json:"replication_factor"` // data replicas of each shard
	Witnesses         string `json:"witnesses"`          // WitnessesAuto, WitnessesNone
}

// Replica is one replica of a shard that exists or is to be made.
type Replica struct {
	// ID is <node>/<number>, or <node>/<number>w of a witness. Numbers are
	// drawn from a counter of the cluster and never used twice.
	ID raft.ServerID `json:"id"`
	// Incarnation is the node's when the replica was assigned to it. Another
	// incarnation of the node has lost the replica and must not make it anew.
	Incarnation uint64 `json:"incarnation"`
}

// Node is where the replica is.
func (r Replica) Node() string { return shard.NodeOf(r.ID) }

// Role is the replica's role.
func (r Replica) Role() Role { return RoleOf(r.ID) }

// RoleOf is the role that is part of a replica's id.
func RoleOf(id raft.ServerID) Role {
	if shard.IsWitness(id) {
		return Witness
	}
	return Data
}

// Shard is the map's record of one shard.
type Shard struct {
	Number int `json:"number"` // 0..Shards-1
	// Founders are the first configuration of the shard's group, all voters.
	// They never change, so that every founder begins with the same one.
	Founders []raft.ServerID `json:"founders"`
	// Replicas are to exist on their nodes as long as they stand here. One is
	// taken out only after the group's committed configuration excludes it.
	Replicas []Replica `json:"replicas"`
}

// Group is the Raft group that serves the shard.
func (s Shard) Group() uint64 { return GroupOf(s.Number) }

// GroupOf is the Raft group that serves a shard: group 0 has the map.
func GroupOf(shardNumber int) uint64 { return uint64(shardNumber) + 1 }

// Map is the cluster map.
type Map struct {
	Config   *ClusterConfig // nil in a cluster without shards, and before it is founded
	Members  []Member       // in order of names
	Shards   []Shard        // by number
	Revision int64          // of the key space that it was read from

	counter uint64 // the last replica number that was used
}

// Member returns the member of that name.
func (m *Map) Member(name string) (Member, bool) {
	for _, member := range m.Members {
		if member.Name == name {
			return member, true
		}
	}
	return Member{}, false
}

// Keys of the map in the system key space.
const (
	configKey   = "config"
	counterKey  = "replicas" // the last replica number that was used
	shardPrefix = "shard/"
)

func shardKey(number int) string { return fmt.Sprintf("%s%05d", shardPrefix, number) }

// LoadMap reads the map from a node's own state, as it is.
func LoadMap(ctx context.Context, state *fsm.Store) (Map, error) {
	var m Map
	answer, err := state.Range(ctx, fsm.System, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		return m, err
	}
	m.Revision = answer.Header.Revision
	for _, kv := range answer.Kvs {
		if err := m.add(kv.Key, kv.Value); err != nil {
			return Map{}, fmt.Errorf("placement: malformed record %q in the cluster map: %w", kv.Key, err)
		}
	}
	return m, nil
}

// Load reads the members from a node's own state, as it is, in order of names.
func Load(ctx context.Context, state *fsm.Store) ([]Member, error) {
	end := []byte(memberPrefix)
	end[len(end)-1]++
	answer, err := state.Range(ctx, fsm.System, &pb.RangeRequest{Key: []byte(memberPrefix), RangeEnd: end})
	if err != nil {
		return nil, err
	}
	members := make([]Member, 0, len(answer.Kvs))
	for _, kv := range answer.Kvs {
		m, err := decodeMember(kv.Value)
		if err != nil {
			return nil, err
		}
		members = append(members, m)
	}
	return members, nil
}

// add decodes one record; keys come in order.
func (m *Map) add(key, value []byte) error {
	switch {
	case string(key) == configKey:
		m.Config = new(ClusterConfig)
		return json.Unmarshal(value, m.Config)
	case string(key) == counterKey:
		return json.Unmarshal(value, &m.counter)
	case bytes.HasPrefix(key, []byte(memberPrefix)):
		member, err := decodeMember(value)
		m.Members = append(m.Members, member)
		return err
	case bytes.HasPrefix(key, []byte(shardPrefix)):
		var s Shard
		err := json.Unmarshal(value, &s)
		m.Shards = append(m.Shards, s)
		return err
	}
	return nil
}

// replicaID names a replica.
func replicaID(node string, number uint64, role Role) raft.ServerID {
	id := node + "/" + strconv.FormatUint(number, 10)
	if role == Witness {
		id += "w"
	}
	return raft.ServerID(id)
}
