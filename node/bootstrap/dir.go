package bootstrap

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
)

// What can be wrong with a data directory.
var (
	// ErrInUse: another process has the directory open.
	ErrInUse = errors.New("in use by another process")
	// ErrCorrupt: a file is damaged or missing.
	ErrCorrupt = errors.New("damaged data directory")
	// ErrForeign: the directory is not empty and not kvd's.
	ErrForeign = errors.New("not a kvd data directory")
	// ErrVersion: the directory, or a peer's message, is of a newer kvd.
	ErrVersion = errors.New("unknown format version")
	// ErrReplicaUsed: the replica id was opened on this node before and must not be opened afresh.
	ErrReplicaUsed = errors.New("replica id already used")
	// ErrClosed: the directory has been closed.
	ErrClosed = errors.New("data directory closed")
)

const (
	lockFile      = "lock"
	identityFile  = "identity.json"
	recordFile    = "bootstrap.json"
	replicasFile  = "replicas.json"
	addressesFile = "addresses.json"

	logDir    = "log"
	lostFound = "lost+found"
)

// identity is the body of identity.json.
type identity struct {
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation,string"`
	ClusterID   uint64 `json:"cluster_id,string"` // 0: not a member yet
	Replica     string `json:"replica"`           // of group 0, once a member
	Common
	Founders []string `json:"founders"` // names of --peers and this node's, when it was last fresh
	// Log is where the replicas' raft logs are: empty, a file each, or what SetLog was told.
	Log string `json:"log,omitempty"`
}

// version is higher for what a kvd that knows no log but files would take for damaged.
func (id identity) version() int {
	if id.Log != "" {
		return identityVersion
	}
	return formatVersion
}

func (id identity) validate() error {
	if err := checkName(id.Name); err != nil {
		return err
	}
	if err := id.Common.validate(); err != nil {
		return err
	}
	if len(id.Log) > MaxNameBytes {
		return fmt.Errorf("%w: log %.100q", ErrInvalid, id.Log)
	}
	if id.Incarnation == 0 || (id.ClusterID == 0) != (id.Replica == "") {
		return fmt.Errorf("%w: incomplete identity", ErrInvalid)
	}
	if id.ClusterID == 0 {
		return nil
	}
	return Member{id.Name, id.Incarnation, id.Replica}.validate()
}

// Replica is one replica that this node has opened.
type Replica struct {
	Group uint64 `json:"group,string"`
	ID    string `json:"id"`
	// Through: it has been deleted. It stands for all replicas of the group with lower numbers, too.
	Through bool `json:"through,omitempty"`
}

func (r Replica) number() uint64 {
	_, n, _ := ParseReplicaID(r.ID) // 0 if it is none
	return n
}

// covers reports whether the entry says that a replica has been opened.
func (r Replica) covers(other Replica) bool {
	return r.Group == other.Group && (r.ID == other.ID || r.Through && other.number() <= r.number())
}

// Dir is a node's data directory, locked from Open until Close. Its methods may be called concurrently. What a
// method has written is durable when it returns nil; after an error either the old or the new content is
// there, and the process should end.
type Dir struct {
	path  string
	set   Settings
	files files

	mu       sync.Mutex
	lock     *os.File // nil when closed
	id       identity
	record   *Record // nil: none
	replicas []Replica
}

// Open creates (mode 0700) or opens the directory, locks it, and checks that it belongs to the node and the cluster
// that set describes. It completes or undoes what a crash has left. Errors: ErrInvalid, ErrInUse, ErrForeign,
// ErrCorrupt, ErrVersion, ErrMismatch, or the file system's.
func Open(path string, set Settings) (*Dir, error) { return open(path, set, files{}) }

