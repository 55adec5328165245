package fsm

import "time"

// Pace spreads background work of the stores that share it: one step at a time, and after each a rest in proportion
// to what it took. So the work of one node takes a bounded share of one processor and of its disk, however many of
// its stores have some to do, and requests do not wait behind it.
type Pace struct {
	turn  chan struct{}
	rests time.Duration
}

// NewPace rests after each step rests times as long as the step took.
func NewPace(rests int) *Pace {
	return &Pace{turn: make(chan struct{}, 1), rests: time.Duration(rests)}
}

// begin is the channel to send to for a turn: first come, first served.
func (p *Pace) begin() chan<- struct{} { return p.turn }

// end gives the turn to the next after the rest that a step of this length calls for.
func (p *Pace) end(took time.Duration) {
	time.AfterFunc(p.rests*took, func() { <-p.turn })
}
