package bootstrap

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Limits on what a node, its flags or its peers may say.
const (
	MaxNameBytes    = 63
	MaxTokenBytes   = 128
	MaxAddressBytes = 256
	MaxMembers      = 128
	MaxShards       = 4096
	MaxReplicas     = 7 // data replicas of a shard
)

// Why formation or a setting was refused. Every error of this package that a user can act on is one line.
var (
	// ErrInvalid: a value is malformed or out of bounds.
	ErrInvalid = errors.New("invalid value")
	// ErrMismatch: a setting differs from the directory's or a peer's. See MismatchError for the flag.
	ErrMismatch = errors.New("settings differ")
	// ErrUnknownMember: the peers belong to a cluster that does not know this node's name.
	ErrUnknownMember = errors.New("not a member of the cluster")
	// ErrReplaced: another incarnation has taken this node's place in its cluster.
	ErrReplaced = errors.New("replaced by another incarnation")
	// ErrTwoClusters: the peers belong to different clusters.
	ErrTwoClusters = errors.New("peers belong to different clusters")
	// ErrOtherCluster: the directory is of another cluster than the peers.
	ErrOtherCluster = errors.New("of another cluster than the peers")
)

// MismatchError names the flag whose value differs from what the directory or a peer has. It is an ErrMismatch.
type MismatchError struct {
	Flag   string // "--cluster-token"
	Here   string // this node's value
	There  string // the other one
	Source string // where the other one was found: "data directory ./n1.kvd", "node n2 (10.0.0.2:2380)"
	Advice string // what to do
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("%s is %q here and %q in %s: %s", e.Flag, e.Here, e.There, e.Source, e.Advice)
}

// Is makes errors.Is(err, ErrMismatch) true.
func (e *MismatchError) Is(target error) bool { return target == ErrMismatch }

// Settings are what an operator says about a node and its cluster.
type Settings struct {
	Name string
	Common
	Peers map[string]string // name -> peer address of all founding members; may include Name; empty: this node alone
}

// Common are the settings that all members of a cluster have in common. The last three are zero where the strategy
// has no shards.
type Common struct {
	Token             string `json:"token"`    // tells apart clusters that could reach each other by mistake
	Strategy          string `json:"strategy"` // "full", "consistent"
	Shards            int    `json:"shards"`
	ReplicationFactor int    `json:"replication_factor,omitempty"`
	Witnesses         string `json:"witnesses,omitempty"` // "auto", "0"
}

// Validate reports the first malformed setting, by its flag. The error is an ErrInvalid.
func (s Settings) Validate() error {
	if err := checkName(s.Name); err != nil {
		return fmt.Errorf("--name: %w", err)
	}
	if err := s.Common.validate(); err != nil {
		return err
	}
	if n := len(s.names()); n > MaxMembers {
		return fmt.Errorf("--peers: %w: %d nodes, at most %d", ErrInvalid, n, MaxMembers)
	}
	at := make(map[string]string, len(s.Peers))
	for _, name := range slices.Sorted(maps.Keys(s.Peers)) {
		addr := s.Peers[name]
		if err := checkName(name); err != nil {
			return fmt.Errorf("--peers: %w", err)
		}
		if addr == "" || len(addr) > MaxAddressBytes {
			return fmt.Errorf("--peers: %w: the address of %s must have 1 to %d bytes", ErrInvalid, name, MaxAddressBytes)
		}
		if other, taken := at[addr]; taken {
			return fmt.Errorf("--peers: %w: %s and %s have the same address %s", ErrInvalid, other, name, addr)
		}
		at[addr] = name
	}
	return nil
}

// validate reports the first value that is out of bounds, by its flag. The error is an ErrInvalid.
func (c Common) validate() error {
	if len(c.Token) > MaxTokenBytes {
		return fmt.Errorf("--cluster-token: %w: longer than %d bytes", ErrInvalid, MaxTokenBytes)
	}
	if err := checkName(c.Strategy); err != nil {
		return fmt.Errorf("--strategy: %w", err)
	}
	if c.Shards < 0 || c.Shards > MaxShards {
		return fmt.Errorf("--shards: %w: %d is not within 0 and %d", ErrInvalid, c.Shards, MaxShards)
	}
	if c.ReplicationFactor < 0 || c.ReplicationFactor > MaxReplicas {
		return fmt.Errorf("--replication-factor: %w: %d is not within 0 and %d", ErrInvalid, c.ReplicationFactor, MaxReplicas)
	}
	if len(c.Witnesses) > MaxNameBytes {
		return fmt.Errorf("--witnesses: %w: longer than %d bytes", ErrInvalid, MaxNameBytes)
	}
	return nil
}

// names lists the founding members, this node included, in order.
func (s Settings) names() []string {
	all := map[string]bool{s.Name: true}
	for name := range s.Peers {
		all[name] = true
	}
	return slices.Sorted(maps.Keys(all))
}

