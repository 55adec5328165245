package transport

//lint:file-ignore SA1019 raft falls back to its deprecated fields, so they travel as well

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
)

// Encoding: unsigned integers as uvarints; byte strings as their length plus one (0 = nil), then the
// bytes. Decoded byte strings share memory with the message they came in.

// maxEntries bounds the entries of one AppendEntries, and so what decoding allocates beside the message.
const maxEntries = 1 << 14

const minEntryBytes = 6 // of an encoded entry

type messageType uint8

const (
	typeAppendEntries messageType = 1 + iota
	typeRequestVote
	typeRequestPreVote
	typeTimeoutNow
	typeInstallSnapshot
)

func appendUint(b []byte, v uint64) []byte { return binary.AppendUvarint(b, v) }

func appendBytes(b, v []byte) []byte {
	if v == nil {
		return append(b, 0)
	}
	return append(appendUint(b, uint64(len(v))+1), v...)
}

func appendString[S ~string](b []byte, v S) []byte {
	return append(appendUint(b, uint64(len(v))+1), v...)
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

func appendTime(b []byte, v time.Time) []byte {
	if v.IsZero() {
		return append(b, 0)
	}
	b = binary.AppendVarint(append(b, 1), v.Unix())
	return appendUint(b, uint64(v.Nanosecond()))
}

func appendHeader(b []byte, h *raft.RPCHeader) []byte {
	return appendBytes(appendBytes(appendUint(b, uint64(h.ProtocolVersion)), h.ID), h.Addr)
}

// decoder takes values from the front of b. Once bad, it returns zero values.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) fail() {
	d.b, d.bad = nil, true
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.fail()
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return v
}

func (d *decoder) uint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) bool() bool {
	v := d.byte()
	if v > 1 {
		d.fail()
	}
	return v == 1
}

func (d *decoder) bytes() []byte {
	n := d.uint()
	if n == 0 {
		return nil
	}
	if n--; n > uint64(len(d.b)) {
		d.fail()
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) string() string { return string(d.bytes()) }

func (d *decoder) time() time.Time {
	if !d.bool() {
		return time.Time{}
	}
	sec, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail()
		return time.Time{}
	}
	d.b = d.b[n:]
	nsec := d.uint()
	if nsec >= uint64(time.Second) {
		d.fail()
	}
	if d.bad {
		return time.Time{}
	}
	return time.Unix(sec, int64(nsec)).UTC()
}

func (d *decoder) header() raft.RPCHeader {
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersion(d.uint()), ID: d.bytes(), Addr: d.bytes()}
}

// end reports whether everything was there and nothing is left over.
func (d *decoder) end() error {
	if d.bad || len(d.b) > 0 {
		return fmt.Errorf("%w: message ends too early or too late", errMalformed)
	}
	return nil
}

func typeOf(request any) messageType {
	switch request.(type) {
	case *raft.AppendEntriesRequest:
		return typeAppendEntries
	case *raft.RequestVoteRequest:
		return typeRequestVote
	case *raft.RequestPreVoteRequest:
		return typeRequestPreVote
	case *raft.TimeoutNowRequest:
		return typeTimeoutNow
	case *raft.InstallSnapshotRequest:
		return typeInstallSnapshot
	}
	return 0
}

func appendRequest(b []byte, request any) []byte {
	switch r := request.(type) {
	case *raft.AppendEntriesRequest:
		return appendAppendEntries(b, r)
	case *raft.RequestVoteRequest:
		b = appendUint(appendHeader(b, &r.RPCHeader), r.Term)
		b = appendBytes(b, r.Candidate)
		b = appendUint(appendUint(b, r.LastLogIndex), r.LastLogTerm)
		return appendBool(b, r.LeadershipTransfer)
	case *raft.RequestPreVoteRequest:
		b = appendUint(appendHeader(b, &r.RPCHeader), r.Term)
		return appendUint(appendUint(b, r.LastLogIndex), r.LastLogTerm)
	case *raft.TimeoutNowRequest:
		return appendHeader(b, &r.RPCHeader)
	case *raft.InstallSnapshotRequest:
		b = appendUint(appendHeader(b, &r.RPCHeader), uint64(r.SnapshotVersion))
		b = appendBytes(appendUint(b, r.Term), r.Leader)
		b = appendUint(appendUint(b, r.LastLogIndex), r.LastLogTerm)
		b = appendBytes(appendBytes(b, r.Peers), r.Configuration)
		return appendUint(appendUint(b, r.ConfigurationIndex), uint64(r.Size))
	}
	panic(fmt.Sprintf("transport: no encoding for %T", request))
}