func open(path string, set Settings, f files) (*Dir, error) {
	if err := set.Validate(); err != nil {
		return nil, err
	}
	f.dir = path
	d := &Dir{path: path, set: set, files: f}
	if err := d.create(); err != nil {
		return nil, d.in(err)
	}
	if err := d.acquire(); err != nil {
		return nil, err
	}
	if err := d.load(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// OpenOffline opens and locks a directory that has been a node's, whatever its settings are, for a tool. Errors:
// fs.ErrNotExist if there is none, and those of Open.
func OpenOffline(path string) (*Dir, error) {
	d := &Dir{path: path, files: files{dir: path}}
	if _, err := os.Stat(filepath.Join(path, identityFile)); err != nil {
		return nil, d.in(err)
	}
	if err := d.acquire(); err != nil {
		return nil, err
	}
	err := d.files.read(identityFile, &d.id)
	if err == nil {
		d.set = Settings{Name: d.id.Name, Common: d.id.Common}
		err = d.loadReplicas(true)
	}
	if err == nil {
		err = d.loadRecord()
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// in says which directory an error is about.
func (d *Dir) in(err error) error { return fmt.Errorf("data directory %s: %w", d.path, err) }

func (d *Dir) create() error {
	if _, err := os.Stat(d.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(d.path, 0o700); err != nil {
		return err
	}
	if d.files.noSync {
		return nil
	}
	return syncDir(filepath.Dir(filepath.Clean(d.path)))
}

// acquire locks the directory. It touches nothing in a directory that isn't kvd's.
func (d *Dir) acquire() error {
	if err := d.checkOurs(); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(d.path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return d.in(err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("data directory %s is %w: stop that one first, or choose another --data-dir", d.path, ErrInUse)
		}
		return fmt.Errorf("data directory %s: lock: %w", d.path, err)
	}
	d.lock = lock
	return nil
}

// checkOurs wants an identity, or nothing but what a first start leaves behind when it is interrupted.
func (d *Dir) checkOurs() error {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return d.in(err)
	}
	var ours, foreign string
	for _, e := range entries {
		switch name := e.Name(); name {
		case identityFile:
			return nil
		case recordFile, "groups":
			ours = name
		case logDir: // made beforehand, for a disk of its own
			if !empty(filepath.Join(d.path, name)) {
				foreign = name
			}
		case lockFile, replicasFile, addressesFile, lostFound, identityFile + tempSuffix, replicasFile + tempSuffix, addressesFile + tempSuffix:
		default:
			foreign = name
		}
	}
	switch {
	case ours != "":
		return d.in(corrupt(identityFile, fmt.Errorf("missing, but there is %s", ours)))
	case foreign != "":
		return fmt.Errorf("data directory %s is %w: it holds %.100q: choose an empty one with --data-dir", d.path, ErrForeign, foreign)
	}
	return nil
}

// empty reports whether it is a directory with nothing in it, or a disk with nothing on it.
func empty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && !slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() != lostFound })
}

func (d *Dir) load() error {
	for _, name := range []string{identityFile, recordFile, replicasFile, addressesFile} {
		if err := os.Remove(filepath.Join(d.path, name+tempSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return d.in(err)
		}
	}
	err := d.files.read(identityFile, &d.id)
	if errors.Is(err, fs.ErrNotExist) {
		return d.initialise()
	}
	if err != nil {
		return err
	}
	if err := d.loadReplicas(true); err != nil {
		return err
	}
	if err := d.loadRecord(); err != nil {
		return err
	}
	return d.checkSettings()
}

// initialise writes an identity last: a directory without one has never been used.
func (d *Dir) initialise() error {
	if err := d.loadReplicas(false); err != nil {
		return err
	}
	if len(d.replicas) > 0 {
		return d.in(corrupt(identityFile, errors.New("missing, but replicas were opened")))
	}
	if err := d.files.write(replicasFile, []Replica{}); err != nil {
		return d.in(err)
	}
	return d.renew()
}

// renew starts a new incarnation that belongs to no cluster.
func (d *Dir) renew() error {
	return d.setIdentity(identity{
		Name: d.set.Name, Incarnation: randomID(),
		Common: d.set.Common, Founders: d.set.names(), Log: d.id.Log,
	})
}

func (d *Dir) setIdentity(id identity) error {
	if err := d.files.write(identityFile, id); err != nil {
		return d.in(err)
	}
	d.id = id
	return nil
}

func (d *Dir) loadReplicas(must bool) error {
	err := d.files.read(replicasFile, &d.replicas)
	if errors.Is(err, fs.ErrNotExist) {
		if must {
			return d.in(corrupt(replicasFile, errors.New("missing")))
		}
		return nil
	}
	if err != nil {
		return err
	}
	for _, r := range d.replicas {
		if _, _, err := ParseReplicaID(r.ID); err != nil {
			return d.in(corrupt(replicasFile, err))
		}
	}
	return nil
}

// loadRecord also checks the identity, and removes a record that an interrupted abandonment or rejoin left.
func (d *Dir) loadRecord() error {
	if err := d.id.validate(); err != nil {
		return d.in(corrupt(identityFile, err))
	}
	var record Record
	err := d.files.read(recordFile, &record)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		if err = record.Validate(); err == nil && d.id.ClusterID != 0 && d.id.ClusterID != record.ClusterID {
			err = fmt.Errorf("it is of cluster %016x, not %016x", record.ClusterID, d.id.ClusterID)
		}
		if err != nil {
			err = d.in(corrupt(recordFile, err))
		}
	}
	if err != nil {
		return err
	}
	if d.id.ClusterID == 0 && !record.Names(d.id.Name, d.id.Incarnation) {
		return d.files.remove(recordFile)
	}
	d.record = &record
	return nil
}

// checkSettings compares the flags with what is stored. A fresh node may change all but its name, as a new incarnation:
// what it said under the old settings must not bind it.
func (d *Dir) checkSettings() error {
	source := "data directory " + d.path
	if d.set.Name != d.id.Name {
		return &MismatchError{"--name", d.set.Name, d.id.Name, source, "start it under its own name, or choose another --data-dir"}
	}
	err := d.set.compare(d.id.Common, source, "start it as before, or choose another --data-dir")
	if d.id.ClusterID != 0 || d.record != nil {
		return err
	}
	if err != nil || !slices.Equal(d.id.Founders, d.set.names()) {
		return d.renew()
	}
	return nil
}

// Close unlocks the directory. It may be called again.
func (d *Dir) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return nil
	}
	err := d.lock.Close()
	d.lock = nil
	return err
}

