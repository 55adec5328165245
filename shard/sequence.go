package shard

import (
	"context"
	"fmt"
	"slices"
	"time"

	"kvd/fsm"
)

// Sequencer hands out revisions, each one once, to all groups of a cluster.
type Sequencer interface {
	// Reserve returns the first of as many consecutive revisions as count last
	// said. It calls count, once at a time, just before every time that it asks
	// whoever hands them out, and not any more when it has returned; if count
	// says 0, it returns 0 at once. What it returns is above everything that was
	// handed out before that last call. It tries until ctx ends.
	Reserve(ctx context.Context, count func() int) (first int64, err error)
}

// sequence is what a proposer knows of the revisions that it uses, in a group
// with a sequencer (docs/design.md section 6). An entry is closed, then its
// revisions are asked for, then it is proposed with the first of them as its
// floor and the term in which it was asked; one entry after the other, so that
// floors grow along the log. proposer.mu guards it, except pause.
type sequence struct {
	asks   []*ask             // not settled, oldest first
	open   *ask               // the last of them, while it is not answered
	cancel context.CancelFunc // of the call of Reserve under way
	gate   int64              // no entry is proposed with a floor at or below it

	hurried int           // asks in a row that were dropped because a read waited
	gated   int           // answers in a row that came too late for the gate
	pause   time.Duration // the last one between two asks; run's alone
}

// ask is one question for revisions, and the entry that uses the answer.
type ask struct {
	epoch   *epoch
	since   time.Time
	floor   int64         // 0: not answered
	settled chan struct{} // closed when the entry is applied, or never will be with this floor
	unknown bool          // or when nobody knows; set before
}

// A read that waits for revisions to be handed out drops the question after
// askPatience, so that reads go on while nobody hands them out, and the entry
// asks again. Each time in a row it may take twice as long, up to the maximum:
// reads must not starve the writes of a group that is far from the sequencer.
const (
	askPatience    = 200 * time.Millisecond
	maxAskPatience = 8 * askPatience
)

// maxGated is how often in a row snapshot reads may come first. They wait then
// for the entry that asks again, before they raise the gate once more.
const maxGated = 3

// Between two questions when the first was of no use.
const (
	minAskPause = 5 * time.Millisecond
	maxAskPause = 250 * time.Millisecond
)

// nextSequenced makes an entry of what is queued and of revisions that are
// reserved for it. If that fails it returns nothing, after a pause unless there
// is reason to try again at once.
func (p *proposer) nextSequenced(entry *fsm.EntryBuilder) ([]*proposal, *ask) {
	ctx, cancel := context.WithCancel(p.l.ctx)
	defer cancel()
	p.mu.Lock()
	p.sequence.cancel = cancel
	p.mu.Unlock()
	first, err := p.l.r.cfg.Sequencer.Reserve(ctx, p.ask)
	if err != nil {
		first = 0
	}
	batch, a := p.assign(first, entry)
	reached := p.l.state.store.Revision(fsm.User)
	switch {
	case len(batch) > 0:
		p.sequence.pause = 0
	case ctx.Err() != nil: // dropped
	case err != nil:
		p.l.r.slog.Info("no revisions could be reserved yet", "error", err)
		p.pauseAsking()
	case first > 0 && first <= reached:
		p.l.r.slog.Error("the sequencer is behind this group: nothing can be written before it has caught up", "reserved", first, "reached", reached)
		p.pauseAsking()
	}
	return batch, a
}

func (p *proposer) pauseAsking() {
	p.sequence.pause = min(max(2*p.sequence.pause, minAskPause), maxAskPause)
	timer := time.NewTimer(p.sequence.pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-p.l.done:
	}
}

// ask closes the next entry and says how many revisions it needs, just before
// they are asked for.
func (p *proposer) ask() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.settleOpen() // its answer will not be used
	e := p.l.role.Load()
	if p.refusing || e == nil || !e.isServing() {
		return 0
	}
	n := p.gather()
	if n > 0 {
		a := &ask{epoch: e, since: time.Now(), settled: make(chan struct{})}
		p.sequence.open = a
		p.sequence.asks = append(p.sequence.asks, a)
	}
	return n
}

