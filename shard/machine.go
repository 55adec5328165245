package shard

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/hashicorp/raft"

	"kvd/fsm"
)

// machine feeds committed log entries to the state. It implements
// raft.BatchingFSM, which hands over configurations through ApplyBatch.
type machine struct{ l *life }

var _ raft.BatchingFSM = (*machine)(nil)

// applied answers one log entry.
type applied struct {
	term    uint64
	results []fsm.Result
}

// errHalted answers the entry that the state machine could not apply, and all
// that follow.
var errHalted = errors.New("shard: state machine has halted")

// Apply implements raft.FSM.
func (m *machine) Apply(entry *raft.Log) any { return m.ApplyBatch([]*raft.Log{entry})[0] }

// ApplyBatch implements raft.BatchingFSM. A state machine that cannot apply an
// entry stops there for good: skipping one would make replicas differ (I4).
func (m *machine) ApplyBatch(entries []*raft.Log) []any {
	start := time.Now()
	answers := make([]any, len(entries))
	for i, entry := range entries {
		results, err := m.apply(entry)
		if err != nil {
			m.l.r.fail(fmt.Errorf("apply log entry %d: %w", entry.Index, err))
			m.l.halted.Store(true)
			for j := i; j < len(entries); j++ {
				answers[j] = errHalted
			}
			return answers
		}
		m.l.tail.add(entry)
		answers[i] = applied{term: entry.Term, results: results}
	}
	m.l.r.metrics.applySeconds.Observe(time.Since(start).Seconds())
	if m.l.role.Load() != nil {
		select {
		case m.l.committed <- struct{}{}:
		default:
		}
	}
	return answers
}

func (m *machine) apply(entry *raft.Log) ([]fsm.Result, error) {
	if m.l.halted.Load() {
		return nil, errHalted
	}
	store := m.l.state.store
	switch entry.Type {
	case raft.LogCommand:
		if m.l.r.cfg.Faults.WitnessServes && IsWitness(m.l.r.cfg.Replica) {
			_, err := store.Apply(entry.Index, entry.Term, emptyEntry())
			return nil, err // writes here have an unknown outcome
		}
		return store.Apply(entry.Index, entry.Term, entry.Data)
	case raft.LogConfiguration:
		return nil, store.ApplyConfiguration(entry.Index, entry.Term, raft.DecodeConfiguration(entry.Data))
	default:
		return nil, fmt.Errorf("unexpected log entry type %v", entry.Type)
	}
}

// Snapshot implements raft.FSM: nothing is copied, raft only wants to know
// that the log up to here may go once Persist has returned.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	if m.l.halted.Load() {
		return nil, errHalted
	}
	return &truncation{l: m.l, index: m.l.state.store.AppliedIndex()}, nil
}

// Restore implements raft.FSM. Raft never calls it: snapshots are installed
// beside it (install.go) and are not restored at start.
func (m *machine) Restore(body io.ReadCloser) error {
	return errors.Join(errors.New("shard: snapshots are not restored through raft"), body.Close())
}

// truncation makes the state durable, so that the log before it may go.
type truncation struct {
	l     *life
	index uint64
}

// Persist implements raft.FSMSnapshot.
func (t *truncation) Persist(sink raft.SnapshotSink) error {
	if err := t.l.state.store.Flush(t.l.ctx, t.index); err != nil {
		return fmt.Errorf("make the state durable up to %d: %w", t.index, err)
	}
	t.l.r.metrics.truncations.Inc()
	return nil
}

// Release implements raft.FSMSnapshot.
func (t *truncation) Release() {}
