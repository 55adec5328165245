package placement

import (
	"fmt"

	"github.com/hashicorp/raft"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/placement/sequencer"
)

// Restored is the map of a cluster with shards whose data is on one of its
// members, home, because a backup was restored there: every shard begins with
// one replica. request writes that map into the empty state of group 0, and
// makes the sequencer begin above revision, the backup's.
func Restored(members []Member, cfg ClusterConfig, home string, revision int64) (shards []Shard, request fsm.Request, err error) {
	number, incarnation := uint64(0), uint64(0)
	for _, m := range members {
		number = max(number, numberOf(m.Replica))
		if m.Name == home {
			incarnation = m.Incarnation
		}
	}
	if incarnation == 0 {
		return nil, fsm.Request{}, fmt.Errorf("placement: %s is no member", home)
	}
	c := &change{}
	for _, m := range members {
		c.put(memberKey(m.Name), m)
	}
	c.put(configKey, cfg)
	for n := range cfg.Shards {
		number++
		id := replicaID(home, number, Data)
		s := Shard{Number: n, Founders: []raft.ServerID{id}, Replicas: []Replica{{ID: id, Incarnation: incarnation}}}
		c.put(shardKey(n), s)
		shards = append(shards, s)
	}
	c.put(counterKey, number)
	c.txn.Success = append(c.txn.Success, put([]byte(sequencer.Key), sequencer.Encode(revision)))
	data, err := proto.Marshal(&pb.InternalRaftRequest{Txn: &c.txn})
	if err != nil {
		return nil, fsm.Request{}, fmt.Errorf("placement: encode the map: %w", err)
	}
	return shards, fsm.Request{Space: fsm.System, Data: data}, nil
}
