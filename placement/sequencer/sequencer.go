// Package sequencer hands out the revisions of a cluster whose keys are spread
// over many groups: a counter on the leader of group 0, and a client on every
// node that gathers what its replicas and reads want from it.
//
// It follows docs/design.md section 6.
package sequencer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"kvd/fsm"
	"kvd/shard"
)

// Group0 is this node's replica of group 0; shard.Replica implements it.
type Group0 interface {
	Confirm(ctx context.Context) (index, term uint64, err error)
	Propose(ctx context.Context, request fsm.Request) (fsm.Result, error)
	AcquireState(ctx context.Context, minIndex uint64) (*fsm.Store, func(), error)
	Leader() shard.Leader
	LeaderChanged() <-chan struct{}
}

// Peers calls the other nodes.
type Peers interface {
	Call(ctx context.Context, node, method string, payload []byte) ([]byte, error)
}

// Method is the name under which a node answers the clients of the others.
const Method = "sequencer.reserve"

var (
	// ErrNotLeader: this node does not lead group 0, and nothing was handed out.
	ErrNotLeader = errors.New("sequencer: group 0 is led elsewhere")
	// ErrTooMany: nobody may have so many revisions at a time.
	ErrTooMany = errors.New("sequencer: too many revisions at a time")
	// ErrClosed: the server or client is closed.
	ErrClosed = errors.New("sequencer: closed")
)

// Key holds, in the system key space of group 0, the last revision that may
// have been handed out, in decimal. It is absent while that is the 1 of an
// empty store.
const Key = "sequencer"

// Encode is the value of Key. Whoever founds a cluster with keys that have
// revisions already writes the highest of them.
func Encode(last int64) []byte { return strconv.AppendInt(nil, last, 10) }

func decode(value []byte) (int64, error) {
	last, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || last < firstRevision {
		return 0, fmt.Errorf("sequencer: malformed record %q", value)
	}
	return last, nil
}

// firstRevision is the revision of an empty store.
const firstRevision = 1

// maxReserve bounds one reservation: more than all shards of a node ask for
// together.
const maxReserve = 1 << 24

// A request is a version (1 byte) and a number of revisions (8, big endian); 0
// asks for the latest one. An answer is a version, a code (1), and the first
// revision that belongs to the asker (8): the one before is the latest of all
// others.
const (
	wireVersion   = 1
	requestBytes  = 9
	responseBytes = 10

	codeOK        = 0
	codeNotLeader = 1
	codeMalformed = 2
	codeFailed    = 3
)

var errMalformed = errors.New("sequencer: malformed message")

func appendRequest(n int64) []byte {
	return binary.BigEndian.AppendUint64([]byte{wireVersion}, uint64(n))
}

func parseRequest(b []byte) (int64, error) {
	if len(b) != requestBytes || b[0] != wireVersion {
		return 0, errMalformed
	}
	n := int64(binary.BigEndian.Uint64(b[1:]))
	if n < 0 || n > maxReserve {
		return 0, fmt.Errorf("%w: %w", errMalformed, ErrTooMany)
	}
	return n, nil
}

func appendResponse(first int64, err error) []byte {
	code := byte(codeFailed)
	switch {
	case err == nil:
		code = codeOK
	case errors.Is(err, ErrNotLeader):
		code = codeNotLeader
	case errors.Is(err, errMalformed):
		code = codeMalformed
	}
	return binary.BigEndian.AppendUint64([]byte{wireVersion, code}, uint64(first))
}

func parseResponse(b []byte) (first int64, err error) {
	if len(b) != responseBytes || b[0] != wireVersion {
		return 0, errMalformed
	}
	first = int64(binary.BigEndian.Uint64(b[2:]))
	switch b[1] {
	case codeOK:
		if first <= firstRevision {
			return 0, errMalformed
		}
		return first, nil
	case codeNotLeader:
		return 0, ErrNotLeader
	case codeMalformed:
		return 0, errMalformed
	default:
		return 0, errors.New("sequencer: the leader of group 0 could not answer")
	}
}
