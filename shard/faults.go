package shard

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

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

func acknowledgeNow(batch []*proposal) {
	for _, item := range batch {
		item.done <- outcome{result: fsm.Result{Response: &pb.PutResponse{Header: &pb.ResponseHeader{}}}}
	}
}
