package server

import (
	"context"
	"errors"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kvd/fsm"
)

// refusals are the definite answers of the state machine: nothing changed,
// except after fsm.ErrAnswerDropped.
// Their kinds are part of the node-to-node protocol; never renumber them.
var refusals = []struct {
	kind byte
	err  error // of fsm
	grpc error // what the client is told
}{
	{1, fsm.ErrCompacted, rpctypes.ErrGRPCCompacted},
	{2, fsm.ErrFutureRevision, rpctypes.ErrGRPCFutureRev},
	{3, fsm.ErrKeyNotFound, rpctypes.ErrGRPCKeyNotFound},
	{4, fsm.ErrLeaseNotFound, rpctypes.ErrGRPCLeaseNotFound},
	{5, fsm.ErrReadsTooMuch, kvdError(codes.ResourceExhausted, ReasonTooMuchRead, "the request reads too much at once: read less, or outside of a transaction that writes")},
	{6, fsm.ErrAnswerDropped, kvdError(codes.ResourceExhausted, ReasonAnswerDropped, "the transaction was executed, but reads too much to be answered: read less in it")},
	{8, fsm.ErrLeaseExists, rpctypes.ErrGRPCLeaseExist},
	{9, fsm.ErrLeaseStale, status.Error(codes.Unavailable, "kvd: the lease is changing hands, try again")},
	{7, errBusy, kvdError(codes.ResourceExhausted, ReasonBusy, "the answers under way take as much memory as they may already: read less at once, or try again")},
}

// refusal is the client's answer for an error of the state machine; gRPC
// statuses stay as they are.
func refusal(err error) error {
	for _, known := range refusals {
		if errors.Is(err, known.err) {
			return known.grpc
		}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.Error(codes.Unknown, err.Error())
}

// errBusy is a meter's.
var errBusy = errors.New("server: answers take too much memory")

func isRefusal(err error) bool {
	for _, known := range refusals {
		if errors.Is(err, known.err) {
			return true
		}
	}
	return false
}

// encodeRefusal is a kind (0 = none of the known ones) and the text.
func encodeRefusal(err error) []byte {
	for _, known := range refusals {
		if errors.Is(err, known.err) {
			return []byte{known.kind}
		}
	}
	return append([]byte{0}, err.Error()...)
}

func decodeRefusal(body []byte) error {
	if len(body) == 0 {
		return errBadAnswer
	}
	for _, known := range refusals {
		if body[0] == known.kind {
			return known.err
		}
	}
	return errors.New(string(body[1:]))
}

// Reasons of kvd's own errors, in errdetails.ErrorInfo. Clients may rely on
// them.
const (
	errorDomain = "kvd"

	// ReasonUnsupported: kvd does not have this function of etcd.
	ReasonUnsupported = "UNSUPPORTED"
	// ReasonNotJoined: this node does not belong to a cluster yet.
	ReasonNotJoined = "NOT_JOINED"
	// ReasonInternal: a bug; the node's log has the details.
	ReasonInternal = "INTERNAL"
	// ReasonOtherLeader: another member than the one asked for was elected.
	ReasonOtherLeader = "OTHER_LEADER"
	// ReasonTooMuchRead: the request reads more than one may; nothing changed.
	ReasonTooMuchRead = "TOO_MUCH_READ"
	// ReasonAnswerDropped: the transaction was executed, but its answer would
	// have been larger than one may be.
	ReasonAnswerDropped = "ANSWER_DROPPED"
	// ReasonBusy: this node does as much of it as it is allowed to.
	ReasonBusy = "BUSY"
	// ReasonStalled: the client has not read what it asked for in time.
	ReasonStalled = "STALLED"
	// ReasonCrossShard: the keys of a transaction are not all in one shard.
	ReasonCrossShard = "CROSS_SHARD"
	// ReasonPartial: the request was executed in some shards and not in others;
	// it can be repeated.
	ReasonPartial = "PARTIAL"
	// ReasonMembership: the member cannot be removed, or not now.
	ReasonMembership = "MEMBERSHIP"
	// ReasonNoState: nothing has been written on this node yet.
	ReasonNoState = "NO_STATE"
)

// kvdError is one of kvd's own conditions.
func kvdError(c codes.Code, reason, message string) error {
	s := status.New(c, "kvd: "+message)
	detailed, err := s.WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: errorDomain})
	if err != nil {
		return s.Err()
	}
	return detailed.Err()
}

// reasonOf is the reason of one of kvd's own errors; empty for all others.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.Domain == errorDomain {
			return info.Reason
		}
	}
	return ""
}

func unsupported(what string) error {
	return kvdError(codes.Unimplemented, ReasonUnsupported, what+" not supported")
}

func notJoined() error {
	return kvdError(codes.Unavailable, ReasonNotJoined, "this node does not serve the key space yet")
}