// assign makes an entry of what is held and the answer to the open question.
// From here on it counts as proposed: whoever raises the gate waits for it.
func (p *proposer) assign(first int64, entry *fsm.EntryBuilder) ([]*proposal, *ask) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.sequence
	a := s.open
	if a == nil {
		return nil, nil
	}
	gated := first > 0 && first <= s.gate
	if first == 0 || gated || first <= p.l.state.store.Revision(fsm.User) {
		if gated {
			s.gated++
		}
		p.settleOpen()
		return nil, nil
	}
	batch := p.seal(entry)
	if len(batch) == 0 {
		p.settleOpen()
		return nil, nil
	}
	a.floor = first
	s.open, s.hurried, s.gated = nil, 0, 0
	entry.SetFloor(first, a.epoch.term)
	return batch, a
}

// settleOpen gives up the floor that has been asked for. p.mu is held.
func (p *proposer) settleOpen() {
	if a := p.sequence.open; a != nil {
		p.sequence.open = nil
		p.settle(a)
		p.l.r.metrics.floorsDropped.Inc()
	}
}

// dropAsk is settleOpen for those who do not answer the question: it ends the
// call too. p.mu is held.
func (p *proposer) dropAsk() {
	if p.sequence.open != nil {
		p.settleOpen()
		p.sequence.cancel()
	}
}

// settle ends the wait of reads. p.mu is held.
func (p *proposer) settle(a *ask) {
	close(a.settled)
	p.sequence.asks = slices.DeleteFunc(p.sequence.asks, func(b *ask) bool { return a == b })
}

// settled is told when raft has answered the entry.
func (p *proposer) settled(a *ask, unknown bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a.unknown = unknown
	p.settle(a)
}

// requeue puts back requests that the state machine has refused because of
// their entry's floor: they have done nothing, and go first.
func (p *proposer) requeue(batch []*proposal) {
	p.mu.Lock()
	e := p.l.role.Load()
	var back, lost []*proposal
	for _, item := range batch {
		switch {
		case p.refusing || e == nil:
			lost = append(lost, item)
		case item.taken.CompareAndSwap(proposed, queued):
			p.bytes += len(item.request.Data)
			back = append(back, item)
		}
	}
	p.queue = append(back, p.queue...)
	p.mu.Unlock()
	p.l.r.metrics.floorsDropped.Inc()
	for _, item := range lost {
		item.done <- outcome{err: ErrNotLeader}
	}
}

// unsettled are the questions that have been asked up to now.
func (p *proposer) unsettled() []*ask {
	if p.l.r.cfg.Sequencer == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.sequence.asks)
}

// raiseGate makes sure that no entry is proposed from here on with a floor of at
// or below, and returns the entries with such floors that may be in the log and
// not yet applied.
func (p *proposer) raiseGate(at int64) []*ask {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sequence.gate = max(p.sequence.gate, at)
	var below []*ask
	for _, a := range p.sequence.asks {
		if a.floor > 0 && a.floor <= at {
			below = append(below, a)
		}
	}
	return below
}

// isGated reports whether snapshot reads have come before an entry so often
// that they have to wait for it.
func (p *proposer) isGated() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sequence.gated >= maxGated
}

// await waits until all of the given questions are settled.
func (p *proposer) await(ctx context.Context, e *epoch, asks []*ask) error {
	for _, a := range asks {
		if err := p.awaitOne(ctx, e, a); err != nil {
			return err
		}
	}
	return nil
}

func (p *proposer) awaitOne(ctx context.Context, e *epoch, a *ask) error {
	var late <-chan time.Time
	if wait, ok := p.patience(a); ok {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		late = timer.C
	}
	for {
		select {
		case <-a.settled:
			if a.unknown { // the leadership is lost, and the entry may yet be applied
				return ErrNotLeader
			}
			return nil
		case <-late:
			p.hurry(a)
		case <-e.over:
			return ErrNotLeader
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrNotProposed, ctx.Err())
		}
	}
}

// patience is how long a read waits for the answer to a question, if it is
// open.
func (p *proposer) patience(a *ask) (time.Duration, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	wait := min(askPatience<<min(p.sequence.hurried, 8), maxAskPatience)
	return time.Until(a.since.Add(wait)), a == p.sequence.open
}

// hurry drops a question that a read has waited for long enough.
func (p *proposer) hurry(a *ask) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a == p.sequence.open {
		p.sequence.hurried++
		p.dropAsk()
	}
}
