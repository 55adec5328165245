package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"runtime/debug"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
	"kvd/shard"
)

// Methods of the node-to-node protocol.
const (
	methodPropose   = "kv.propose"
	methodReadIndex = "kv.readindex"
	methodPage      = "kv.page"
	methodReadTxn   = "kv.readtxn"
	methodGate      = "kv.gate"
	methodRows      = "kv.rows"
	methodLeases    = "kv.leases"
	methodHash      = "kv.hash"
)

// HandlerFunc answers one call from another node. An error means that nothing
// is known about the outcome; every known outcome is an answer.
type HandlerFunc func(ctx context.Context, fromNode string, payload []byte) ([]byte, error)

// Requests and answers begin with this version. Both are fixed headers in big
// endian, followed by a body:
//
//	propose:    version 1, flags 1, space 1, group 8, timeout 4 (ms) | InternalRaftRequest
//	read index: version 1, group 8, timeout 4 (ms)
//	answer:     version 1, code 1 | response, or refusal, or read index
const (
	protocolVersion = 1
	proposeHeader   = 15
	readIndexHeader = 13
	answerHeader    = 2

	flagGrows = 1 << 0
)

// code is an answer's outcome.
type code uint8

const (
	codeOK          code = iota // body: marshalled response, or index
	codeRefused                 // body: kind of refusal 1, text
	codeNotLeader               // not in the log: ask who leads
	codeNotProposed             // not in the log: no time left
	codeOverloaded              // not in the log
	codeTooLarge                // not in the log
	codeNoSpace                 // not in the log
	codeMalformed               // not in the log: the request is not understood
	codeUnknown                 // anything may have happened
)

// errMalformed: the peer did not understand the request, so nothing happened.
var errMalformed = errors.New("server: peer does not understand the request")

var codeErrors = map[code]error{
	codeNotLeader:   shard.ErrNotLeader,
	codeNotProposed: shard.ErrNotProposed,
	codeOverloaded:  shard.ErrOverloaded,
	codeTooLarge:    shard.ErrTooLarge,
	codeNoSpace:     errNoSpace,
	codeMalformed:   errMalformed,
}

func codeOf(err error) code {
	if errors.Is(err, shard.ErrUnknownOutcome) {
		return codeUnknown
	}
	for c, known := range codeErrors {
		if errors.Is(err, known) {
			return c
		}
	}
	return codeUnknown
}

func (c code) err() error {
	if err, ok := codeErrors[c]; ok {
		return err
	}
	return shard.ErrUnknownOutcome
}

func answer(c code, body ...byte) []byte {
	return append([]byte{protocolVersion, byte(c)}, body...)
}

// timeoutMillis is how long the peer may take, so that it does not propose what
// nobody waits for any more.
func timeoutMillis(ctx context.Context) uint32 {
	deadline, ok := ctx.Deadline()
	if !ok {
		return math.MaxUint32
	}
	return uint32(min(max(time.Until(deadline).Milliseconds(), 0), math.MaxUint32))
}

// call makes one call and sorts its errors into reached and not reached.
func (r *router) call(ctx context.Context, node, method string, payload []byte) (code, []byte, error) {
	start := time.Now()
	reply, err := r.cfg.Peers.Call(ctx, node, method, payload)
	if r.sharded {
		r.heard(ctx, node, method, start, err)
	}
	switch {
	case err != nil && r.cfg.NotDelivered(err):
		return 0, nil, fmt.Errorf("%w: %w", errNotReached, err)
	case err != nil:
		return 0, nil, fmt.Errorf("%w: %w", shard.ErrUnknownOutcome, err)
	case len(reply) < answerHeader || reply[0] != protocolVersion:
		return 0, nil, fmt.Errorf("%w: %w", shard.ErrUnknownOutcome, errBadAnswer)
	}
	return code(reply[1]), reply[answerHeader:], nil
}

// heard notes whether a node answers in time. Reads are answered before their
// caller gives up; writes take as long as they take. What fails soon costs
// nothing to try again.
func (r *router) heard(ctx context.Context, node, method string, start time.Time, err error) {
	switch {
	case err == nil:
		r.quiet.answered(node, true)
	case time.Since(start) < gateTimeout/2:
	case r.cfg.NotDelivered(err), method != methodPropose && errors.Is(ctx.Err(), context.DeadlineExceeded):
		r.quiet.answered(node, false)
	}
}

// proposeThere asks the leader's node to propose a write.
func (r *router) proposeThere(ctx context.Context, node string, w *write) (fsm.Result, error) {
	payload := make([]byte, proposeHeader, proposeHeader+len(w.request.Data))
	payload[0], payload[2] = protocolVersion, byte(w.request.Space)
	if w.grows {
		payload[1] |= flagGrows
	}
	binary.BigEndian.PutUint64(payload[3:], w.group)
	binary.BigEndian.PutUint32(payload[11:], timeoutMillis(ctx))
	c, body, err := r.ask(ctx, w.group, node, methodPropose, append(payload, w.request.Data...))
	switch {
	case err != nil:
		return fsm.Result{}, err
	case c == codeRefused:
		return fsm.Result{Err: decodeRefusal(body)}, nil
	case c != codeOK:
		return fsm.Result{}, c.err()
	}
	response := w.answer()
	if put, ok := response.(*pb.PutResponse); ok {
		put.Header = &pb.ResponseHeader{}
		if decodeHeaderOnly(body, put.Header) {
			return fsm.Result{Response: put}, nil
		}
		response = w.answer()
	}
	if err := proto.Unmarshal(body, response); err != nil {
		return fsm.Result{}, fmt.Errorf("%w: %w", shard.ErrUnknownOutcome, err)
	}
	return fsm.Result{Response: response}, nil
}

