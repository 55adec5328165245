package fsm

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Apply applies the entry at index, which was logged in term, and returns a result for each of its requests. An
// entry at or below AppliedIndex has been applied and is skipped, with no results. An error means that the entry
// was not understood or the store has failed: the replica must halt, as every replica of this version does at the
// same entry. Apply waits while MaxLagBytes of what was applied are not on disk.
func (s *Store) Apply(index, term uint64, data []byte) ([]Result, error) {
	if err := s.Err(); err != nil {
		return nil, err
	}
	if index <= s.applied.load() {
		return nil, nil
	}
	if s.config.Witness {
		s.advance(index, term)
		return nil, nil
	}
	e, err := decodeEntry(data)
	if err != nil {
		return nil, s.fail(fmt.Errorf("entry %d: %w", index, err))
	}
	if err := s.waitForFlusher(); err != nil {
		return nil, err
	}
	start := time.Now()
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.beginDigest(index, term)
	results, err := s.applyEntry(index, term, e)
	if err != nil {
		s.isTorn = true
		return nil, s.fail(fmt.Errorf("entry %d: %w", index, err))
	}
	s.commit(index, term, nil)
	s.metrics.applySeconds.Observe(time.Since(start).Seconds())
	s.metrics.requests.Add(float64(len(results)))
	return results, nil
}

// ApplyConfiguration applies a configuration entry: it is remembered with the state.
func (s *Store) ApplyConfiguration(index, term uint64, c raft.Configuration) error {
	if err := s.Err(); err != nil {
		return err
	}
	if index <= s.applied.load() {
		return nil
	}
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.beginDigest(index, term)
	c = c.Clone()
	_, _ = s.hasher.Write(appendConfiguration(nil, c))
	s.commit(index, term, &c)
	return nil
}

// waitForFlusher is the backpressure that bounds what a crash makes the log repeat, and the memory it is kept in.
func (s *Store) waitForFlusher() error {
	if s.pendingBytes.Load() <= s.config.MaxLagBytes {
		return nil
	}
	start := time.Now()
	defer func() { s.metrics.stallSeconds.Add(time.Since(start).Seconds()) }()
	for s.pendingBytes.Load() > s.config.MaxLagBytes {
		signal(s.flushNow)
		select {
		case <-s.drained:
		case <-s.failed:
			return s.failure
		case <-s.stop.Done():
			return ErrClosed
		}
	}
	return nil
}

func (s *Store) beginDigest(index, term uint64) {
	var b [24]byte
	binary.LittleEndian.PutUint64(b[0:], s.state.digest)
	binary.LittleEndian.PutUint64(b[8:], index)
	binary.LittleEndian.PutUint64(b[16:], term)
	s.hasher.Reset()
	_, _ = s.hasher.Write(b[:])
}

// commit ends an entry: from here on it may be flushed, and waiters see it.
func (s *Store) commit(index, term uint64, c *raft.Configuration) {
	s.mu.Lock()
	s.state.index, s.state.term = index, term
	if !s.config.Witness {
		s.state.digest = s.hasher.Sum64()
	}
	if c != nil {
		s.configuration, s.state.configurationIndex = *c, index
	}
	for i, sp := range s.spaces {
		s.state.spaces[i].revision = sp.revision
		s.state.spaces[i].compacted = sp.compacted
		s.state.spaces[i].keys = int64(sp.index.Live())
	}
	s.mu.Unlock()
	s.applied.advance(index)
	s.metrics.appliedIndex.Set(float64(index))
	if !s.isDirty {
		s.isDirty = true
		signal(s.dirty)
	}
	if s.activeBytes >= s.config.FlushBytes {
		signal(s.flushNow)
	}
}

func (s *Store) applyEntry(index, term uint64, e entry) ([]Result, error) {
	results := make([]Result, len(e.commands))
	if s.isStale(term, e) {
		for i, c := range e.commands {
			results[i].Err = ErrStaleFloor
			s.digestOutcome(c, ErrStaleFloor)
		}
		return results, nil
	}
	a := application{store: s, index: index, term: term, entry: e, results: results, puts: make([]putResponse, e.puts), reads: allowance{bytes: entryReadBytes}}
	for i := 0; i < len(e.commands); {
		before := len(s.spaces[User].active)
		n, err := a.apply(i)
		if err == nil {
			err = s.publish(before)
		}
		if err != nil {
			return nil, fmt.Errorf("request %d: %w", i, err)
		}
		i += n
	}
	return results, nil
}

// isStale says whether the revisions reserved for an entry cannot be used: they were given to a leader that has
// been replaced, or are not above what the state has.
func (s *Store) isStale(term uint64, e entry) bool {
	if e.floor == 0 {
		return false
	}
	return e.term != term || slices.ContainsFunc(e.commands, func(c command) bool { return e.floor <= s.spaces[c.space].revision })
}

func (s *Store) digestOutcome(c command, err error) {
	_, _ = s.hasher.Write([]byte{byte(c.space), errorCode(err)})
}

// application is the work on one entry.
type application struct {
	store   *Store
	index   uint64 // of the entry
	term    uint64
	entry   entry
	results []Result
	puts    []putResponse // not used yet
	writer  writer
	reads   allowance
}

// begin makes the writer ready for the i-th command.
func (a *application) begin(i int) *writer {
	c := &a.entry.commands[i]
	a.writer = a.store.newWriter(c.space)
	a.writer.index, a.writer.place, a.writer.term = a.index, i, a.term
	a.reads.free = freeReadBytes
	a.writer.meter = &a.reads
	if a.entry.floor != 0 {
		a.writer.reserve(a.entry.floor + int64(i))
	}
	if c.isPut {
		a.writer.response, a.puts = &a.puts[0], a.puts[1:]
	}
	return &a.writer
}

// apply applies the i-th command, or a run of plain puts that begins with it, and returns how many that were.
func (a *application) apply(i int) (n int, err error) {
	c := &a.entry.commands[i]
	if !c.isPlainPut() {
		w := a.begin(i)
		a.results[i], err = w.applyBounded(*c)
		w.keepUp()
		a.store.digestOutcome(*c, a.results[i].Err)
		return 1, err
	}
	// One hold of the lock for many puts: each Lock may have to wait for a reader's step.
	a.store.mu.Lock()
	for ; i+n < len(a.results) && n < scanBudget; n++ {
		c := &a.entry.commands[i+n]
		if !c.isPlainPut() {
			break
		}
		w := a.begin(i + n)
		if a.results[i+n].Err = w.checkPut(c.put); a.results[i+n].Err == nil {
			a.results[i+n].Response = w.plainPut(c.put)
		}
		a.store.digestOutcome(*c, a.results[i+n].Err)
	}
	a.store.mu.Unlock()
	return n, nil
}

// isPlainPut says whether a command is a put that needs to know nothing of the key.
func (c *command) isPlainPut() bool {
	return c.isPut && !c.put.prevKV && !c.put.ignoreValue && !c.put.ignoreLease
}
