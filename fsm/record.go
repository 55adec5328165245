package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"kvd/fsm/mvcc"
)

// The file has these buckets:
//
//	key, system   the rows of the key spaces User and System: mvcc.Revision.AppendKey -> mvcc.AppendRow or
//	              AppendTombstone. Name and content of the first are etcd's, so that hashes agree
//	meta          format         -> 1 byte, formatVersion or formatLeases
//	              role           -> witnessRole; absent if the file is for data
//	              identity       -> group (8), cluster id (8); big endian, as all below
//	              state          -> record of the last entry whose effects are in the file; absent before the first
//	              configuration  -> latest raft configuration: appendConfiguration
//
// and, if it has format formatLeases, those of leaserecord.go. All of them are written in the one transaction of a
// flush.
var (
	metaBucket   = []byte("meta")
	spaceBuckets = [spaces][]byte{[]byte("key"), []byte("system")}

	formatKey        = []byte("format")
	roleKey          = []byte("role")
	identityKey      = []byte("identity")
	stateKey         = []byte("state")
	configurationKey = []byte("configuration")
)

const (
	formatVersion = 1
	formatLeases  = 2 // with a table of leases
)

// state is where a sequence of whole entries has led.
type state struct {
	index, term, digest uint64
	configurationIndex  uint64
	spaces              [spaces]spaceState
}

type spaceState struct {
	revision  int64
	compacted int64
	finished  int64 // last compaction that has deleted all its rows; set by the flusher
	keys      int64 // live ones
}

// emptyState is that of a new file.
func emptyState() state {
	var s state
	for i := range s.spaces {
		s.spaces[i] = spaceState{revision: 1, compacted: -1, finished: -1}
	}
	return s
}

const stateBytes = 4*8 + spaces*4*8

func appendState(b []byte, s state) []byte {
	for _, v := range []uint64{s.index, s.term, s.digest, s.configurationIndex} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	for _, sp := range s.spaces {
		for _, v := range []int64{sp.revision, sp.compacted, sp.finished, sp.keys} {
			b = binary.BigEndian.AppendUint64(b, uint64(v))
		}
	}
	return b
}

func parseState(b []byte) (state, error) {
	if len(b) != stateBytes {
		return state{}, fmt.Errorf("%w: state record of %d bytes", ErrCorruptState, len(b))
	}
	next := func() uint64 {
		v := binary.BigEndian.Uint64(b)
		b = b[8:]
		return v
	}
	s := state{index: next(), term: next(), digest: next(), configurationIndex: next()}
	for i := range s.spaces {
		s.spaces[i] = spaceState{revision: int64(next()), compacted: int64(next()), finished: int64(next()), keys: int64(next())}
	}
	return s, nil
}

// appendConfiguration encodes a configuration by hand, so that all versions of all replicas agree on the bytes.
func appendConfiguration(b []byte, c raft.Configuration) []byte {
	b = binary.AppendUvarint(b, uint64(len(c.Servers)))
	for _, s := range c.Servers {
		b = append(b, byte(s.Suffrage))
		for _, text := range []string{string(s.ID), string(s.Address)} {
			b = binary.AppendUvarint(b, uint64(len(text)))
			b = append(b, text...)
		}
	}
	return b
}

func parseConfiguration(b []byte) (c raft.Configuration, err error) {
	malformed := fmt.Errorf("%w: raft configuration", ErrCorruptState)
	count, n := binary.Uvarint(b)
	if n <= 0 {
		return c, malformed
	}
	b = b[n:]
	text := func() (string, bool) {
		size, n := binary.Uvarint(b)
		if n <= 0 || size > uint64(len(b)-n) {
			return "", false
		}
		t := string(b[n:][:size])
		b = b[n+int(size):]
		return t, true
	}
	for range count {
		if len(b) == 0 {
			return c, malformed
		}
		suffrage := raft.ServerSuffrage(b[0])
		b = b[1:]
		id, ok := text()
		address, ok2 := text()
		if !ok || !ok2 {
			return c, malformed
		}
		c.Servers = append(c.Servers, raft.Server{Suffrage: suffrage, ID: raft.ServerID(id), Address: raft.ServerAddress(address)})
	}
	if len(b) != 0 {
		return c, malformed
	}
	return c, nil
}

// storedState is what the meta bucket holds.
type storedState struct {
	witness          bool
	group, clusterID uint64
	state            state
	configuration    raft.Configuration
}

func readStored(tx *bbolt.Tx) (m storedState, err error) {
	bucket := tx.Bucket(metaBucket)
	if bucket == nil {
		return m, fmt.Errorf("%w: no bucket %q", ErrCorruptState, metaBucket)
	}
	if format := bucket.Get(formatKey); len(format) != 1 || format[0] != formatVersion && format[0] != formatLeases {
		return m, fmt.Errorf("%w: %x", ErrUnknownFormat, format)
	} else if hasLeases := tx.Bucket(leaseBucket) != nil; hasLeases != (format[0] == formatLeases) {
		return m, fmt.Errorf("%w: format %d, and bucket %q is there: %t", ErrCorruptState, format[0], leaseBucket, hasLeases)
	}
	switch role := bucket.Get(roleKey); {
	case role == nil:
	case bytes.Equal(role, witnessRole):
		m.witness = true
	default:
		return m, fmt.Errorf("%w: role %q", ErrUnknownFormat, role)
	}
	identity := bucket.Get(identityKey)
	if len(identity) != 16 {
		return m, fmt.Errorf("%w: identity of %d bytes", ErrCorruptState, len(identity))
	}
	m.group, m.clusterID = binary.BigEndian.Uint64(identity), binary.BigEndian.Uint64(identity[8:])
	m.state = emptyState()
	if record := bucket.Get(stateKey); record != nil {
		if m.state, err = parseState(record); err != nil {
			return m, err
		}
	}
	if c := bucket.Get(configurationKey); c != nil {
		m.configuration, err = parseConfiguration(c)
	}
	return m, err
}

