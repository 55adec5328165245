package fsm

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config says how a store runs. Zero fields get the defaults named beside them; only Path is required.
type Config struct {
	// Path of the bbolt file. It is created if it does not exist; its directory must.
	Path string

	// Group and ClusterID are whose state this is. Open refuses a file of another group, or of another cluster if
	// both ids are known; 0 is an unknown cluster.
	Group     uint64
	ClusterID uint64

	// Witness opens the state of a replica that votes and keeps a log, but holds no data: Apply does not look at
	// commands and has no results, and whatever needs data answers ErrWitness. A file keeps its role.
	Witness bool

	Logger     *slog.Logger          // discards
	Registerer prometheus.Registerer // nil leaves the metrics unregistered

	// What has been applied is written to disk after FlushInterval (100 ms) or FlushBytes (4 MiB), whichever is
	// first. Apply waits while more than MaxLagBytes (64 MiB) are not written yet.
	FlushInterval time.Duration
	FlushBytes    int64
	MaxLagBytes   int64

	// Flushes bounds how many stores write at a time; nil does not.
	Flushes *Flushes

	// CompactionBatch (1000) keys are looked at, or twice as many rows deleted, per step of a physical compaction.
	// Pace says when; without one, the store does a step whenever the one before has rested as long as it took.
	CompactionBatch int
	Pace            *Pace

	// InitialMmapBytes (8 GiB; 1 MiB for a witness) of address space are mapped at once, so that growing the file up to there never
	// waits for a long read.
	InitialMmapBytes int

	// NoSync leaves out fsync: a crash of the machine may then corrupt the file. For tests.
	NoSync bool

	maxDrops int // rememberedDrops; only tests have less

	faults faults
}

// Faults are those that whole nodes can take, in simulations.
type Faults struct {
	// SlowHistory is how long it takes to read a step of a watch's history. That must do no harm.
	SlowHistory time.Duration
	// WatchGap has a watch not read what was published while it read the history.
	WatchGap bool
}

// Planted returns the configuration with faults.
func (c Config) Planted(f Faults) Config {
	c.faults.Faults = f
	return c
}

// faults are wrong turns that tests take to see that they are noticed.
type faults struct {
	Faults
	stateNotWritten func() bool           // this flush leaves out the applied index
	rowNotWritten   func(key []byte) bool // this flush leaves out the row
	flushFails      func() error          // this flush fails
	rowNotDeleted   func(key []byte) bool // this compaction leaves the row
	outOfOrder      bool                  // compaction deletes newest rows first
	unlimited       bool                  // flushes do not wait for their turn
	paging          func()                // called between a page's looks at memory and at the file
	unjudged        bool                  // pages of rows have what compactions made unreadable
	nameNotSynced   func() error          // the name of a defragmented file cannot be made durable
	copying         func()                // called before a defragmentation copies
	publishing      func()                // called when changes can be read and have not been published
	catchingUp      func()                // called before a lagging watch reads what its view shows
	watchTwice      bool                  // a watch is given what it has read already
	watchSplit      func()                // called between two changes of a transaction, which the feeds can see
	anyTerm         bool                  // decisions about leases hold in other terms than theirs
	attachmentLost  bool                  // an overwritten key leaves its lease and does not get the new one
	keyForgotten    func() bool           // this end of a lease leaves its first key
	lateAttachments bool                  // leases that were dropped are attached again
}

func (c Config) withDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.FlushInterval, 100*time.Millisecond)
	setDefault(&c.FlushBytes, 4<<20)
	setDefault(&c.MaxLagBytes, 64<<20)
	setDefault(&c.CompactionBatch, 1000)
	setDefault(&c.maxDrops, rememberedDrops)
	if c.Pace == nil {
		c.Pace = NewPace(1)
	}
	if c.Witness {
		setDefault(&c.InitialMmapBytes, 1<<20)
	}
	setDefault(&c.InitialMmapBytes, 8<<30)
	return c
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate reports settings that cannot work.
func (c Config) Validate() error {
	switch {
	case c.Path == "":
		return errors.New("fsm: no path")
	case c.FlushInterval < 0, c.FlushBytes < 0, c.MaxLagBytes < 0, c.CompactionBatch < 0, c.InitialMmapBytes < 0:
		return errors.New("fsm: a negative interval or size")
	case c.MaxLagBytes != 0 && c.FlushBytes > c.MaxLagBytes:
		return fmt.Errorf("fsm: flush size %d is above the largest lag %d", c.FlushBytes, c.MaxLagBytes)
	}
	return nil
}