// compare reports the first setting in which there differs from c.
func (c Common) compare(there Common, source, advice string) error {
	for _, s := range []struct{ flag, here, there string }{
		{"--cluster-token", c.Token, there.Token},
		{"--strategy", c.Strategy, there.Strategy},
		{"--shards", strconv.Itoa(c.Shards), strconv.Itoa(there.Shards)},
		{"--replication-factor", strconv.Itoa(c.ReplicationFactor), strconv.Itoa(there.ReplicationFactor)},
		{"--witnesses", c.Witnesses, there.Witnesses},
	} {
		if s.here != s.there {
			return &MismatchError{s.flag, s.here, s.there, source, advice}
		}
	}
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > MaxNameBytes {
		return fmt.Errorf("%w: a name has 1 to %d characters, not %d", ErrInvalid, MaxNameBytes, len(name))
	}
	for _, c := range []byte(name) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-') {
			return fmt.Errorf("%w: name %q has characters other than A-Z a-z 0-9 . _ -", ErrInvalid, name)
		}
	}
	return nil
}

// ReplicaID names a node's n-th replica of a group, "n1/1". Such an id is never used twice.
func ReplicaID(node string, number uint64) string { return node + "/" + strconv.FormatUint(number, 10) }

// ParseReplicaID is the reverse of ReplicaID; it accepts only what ReplicaID makes, with number >= 1, and the same with
// a "w" at the end: a witness's id.
func ParseReplicaID(id string) (node string, number uint64, err error) {
	data := strings.TrimSuffix(id, "w")
	node, digits, _ := strings.Cut(data, "/")
	number, err = strconv.ParseUint(digits, 10, 64)
	if err != nil || number == 0 || checkName(node) != nil || ReplicaID(node, number) != data {
		return "", 0, fmt.Errorf("%w: %.100q is not a replica id", ErrInvalid, id)
	}
	return node, number, nil
}

// Member is one node of a cluster: which life of its directory, and its replica of group 0.
type Member struct {
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation,string"`
	Replica     string `json:"replica"`
}

func (m Member) validate() error {
	if err := checkName(m.Name); err != nil {
		return err
	}
	if m.Incarnation == 0 {
		return fmt.Errorf("%w: %s has no incarnation", ErrInvalid, m.Name)
	}
	if node, _, err := ParseReplicaID(m.Replica); err != nil || node != m.Name {
		return fmt.Errorf("%w: %.100q is not a replica of %s", ErrInvalid, m.Replica, m.Name)
	}
	return nil
}

// validateMembers wants at most MaxMembers valid members in the order of their names, each name once.
func validateMembers(members []Member) error {
	if len(members) > MaxMembers {
		return fmt.Errorf("%w: %d members, at most %d", ErrInvalid, len(members), MaxMembers)
	}
	for i, m := range members {
		if err := m.validate(); err != nil {
			return err
		}
		if i > 0 && members[i-1].Name >= m.Name {
			return fmt.Errorf("%w: members are not in order at %s", ErrInvalid, m.Name)
		}
	}
	return nil
}

func findMember(members []Member, name string) (Member, bool) {
	i, ok := slices.BinarySearchFunc(members, name, func(m Member, name string) int { return strings.Compare(m.Name, name) })
	if !ok {
		return Member{}, false
	}
	return members[i], true
}

// Record is what founds a cluster. It never changes once it is written, and all founding members hold the
// same one. It is shared by pointer and must not be modified.
type Record struct {
	ClusterID uint64 `json:"cluster_id,string"` // random, never 0
	Common
	Members []Member `json:"members"` // in the order of their names
}

// Member returns the founding member of that name.
func (r *Record) Member(name string) (Member, bool) { return findMember(r.Members, name) }

// Names reports whether this very incarnation of the node is a founding member: only then may it start raft
// with the record's configuration. False for a nil record.
func (r *Record) Names(name string, incarnation uint64) bool {
	if r == nil {
		return false
	}
	m, ok := r.Member(name)
	return ok && m.Incarnation == incarnation
}

// Validate reports the first malformed field. The error is an ErrInvalid.
func (r *Record) Validate() error {
	if r.ClusterID == 0 || len(r.Members) == 0 {
		return fmt.Errorf("%w: a bootstrap record without cluster id or members", ErrInvalid)
	}
	if err := r.Common.validate(); err != nil {
		return err
	}
	return validateMembers(r.Members)
}

func (r *Record) equal(other *Record) bool {
	return r.ClusterID == other.ClusterID && r.Common == other.Common && slices.Equal(r.Members, other.Members)
}

func (r *Record) names() []string {
	names := make([]string, len(r.Members))
	for i, m := range r.Members {
		names[i] = m.Name
	}
	return names
}
