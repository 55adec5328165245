package shard

import "errors"

var (
	// ErrNotLeader: this replica does not lead the group. The request is
	// certainly not in the log; send it to the leader.
	ErrNotLeader = errors.New("shard: not the leader")
	// ErrNotProposed: the caller's context ended while the request was still
	// queued. It is certainly not in the log.
	ErrNotProposed = errors.New("shard: request was not proposed in time")
	// ErrUnknownOutcome: the request was proposed and its fate is unknown: it
	// may have been applied, or be applied later.
	ErrUnknownOutcome = errors.New("shard: outcome of the request is unknown")
	// ErrOverloaded: too many bytes wait to be proposed. The request is
	// certainly not in the log; try again later.
	ErrOverloaded = errors.New("shard: too many requests are waiting")
	// ErrTooLarge: the request alone exceeds what one log entry may hold.
	ErrTooLarge = errors.New("shard: request is too large")
	// ErrNoState: this replica is a witness and has no state to read.
	ErrNoState = errors.New("shard: a witness has no state")
	// ErrClosed: the replica is closed.
	ErrClosed = errors.New("shard: replica is closed")
	// ErrLogGap: the log begins after the state's next entry (invariant I9).
	ErrLogGap = errors.New("shard: log begins after the durable state's next entry")
	// ErrLogBehind: the log does not have what the durable state has applied.
	ErrLogBehind = errors.New("shard: log lacks entries that the durable state has applied")
	// ErrContradicted: the leader does not have entries that were committed.
	ErrContradicted = errors.New("shard: committed entries are contradicted")
	// ErrBusy: another snapshot is being installed, or the replica is starting.
	ErrBusy = errors.New("shard: no snapshot can be installed now")
	// ErrNeeded: this witness would have to drop log entries that a data replica
	// may lack.
	ErrNeeded = errors.New("shard: the log of this witness is needed")
	// ErrNoTarget: no member can take over the leadership.
	ErrNoTarget = errors.New("shard: no such voter to lead")
)
