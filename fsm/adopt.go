package fsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.etcd.io/bbolt"

	"kvd/snapshot"
)

// Adopt makes the state file at path, which no store may have open, the first state of another cluster: it belongs
// to meta's cluster and group and ends at meta's index, term and configuration. The clients' keys, their revisions
// and their history stay, and their leases, as RestoredLeases has them; the system key space, which described the old
// cluster, is emptied. The other fields of
// meta are not used. It is durable when Adopt returns, and nothing has happened if it fails.
func Adopt(path string, meta snapshot.Meta) (err error) {
	defer catchCorruption(&err)()
	if _, err := os.Stat(path); err != nil {
		return err
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Nanosecond, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return fmt.Errorf("adopt %s: %w", path, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		m, err := readStored(tx)
		if err != nil {
			return err
		}
		if m.witness {
			return ErrWitness
		}
		revision := m.state.spaces[User].revision
		leases, err := restoredLeases(context.Background(), tx, revision, func([]byte, int64) {})
		if err == nil {
			err = resetLeases(tx, leases)
		}
		if err != nil {
			return err
		}
		if err := tx.DeleteBucket(spaceBuckets[System]); err != nil {
			return err
		}
		if _, err := tx.CreateBucket(spaceBuckets[System]); err != nil {
			return err
		}
		s := emptyState()
		s.index, s.term, s.configurationIndex = meta.Index, meta.Term, meta.ConfigurationIndex
		s.spaces[User] = m.state.spaces[User]
		bucket := tx.Bucket(metaBucket)
		return errors.Join(
			putIdentity(tx, meta.Group, meta.ClusterID),
			bucket.Put(stateKey, appendState(nil, s)),
			bucket.Put(configurationKey, appendConfiguration(nil, meta.Configuration)),
		)
	})
	return errors.Join(err, db.Close())
}
