package linearizability

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

var (
	// ErrViolation says that no store could have given these answers.
	ErrViolation = errors.New("linearizability: violation")
	// ErrUndecided says that the search ran out of time. It is a failure: nothing has been proved.
	ErrUndecided = errors.New("linearizability: undecided")
	// ErrVacuous says that the history could hardly have shown a violation.
	ErrVacuous = errors.New("linearizability: vacuous history")
)

// Window is a time in which something was broken on purpose, in readings of History.Now.
type Window struct {
	Fault    string // the kind of fault
	From, To int64
}

// Config bounds a check.
type Config struct {
	Timeout time.Duration // of the search; 0 = 1 minute
	Dir     string        // where a violation's picture goes; "" = the directory for temporary files
	// OneOrder also checks the order between keys by revisions: right for a store in which every change has a
	// revision of its own.
	OneOrder bool
	// Sharded says that answers carry the revision of their shard instead of the store's, except snapshots.
	Sharded bool
}

// Check returns nil if ops, in the order of their calls, are linearizable. A violation's error names the
// picture that shows it.
func Check(ops []Op, cfg Config) error {
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Minute
	}
	var orderErr error
	if cfg.OneOrder {
		orderErr = checkRevisions(ops, cfg.Sharded)
	}
	m, history := model(), operations(ops)
	result := search(m, history, cfg.Timeout)
	if result == porcupine.Unknown && orderErr == nil {
		return fmt.Errorf("%w after %v over %d operations, which are in %s", ErrUndecided, cfg.Timeout, len(ops), keep(ops, cfg.Dir))
	}
	if result != porcupine.Illegal && orderErr == nil {
		return nil
	}
	err := orderErr
	if result == porcupine.Illegal {
		err = errors.Join(err, fmt.Errorf("%w: no order of the operations on some key explains the answers", ErrViolation))
	}
	_, info := porcupine.CheckOperationsVerbose(m, history, cfg.Timeout) // slower: keeps what the picture needs
	return fmt.Errorf("%w\nshown in %s; the operations are in %s", err, picture(m, info, cfg.Dir), keep(ops, cfg.Dir))
}

// search looks for an order of each key's operations. Writes without an answer that nobody saw may be left for after
// everything else, where they explain nothing and disturb nobody; only if there is no order without them are they
// tried everywhere, which can take very long where there are many.
func search(m porcupine.Model, history []porcupine.Operation, timeout time.Duration) porcupine.CheckResult {
	deadline, undecided := time.Now().Add(timeout), false
	for _, part := range partition(history) {
		unseen := func(op porcupine.Operation) bool { return op.Output.(Output).Unknown && op.Return == Open }
		few := slices.DeleteFunc(slices.Clone(part), unseen)
		result := porcupine.CheckOperationsTimeout(m, few, max(time.Until(deadline)/2, time.Millisecond))
		if result != porcupine.Ok && len(few) < len(part) {
			result = porcupine.CheckOperationsTimeout(m, part, max(time.Until(deadline), time.Millisecond))
		}
		switch result {
		case porcupine.Illegal:
			return porcupine.Illegal
		case porcupine.Unknown:
			undecided = true
		}
	}
	if undecided {
		return porcupine.Unknown
	}
	return porcupine.Ok
}

// keep writes a history to a file.
func keep(ops []Op, dir string) string {
	file, err := os.CreateTemp(dir, "linearizability-*.json")
	if err != nil {
		return "no file: " + err.Error()
	}
	defer file.Close()
	if err := json.NewEncoder(file).Encode(ops); err != nil {
		return "no file: " + err.Error()
	}
	return file.Name()
}

// operations translates a history for the search. Reads without an answer say nothing, and serializable ones
// need no place in the order. A write without an answer stays open, but not beyond the end of the first
// operation that saw its value, by which it must have taken effect; and who saw it says at which revision it did,
// which spares the search most of its choices.
func operations(ops []Op) []porcupine.Operation {
	firstSeen := make(map[string]int64)
	seenAt := make(map[string]int64) // the revision; 0 = they disagree
	for _, op := range ops {
		if !op.observes() || !op.Output.Seen.Found {
			continue
		}
		id := op.Input.Key + "\x00" + op.Output.Seen.Value
		if first, ok := firstSeen[id]; !ok || op.Return < first {
			firstSeen[id] = op.Return
		}
		if at, ok := seenAt[id]; !ok {
			seenAt[id] = op.Output.Seen.Mod
		} else if at != op.Output.Seen.Mod {
			seenAt[id] = 0
		}
	}
	var out []porcupine.Operation
	for _, op := range ops {
		if op.Input.Kind == Stale || op.Input.Kind == Get && op.Output.Unknown {
			continue
		}
		id := op.Input.Key + "\x00" + op.Input.Value
		if seen, ok := firstSeen[id]; ok && op.Output.Unknown && op.Input.Value != "" {
			op.Return = max(op.Call, min(op.Return, seen))
			if at := seenAt[id]; at > 0 {
				op.Input.Prev = false // that part of the answer is lost
				op.Output = Output{Revision: at, Succeeded: op.Input.Kind == Swap}
			}
		}
		out = append(out, porcupine.Operation{ClientId: op.Client, Input: op.Input, Call: op.Call, Output: op.Output, Return: op.Return})
	}
	return out
}

