package bootstrap

import "fmt"

// RejoinRequest is what a node that has lost its directory, or one that is new to a running cluster, sends to a
// member (MethodRejoin), which passes it to the leader of group 0. Asking again with the same incarnation is harmless.
type RejoinRequest struct {
	ClusterID   uint64 `json:"cluster_id,string"` // that it was told of
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation,string"` // the new one
	Common
	// Join: the node wants to become a member if the cluster has none of its name. It need not know the ClusterID.
	Join   bool    `json:"join,omitempty"`
	Weight float64 `json:"weight,omitempty"` // with Join: its share of the shards
}

// NewRejoinRequest is the request of the node that d belongs to.
func NewRejoinRequest(d *Dir, r Rejoin) RejoinRequest {
	return RejoinRequest{ClusterID: r.ClusterID, Name: d.set.Name, Incarnation: d.Incarnation(), Common: d.set.Common}
}

// NewJoinRequest is the request of the node that d belongs to, to become a member of whatever cluster it is sent to.
func NewJoinRequest(d *Dir, weight float64) RejoinRequest {
	r := NewRejoinRequest(d, Rejoin{})
	r.Join, r.Weight = true, weight
	return r
}

// Encode makes the payload of a question.
func (r RejoinRequest) Encode() ([]byte, error) { return encodeMessage(r) }

// DecodeRejoinRequest parses and validates; the error is an ErrInvalid.
func DecodeRejoinRequest(payload []byte) (RejoinRequest, error) {
	var r RejoinRequest
	if err := decodeMessage(payload, &r); err != nil {
		return r, err
	}
	if err := checkName(r.Name); err != nil {
		return r, err
	}
	if err := r.Common.validate(); err != nil {
		return r, err
	}
	if r.ClusterID == 0 && !r.Join || r.Incarnation == 0 {
		return r, fmt.Errorf("%w: a rejoin without cluster or incarnation", ErrInvalid)
	}
	return r, nil
}

// Reason says why a rejoin was refused. The zero value is none.
type Reason string

const (
	OtherCluster  Reason = "OTHER_CLUSTER"  // the member asked is not in that cluster
	OtherSettings Reason = "OTHER_SETTINGS" // a setting that all members have in common differs; the detail names the flag
	UnknownName   Reason = "UNKNOWN_NAME"   // no member has that name
	StillReports  Reason = "STILL_REPORTS"  // the member's present incarnation is alive: two nodes with one name, or it died a moment ago
	NotNow        Reason = "NOT_NOW"        // no leader, no quorum, another change in flight
)

// RefusedError is a refusal of a rejoin.
type RefusedError struct {
	Reason Reason
	Detail string
}

func (e *RefusedError) Error() string { return "rejoin refused: " + e.Detail }

// Retryable reports whether the same request may succeed later without anybody changing a setting.
func (e *RefusedError) Retryable() bool { return e.Reason == StillReports || e.Reason == NotNow }

// RejoinResponse is the answer: a refusal, or the replica of group 0 that the new incarnation is to open.
type RejoinResponse struct {
	Refused   Reason  `json:"refused,omitempty"`
	Detail    string  `json:"detail,omitempty"`
	ClusterID uint64  `json:"cluster_id,string"`
	Replica   string  `json:"replica,omitempty"` // never used before, or the one already given to this incarnation
	Record    *Record `json:"record,omitempty"`  // the cluster's bootstrap record, if the member has it
	// Addresses of the members, as far as known: a node that joins has no --peers.
	Addresses map[string]Addresses `json:"addresses,omitempty"`
}

// Refuse makes the response out of a refusal.
func Refuse(e *RefusedError) RejoinResponse {
	return RejoinResponse{Refused: e.Reason, Detail: e.Detail}
}

// Err is nil for an acceptance, else a *RefusedError.
func (r RejoinResponse) Err() error {
	if r.Refused == "" {
		return nil
	}
	return &RefusedError{r.Refused, r.Detail}
}

// Encode makes the payload of an answer.
func (r RejoinResponse) Encode() ([]byte, error) { return encodeMessage(r) }

// DecodeRejoinResponse parses and validates; the error is an ErrInvalid. A refusal is not an error here.
func DecodeRejoinResponse(payload []byte) (RejoinResponse, error) {
	var r RejoinResponse
	if err := decodeMessage(payload, &r); err != nil {
		return r, err
	}
	return r, r.validate()
}

func (r RejoinResponse) validate() error {
	if r.Refused != "" {
		if len(r.Refused) > 64 || len(r.Detail) > 4096 {
			return fmt.Errorf("%w: an oversized refusal", ErrInvalid)
		}
		return nil
	}
	if _, _, err := ParseReplicaID(r.Replica); err != nil {
		return err
	}
	if r.ClusterID == 0 {
		return fmt.Errorf("%w: a rejoin without a cluster", ErrInvalid)
	}
	if err := validateAddresses(r.Addresses); err != nil {
		return err
	}
	if r.Record == nil {
		return nil
	}
	if err := r.Record.Validate(); err != nil {
		return err
	}
	if r.Record.ClusterID != r.ClusterID {
		return fmt.Errorf("%w: a rejoin with the record of another cluster", ErrInvalid)
	}
	return nil
}

// Cluster is what the leader of group 0 knows when it judges a rejoin.
type Cluster struct {
	ClusterID uint64
	Common
	Members   []Member          // now, in the order of their names
	Reporting func(Member) bool // whether that incarnation has reported lately; only the leader's own observation counts
}

// Judge says whether the request may be executed: it returns the member whose incarnation is to be replaced, or,
// if already is true, the one that this very incarnation has become.
func (c Cluster) Judge(r RejoinRequest) (member Member, already bool, refusal *RefusedError) {
	if r.ClusterID != c.ClusterID && !(r.Join && r.ClusterID == 0) {
		return Member{}, false, &RefusedError{OtherCluster, fmt.Sprintf("this is cluster %016x, not %016x", c.ClusterID, r.ClusterID)}
	}
	if err := r.compare(c.Common, "the cluster", "start it with the cluster's"); err != nil {
		return Member{}, false, &RefusedError{OtherSettings, err.Error()}
	}
	m, known := findMember(c.Members, r.Name)
	switch {
	case !known:
		return Member{}, false, &RefusedError{UnknownName, fmt.Sprintf("the cluster has no node %q: join it as a new node", r.Name)}
	case m.Incarnation == r.Incarnation:
		return m, true, nil
	case c.Reporting(m):
		return Member{}, false, &RefusedError{StillReports, fmt.Sprintf("node %q is alive in the cluster: stop the other process of that name, or choose another --name", r.Name)}
	}
	return m, false, nil
}
