package raftlog

import (
	"fmt"

	"go.etcd.io/bbolt"
)

// boltKeys is raft-boltdb's bucket of stable keys.
var boltKeys = []byte("conf")

// Keys returns the stable keys of a file that nobody has open, as a raft that opens it reads them. It fails with
// ErrCorrupt if the file is damaged.
func Keys(path string) (map[string][]byte, error) {
	if err := check(path); err != nil {
		return nil, err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout, ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("open raft log %s: %w", path, err)
	}
	defer db.Close()
	keys := make(map[string][]byte)
	err = db.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket(boltKeys)
		if bucket == nil {
			return nil
		}
		return bucket.ForEach(func(key, value []byte) error {
			if string(key) != string(keyVote) {
				keys[string(key)] = append([]byte{}, value...)
				return nil
			}
			if len(value) < 8 {
				return fmt.Errorf("%w: %s: a vote of %d bytes", ErrCorrupt, path, len(value))
			}
			keys[string(keyVoteTerm)] = append([]byte{}, value[:8]...)
			keys[string(keyVoteCandidate)] = append([]byte{}, value[8:]...)
			return nil
		})
	})
	return keys, err
}
