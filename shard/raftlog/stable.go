package raftlog

import (
	"bytes"
	"encoding/binary"
	"fmt"

	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// Raft stores a vote with two calls, the term and then the candidate (hashicorp/raft#661). After a crash
// between two such writes, the new term would stand beside the candidate of an older vote, and raft would
// take a request of that candidate for one that it has granted already: it would vote for it without looking
// at its log. So the term is only staged, in memory, and the candidate's call writes both as one record.
// Reads see the record alone.
var (
	keyVoteTerm      = []byte("LastVoteTerm")
	keyVoteCandidate = []byte("LastVoteCand")
	keyVote          = []byte("kvd.vote") // term u64 big endian, candidate
)

// ErrKeyNotFound is the error for a stable key that is not set. Raft knows it by its text, "not found".
var ErrKeyNotFound = raftboltdb.ErrKeyNotFound

// stagedTerm is the term of a vote whose candidate has not come yet.
type stagedTerm struct {
	set  bool
	term uint64
}

// Set stores a value. A vote's candidate needs its term to have been set before (ErrVoteTerm).
func (s *Store) Set(key, value []byte) error {
	s.write.Lock()
	defer s.write.Unlock()
	if bytes.Equal(key, keyVoteCandidate) && !s.hooks.unguardedVotes {
		return s.setVote(value)
	}
	return s.commit(opStable, func() error { return s.bolt.Set(key, value) })
}

func (s *Store) setVote(candidate []byte) error {
	staged := s.term
	s.term = stagedTerm{}
	if !staged.set {
		return fmt.Errorf("%w: candidate %q", ErrVoteTerm, candidate)
	}
	record := append(binary.BigEndian.AppendUint64(nil, staged.term), candidate...)
	return s.commit(opStable, func() error { return s.bolt.Set(keyVote, record) })
}

// SetUint64 stores a value. A vote's term takes effect, and is durable, only with its candidate.
func (s *Store) SetUint64(key []byte, value uint64) error {
	s.write.Lock()
	defer s.write.Unlock()
	if bytes.Equal(key, keyVoteTerm) && !s.hooks.unguardedVotes {
		if err := s.writable(); err != nil {
			return err
		}
		s.term = stagedTerm{set: true, term: value}
		return nil
	}
	return s.commit(opStable, func() error { return s.bolt.SetUint64(key, value) })
}

// Get returns a copy of the value, or ErrKeyNotFound.
func (s *Store) Get(key []byte) ([]byte, error) {
	if bytes.Equal(key, keyVoteCandidate) && !s.hooks.unguardedVotes {
		_, candidate, err := s.vote()
		return candidate, err
	}
	return s.get(key)
}

// GetUint64 returns the value, or ErrKeyNotFound.
func (s *Store) GetUint64(key []byte) (uint64, error) {
	if bytes.Equal(key, keyVoteTerm) && !s.hooks.unguardedVotes {
		term, _, err := s.vote()
		return term, err
	}
	value, err := s.get(key)
	if err != nil {
		return 0, err
	}
	if len(value) != 8 {
		return 0, fmt.Errorf("%w: %s: %s has %d bytes", ErrCorrupt, s.path, key, len(value))
	}
	return binary.BigEndian.Uint64(value), nil
}

func (s *Store) get(key []byte) ([]byte, error) {
	value, err := s.bolt.Get(key)
	if err != nil {
		return nil, s.readError(string(key), err)
	}
	return value, nil
}

// vote returns the durable vote. The candidate is never nil, even if it is empty: raft takes nil for no vote.
func (s *Store) vote() (term uint64, candidate []byte, err error) {
	record, err := s.get(keyVote)
	if err != nil {
		return 0, nil, err
	}
	if len(record) < 8 {
		return 0, nil, fmt.Errorf("%w: %s: a vote of %d bytes", ErrCorrupt, s.path, len(record))
	}
	return binary.BigEndian.Uint64(record), record[8:], nil
}
