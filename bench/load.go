package bench

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A put that loads a key is tried again after these times, doubled each time: for some three seconds in all.
const (
	loadBackoff    = 25 * time.Millisecond
	loadBackoffMax = 2 * time.Second
)

// load writes the keys that the workload reads, unless they are there. It returns how many it wrote.
func (r *run) load(ctx context.Context, w workload) (int, error) {
	if r.o.SkipLoad || r.o.Workload.Kind == Put {
		return 0, nil
	}
	l := &loading{run: r, last: new(atomic.Int64)}
	l.txns, _ = w.(*txns)
	p := r.phase("load", l, r.o.Keys, 0)
	p.rate = 0
	p.execute(ctx)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	operations, _ := p.rec.finish(0)
	if failed := operations[0].Errors; len(failed) > 0 {
		return 0, fmt.Errorf("%w: %d of %d keys: %s (%s)", ErrLoad, operations[0].Failed(), r.o.Keys, failed[0].Example, failed[0].Code)
	}
	return r.o.Keys, nil
}

// loading puts every key once.
type loading struct {
	*run
	last *atomic.Int64
	txns *txns // nil, or wants to know the revisions
}

func (*loading) operations() []string { return []string{"load"} }

func (l *loading) chooser(uint64) chooser { return sequence{int64(l.o.Keys), l.last} }

// do puts the next key, again if need be: an election or a server that sheds load may not end a long load.
func (l *loading) do(c *client) (int, outcome) {
	n := c.keys.next(c.rng)
	o := c.put(n)
	for wait := loadBackoff; o.err != nil && transient(o.err) && wait < loadBackoffMax && c.parent.Err() == nil; wait *= 2 {
		sleep(c.parent, wait)
		o = c.put(n)
	}
	if o.err == nil && l.txns != nil {
		l.txns.revisions[n].Store(c.call.revision)
	}
	return 0, o
}

// transient errors may be gone a little later.
func transient(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.ResourceExhausted, codes.DeadlineExceeded, codes.Aborted:
		return true
	}
	return false
}
