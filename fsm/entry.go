package fsm

import (
	"encoding/binary"
	"fmt"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Space names one of the two key spaces of a state. Each has its own revisions, compaction and history.
type Space uint8

const (
	User   Space = 0 // the keys of clients
	System Space = 1 // kvd's own: the cluster map
	spaces       = 2
)

// Request is one transaction. Data is a marshalled etcdserverpb.InternalRaftRequest with one of Put, DeleteRange,
// Txn, Compaction or, in the space User, LeaseGrant, LeaseRevoke, LeaseCheckpoint; empty Data does nothing and has an
// empty Result. If the Header of a LeaseRevoke or a LeaseCheckpoint has an ID, that is the term in which it was decided:
// in an entry of another one it fails with ErrLeaseStale. If it has an AuthRevision, that is the incarnation of the lease
// for which a LeaseRevoke was decided, another one is not found; or the newest one that a LeaseCheckpoint knew of, later
// ones are passed over.
type Request struct {
	Space Space // or LeaseCommands
	Data  []byte
}

// Result is the outcome of a request. Err is definite: the request changed nothing, except after ErrAnswerDropped.
// Headers of responses carry the revision alone.
type Result struct {
	Response proto.Message
	Err      error
}

// An entry is a header of version (1 byte), flags (1, zero), floor (8, signed), term (8) and number of requests
// (4), all little endian, followed for each request by its space (1), its size (uvarint) and its data.
const (
	entryVersion     = 1
	entryHeaderBytes = 1 + 1 + 8 + 8 + 4
	entryCountOffset = entryHeaderBytes - 4
)

// EntryBuilder builds the payload of one raft entry. The zero EntryBuilder is empty and has no floor. It is not
// safe for concurrent use.
type EntryBuilder struct {
	buf   []byte
	count uint32
	floor int64
	term  uint64
}

// Add appends a request. It copies the data.
func (b *EntryBuilder) Add(r Request) {
	if b.buf == nil {
		b.buf = make([]byte, entryHeaderBytes, max(1<<10, entryHeaderBytes+len(r.Data)+16))
	}
	b.buf = append(b.buf, byte(r.Space))
	b.buf = binary.AppendUvarint(b.buf, uint64(len(r.Data)))
	b.buf = append(b.buf, r.Data...)
	b.count++
}

// SetFloor says that the entry's requests use the revisions from floor on, one each, which were reserved in term;
// those of requests that change nothing stay unused, except a compaction's. What is a future revision is judged
// against the request's own. Floor 0, the default, uses the next revisions.
func (b *EntryBuilder) SetFloor(floor int64, term uint64) { b.floor, b.term = floor, term }

// Count is the number of requests added.
func (b *EntryBuilder) Count() int { return int(b.count) }

// SizeBytes is the size of what Bytes returns.
func (b *EntryBuilder) SizeBytes() int { return max(len(b.buf), entryHeaderBytes) }

// Bytes returns the payload. It stays valid, and unchanged, if Reset follows; Add must not.
func (b *EntryBuilder) Bytes() []byte {
	if b.buf == nil {
		b.buf = make([]byte, entryHeaderBytes)
	}
	b.buf[0] = entryVersion
	binary.LittleEndian.PutUint64(b.buf[2:], uint64(b.floor))
	binary.LittleEndian.PutUint64(b.buf[10:], b.term)
	binary.LittleEndian.PutUint32(b.buf[entryCountOffset:], b.count)
	return b.buf
}

// Reset makes the builder empty again, without touching the bytes it has returned.
func (b *EntryBuilder) Reset() { *b = EntryBuilder{} }

// entry is a decoded entry. Its commands alias its bytes.
type entry struct {
	floor    int64
	term     uint64
	commands []command
	puts     int
}

// command is one decoded request: a put, a message of another kind, or nothing.
type command struct {
	space   Space
	isPut   bool
	put     putCommand
	message proto.Message
	decided decision // of a message that ends or shortens leases
	lease   *LeaseCommand
}

// putCommand is a PutRequest without its message: puts are most of what is applied.
type putCommand struct {
	key, value                       []byte
	lease                            int64
	prevKV, ignoreValue, ignoreLease bool
}

func putCommandOf(p *pb.PutRequest) putCommand {
	return putCommand{
		key: p.GetKey(), value: p.GetValue(), lease: p.GetLease(),
		prevKV: p.GetPrevKv(), ignoreValue: p.GetIgnoreValue(), ignoreLease: p.GetIgnoreLease(),
	}
}

// decodeEntry decodes the whole of an entry, so that one that is not understood changes nothing.
func decodeEntry(data []byte) (entry, error) {
	if len(data) < entryHeaderBytes {
		return entry{}, fmt.Errorf("%w: %d bytes", ErrMalformedEntry, len(data))
	}
	if data[0] != entryVersion || data[1] != 0 {
		return entry{}, fmt.Errorf("%w: entry version %d, flags %#x", ErrUnknownCommand, data[0], data[1])
	}
	e := entry{
		floor: int64(binary.LittleEndian.Uint64(data[2:])),
		term:  binary.LittleEndian.Uint64(data[10:]),
	}
	count := binary.LittleEndian.Uint32(data[entryCountOffset:])
	data = data[entryHeaderBytes:]
	if uint64(count) > uint64(len(data))/2 {
		return entry{}, fmt.Errorf("%w: %d requests in %d bytes", ErrMalformedEntry, count, len(data))
	}
	if e.floor < 0 || e.floor > math.MaxInt64-int64(count) {
		return entry{}, fmt.Errorf("%w: floor %d", ErrMalformedEntry, e.floor)
	}
	e.commands = make([]command, count)
	for i := range e.commands {
		size, n := binary.Uvarint(data[min(1, len(data)):])
		if n <= 0 || size > uint64(len(data)-1-n) {
			return entry{}, fmt.Errorf("%w: request %d is cut off", ErrMalformedEntry, i)
		}
		c := &e.commands[i]
		if c.space = Space(data[0]); c.space > LeaseCommands {
			return entry{}, fmt.Errorf("%w: key space %d", ErrUnknownCommand, c.space)
		}
		if err := c.decode(data[1+n:][:size]); err != nil {
			return entry{}, fmt.Errorf("request %d: %w", i, err)
		}
		if c.isPut {
			e.puts++
		}
		data = data[1+n+int(size):]
	}
	if len(data) != 0 {
		return entry{}, fmt.Errorf("%w: %d bytes after the last request", ErrMalformedEntry, len(data))
	}
	return e, nil
}

func (c *command) decode(data []byte) error {
	if c.space == LeaseCommands {
		lease, err := ParseLeaseCommand(data)
		c.space, c.lease = User, &lease
		return err
	}
	if len(data) == 0 {
		return nil
	}
	if c.put, c.isPut = decodePlainPut(data); c.isPut {
		return nil
	}
	var r pb.InternalRaftRequest
	if err := proto.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformedEntry, err)
	}
	found := 0
	if r.Put != nil {
		c.put, c.isPut = putCommandOf(r.Put), true
		found++
	}
	if r.DeleteRange != nil {
		c.message = r.DeleteRange
		found++
	}
	if r.Txn != nil {
		c.message = r.Txn
		found++
	}
	if r.Compaction != nil {
		c.message = r.Compaction
		found++
	}
	found += c.decodeLease(&r)
	if found != 1 {
		return fmt.Errorf("%w: %d known commands in %d bytes", ErrUnknownCommand, found, len(data))
	}
	return nil
}

