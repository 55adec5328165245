package fsm

import "errors"

// Errors of single requests. The request changed nothing, on any replica.
var (
	// ErrCompacted: the revision asked for has been compacted.
	ErrCompacted = errors.New("fsm: required revision has been compacted")
	// ErrFutureRevision: the revision asked for is above the newest.
	ErrFutureRevision = errors.New("fsm: required revision is a future revision")
	// ErrKeyNotFound: a put with ignore_value or ignore_lease found no key to take them from.
	ErrKeyNotFound = errors.New("fsm: key not found")
	// ErrLeaseNotFound: the lease named does not exist, or is ending.
	ErrLeaseNotFound = errors.New("fsm: requested lease not found")
	// ErrLeaseExists: there is a lease with this id.
	ErrLeaseExists = errors.New("fsm: lease already exists")
	// ErrLeaseStale: a step with a lease comes too late or too early, as its LeaseKind says.
	ErrLeaseStale = errors.New("fsm: step with a lease is out of turn")
	// ErrStaleFloor: the entry's reserved revisions are not usable any more; propose the request again.
	ErrStaleFloor = errors.New("fsm: reserved revisions are stale")
	// ErrReadsTooMuch: a transaction that may write wanted to read more than one may.
	ErrReadsTooMuch = errors.New("fsm: transaction reads too much")
	// ErrUnknownSpace: a read named a key space that does not exist.
	ErrUnknownSpace = errors.New("fsm: unknown key space")
	// ErrNotReadOnly: a transaction given to ReadTxn writes.
	ErrNotReadOnly = errors.New("fsm: transaction is not read-only")
)

// ErrAnswerDropped: unlike after all of the above, the transaction has been executed. Its ranges and previous values
// were more than it may read, so there is no answer.
var ErrAnswerDropped = errors.New("fsm: transaction was executed, but reads too much to be answered")

// Errors of calls that do not go with the store's role.
var (
	// ErrWitness: a witness has no data to answer from.
	ErrWitness = errors.New("fsm: a witness has no data")
	// ErrNotWitness: the store holds data, of which nothing can be left out.
	ErrNotWitness = errors.New("fsm: not a witness")
)

// Errors that end a store. They are returned by every later call that would change it or wait for a change.
var (
	// ErrMalformedEntry: an entry cannot be decoded.
	ErrMalformedEntry = errors.New("fsm: malformed entry")
	// ErrUnknownCommand: an entry has a version or a command that this version of kvd does not know.
	ErrUnknownCommand = errors.New("fsm: unknown command")
	// ErrCorruptState: the file contradicts itself.
	ErrCorruptState = errors.New("fsm: corrupt state")
	// ErrClosed: the store has been closed.
	ErrClosed = errors.New("fsm: store is closed")
)

// Errors of moving rows from state to state.
var (
	// ErrMalformedRows: what should be a page of rows, or its cursor, is none.
	ErrMalformedRows = errors.New("fsm: malformed page of rows")
	// ErrRowOrder: rows do not come newest first, or two states have changes at the same revision.
	ErrRowOrder = errors.New("fsm: rows are not in order")
)

// Errors of Open, beside ErrCorruptState.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("fsm: state file is in use by another process")
	// ErrForeignState: the file belongs to another cluster or group.
	ErrForeignState = errors.New("fsm: state belongs to another cluster or group")
	// ErrWrongRole: the file is a witness's and was to be opened as one with data, or the reverse.
	ErrWrongRole = errors.New("fsm: state file has another role")
	// ErrUnknownFormat: the file was written by a newer version of kvd.
	ErrUnknownFormat = errors.New("fsm: unknown state format")
)

// errorCode is how the outcome of a request enters the digest.
func errorCode(err error) byte {
	switch err {
	case nil:
		return 0
	case ErrCompacted:
		return 1
	case ErrFutureRevision:
		return 2
	case ErrKeyNotFound:
		return 3
	case ErrLeaseNotFound:
		return 4
	case ErrStaleFloor:
		return 5
	case ErrReadsTooMuch:
		return 6
	case ErrAnswerDropped:
		return 7
	case ErrLeaseExists:
		return 8
	case ErrLeaseStale:
		return 9
	default:
		return 255
	}
}
