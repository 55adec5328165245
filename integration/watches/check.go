package watches

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kvd/integration/linearizability"
)

// Check returns nil if every watch delivered just what the ledger has for it: each change once, in the order of
// revisions, transactions whole, nothing left out up to what came last, and nothing at or below a revision for which
// progress had been told. A watch may end for a compaction that made unreadable what it had to tell next, and values from
// before an event may be missing if they were compacted. What clients were told of changes, ops, must be in the ledger, too. The error of a violation
// names a file with the watch.
func Check(watches []*Watch, l *Ledger, ops []linearizability.Op, compactions []Compaction) error {
	if err := l.Agree(ops); err != nil {
		return err
	}
	called := make(map[string]int64) // when a value was written
	for _, op := range ops {
		if op.Input.Value != "" {
			called[op.Input.Key+"\x00"+op.Input.Value] = op.Call
		}
	}
	for _, w := range watches {
		err := l.checkStart(w, ops)
		if err == nil {
			err = l.checkWatch(w, compactions)
		}
		if err == nil {
			err = checkEnd(w, compactions)
		}
		if err == nil {
			err = checkFuture(w, called)
		}
		if err != nil {
			return fmt.Errorf("%w: %w\n  %v\n  kept in %s", linearizability.ErrViolation, err, w, keep(w, l))
		}
	}
	return nil
}

// String tells what was watched.
func (w *Watch) String() string {
	return fmt.Sprintf("watch of [%q, %q) from %d on service %d, prev_kv %t, without puts %t, without deletions %t: created at %d, %d answers, ended: %q",
		w.Key, w.End, w.From, w.Node, w.Prev, w.NoPut, w.NoDelete, w.Created, len(w.Answers), w.Ended)
}

// checkStart checks that a watch from now on misses nothing that was asked for when it had been created.
func (l *Ledger) checkStart(w *Watch, ops []linearizability.Op) error {
	if w.Answered == 0 || w.From > 0 {
		return nil
	}
	for _, op := range ops {
		if op.Changes() && op.Call > w.Answered && op.Output.Revision <= w.Created {
			return fmt.Errorf("it had been created, at revision %d, when this change was asked for: %v", w.Created, op)
		}
	}
	return nil
}

// checkFuture checks that no event came before its value was written.
func checkFuture(w *Watch, called map[string]int64) error {
	for _, a := range w.Answers {
		for _, e := range a.Events {
			if call, ok := called[string(e.Kv.Key)+"\x00"+string(e.Kv.Value)]; ok && call > a.At {
				return fmt.Errorf("an event before its write was asked for: %v", e)
			}
		}
	}
	return nil
}

// checkEnd checks that a watch that was ended for a compaction could not go on.
func checkEnd(w *Watch, compactions []Compaction) error {
	switch {
	case w.Compacted == 0:
		return nil
	case w.next() >= w.Compacted:
		return fmt.Errorf("it was ended for a compaction at %d and was to go on from %d", w.Compacted, w.next())
	case !slices.ContainsFunc(compactions, func(c Compaction) bool { return c.Revision == w.Compacted && c.Asked < w.Closed }):
		return fmt.Errorf("it was ended for a compaction at %d that nobody had asked for", w.Compacted)
	}
	return nil
}

// checkWatch checks one watch against the ledger.
func (l *Ledger) checkWatch(w *Watch, compactions []Compaction) error {
	if w.Answered == 0 && len(w.Answers) > 0 {
		return fmt.Errorf("events before the answer that creates it")
	}
	due := l.due(w)
	done := w.start() - 1 // everything up to here has come
	for _, a := range w.Answers {
		if len(a.Events) == 0 {
			if len(due) > 0 && due[0].Revision <= a.Revision {
				return fmt.Errorf("progress at %d ahead of %v", a.Revision, due[0])
			}
			done = max(done, a.Revision)
			continue
		}
		for _, events := range byRevision(a.Events) {
			revision := events[0].Kv.ModRevision
			switch {
			case revision > a.Revision:
				return fmt.Errorf("events of revision %d in an answer of %d", revision, a.Revision)
			case revision <= done:
				return fmt.Errorf("an event of revision %d, though everything up to %d had come: %v", revision, done, events[0])
			case len(due) == 0 || revision < due[0].Revision:
				return fmt.Errorf("an event that never was: %v", events[0])
			case revision > due[0].Revision:
				return fmt.Errorf("a gap: %v has not come before %v", due[0], events[0])
			}
			n := 0
			for n < len(due) && due[n].Revision == revision {
				n++
			}
			forgotten := slices.ContainsFunc(compactions, func(c Compaction) bool { return c.Revision >= revision && c.Asked < a.At })
			if err := l.checkRevision(w, due[:n], events, forgotten); err != nil {
				return err
			}
			due, done = due[n:], revision
		}
	}
	return nil
}

// start is the first revision of which the watch is to tell. One that begins now may begin a little before its answer
// says.
func (w *Watch) start() int64 {
	if w.From > 0 {
		return w.From
	}
	start := w.Created + 1
	for _, a := range w.Answers {
		if len(a.Events) > 0 {
			return min(start, a.Events[0].Kv.ModRevision)
		}
	}
	return start
}

// due are the changes that the watch is to tell of.
func (l *Ledger) due(w *Watch) []Change {
	start := w.start()
	var due []Change
	for _, c := range l.Changes {
		if c.Revision >= start && w.covers(c) {
			due = append(due, c)
		}
	}
	return due
}