func putIdentity(tx *bbolt.Tx, group, clusterID uint64) error {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, 16), group)
	return tx.Bucket(metaBucket).Put(identityKey, binary.BigEndian.AppendUint64(b, clusterID))
}

// load makes the store what the file says, after creating what a new file lacks.
func (s *Store) load(db *bbolt.DB) (err error) {
	defer catchCorruption(&err)()
	if err := db.Update(s.prepare); err != nil {
		return err
	}
	return db.View(func(tx *bbolt.Tx) error {
		m, err := readStored(tx)
		if err != nil {
			return err
		}
		s.clusterID = m.clusterID
		s.state, s.configuration = m.state, m.configuration
		s.durableState, s.durableConfig = m.state, m.configuration
		s.applied.advance(m.state.index)
		s.durable.advance(m.state.index)
		if s.leases, err = loadLeases(tx, s.config.maxDrops); err != nil {
			return err
		}
		keys := keyLeases{}
		for i, sp := range s.spaces {
			of := m.state.spaces[i]
			sp.revision, sp.compacted, sp.trimmed = of.revision, of.compacted, of.finished
			sp.finished.advance(finishedMark(of.finished))
			row := keys.row
			if sp.id != User || tx.Bucket(leaseBucket) == nil {
				row = nil
			}
			if err := sp.rebuild(tx.Bucket(sp.bucket), row); err != nil {
				return err
			}
			if live := int64(sp.index.Live()); live != of.keys {
				return fmt.Errorf("%w: %d live keys in bucket %q instead of %d", ErrCorruptState, live, sp.bucket, of.keys)
			}
		}
		return s.leases.attachAll(keys)
	})
}

// prepare creates the buckets of a new file, and checks whose an old one is.
func (s *Store) prepare(tx *bbolt.Tx) error {
	if tx.Bucket(metaBucket) == nil {
		return s.create(tx)
	}
	m, err := readStored(tx)
	if err != nil {
		return err
	}
	for _, name := range spaceBuckets {
		if tx.Bucket(name) == nil {
			return fmt.Errorf("%w: no bucket %q", ErrCorruptState, name)
		}
	}
	mine := s.config.ClusterID
	switch {
	case m.group != s.config.Group || m.clusterID != 0 && mine != 0 && m.clusterID != mine:
		return fmt.Errorf("%w: group %d of cluster %x instead of group %d of cluster %x", ErrForeignState, m.group, m.clusterID, s.config.Group, mine)
	case m.witness != s.config.Witness:
		return fmt.Errorf("%w: it is a witness's: %t", ErrWrongRole, m.witness)
	case m.clusterID == 0 && mine != 0:
		return putIdentity(tx, m.group, mine)
	}
	return nil
}

func (s *Store) create(tx *bbolt.Tx) error {
	for _, name := range [][]byte{metaBucket, spaceBuckets[User], spaceBuckets[System]} {
		if _, err := tx.CreateBucket(name); err != nil {
			return fmt.Errorf("%w: %w", ErrCorruptState, err)
		}
	}
	bucket := tx.Bucket(metaBucket)
	if err := bucket.Put(formatKey, []byte{formatVersion}); err != nil {
		return err
	}
	if s.config.Witness {
		if err := bucket.Put(roleKey, witnessRole); err != nil {
			return err
		}
	}
	return putIdentity(tx, s.config.Group, s.config.ClusterID)
}

// rebuild reads the index back from the rows. It tells row, unless that is nil, which lease each row names.
func (sp *keyspace) rebuild(bucket *bbolt.Bucket, row func(key []byte, lease int64)) error {
	return bucket.ForEach(func(k, v []byte) error {
		r, tombstone, err := mvcc.ParseKey(k)
		if err == nil && r.Main > sp.revision {
			err = fmt.Errorf("%w: row above revision %d", mvcc.ErrMalformed, sp.revision)
		}
		if err != nil {
			return fmt.Errorf("%w: bucket %q: %w", ErrCorruptState, sp.bucket, err)
		}
		key, stamp, err := mvcc.DecodeStamp(v, r, tombstone)
		if err != nil {
			return fmt.Errorf("%w: bucket %q, revision %d.%d: %w", ErrCorruptState, sp.bucket, r.Main, r.Sub, err)
		}
		sp.index.Restore(key, stamp)
		if row == nil {
			return nil
		}
		lease, err := mvcc.DecodeLease(v)
		if err != nil {
			return fmt.Errorf("%w: bucket %q, revision %d.%d: %w", ErrCorruptState, sp.bucket, r.Main, r.Sub, err)
		}
		row(key, lease)
		return nil
	})
}

// catchCorruption makes an error of the panics with which bbolt meets a damaged file, and of reads beyond the end
// of a shortened one. Use: defer catchCorruption(&err)().
func catchCorruption(err *error) func() {
	was := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(was)
		if p := recover(); p != nil {
			*err = errors.Join(*err, fmt.Errorf("%w: %v", ErrCorruptState, p))
		}
	}
}
