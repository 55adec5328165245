package fsm

import "time"

// Pace spreads background work of the stores that share it: one step at a time, and after each a rest in proportion
// to what it took. So the work of one node takes a bounded share of one processor and of its disk, however many of
// its stores have some to do, and requests do not wait behind it.
type Pace struct {
	turn  chan struct{}
	rests time.Duration
}

// maxRest is for steps that took long for reasons of their own: a disk that stalled, a process that was stopped. What
// goes on must not stand still for a multiple of that.
const maxRest = 5 * time.Second

// NewPace rests after each step rests times as long as the step took, but 5 s at most.
func NewPace(rests int) *Pace {
	return &Pace{turn: make(chan struct{}, 1), rests: time.Duration(rests)}
}

// begin is the channel to send to for a turn: first come, first served.
func (p *Pace) begin() chan<- struct{} { return p.turn }

// end gives the turn to the next after the rest that a step of this length calls for.
func (p *Pace) end(took time.Duration) {
	time.AfterFunc(min(p.rests*took, maxRest), func() { <-p.turn })
}
