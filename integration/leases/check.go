package leases

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"kvd/integration/linearizability"
	"kvd/ring"
)

// Config says what to expect.
type Config struct {
	// Bound is how long after its end a lease's keys may still be there while nothing is broken. 0 = 5 s.
	Bound  time.Duration
	Broken []Span
	// Shards that keys and leases are spread over: each deletes its keys of a lease in one revision, and then refuses puts
	// with it. 0 = one store has all of them.
	Shards int
}

// Check returns nil if no lease and nothing attached to one was gone before the time to live that the last acknowledged
// renewal gave it, counted from when that was sent, or came back afterwards; if a revoked lease left nothing; if keys
// that had been taken from their lease stayed; and if, while nothing was broken, nothing outlived its lease by more
// than the bound. The error of a violation names a file with the lease's operations.
func Check(ops []Op, cfg Config) error {
	if cfg.Bound == 0 {
		cfg.Bound = 5 * time.Second
	}
	byLease := make(map[int64][]Op)
	for _, op := range ops {
		byLease[op.Lease] = append(byLease[op.Lease], op)
	}
	for id, ops := range byLease {
		l := newLease(ops)
		for _, rule := range []func(Config) error{l.early, l.back, l.revoked, l.kept, l.late, l.together} {
			if err := rule(cfg); err != nil {
				return fmt.Errorf("%w: lease %x: %w\n  kept in %s", linearizability.ErrViolation, id, err, keep(l.ops))
			}
		}
	}
	return nil
}

// lease is one lease's operations.
type lease struct {
	ops      []Op
	attached map[string]Op // the put of a key with it that was acknowledged first
}

func newLease(ops []Op) *lease {
	l := &lease{ops: ops, attached: make(map[string]Op)}
	for _, op := range ops {
		if first, ok := l.attached[op.Key]; op.Kind == Attach && op.Outcome == Done && (!ok || op.Answered < first.Answered) {
			l.attached[op.Key] = op
		}
	}
	return l
}

// lives reports whether the operation proves that the lease was there when it was carried out.
func (o Op) lives() bool {
	return o.Outcome == Done && (o.Kind == Grant || o.Kind == Renew || o.Kind == Attach || o.Kind == Left)
}

// extends reports whether it gave the lease its full time again.
func (o Op) extends() bool { return o.Outcome == Done && (o.Kind == Grant || o.Kind == Renew) }

// ended reports whether the operation proves that the lease was not there any more when it was answered.
func (l *lease) ended(op Op) bool {
	switch op.Kind {
	case Gone:
		return true
	case Look:
		put, ok := l.attached[op.Key]
		return op.Outcome == Missing && ok && put.Answered < op.Sent
	case Renew, Attach, Left:
		return op.Outcome == Missing
	default:
		return false
	}
}

// early: nothing ends before its time, unless somebody asked to revoke it. A renewal that was under way at the end came
// before it, so that it gave more time, or after it, and should have been refused.
func (l *lease) early(Config) error {
	for _, end := range l.ops {
		if !l.ended(end) || l.revokedBefore(end.Answered) {
			continue
		}
		for _, op := range l.ops {
			if op.extends() && op.Sent < end.Answered && end.Answered < op.Sent+op.TTL {
				return fmt.Errorf("gone %v early:\n  %v\n  %v", op.Sent+op.TTL-end.Answered, op, end)
			}
		}
	}
	return nil
}

func (l *lease) revokedBefore(t time.Duration) bool {
	return slices.ContainsFunc(l.ops, func(op Op) bool { return op.Kind == Revoke && op.Sent <= t })
}

// back: what has ended does not come back. Shards learn of the end one after the other, the lease's home first.
func (l *lease) back(cfg Config) error {
	for _, end := range l.ops {
		if !l.ended(end) {
			continue
		}
		for _, op := range l.ops {
			knows := cfg.place(op) == cfg.place(end) || cfg.place(op) == cfg.home(op.Lease)
			if op.lives() && knows && op.Sent > end.Answered {
				return fmt.Errorf("alive after it had ended:\n  %v\n  %v", end, op)
			}
		}
	}
	return nil
}

// home is the shard that a lease belongs to.
func (c *Config) home(id int64) int {
	if c.Shards == 0 {
		return 0
	}
	return ring.ShardOfLease(id, c.Shards)
}

// place is the shard that has carried an operation out.
func (c *Config) place(op Op) int {
	switch {
	case c.Shards == 0:
		return 0
	case op.Kind == Grant || op.Kind == Renew || op.Kind == Revoke || op.Kind == Left:
		return c.home(op.Lease)
	}
	return ring.ShardOf([]byte(op.Key), c.Shards)
}

