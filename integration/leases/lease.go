// Package leases holds leases on an etcd v3 service, records what their holders asked for and saw, and judges whether a
// lease or what is attached to it ended too early, too late, or not at all.
package leases

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"kvd/integration/linearizability"
)

// Service is one node as one client sees it. It must send a request at most once.
type Service interface {
	linearizability.Service
	LeaseGrant(context.Context, *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error)
	LeaseRevoke(context.Context, *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error)
	// KeepAlive renews a lease once.
	KeepAlive(ctx context.Context, id int64) (*pb.LeaseKeepAliveResponse, error)
	LeaseTimeToLive(context.Context, *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error)
}

// Kind is what an operation does.
type Kind uint8

const (
	Grant  Kind = iota
	Renew       // keeps a lease alive
	Attach      // puts a key with the lease
	Detach      // puts a key without the lease that it had
	Revoke      // ends a lease
	Left        // asks how long a lease has to live
	Look        // reads a key, linearizably
	Gone        // a watch told of a key's deletion; Answered is when
)

func (k Kind) String() string {
	return [...]string{"grant", "renew", "attach", "detach", "revoke", "time to live", "look", "gone"}[k]
}

// Outcome is what came of it.
type Outcome uint8

const (
	Done    Outcome = iota // Look: the key is there
	Missing                // the lease is not there; Look: the key is not there
	Unknown                // no answer: it may take effect at any time, or never
)

func (o Outcome) String() string { return [...]string{"done", "missing", "unknown"}[o] }

// Op is one operation on a lease or one of its keys. A key is only ever put with one lease, and deleted by nobody.
type Op struct {
	Kind           Kind
	Outcome        Outcome
	Lease          int64
	Key            string        // of Attach, Detach, Look and Gone
	Sent, Answered time.Duration // since the log began
	TTL            time.Duration // of Grant, Renew and Left: what the answer says
	Revision       int64         // of Attach, if it was answered, and of Gone, the deletion's
	Bare           bool          // Look: the key has no lease
}

func (o Op) String() string {
	return fmt.Sprintf("[%v, %v] %v lease %x key %q: %v, TTL %v", o.Sent.Round(time.Millisecond), o.Answered.Round(time.Millisecond), o.Kind, o.Lease, o.Key, o.Outcome, o.TTL)
}

// Log collects operations. All methods may be called concurrently.
type Log struct {
	began time.Time

	mu     sync.Mutex
	ops    []Op
	broken []Span
}

// Span is a time in which something was broken on purpose, or not mended yet.
type Span struct{ From, To time.Duration }

// NewLog begins a log.
func NewLog() *Log { return &Log{began: time.Now()} }

// Now is the time since the log began.
func (l *Log) Now() time.Duration { return time.Since(l.began) }

// Since is the moment of a time.
func (l *Log) Since(t time.Time) time.Duration { return t.Sub(l.began) }

// Add records operations.
func (l *Log) Add(ops ...Op) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ops = append(l.ops, ops...)
}

// Broke records a time in which something was broken.
func (l *Log) Broke(from, to time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken = append(l.broken, Span{l.Since(from), l.Since(to)})
}

// Ops returns what has been recorded.
func (l *Log) Ops() []Op {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.ops)
}

// Known are the revisions at which keys were put with leases.
func (l *Log) Known() (known []int64) {
	for _, op := range l.Ops() {
		if op.Kind == Attach && op.Outcome == Done {
			known = append(known, op.Revision)
		}
	}
	return known
}

// Broken returns when something was broken.
func (l *Log) Broken() []Span {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.broken)
}