// Log is what SetLog was told last; empty if it never was.
func (d *Dir) Log() string {
	id, _ := d.state()
	return id.Log
}

// SetLog notes where the replicas' raft logs are from now on. Empty is a file each, as in directories that were never
// told; so is what a kvd reads that knows nothing else.
func (d *Dir) SetLog(log string) error {
	return d.change(func() error {
		if d.id.Log == log {
			return nil
		}
		id := d.id
		id.Log = log
		return d.setIdentity(id)
	})
}

// Name is the node's.
func (d *Dir) Name() string {
	id, _ := d.state()
	return id.Name
}

// Replica is this node's replica of group 0; empty while the node is no member.
func (d *Dir) Replica() string {
	id, _ := d.state()
	return id.Replica
}

// Incarnation is the number of this life of the directory, never 0. It changes only while the node is no member.
func (d *Dir) Incarnation() uint64 {
	id, _ := d.state()
	return id.Incarnation
}

// ClusterID is the cluster that this node is a member of, 0 while it is none.
func (d *Dir) ClusterID() uint64 {
	id, _ := d.state()
	return id.ClusterID
}

func (d *Dir) state() (identity, *Record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.id, d.record
}

// change runs one modification of an open directory.
func (d *Dir) change(fn func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return d.in(ErrClosed)
	}
	return fn()
}

// hold binds this incarnation to the record.
func (d *Dir) hold(r *Record) error {
	return d.change(func() error {
		if d.record != nil || d.id.ClusterID != 0 || !r.Names(d.id.Name, d.id.Incarnation) {
			return fmt.Errorf("%w: record %016x cannot bind incarnation %016x", ErrInvalid, r.ClusterID, d.id.Incarnation)
		}
		return d.setRecord(r)
	})
}