// decodeLease takes the commands with leases, which there are in one key space only.
func (c *command) decodeLease(r *pb.InternalRaftRequest) (found int) {
	if c.space != User {
		return 0
	}
	if r.LeaseGrant != nil {
		c.message = r.LeaseGrant
		found++
	}
	if r.LeaseRevoke != nil {
		c.message = r.LeaseRevoke
		found++
	}
	if r.LeaseCheckpoint != nil {
		c.message = r.LeaseCheckpoint
		found++
	}
	c.decided = decision{term: r.Header.GetID(), incarnation: int64(r.Header.GetAuthRevision())}
	return found
}

// decodePlainPut decodes an InternalRaftRequest that holds a put and nothing else, in fields that it knows. What
// it declines is left to the general decoder; what it takes, both decode alike.
func decodePlainPut(data []byte) (p putCommand, ok bool) {
	number, kind, n := protowire.ConsumeTag(data)
	if n < 0 || number != 4 || kind != protowire.BytesType {
		return p, false
	}
	body, m := protowire.ConsumeBytes(data[n:])
	if m != len(data)-n {
		return p, false
	}
	for len(body) > 0 {
		number, kind, n := protowire.ConsumeTag(body)
		if n < 0 {
			return p, false
		}
		body = body[n:]
		var bytes []byte
		var integer uint64
		switch {
		case number <= 2 && kind == protowire.BytesType:
			bytes, n = protowire.ConsumeBytes(body)
		case number >= 3 && number <= 6 && kind == protowire.VarintType:
			integer, n = protowire.ConsumeVarint(body)
		default:
			return p, false
		}
		if n < 0 {
			return p, false
		}
		body = body[n:]
		switch number {
		case 1:
			p.key = bytes
		case 2:
			p.value = bytes
		case 3:
			p.lease = int64(integer)
		case 4:
			p.prevKV = integer != 0
		case 5:
			p.ignoreValue = integer != 0
		case 6:
			p.ignoreLease = integer != 0
		}
	}
	return p, true
}
