package server

import (
	"context"
	"encoding/binary"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// txnRead asks for a transaction that only reads, in one group.
type txnRead struct {
	group        uint64
	serializable bool
	// at is the newest revision handed out, if the transaction reads at
	// revisions: the leader must be complete up to it. 0 = it does not.
	at int64
	r  *pb.TxnRequest
}

// readTxnSharded answers a transaction that only reads. Its errors are gRPC
// statuses.
func (r *router) readTxnSharded(ctx context.Context, group uint64, t *pb.TxnRequest) (*pb.TxnResponse, error) {
	q := &txnRead{group: group, serializable: isSerializable(t), r: t}
	if readsRevisions(t) {
		var err error
		if q.at, err = r.latest(ctx); err != nil {
			return nil, err
		}
		q.serializable = false
	} else if state, release, err := r.pinHere(ctx, group, q.serializable); err == nil {
		defer release()
		ctx, answered := r.answers.metered(ctx)
		defer answered()
		resp, err := state.ReadTxn(ctx, fsm.User, t)
		if err != nil {
			return nil, refusal(err)
		}
		return resp, nil
	}
	var resp *pb.TxnResponse
	here := func(ctx context.Context, replica Replica) error {
		var release func()
		var err error
		if resp, release, err = r.txnHere(ctx, replica, q); err == nil {
			release()
		}
		return err
	}
	there := func(ctx context.Context, node string) error {
		var err error
		resp, err = r.txnThere(ctx, node, q)
		return err
	}
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	var err error
	if q.serializable {
		err = r.onState(ctx, group, "", here, there)
	} else {
		err = r.onLeader(ctx, group, here, there)
	}
	if err != nil {
		return nil, refusal(err)
	}
	return resp, nil
}

// readsRevisions reports whether a transaction has ranges at revisions.
func readsRevisions(t *pb.TxnRequest) bool {
	return !everyOp(t, func(op *pb.RequestOp) bool { return op.GetRequestRange().GetRevision() == 0 })
}

// txnHere answers from this node's replica. What is read counts until release.
func (r *router) txnHere(ctx context.Context, replica Replica, q *txnRead) (*pb.TxnResponse, func(), error) {
	var index uint64
	if !q.serializable {
		var err error
		if index, err = leaderIndex(ctx, replica, q.at); err != nil {
			return nil, nil, err
		}
	}
	state, unpin, err := pinFor(ctx, replica, index)
	if err != nil {
		return nil, nil, err
	}
	defer unpin()
	meter := r.answers.meter()
	resp, err := state.ReadTxnAt(fsm.WithMeter(ctx, &pageMeter{meter, r.sizes.wholeBytes}), fsm.User, q.r, q.at)
	if err != nil {
		meter.release()
		if errors.Is(err, errPageFull) {
			err = fsm.ErrReadsTooMuch
		}
		return nil, nil, err
	}
	return resp, meter.release, nil
}

// The request to read and its answer, beside what forward.go says:
//
//	read transaction: version 1, flags 1, group 8, timeout 4 (ms), at 8 | TxnRequest
//	answer:           version 1, code 1 | TxnResponse
const (
	readTxnHeader    = 22
	flagSerializable = 1 << 0
)

func (r *router) txnThere(ctx context.Context, node string, q *txnRead) (*pb.TxnResponse, error) {
	payload := make([]byte, readTxnHeader, readTxnHeader+proto.Size(q.r))
	payload[0] = protocolVersion
	call := r.ask
	if q.serializable {
		payload[1] |= flagSerializable
		call = r.askAnyone
	}
	binary.BigEndian.PutUint64(payload[2:], q.group)
	binary.BigEndian.PutUint32(payload[10:], timeoutMillis(ctx))
	binary.BigEndian.PutUint64(payload[14:], uint64(q.at))
	payload, err := proto.MarshalOptions{}.MarshalAppend(payload, q.r)
	if err != nil {
		return nil, err
	}
	r.metrics.forwardedReads.Inc()
	c, body, err := call(ctx, q.group, node, methodReadTxn, payload)
	switch {
	case err != nil:
		return nil, err
	case c == codeRefused:
		return nil, decodeRefusal(body)
	case c != codeOK:
		return nil, c.err()
	}
	resp := &pb.TxnResponse{}
	if proto.Unmarshal(body, resp) != nil || resp.Header == nil {
		return nil, errBadAnswer
	}
	return resp, nil
}

func (r *router) handleReadTxn(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	if len(payload) < readTxnHeader || payload[0] != protocolVersion {
		return answer(codeMalformed), nil
	}
	q := &txnRead{
		group: binary.BigEndian.Uint64(payload[2:]), serializable: payload[1]&flagSerializable != 0,
		at: int64(binary.BigEndian.Uint64(payload[14:])), r: &pb.TxnRequest{},
	}
	if proto.Unmarshal(payload[readTxnHeader:], q.r) != nil || checkTxn(q.r, MaxMaxTxnOps) != nil || !isReadOnly(q.r) || q.at < 0 {
		return answer(codeMalformed), nil
	}
	replica := r.ofKeys(q.group)
	if replica == nil {
		return r.decline(q.group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMost(ctx, binary.BigEndian.Uint32(payload[10:]))
	defer cancel()
	resp, release, err := r.txnHere(ctx, replica, q)
	if err != nil {
		return r.declineRead(q.group, replica, err), nil
	}
	defer release()
	reply := make([]byte, answerHeader, answerHeader+proto.Size(resp))
	reply[0], reply[1] = protocolVersion, byte(codeOK)
	if reply, err = (proto.MarshalOptions{}).MarshalAppend(reply, resp); err != nil {
		return answer(codeUnknown), nil
	}
	return reply, nil
}