// revoked: an acknowledged revocation leaves no key and no lease.
func (l *lease) revoked(Config) error {
	for _, revoke := range l.ops {
		if revoke.Kind != Revoke || revoke.Outcome != Done {
			continue
		}
		for _, op := range l.ops {
			left := op.Kind == Look && op.Outcome == Done && !op.Bare || op.lives()
			if left && op.Sent > revoke.Answered {
				return fmt.Errorf("left by a revocation:\n  %v\n  %v", revoke, op)
			}
		}
	}
	return nil
}

// kept: a key that has been taken from its lease stays.
func (l *lease) kept(Config) error {
	for _, detach := range l.ops {
		if detach.Kind != Detach || detach.Outcome != Done {
			continue
		}
		for _, op := range l.ops {
			if op.Kind == Look && op.Key == detach.Key && op.Sent > detach.Answered && (op.Outcome == Missing || op.Outcome == Done && !op.Bare) {
				return fmt.Errorf("a key without a lease is gone or has one:\n  %v\n  %v", detach, op)
			}
		}
	}
	return nil
}

// late: while nothing is broken, nothing outlives its lease for long.
func (l *lease) late(cfg Config) error {
	var last Op // the last that may have given it time
	for _, op := range l.ops {
		if (op.Kind == Grant || op.Kind == Renew) && op.Outcome != Missing && op.Answered > last.Answered {
			last = op
		}
	}
	ttl := time.Duration(0)
	for _, op := range l.ops {
		if op.extends() {
			ttl = max(ttl, op.TTL)
		}
	}
	for _, op := range l.ops {
		there := op.Kind == Look && op.Outcome == Done && !op.Bare || op.Kind == Left && op.Outcome == Done
		calm := !slices.ContainsFunc(cfg.Broken, func(s Span) bool { return s.To > op.Sent-ttl-cfg.Bound && s.From < op.Answered })
		if there && calm && ttl > 0 && op.Sent > last.Answered+ttl+cfg.Bound {
			return fmt.Errorf("still there %v after its end:\n  %v\n  %v", op.Sent-last.Answered-ttl, last, op)
		}
	}
	return nil
}

// together: all keys that are attached when a lease ends are deleted at once.
func (l *lease) together(cfg Config) error {
	var first Op
	for _, op := range l.ops {
		if op.Kind != Gone || cfg.Shards > 0 {
			continue
		}
		if first.Revision > 0 && op.Revision != first.Revision {
			return fmt.Errorf("its keys were deleted at two revisions, %d and %d", first.Revision, op.Revision)
		}
		first = op
	}
	return nil
}

// keep writes operations to a file.
func keep(ops []Op) string {
	file, err := os.CreateTemp("", "lease-*.json")
	if err != nil {
		return "no file: " + err.Error()
	}
	defer file.Close()
	lines := make([]string, len(ops))
	for i, op := range ops {
		lines[i] = op.String()
	}
	encoder := json.NewEncoder(file)
	encoder.SetIndent("", " ")
	if err := encoder.Encode(lines); err != nil {
		return "no file: " + err.Error()
	}
	return file.Name()
}

// Summary counts what has been put to the test.
type Summary struct {
	Leases, Renewals, Unknown int
	Revoked, Expired          int // leases of which that was seen
	Kept                      int // keys that were taken from their lease
	Refused                   int // puts with a lease that had ended
	Deletions                 int // watches told of
}

// Summarize counts.
func Summarize(ops []Op) (s Summary) {
	revoked, expired := make(map[int64]bool), make(map[int64]bool)
	for _, op := range ops {
		switch {
		case op.Outcome == Unknown:
			s.Unknown++
		case op.Kind == Grant:
			s.Leases++
		case op.Kind == Renew && op.Outcome == Done:
			s.Renewals++
		case op.Kind == Revoke:
			revoked[op.Lease] = true
		case op.Kind == Detach && op.Outcome == Done:
			s.Kept++
		case op.Kind == Attach && op.Outcome == Missing:
			s.Refused++
		case op.Kind == Gone:
			s.Deletions++
			expired[op.Lease] = true
		}
	}
	for id := range expired {
		if !revoked[id] {
			s.Expired++
		}
	}
	s.Revoked = len(revoked)
	return s
}

// Vacuous returns an error that wraps linearizability.ErrVacuous if something was never seen.
func (s Summary) Vacuous() error {
	for what, n := range map[string]int{"leases": s.Leases, "renewals": s.Renewals, "revocations": s.Revoked, "expiries": s.Expired, "keys taken from leases": s.Kept} {
		if n == 0 {
			return fmt.Errorf("%w: no %s", linearizability.ErrVacuous, what)
		}
	}
	return nil
}

// Add adds what another one counted.
func (s *Summary) Add(o Summary) {
	s.Leases += o.Leases
	s.Renewals += o.Renewals
	s.Unknown += o.Unknown
	s.Revoked += o.Revoked
	s.Expired += o.Expired
	s.Kept += o.Kept
	s.Refused += o.Refused
	s.Deletions += o.Deletions
}
