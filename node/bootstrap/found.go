package bootstrap

import (
	"errors"
	"fmt"
)

// Found makes the directory at path that of a founding member of a new cluster, without asking anybody: for a
// restored backup. The other members of set.Peers are founding members that have lost their directories: they come
// in as new incarnations when they start with empty ones. The directory must be empty or not exist, and is left
// locked. Errors are those of Open.
func Found(path string, set Settings) (*Dir, *Record, error) {
	d, err := Open(path, set)
	if err != nil {
		return nil, nil, err
	}
	if d.ClusterID() != 0 || d.record != nil {
		return nil, nil, errors.Join(fmt.Errorf("data directory %s: %w: it belongs to a cluster", path, ErrInvalid), d.Close())
	}
	r := &Record{ClusterID: randomID(), Common: set.Common}
	for _, name := range set.names() {
		m := Member{Name: name, Incarnation: randomID(), Replica: ReplicaID(name, 1)}
		if name == set.Name {
			m.Incarnation = d.Incarnation()
		}
		r.Members = append(r.Members, m)
	}
	if err := d.hold(r); err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	if err := d.finish(); err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	return d, r, nil
}