// byRevision cuts events wherever the revision changes.
func byRevision(events []*mvccpb.Event) (cut [][]*mvccpb.Event) {
	for i, e := range events {
		if i == 0 || e.Kv.ModRevision != events[i-1].Kv.ModRevision {
			cut = append(cut, nil)
		}
		cut[len(cut)-1] = append(cut[len(cut)-1], e)
	}
	return cut
}

// checkRevision compares the events of one revision with its changes, which are by key. What was there before may be
// forgotten.
func (l *Ledger) checkRevision(w *Watch, changes []Change, events []*mvccpb.Event, forgotten bool) error {
	if len(events) != len(changes) {
		return fmt.Errorf("%d events of revision %d in one answer, which changed %d keys: %v", len(events), changes[0].Revision, len(changes), changes)
	}
	left := make(map[string]Change)
	for _, c := range changes {
		left[c.Key] = c
	}
	for _, e := range events {
		c, ok := left[string(e.Kv.Key)]
		if !ok {
			return fmt.Errorf("a second event, or one of another key, at revision %d: %v", changes[0].Revision, e)
		}
		delete(left, c.Key)
		if err := checkEvent(w, c, e, forgotten); err != nil {
			return err
		}
	}
	return l.checkOrder(changes[0].Revision, events)
}

// checkEvent compares an event with its change.
func checkEvent(w *Watch, c Change, e *mvccpb.Event, forgotten bool) error {
	want := &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: c.KV}
	if c.KV == nil {
		want.Type, want.Kv = mvccpb.Event_DELETE, &mvccpb.KeyValue{Key: []byte(c.Key), ModRevision: c.Revision}
	}
	if w.Prev && !(forgotten && e.PrevKv == nil) {
		want.PrevKv = c.Prev
	}
	if !proto.Equal(want, e) {
		return fmt.Errorf("the event is %v, and should be %v", e, want)
	}
	return nil
}

// checkOrder checks the order of a transaction's events where it is known: that of its operations, and of deletions
// that of the keys.
func (l *Ledger) checkOrder(revision int64, events []*mvccpb.Event) error {
	var keys []string
	deletions := true
	for _, e := range events {
		keys = append(keys, string(e.Kv.Key))
		deletions = deletions && e.Type == mvccpb.Event_DELETE
	}
	order := slices.DeleteFunc(slices.Clone(l.order[revision]), func(key string) bool { return !slices.Contains(keys, key) })
	if len(order) == len(keys) && !slices.Equal(order, keys) {
		return fmt.Errorf("the events of revision %d are of %q, which were written in the order %q", revision, keys, order)
	}
	if deletions && !slices.IsSorted(keys) {
		return fmt.Errorf("the deletions of revision %d are of %q", revision, keys)
	}
	return nil
}

// keep writes a watch and what it should have told to a file.
func keep(w *Watch, l *Ledger) string {
	file, err := os.CreateTemp("", "watch-*.json")
	if err != nil {
		return "no file: " + err.Error()
	}
	defer file.Close()
	if err := json.NewEncoder(file).Encode(map[string]any{"watch": w, "due": l.due(w)}); err != nil {
		return "no file: " + err.Error()
	}
	return file.Name()
}

// Summary counts what watches have put to the test.
type Summary struct {
	Watches, Events, Progress int
	Transactions              int // answers with several events of one revision
	Resumed                   int // events that came first after a watch was resumed
	Switched                  int // watches that began in the past and went on into what came after their creation
	Ended                     int // by the server or its death
	Compacted                 int // by the server, for a compaction
}

// Summarize counts.
func Summarize(watches []*Watch) (s Summary) {
	for _, w := range watches {
		s.Watches++
		if w.Ended != "" {
			s.Ended++
		}
		if w.Compacted > 0 {
			s.Compacted++
		}
		past, live, first := false, false, true
		for _, a := range w.Answers {
			s.Events += len(a.Events)
			if len(a.Events) == 0 {
				s.Progress++
			}
			for _, events := range byRevision(a.Events) {
				past = past || events[0].Kv.ModRevision <= w.Created
				live = live || events[0].Kv.ModRevision > w.Created
				if len(events) > 1 {
					s.Transactions++
				}
				if first && w.Resumed {
					s.Resumed++
				}
				first = false
			}
		}
		if past && live && w.From > 0 {
			s.Switched++
		}
	}
	return s
}

// Vacuous returns an error that wraps linearizability.ErrVacuous if something was never seen.
func (s Summary) Vacuous() error {
	for what, n := range map[string]int{
		"events": s.Events, "progress": s.Progress, "transactions of several keys": s.Transactions, "watches that were resumed": s.Resumed,
		"watches from the past into the present": s.Switched, "watches that were compacted": s.Compacted,
	} {
		if n == 0 {
			return fmt.Errorf("%w: no %s", linearizability.ErrVacuous, what)
		}
	}
	return nil
}

// Add adds what another one counted.
func (s *Summary) Add(o Summary) {
	s.Watches += o.Watches
	s.Events += o.Events
	s.Progress += o.Progress
	s.Transactions += o.Transactions
	s.Resumed += o.Resumed
	s.Switched += o.Switched
	s.Ended += o.Ended
	s.Compacted += o.Compacted
}
