package wal

import (
	"bytes"
	"encoding/binary"
	"fmt"
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

// stagedTerm is the term of a vote whose candidate has not come yet.
type stagedTerm struct {
	set  bool
	term uint64
}

// Set stores a value. A vote's candidate needs its term to have been set before (ErrVoteTerm).
func (s *Store) Set(key, value []byte) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	if bytes.Equal(key, keyVoteCandidate) {
		return s.setVote(value)
	}
	return s.set(key, bytes.Clone(value))
}

// set takes the value over.
func (s *Store) set(key, value []byte) error {
	r := s.rep.ask(kindKey)
	r.key, r.value = key, value
	err := s.log.submit(r)
	r.key, r.value = nil, nil
	return err
}

func (s *Store) setVote(candidate []byte) error {
	staged := s.term
	s.term = stagedTerm{}
	if !staged.set {
		return fmt.Errorf("%w: candidate %q", ErrVoteTerm, candidate)
	}
	return s.set(keyVote, append(binary.BigEndian.AppendUint64(nil, staged.term), candidate...))
}

// SetUint64 stores a value. A vote's term takes effect, and is durable, only with its candidate.
func (s *Store) SetUint64(key []byte, value uint64) error {
	if err := s.begin(); err != nil {
		return err
	}
	defer s.end()
	if bytes.Equal(key, keyVoteTerm) {
		s.term = stagedTerm{set: true, term: value}
		return nil
	}
	return s.set(key, binary.BigEndian.AppendUint64(nil, value))
}

// Get returns a copy of the value, or ErrKeyNotFound.
func (s *Store) Get(key []byte) ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	if bytes.Equal(key, keyVoteCandidate) {
		_, candidate, err := s.vote()
		return candidate, err
	}
	value, err := s.rep.get(key)
	if err != nil {
		return nil, err
	}
	return append([]byte{}, value...), nil
}

// GetUint64 returns the value, or ErrKeyNotFound.
func (s *Store) GetUint64(key []byte) (uint64, error) {
	if err := s.check(); err != nil {
		return 0, err
	}
	if bytes.Equal(key, keyVoteTerm) {
		term, _, err := s.vote()
		return term, err
	}
	value, err := s.rep.get(key)
	if err != nil {
		return 0, err
	}
	if len(value) != 8 {
		return 0, fmt.Errorf("%w: %s: %s has %d bytes", ErrCorrupt, s.rep.id, key, len(value))
	}
	return binary.BigEndian.Uint64(value), nil
}

// vote returns the durable vote. The candidate is never nil, even if it is empty: raft takes nil for no vote.
func (s *Store) vote() (term uint64, candidate []byte, err error) {
	record, err := s.rep.get(keyVote)
	if err != nil {
		return 0, nil, err
	}
	if len(record) < 8 {
		return 0, nil, fmt.Errorf("%w: %s: a vote of %d bytes", ErrCorrupt, s.rep.id, len(record))
	}
	return binary.BigEndian.Uint64(record), append([]byte{}, record[8:]...), nil
}