func appendAppendEntries(b []byte, r *raft.AppendEntriesRequest) []byte {
	b = appendUint(appendHeader(b, &r.RPCHeader), r.Term)
	b = appendBytes(b, r.Leader)
	b = appendUint(appendUint(b, r.PrevLogEntry), r.PrevLogTerm)
	b = appendUint(b, r.LeaderCommitIndex)
	b = appendUint(b, uint64(len(r.Entries)))
	for _, e := range r.Entries {
		b = appendUint(appendUint(b, e.Index), e.Term)
		b = appendBytes(append(b, byte(e.Type)), e.Data)
		b = appendTime(appendBytes(b, e.Extensions), e.AppendedAt)
	}
	return b
}

const (
	overheadBytes      = 1 << 10 // upper bound of what a request takes beside entries and peers
	entryOverheadBytes = 160     // of what an entry takes beside its data, encoded or in memory
)

func entryBytes(e *raft.Log) int { return len(e.Data) + len(e.Extensions) + entryOverheadBytes }

// requestBytes is an upper bound of what a request takes, encoded or in memory.
func requestBytes(request any) int {
	size := overheadBytes
	if r, ok := request.(*raft.AppendEntriesRequest); ok {
		for _, e := range r.Entries {
			size += entryBytes(e)
		}
	}
	return size
}

// decodeRequest decodes a raft request of the given type.
func decodeRequest(t messageType, b []byte) (any, error) {
	d := decoder{b: b}
	switch t {
	case typeAppendEntries:
		r := new(raft.AppendEntriesRequest)
		d.appendEntries(r)
		if err := d.end(); err != nil {
			return nil, err
		}
		return r, checkEntries(r.Entries)
	case typeRequestVote:
		r := &raft.RequestVoteRequest{RPCHeader: d.header(), Term: d.uint(), Candidate: d.bytes(),
			LastLogIndex: d.uint(), LastLogTerm: d.uint(), LeadershipTransfer: d.bool()}
		return r, d.end()
	case typeRequestPreVote:
		r := &raft.RequestPreVoteRequest{RPCHeader: d.header(), Term: d.uint(),
			LastLogIndex: d.uint(), LastLogTerm: d.uint()}
		return r, d.end()
	case typeTimeoutNow:
		r := &raft.TimeoutNowRequest{RPCHeader: d.header()}
		return r, d.end()
	case typeInstallSnapshot:
		r := &raft.InstallSnapshotRequest{RPCHeader: d.header(), SnapshotVersion: raft.SnapshotVersion(d.uint()),
			Term: d.uint(), Leader: d.bytes(), LastLogIndex: d.uint(), LastLogTerm: d.uint(), Peers: d.bytes(),
			Configuration: d.bytes(), ConfigurationIndex: d.uint(), Size: int64(d.uint())}
		if r.Size < 0 {
			d.fail()
		}
		if err := d.end(); err != nil {
			return nil, err
		}
		return r, checkConfiguration(r.Configuration)
	}
	return nil, fmt.Errorf("%w: unknown raft message type %d", errMalformed, t)
}

func (d *decoder) appendEntries(r *raft.AppendEntriesRequest) {
	r.RPCHeader, r.Term, r.Leader = d.header(), d.uint(), d.bytes()
	r.PrevLogEntry, r.PrevLogTerm, r.LeaderCommitIndex = d.uint(), d.uint(), d.uint()
	n := d.uint()
	if n > maxEntries || n > uint64(len(d.b)/minEntryBytes) {
		d.fail()
	}
	if d.bad || n == 0 {
		return
	}
	entries := make([]raft.Log, n)
	r.Entries = make([]*raft.Log, n)
	for i := range entries {
		entries[i] = raft.Log{Index: d.uint(), Term: d.uint(), Type: raft.LogType(d.byte()), Data: d.bytes(),
			Extensions: d.bytes(), AppendedAt: d.time()}
		r.Entries[i] = &entries[i]
	}
}

