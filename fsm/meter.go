package fsm

import (
	"context"
	"errors"
)

// Meter is told what a read is about to cost, in bytes, and ends it with an error. Looking at a key costs something
// too, even where the answer does not hold it.
type Meter interface{ Take(bytes int) error }

type meterKey struct{}

// WithMeter makes Range, RangePage and ReadTxn ask m before they take memory. Their error is then m's.
func WithMeter(ctx context.Context, m Meter) context.Context {
	return context.WithValue(ctx, meterKey{}, m)
}

func meterOf(ctx context.Context) Meter {
	m, _ := ctx.Value(meterKey{}).(Meter)
	return m
}

// What one transaction of the log may read without asking, and what all of one entry may beyond that. A transaction
// is applied on every replica, and again after a restart: without a bound, one that reads everything a thousand
// times ends them all, and again at each start. All replicas must agree on these numbers.
const (
	freeReadBytes  = 64 << 10
	entryReadBytes = 256 << 20
)

// allowance is what the transactions of an entry may still read. What it counts is the same on all replicas.
type allowance struct {
	free  int // of the present transaction
	bytes int
}

func (a *allowance) Take(bytes int) error {
	// Replicas read the same in another order, so the order must not matter.
	free := min(bytes, a.free)
	a.free -= free
	a.bytes -= bytes - free
	if a.bytes < 0 {
		a.bytes = 0
		return errAllowance
	}
	return nil
}

// errAllowance becomes ErrReadsTooMuch or ErrAnswerDropped.
var errAllowance = errors.New("fsm: allowance used up")

// What a read costs beside the keys and values themselves.
const (
	visitBytes = 16  // a key that is looked at
	kvBytes    = 128 // a key that is returned
)

// take asks the view's meter, if it has one.
func (v *view) take(bytes int) error {
	if v.meter == nil {
		return nil
	}
	return v.meter.Take(bytes)
}
