package shard

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
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
	// HeartbeatFastPath handles heartbeats beside raft's main loop, as raft's
	// own transports do (hashicorp/raft#695): the heartbeat of a new leader
	// raises the term under a main loop that still waits as the leader of the
	// old one, and the next write enters its log under the new term.
	HeartbeatFastPath bool
	// ReadBeforeReserved skips rule 6 of docs/design.md section 5: reads of one
	// shard do not wait for entries that have asked for their revisions.
	ReadBeforeReserved bool
	// SnapshotBeforeInFlight answers snapshot reads without waiting for the
	// entries in flight that belong into the snapshot.
	SnapshotBeforeInFlight bool
	// SnapshotWithoutGate lets entries with revisions that a snapshot read has
	// already passed into the log.
	SnapshotWithoutGate bool
	// WitnessServes treats witnesses like data replicas, though their states
	// have applied nothing. It must be on from a replica's first start.
	WitnessServes bool

	witnessStands bool // witnesses stand for election like others
	sendLate      bool // the leader sends entries when it has written them
	succeedAlone  bool // a follower trusts its own verdict that the leader is dead
}

// isHeartbeat tells raft's heartbeats from its other AppendEntries.
func isHeartbeat(r *raft.AppendEntriesRequest) bool {
	return r.PrevLogEntry == 0 && len(r.Entries) == 0 && r.LeaderCommitIndex == 0
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

// fastPath hands heartbeats to raft as they arrive, and everything else a
// little later, as a slow network may: that makes the race certain.
type fastPath struct {
	Transport
	queue chan delayed
	out   chan raft.RPC
	done  chan struct{}
	close sync.Once
	tasks sync.WaitGroup

	mu      sync.Mutex
	handler func(raft.RPC)
}

type delayed struct {
	rpc raft.RPC
	due time.Time
}

const fastPathLead = 200 * time.Millisecond

func newFastPath(t Transport) *fastPath {
	f := &fastPath{Transport: t, queue: make(chan delayed, 1024), out: make(chan raft.RPC), done: make(chan struct{})}
	f.tasks.Go(f.receive)
	f.tasks.Go(f.forward)
	return f
}

func (f *fastPath) Consumer() <-chan raft.RPC { return f.out }

func (f *fastPath) SetHeartbeatHandler(handler func(raft.RPC)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.handler = handler
}

func (f *fastPath) Close() error {
	f.close.Do(func() { close(f.done) })
	err := f.Transport.Close()
	f.tasks.Wait()
	return err
}

func (f *fastPath) receive() {
	for {
		select {
		case rpc := <-f.Transport.Consumer():
			f.mu.Lock()
			handler := f.handler
			f.mu.Unlock()
			if req, ok := rpc.Command.(*raft.AppendEntriesRequest); ok && handler != nil && isHeartbeat(req) {
				handler(rpc)
				continue
			}
			select {
			case f.queue <- delayed{rpc, time.Now().Add(fastPathLead)}:
			case <-f.done:
				return
			}
		case <-f.done:
			return
		}
	}
}

func (f *fastPath) forward() {
	for {
		select {
		case m := <-f.queue:
			select {
			case <-time.After(time.Until(m.due)):
			case <-f.done:
				return
			}
			select {
			case f.out <- m.rpc:
			case <-f.done:
				return
			}
		case <-f.done:
			return
		}
	}
}