// checkEntries refuses what raft cannot take: it panics at a configuration that it cannot decode, and
// would do so again at each start, since the entry is in its log by then.
func checkEntries(entries []*raft.Log) error {
	for _, e := range entries {
		switch e.Type {
		case raft.LogCommand, raft.LogNoop, raft.LogBarrier:
		case raft.LogConfiguration:
			if err := checkConfiguration(e.Data); err != nil {
				return fmt.Errorf("entry %d: %w", e.Index, err)
			}
		default:
			return fmt.Errorf("%w: entry %d has type %d", errMalformed, e.Index, e.Type)
		}
	}
	return nil
}

// checkConfiguration refuses an encoded configuration that raft would not have made.
func checkConfiguration(b []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: configuration: %v", errMalformed, p)
		}
	}()
	ids, addresses := map[raft.ServerID]bool{}, map[raft.ServerAddress]bool{}
	voters := 0
	for _, s := range raft.DecodeConfiguration(b).Servers {
		if s.ID == "" || s.Address == "" || ids[s.ID] || addresses[s.Address] || s.Suffrage < raft.Voter || s.Suffrage > raft.Staging {
			return fmt.Errorf("%w: configuration: server %q at %q, %v", errMalformed, s.ID, s.Address, s.Suffrage)
		}
		ids[s.ID], addresses[s.Address] = true, true
		if s.Suffrage == raft.Voter {
			voters++
		}
	}
	if voters == 0 {
		return fmt.Errorf("%w: configuration without a voter", errMalformed)
	}
	return nil
}

func appendResponse(b []byte, response any) []byte {
	switch r := response.(type) {
	case *raft.AppendEntriesResponse:
		b = appendUint(appendUint(appendHeader(b, &r.RPCHeader), r.Term), r.LastLog)
		return appendBool(appendBool(b, r.Success), r.NoRetryBackoff)
	case *raft.RequestVoteResponse:
		b = appendUint(appendHeader(b, &r.RPCHeader), r.Term)
		return appendBool(appendBytes(b, r.Peers), r.Granted)
	case *raft.RequestPreVoteResponse:
		return appendBool(appendUint(appendHeader(b, &r.RPCHeader), r.Term), r.Granted)
	case *raft.TimeoutNowResponse:
		return appendHeader(b, &r.RPCHeader)
	case *raft.InstallSnapshotResponse:
		return appendBool(appendUint(appendHeader(b, &r.RPCHeader), r.Term), r.Success)
	}
	panic(fmt.Sprintf("transport: no encoding for %T", response))
}

// decodeResponse decodes into response and sets every field of it: raft passes the same response again
// and again, and a field left over from an earlier answer would be taken for this one's.
func decodeResponse(b []byte, response any) error {
	d := decoder{b: b}
	switch r := response.(type) {
	case *raft.AppendEntriesResponse:
		*r = raft.AppendEntriesResponse{RPCHeader: d.header(), Term: d.uint(), LastLog: d.uint(),
			Success: d.bool(), NoRetryBackoff: d.bool()}
	case *raft.RequestVoteResponse:
		*r = raft.RequestVoteResponse{RPCHeader: d.header(), Term: d.uint(), Peers: d.bytes(), Granted: d.bool()}
	case *raft.RequestPreVoteResponse:
		*r = raft.RequestPreVoteResponse{RPCHeader: d.header(), Term: d.uint(), Granted: d.bool()}
	case *raft.TimeoutNowResponse:
		*r = raft.TimeoutNowResponse{RPCHeader: d.header()}
	case *raft.InstallSnapshotResponse:
		*r = raft.InstallSnapshotResponse{RPCHeader: d.header(), Term: d.uint(), Success: d.bool()}
	default:
		panic(fmt.Sprintf("transport: no decoding for %T", response))
	}
	if err := d.end(); err != nil {
		resetResponse(response)
		return err
	}
	return nil
}

func resetResponse(response any) {
	switch r := response.(type) {
	case *raft.AppendEntriesResponse:
		*r = raft.AppendEntriesResponse{}
	case *raft.RequestVoteResponse:
		*r = raft.RequestVoteResponse{}
	case *raft.RequestPreVoteResponse:
		*r = raft.RequestPreVoteResponse{}
	case *raft.TimeoutNowResponse:
		*r = raft.TimeoutNowResponse{}
	case *raft.InstallSnapshotResponse:
		*r = raft.InstallSnapshotResponse{}
	}
}
