package wal

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"kvd/shard/wal/vfs"
)

// Refusals. Nothing has been written when one of these is returned.
var (
	// ErrGap: an entry does not follow the last one. The log has no holes, so raft must not acknowledge
	// what follows one.
	ErrGap = errors.New("raft log entries are not contiguous")

	// ErrGuarded: removing the end of the log would remove entries that the guard calls durable in the
	// state. They are committed; a raft that takes them back has gone wrong.
	ErrGuarded = errors.New("raft log entries at or below the guard cannot be taken back")

	// ErrVoteTerm: a vote's candidate was stored with no term before it.
	ErrVoteTerm = errors.New("vote without a term")

	// ErrTooLarge: the entries of one StoreLogs, or a stable key, are larger than the log can hold at once.
	ErrTooLarge = errors.New("too large for the raft log")

	// ErrNoReplica: the log has no such replica: never created, or removed.
	ErrNoReplica = errors.New("no such replica in the raft log")

	// ErrExists: the replica exists, or has existed. Its number is never used again.
	ErrExists = errors.New("replica exists in the raft log, or has existed")

	// ErrInUse: the replica's Store is open.
	ErrInUse = errors.New("replica of the raft log is in use")

	// ErrClosed: the Store or the Log has been closed.
	ErrClosed = errors.New("raft log is closed")

	// ErrKeyNotFound is the error for a stable key that is not set. Raft knows it by its text.
	ErrKeyNotFound = errors.New("not found")
)

// ErrLocked: another process, or another Log of this one, has the directory open.
var ErrLocked = errors.New("raft log is open elsewhere")

// ErrFailed: a write has failed, so nobody knows what of it is on the disk, and raft may believe in a log end
// that is not there. Every later write to any Store fails with this; only opening the log again helps. The
// disk's error is wrapped too.
var ErrFailed = errors.New("raft log failed")

// ErrCorrupt: something that was written is damaged or missing. The error names the file, and where.
var ErrCorrupt = errors.New("raft log is corrupt")

// ErrVersion: another version of kvd has written the log. Nothing is damaged.
var ErrVersion = errors.New("raft log of another version of kvd")

const (
	// DefaultSegmentBytes is Options.SegmentBytes where that is 0.
	DefaultSegmentBytes = 64 << 20

	// DefaultCacheBytes is ReplicaOptions.CacheBytes where that is 0.
	DefaultCacheBytes = 16 << 20
)

// ID names a replica for ever.
type ID struct {
	Group   uint64
	Replica uint64 // the number in `<node>/<number>`
}

func (id ID) String() string { return fmt.Sprintf("group %d replica %d", id.Group, id.Replica) }

// Options of a Log.
type Options struct {
	Dir string // made if it does not exist. Required
	FS  vfs.FS // nil: the operating system's

	// SegmentBytes is the size of the log's files; 0 is DefaultSegmentBytes. The very first one is a quarter of
	// that. A log that was written with another size goes on with this one. It keeps two files at least, and
	// no more than twice what is needed of it and a few files.
	SegmentBytes int64

	// NoSync leaves out fdatasync: a crash of the machine loses acknowledged entries and votes. Only for tests.
	NoSync bool

	Logger     *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil registers nothing

	faults faults
	fill   bool // write a new file once before it is used: a disk's syncs are cheaper then
}

// faults are planted by tests to prove that the checkers see them. The zero value plants none.
type faults struct {
	skipSync     bool // say that a batch is durable when it is only written
	ignoreSalt   bool // take batches of a file's former life for its own
	acceptBroken bool // go on behind a batch that is broken, as if it were not there
	forgetBounds bool // leave out, at replay, what removes the beginning or the end of a log
	retireEarly  bool // let the oldest segment go although entries in it are needed
}

// ReplicaOptions of a Store.
type ReplicaOptions struct {
	// CacheBytes bounds the recent entries that are kept in memory. 0 is DefaultCacheBytes, a negative value
	// is none.
	CacheBytes int

	// Guard returns the highest index up to which the beginning of the log may be removed, and above which
	// its end. It is asked at each removal, must not call the Store, and may be called concurrently. nil
	// allows everything to be removed.
	Guard func() uint64
}

// Validate says what is wrong with o.
func (o Options) Validate() error {
	switch {
	case o.Dir == "":
		return errors.New("raft log: no directory")
	case o.SegmentBytes != 0 && (o.SegmentBytes < minSegmentBytes || o.SegmentBytes > maxSegmentBytes):
		return fmt.Errorf("raft log: segments of %d bytes: %d to %d are possible", o.SegmentBytes, minSegmentBytes, maxSegmentBytes)
	}
	return nil
}

const (
	minSegmentBytes = 4 * blockBytes
	maxSegmentBytes = 1 << 30
)

func (o *Options) setDefaults() {
	if o.FS == nil {
		o.FS = vfs.OS
	}
	o.fill = o.fill || o.FS == vfs.OS && !o.NoSync
	if o.SegmentBytes == 0 {
		o.SegmentBytes = DefaultSegmentBytes
	}
	o.SegmentBytes = blocks(o.SegmentBytes)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}