func (d *Dir) setRecord(r *Record) error {
	if err := d.files.write(recordFile, r); err != nil {
		return d.in(err)
	}
	d.record = r
	return nil
}

// finish makes the node a member by the record it holds.
func (d *Dir) finish() error {
	return d.change(func() error {
		self, _ := d.record.Member(d.id.Name)
		id := d.id
		id.ClusterID, id.Replica = d.record.ClusterID, self.Replica
		return d.setIdentity(id)
	})
}

// abandon gives up a record that was never finished: the incarnation that it binds ends first.
func (d *Dir) abandon() error {
	return d.change(func() error {
		if err := d.renew(); err != nil {
			return err
		}
		d.record = nil
		return d.files.remove(recordFile)
	})
}

// rejoin makes the node a member by the cluster's leave. The record is nil if the cluster didn't send it.
func (d *Dir) rejoin(clusterID uint64, replica string, r *Record) error {
	return d.change(func() error {
		if r != nil {
			if err := d.setRecord(r); err != nil {
				return err
			}
		}
		id := d.id
		id.ClusterID, id.Replica = clusterID, replica
		return d.setIdentity(id)
	})
}

// MayCreate says whether the replica's files may be created: nil if this node never opened that id, else
// ErrReplicaUsed, because a replica whose files are gone has forgotten its votes and acknowledged entries.
// While it is nil, leftover files of the replica may be deleted: they have never been used.
//
// The order is: MayCreate; create the files; MarkCreated; start raft on them.
func (d *Dir) MayCreate(group uint64, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.used(Replica{Group: group, ID: id}) {
		return fmt.Errorf("data directory %s: %w: %s of group %d was opened before, but its files are missing: delete the directory's contents so that the node rejoins its cluster with an empty one",
			d.path, ErrReplicaUsed, id, group)
	}
	return nil
}

// used reports whether the replica was opened. d.mu is held.
func (d *Dir) used(r Replica) bool {
	return slices.ContainsFunc(d.replicas, func(known Replica) bool { return known.covers(r) })
}

// MarkCreated notes durably that the replica's files exist and may be in use from now on. Idempotent.
func (d *Dir) MarkCreated(group uint64, id string) error {
	if _, _, err := ParseReplicaID(id); err != nil {
		return err
	}
	return d.change(func() error {
		r := Replica{Group: group, ID: id}
		if d.used(r) {
			return nil
		}
		return d.setReplicas(append(slices.Clone(d.replicas), r))
	})
}

// MarkDeleted notes that the replica's files were deleted, so that the list does not grow for ever: of each group it
// keeps the highest number that was deleted. Those below count as opened, because a group's replicas get their numbers
// in the order in which they are made; one that was not opened yet will be taken for lost, and replaced. Idempotent.
func (d *Dir) MarkDeleted(group uint64, id string) error {
	return d.change(func() error {
		r := Replica{Group: group, ID: id, Through: true}
		if !d.used(r) || slices.ContainsFunc(d.replicas, func(known Replica) bool { return known.Through && known.covers(r) }) {
			return nil
		}
		next := slices.DeleteFunc(slices.Clone(d.replicas), r.covers)
		return d.setReplicas(append(next, r))
	})
}

// setReplicas writes the list. d.mu is held.
func (d *Dir) setReplicas(next []Replica) error {
	if err := d.files.write(replicasFile, next); err != nil {
		return d.in(err)
	}
	d.replicas = next
	return nil
}

// Replicas lists what says which replicas were ever opened on this node.
func (d *Dir) Replicas() []Replica {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.replicas)
}

// randomID draws a number that is never 0.
func randomID() uint64 {
	var b [8]byte
	for {
		rand.Read(b[:]) // never fails
		if id := binary.BigEndian.Uint64(b[:]); id != 0 {
			return id
		}
	}
}