func picture(m porcupine.Model, info porcupine.LinearizationInfo, dir string) string {
	file, err := os.CreateTemp(dir, "linearizability-*.html")
	if err != nil {
		return "no picture: " + err.Error()
	}
	defer file.Close()
	if err := porcupine.Visualize(m, info, file); err != nil {
		return "no picture: " + err.Error()
	}
	return file.Name()
}

// Summary counts what a history holds.
type Summary struct {
	Operations, Unknown                       int
	Puts, Swaps, RefusedSwaps, Deletes, Reads int            // answered; deletions and reads of something that was there
	Overlaps                                  int            // adjacent operations on one key of which one changes it
	ChangesDuring                             map[string]int // by kind of fault: changes that began and succeeded in it
	// Snapshots are answered reads of several shards at one moment, SnapshotsDuring those that began and were answered
	// in a fault, by its kind. ReadPast are reads of a revision of the past. A chance is a snapshot while which at
	// least two keys changed: it could have been torn.
	Snapshots, Chances, ReadPast int
	SnapshotsDuring              map[string]int
}

// Summarize counts.
func Summarize(ops []Op, windows []Window) Summary {
	s := Summary{Operations: len(ops), ChangesDuring: make(map[string]int), SnapshotsDuring: make(map[string]int)}
	s.countSnapshots(ops, windows)
	latest := make(map[string]Op) // per key, the operation that returns last
	for _, op := range ops {
		s.count(op)
		if before, ok := latest[op.Input.Key]; ok && before.Return > op.Call && (before.Changes() || op.Changes()) {
			s.Overlaps++
		}
		if op.Return > latest[op.Input.Key].Return && !op.Output.Unknown {
			latest[op.Input.Key] = op
		}
	}
	for _, w := range windows {
		s.ChangesDuring[w.Fault] += 0 // so that a kind without any is there
		for _, op := range ops {
			if op.Changes() && op.Call > w.From && op.Return < w.To {
				s.ChangesDuring[w.Fault]++
			}
		}
	}
	return s
}

func (s *Summary) count(op Op) {
	if op.Output.Unknown {
		s.Unknown++
		return
	}
	switch op.Input.Kind {
	case Put:
		s.Puts++
	case Swap:
		if op.Output.Succeeded {
			s.Swaps++
		} else {
			s.RefusedSwaps++
		}
	case Delete:
		if op.Output.Deleted {
			s.Deletes++
		}
	case Get:
		if op.Output.Seen.Found {
			s.Reads++
		}
	}
}

// countSnapshots counts what a store of shards answered as of one moment.
func (s *Summary) countSnapshots(ops []Op, windows []Window) {
	for _, w := range windows {
		s.SnapshotsDuring[w.Fault] += 0
	}
	counted := make(map[int64]bool)
	for i, op := range ops {
		if op.Input.Past && !op.Output.Unknown {
			s.ReadPast++
		}
		if !op.Input.Snapshot || op.Output.Unknown || counted[op.Txn] {
			continue
		}
		counted[op.Txn] = true
		s.Snapshots++
		if changedKeysDuring(ops, i) >= 2 {
			s.Chances++
		}
		for _, w := range windows {
			if op.Call > w.From && op.Return < w.To {
				s.SnapshotsDuring[w.Fault]++
			}
		}
	}
}

// changedKeysDuring counts the keys, up to 2, that changed while an operation was under way.
func changedKeysDuring(ops []Op, i int) int {
	key, count := "", 0
	for j := max(0, i-1000); j < len(ops) && ops[j].Call < ops[i].Return && count < 2; j++ {
		if ops[j].Changes() && ops[j].Return > ops[i].Call && (count == 0 || ops[j].Input.Key != key) {
			key = ops[j].Input.Key
			count++
		}
	}
	return count
}

// VacuousSnapshots is Vacuous for what is special about shards: reads across them, some of which could have been torn,
// some in every kind of fault, and reads of the past.
func (s Summary) VacuousSnapshots() error {
	for name, count := range map[string]int{"snapshots": s.Snapshots, "snapshots while keys changed": s.Chances, "reads of the past": s.ReadPast} {
		if count == 0 {
			return fmt.Errorf("%w: no %s", ErrVacuous, name)
		}
	}
	for fault, count := range s.SnapshotsDuring {
		if count == 0 {
			return fmt.Errorf("%w: no snapshot succeeded during %s", ErrVacuous, fault)
		}
	}
	return nil
}

// Vacuous returns ErrVacuous, with the reason, if the history lacks overlap, some effect, or, for some kind of
// fault, a change that succeeded while it lasted.
func (s Summary) Vacuous() error {
	for name, count := range map[string]int{
		"overlapping operations": s.Overlaps, "puts": s.Puts, "successful swaps": s.Swaps, "refused swaps": s.RefusedSwaps,
		"effective deletions": s.Deletes, "reads of a value": s.Reads,
	} {
		if count == 0 {
			return fmt.Errorf("%w: no %s", ErrVacuous, name)
		}
	}
	for fault, count := range s.ChangesDuring {
		if count == 0 {
			return fmt.Errorf("%w: no change succeeded during %s", ErrVacuous, fault)
		}
	}
	return nil
}
