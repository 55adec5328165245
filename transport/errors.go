package transport

import (
	"errors"
	"fmt"
)

// Errors about requests. The ones marked definite mean that no handler saw the request, so it may be
// sent again without risk.
var (
	// ErrUnreachable is definite: the request was not handed to a connection, or never left this node.
	ErrUnreachable = errors.New("peer is unreachable")
	// ErrConnectionLost means the connection broke after the request had (at least partly) been
	// written: whether it was handled is unknown.
	ErrConnectionLost = errors.New("connection was lost while waiting for the answer")
	// ErrBusy is definite: the peer runs as many handlers as it may.
	ErrBusy = errors.New("peer is busy")
	// ErrNoHandler is definite: the peer has no handler for the method.
	ErrNoHandler = errors.New("peer has no handler for the method")
	// ErrTooLarge is definite: the message is over Config.MaxMessageBytes.
	ErrTooLarge = errors.New("message is too large")
	// ErrTimeout means a raft message or a snapshot stream made no progress in its time.
	ErrTimeout = errors.New("no answer in time")
	// ErrUnknownReplica means the peer has not opened the replica that a raft message was for.
	ErrUnknownReplica = errors.New("replica is not open on the peer")
	// ErrSuspended is returned by the raft messages of a suspended Group.
	ErrSuspended = errors.New("group is suspended")
	// ErrClosed is returned after Close of the Transport or the Group.
	ErrClosed = errors.New("transport is closed")
)

// Errors of the handshake. Calls that meet them return them wrapped together with ErrUnreachable.
var (
	// ErrClusterMismatch means the two nodes belong to different clusters, or one of them to none.
	ErrClusterMismatch = errors.New("peer belongs to another cluster")
	// ErrWrongNode means another node than the expected one answers at the address.
	ErrWrongNode = errors.New("another node answers at this address")
	// ErrVersion means the two nodes have no protocol version in common.
	ErrVersion = errors.New("peer speaks another protocol version")
)

// errMalformed is the reason for closing a connection that carried bytes outside the protocol.
var errMalformed = errors.New("malformed frame")

// RemoteError is a handler's own failure. Code 0 stands for a handler error that is no RemoteError.
type RemoteError struct {
	Code    uint32
	Message string
}

func (e *RemoteError) Error() string {
	text := e.Message
	if text == "" {
		text = "the peer's handler failed"
	}
	if e.Code == 0 {
		return text
	}
	return fmt.Sprintf("%s (code %d)", text, e.Code)
}

// status is the outcome of a request on the wire.
type status uint8

const (
	statusOK status = iota
	statusError
	statusBusy
	statusNoHandler
	statusUnknownReplica
)

const maxErrorBytes = 4 << 10 // longer messages of remote errors are cut

// appendError appends the wire form of a failed outcome.
func appendError(b []byte, err error) []byte {
	switch {
	case errors.Is(err, ErrBusy):
		return append(b, byte(statusBusy))
	case errors.Is(err, ErrNoHandler):
		return append(b, byte(statusNoHandler))
	case errors.Is(err, ErrUnknownReplica):
		return append(b, byte(statusUnknownReplica))
	}
	remote := &RemoteError{Message: err.Error()}
	errors.As(err, &remote)
	b = append(b, byte(statusError))
	b = appendUint(b, uint64(remote.Code))
	return append(b, remote.Message[:min(len(remote.Message), maxErrorBytes)]...)
}

// parseOutcome splits an answer into its payload or the error that it carries.
func parseOutcome(b []byte) ([]byte, error) {
	d := decoder{b: b}
	switch s := status(d.byte()); {
	case d.bad:
		return nil, errMalformed
	case s == statusOK:
		return d.b, nil
	case s == statusBusy:
		return nil, ErrBusy
	case s == statusNoHandler:
		return nil, ErrNoHandler
	case s == statusUnknownReplica:
		return nil, ErrUnknownReplica
	case s == statusError:
		code := d.uint()
		return nil, &RemoteError{Code: uint32(code), Message: string(d.b)}
	default:
		return nil, fmt.Errorf("%w: unknown status %d", errMalformed, s)
	}
}
