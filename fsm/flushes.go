package fsm

// Flushes limits how many of the stores that share it write to disk at the same time. A disk gains nothing from
// hundreds of them at once, and the raft logs wait behind it.
type Flushes struct{ turns chan struct{} }

// NewFlushes lets n stores write at a time, at least one.
func NewFlushes(n int) *Flushes { return &Flushes{turns: make(chan struct{}, max(1, n))} }

// begin waits for a turn: first come, first served. Each turn ends with the write, so no wait needs to be broken off.
func (f *Flushes) begin() {
	if f != nil {
		f.turns <- struct{}{}
	}
}

func (f *Flushes) end() {
	if f != nil {
		<-f.turns
	}
}