// readIndexThere asks the leader's node for a read index.
func (r *router) readIndexThere(ctx context.Context, node string, group uint64) (uint64, error) {
	payload := make([]byte, readIndexHeader)
	payload[0] = protocolVersion
	binary.BigEndian.PutUint64(payload[1:], group)
	binary.BigEndian.PutUint32(payload[9:], timeoutMillis(ctx))
	c, body, err := r.ask(ctx, group, node, methodReadIndex, payload)
	switch {
	case err != nil:
		return 0, err
	case c != codeOK:
		return 0, c.err()
	case len(body) != 8:
		return 0, errBadAnswer
	}
	return binary.BigEndian.Uint64(body), nil
}

// handlers answer the calls above on the leader's node. They serve from the
// local replica only: a node that does not lead says so, and the caller, who
// may know better by now, decides where to go next.
func (r *router) handlers() map[string]HandlerFunc {
	all := map[string]HandlerFunc{
		methodPropose:   r.guarded(r.handlePropose),
		methodReadIndex: r.guarded(r.handleReadIndex),
	}
	maps.Copy(all, r.leases.handlers())
	if r.sharded {
		all[methodPage] = r.guarded(r.handlePage)
		all[methodReadTxn] = r.guarded(r.handleReadTxn)
		all[methodGate] = r.guarded(r.handleGate)
		all[methodRows] = r.guarded(r.handleRows)
		all[methodLeases] = r.guarded(r.handleLeases)
		all[methodHash] = r.guarded(r.handleHash)
		all[methodWatchPoll] = r.guarded(r.handleWatchPoll)
		all[methodWatchRead] = r.guarded(r.handleWatchRead)
	}
	return all
}

// ofKeys is this node's replica of a group that has keys; nil if there is none.
func (r *router) ofKeys(group uint64) Replica {
	if r.sharded && group == userGroup { // it has the cluster map
		return nil
	}
	return r.cfg.Replica(group)
}

// guarded keeps a peer's message from ending the process (I8).
func (r *router) guarded(h HandlerFunc) HandlerFunc {
	return func(ctx context.Context, from string, payload []byte) (reply []byte, err error) {
		defer func() {
			if p := recover(); p != nil {
				r.metrics.panics.Inc()
				r.cfg.Logger.Error("panic while answering a peer", "peer", from, "panic", p, "stack", string(debug.Stack()))
				reply, err = answer(codeUnknown), nil
			}
		}()
		return h(ctx, from, payload)
	}
}

func (r *router) handlePropose(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	if len(payload) < proposeHeader || payload[0] != protocolVersion {
		return answer(codeMalformed), nil
	}
	request := fsm.Request{Space: fsm.Space(payload[2]), Data: payload[proposeHeader:]}
	if err := checkForwardedRequest(request); err != nil {
		return answer(codeOf(err)), nil
	}
	group := binary.BigEndian.Uint64(payload[3:])
	replica := r.ofKeys(group)
	if replica == nil {
		return r.decline(group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMillis(ctx, binary.BigEndian.Uint32(payload[11:]))
	defer cancel()
	result, err := r.proposeHere(ctx, replica, request, payload[1]&flagGrows != 0)
	switch {
	case err != nil:
		return r.decline(group, replica, err), nil
	case result.Err != nil:
		return answer(codeRefused, encodeRefusal(result.Err)...), nil
	}
	if put, ok := result.Response.(*pb.PutResponse); ok && put.PrevKv == nil { // made by the state machine
		return appendPutResponse(append(make([]byte, 0, 32), protocolVersion, byte(codeOK)), put), nil
	}
	reply := make([]byte, answerHeader, answerHeader+proto.Size(result.Response))
	reply[0], reply[1] = protocolVersion, byte(codeOK)
	reply, err = proto.MarshalOptions{}.MarshalAppend(reply, result.Response)
	if err != nil {
		return answer(codeUnknown), nil
	}
	return reply, nil
}

func (r *router) handleReadIndex(ctx context.Context, from string, payload []byte) ([]byte, error) {
	if len(payload) != readIndexHeader || payload[0] != protocolVersion {
		return answer(codeMalformed), nil
	}
	group := binary.BigEndian.Uint64(payload[1:])
	replica := r.cfg.Replica(group)
	if replica == nil {
		return r.decline(group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMillis(ctx, binary.BigEndian.Uint32(payload[9:]))
	defer cancel()
	index, err := replica.ReadIndex(ctx)
	if err != nil {
		return r.decline(group, replica, err), nil
	}
	replica.AdvanceFollower(from, index)
	return binary.BigEndian.AppendUint64(answer(codeOK), index), nil
}

// decline answers with an error, and says who leads if it is that this node
// does not.
func (r *router) decline(group uint64, replica Replica, err error) []byte {
	c := codeOf(err)
	if c != codeNotLeader {
		return answer(c)
	}
	return answer(c, r.hint(group, replica)...)
}

// withMost leaves some of the caller's time for the answer to arrive in.
func withMost(ctx context.Context, ms uint32) (context.Context, context.CancelFunc) {
	return withMillis(ctx, ms-ms/4)
}

func withMillis(ctx context.Context, ms uint32) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, time.Duration(ms)*time.Millisecond)
}
