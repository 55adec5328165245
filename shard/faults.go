package shard

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// Faults are bugs that tests plant on purpose, to prove that the checkers of
// linearizability and durability see them. All are off unless a test says so.
type Faults struct {
	// ReadWithoutConfirmation serves reads without asking a quorum.
	ReadWithoutConfirmation bool
	// AcknowledgeBeforeCommit answers puts when the leader has queued them.
	AcknowledgeBeforeCommit bool
}

// acknowledgeNow answers the puts of a batch; nobody waits for them any more.
func acknowledgeNow(batch []*proposal) {
	for i, item := range batch {
		var r pb.InternalRaftRequest
		if err := proto.Unmarshal(item.request.Data, &r); err != nil || r.Put == nil {
			continue
		}
		batch[i] = &proposal{done: make(chan outcome, 1)}
		item.done <- outcome{result: fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{}}}}
	}
}
