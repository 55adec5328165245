// Package linearizability drives concurrent clients against an etcd v3 key-value service, records what they
// did and saw, and judges whether one store that does one thing at a time could have answered so.
package linearizability

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// Kind is what an operation asks for.
type Kind uint8

const (
	Get    Kind = iota // a linearizable read of one key
	Stale              // a serializable read of one key: any past state of the store may answer
	Put                // a write of one key
	Delete             // a deletion of one key
	Swap               // a transaction: if the key's value is Expect, write Value, else read the key
)

func (k Kind) String() string {
	return [...]string{"get", "stale-get", "put", "delete", "swap"}[k]
}

// Input is what a client asked for. Values are unique over a history, except that operations of one
// transaction (same Op.Txn) write the same value.
type Input struct {
	Kind   Kind
	Key    string
	Value  string // Put, Swap: what to write
	Expect string // Swap: the value the key must have; "" = the key must not exist
	Prev   bool   // Put, Delete: asks for the value that was there before

	Snapshot bool // Get: part of a read of several shards; the answer's revision is its moment
	Past     bool // Stale: at a revision that the client named; the answer's revision is that one
}

// KV is one version of a key as a client saw it. The zero value is an absent key.
type KV struct {
	Found                bool
	Value                string
	Create, Mod, Version int64
}

// Output is what a client was told.
type Output struct {
	Unknown   bool  // no answer, or one that leaves open whether a write took place; nothing else is set
	Revision  int64 // of the response's header
	Seen      KV    // Get, Stale, a Swap that did not succeed; before the write where Prev was asked for
	Succeeded bool  // Swap: the comparison held
	Deleted   bool  // Delete: there was something to delete
}

// Open is the Return of an operation whose outcome is unknown: it may take effect at any time.
const Open = math.MaxInt64

// Op is one operation on one key. A request over several keys is one Op for each, with the same times and
// the same Txn.
type Op struct {
	Client       int // no two operations of one client overlap
	Txn          int64
	Call, Return int64 // readings of History.Now
	Input        Input
	Output       Output
}

// Changes reports whether the operation is known to have changed its key.
func (o Op) Changes() bool {
	switch {
	case o.Output.Unknown:
		return false
	case o.Input.Kind == Put:
		return true
	case o.Input.Kind == Delete:
		return o.Output.Deleted
	default:
		return o.Input.Kind == Swap && o.Output.Succeeded
	}
}

// observes reports whether the operation's answer says what was in its key.
func (o Op) observes() bool {
	switch {
	case o.Output.Unknown:
		return false
	case o.Input.Kind == Get || o.Input.Kind == Stale:
		return true
	case o.Input.Kind == Swap:
		return !o.Output.Succeeded
	default:
		return o.Input.Prev
	}
}

func (o Op) String() string {
	return fmt.Sprintf("[%d,%d] client %d: %s", o.Call, o.Return, o.Client, describe(o.Input, o.Output))
}

// History collects operations. Its clock is a counter, so that the order of two moments is never in doubt.
// The zero value is ready; all methods may be called concurrently.
type History struct {
	clock, lastTxn, lastClient atomic.Int64

	mu     sync.Mutex
	ops    []Op
	newest int64 // revision
}

// Now is later than every earlier call's result.
func (h *History) Now() int64 { return h.clock.Add(1) }

// newTxn returns an identifier for the operations of one request.
func (h *History) newTxn() int64 { return h.lastTxn.Add(1) }

// newClient returns an identifier that no operation has yet.
func (h *History) newClient() int { return int(h.lastClient.Add(1) - 1) }

// Add records finished operations.
func (h *History) Add(ops ...Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, ops...)
	for _, op := range ops {
		h.newest = max(h.newest, op.Output.Revision)
	}
}

// Ops returns a copy of what has been recorded, in the order of the calls.
func (h *History) Ops() []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	ops := slices.Clone(h.ops)
	slices.SortStableFunc(ops, func(a, b Op) int { return int(a.Call - b.Call) })
	return ops
}

// Newest returns the highest revision that any client was told of.
func (h *History) Newest() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.newest
}

// SnapshotsSince counts the snapshots that were asked for after a moment and have been answered.
func (h *History) SnapshotsSince(moment int64) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, count := int64(0), 0
	for _, op := range h.ops {
		if op.Input.Snapshot && op.Call > moment && !op.Output.Unknown && op.Txn != last {
			last = op.Txn
			count++
		}
	}
	return count
}

// ChangesSince counts the changes that were asked for after a moment and have succeeded.
func (h *History) ChangesSince(moment int64) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	count := 0
	for _, op := range h.ops {
		if op.Call > moment && op.Changes() {
			count++
		}
	}
	return count
}
