package bootstrap

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
)

// Methods under which a node registers HandleAsk and its own execution of a rejoin.
const (
	MethodStatus = "bootstrap.status"
	MethodRejoin = "bootstrap.rejoin"
)

// MaxMessageBytes bounds every payload of this package, before it is parsed.
const MaxMessageBytes = 256 << 10

const protocolVersion = 1

// Asker sends one question to an address and returns the answer of whatever node listens there. It must return
// when ctx ends, and an answer that comes later must be lost.
type Asker interface {
	Ask(ctx context.Context, addr, method string, payload []byte) ([]byte, error)
}

// statusRequest is the question. It says nothing: a node believes only what it asked for itself.
type statusRequest struct {
	Version int `json:"version"`
}

// Status is the answer: what a node durably is, and whom it has heard.
type Status struct {
	Version     int    `json:"version"`
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation,string"`
	Common
	Founders  []string `json:"founders"`          // names of its --peers and its own, in order
	View      []Seen   `json:"view,omitempty"`    // the peers it heard, itself included
	Record    *Record  `json:"record,omitempty"`  // held, if any
	ClusterID uint64   `json:"cluster_id,string"` // 0: not a member
	Members   []Member `json:"members,omitempty"` // of a member: the present members as far as it knows; empty: unknown
}

// Seen is the incarnation that answered last at the address of a name.
type Seen struct {
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation,string"`
}

func (s *Status) fresh() bool { return s.ClusterID == 0 && s.Record == nil }

// holds reports whether the node is bound to the cluster of that id.
func (s *Status) holds(clusterID uint64) bool {
	return s.ClusterID == clusterID || s.ClusterID == 0 && s.Record != nil && s.Record.ClusterID == clusterID
}

func (s *Status) validate() error {
	if s.Version != protocolVersion {
		return fmt.Errorf("%w: status message %d", ErrVersion, s.Version)
	}
	if err := checkName(s.Name); err != nil {
		return err
	}
	if err := s.Common.validate(); err != nil {
		return err
	}
	if s.Incarnation == 0 || len(s.Founders) > MaxMembers || len(s.View) > MaxMembers || !slices.IsSorted(s.Founders) {
		return fmt.Errorf("%w: status of %s", ErrInvalid, s.Name)
	}
	for _, name := range s.Founders {
		if err := checkName(name); err != nil {
			return err
		}
	}
	for _, seen := range s.View {
		if err := checkName(seen.Name); err != nil {
			return err
		}
	}
	return s.validateCluster()
}

func (s *Status) validateCluster() error {
	if err := validateMembers(s.Members); err != nil {
		return err
	}
	if s.Record == nil {
		return nil
	}
	if err := s.Record.Validate(); err != nil {
		return err
	}
	if s.ClusterID != 0 && s.ClusterID != s.Record.ClusterID || s.ClusterID == 0 && !s.Record.Names(s.Name, s.Incarnation) {
		return fmt.Errorf("%w: %s holds a record that is not its own", ErrInvalid, s.Name)
	}
	if s.Record.Common != s.Common {
		return fmt.Errorf("%w: %s holds a record of other settings", ErrInvalid, s.Name)
	}
	return nil
}

func decodeStatus(payload []byte) (*Status, error) {
	var s Status
	if err := decodeMessage(payload, &s); err != nil {
		return nil, err
	}
	return &s, s.validate()
}

func encodeMessage(v any) ([]byte, error) {
	payload, err := json.Marshal(v)
	if err == nil && len(payload) > MaxMessageBytes {
		err = fmt.Errorf("%w: a message of %d bytes", ErrInvalid, len(payload))
	}
	return payload, err
}

// decodeMessage ignores fields it doesn't know: a newer node may send more.
func decodeMessage(payload []byte, v any) error {
	if len(payload) > MaxMessageBytes {
		return fmt.Errorf("%w: a message of %d bytes", ErrInvalid, len(payload))
	}
	if err := json.Unmarshal(payload, v); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}
