package server

import (
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// The messages of puts, gets and events are encoded and decoded by hand: reflection costs more than all else that is done with
// most of them. What is encoded here is what proto.Marshal makes of it, byte by byte, as long as a message has no unknown
// fields, which those made here do not; what is decoded here is what proto.Unmarshal makes of it, and whatever has
// anything unknown is left to that.

// scan decodes a message of which nothing but integers and bytes is known; false leaves it to the general decoder.
func scan(b []byte, take func(field protowire.Number, bytes []byte, integer uint64, isBytes bool) bool) bool {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return false
		}
		b = b[n:]
		var bytes []byte
		var integer uint64
		switch kind {
		case protowire.BytesType:
			bytes, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			integer, n = protowire.ConsumeVarint(b)
		default:
			return false
		}
		if n < 0 || !take(number, bytes, integer, kind == protowire.BytesType) {
			return false
		}
		b = b[n:]
	}
	return true
}

// decodePut decodes into r, which must be empty; if it returns false, r is useless. Key and value alias b.
func decodePut(b []byte, r *pb.PutRequest) bool {
	return scan(b, func(field protowire.Number, bytes []byte, integer uint64, isBytes bool) bool {
		if isBytes != (field <= 2) {
			return false
		}
		switch field {
		case 1:
			r.Key = bytes
		case 2:
			r.Value = bytes
		case 3:
			r.Lease = int64(integer)
		case 4:
			r.PrevKv = integer != 0
		case 5:
			r.IgnoreValue = integer != 0
		case 6:
			r.IgnoreLease = integer != 0
		default:
			return false
		}
		return true
	})
}

// decodeRange is decodePut for a range.
func decodeRange(b []byte, r *pb.RangeRequest) bool {
	return scan(b, func(field protowire.Number, bytes []byte, integer uint64, isBytes bool) bool {
		if isBytes != (field <= 2) {
			return false
		}
		switch field {
		case 1:
			r.Key = bytes
		case 2:
			r.RangeEnd = bytes
		case 3:
			r.Limit = int64(integer)
		case 4:
			r.Revision = int64(integer)
		case 5:
			r.SortOrder = pb.RangeRequest_SortOrder(int32(integer))
		case 6:
			r.SortTarget = pb.RangeRequest_SortTarget(int32(integer))
		case 7:
			r.Serializable = integer != 0
		case 8:
			r.KeysOnly = integer != 0
		case 9:
			r.CountOnly = integer != 0
		case 10:
			r.MinModRevision = int64(integer)
		case 11:
			r.MaxModRevision = int64(integer)
		case 12:
			r.MinCreateRevision = int64(integer)
		case 13:
			r.MaxCreateRevision = int64(integer)
		default:
			return false
		}
		return true
	})
}

// decodeHeaderOnly decodes the response to a plain put into its header; false if there is anything else.
func decodeHeaderOnly(b []byte, h *pb.ResponseHeader) bool {
	number, kind, n := protowire.ConsumeTag(b)
	if n < 0 || number != 1 || kind != protowire.BytesType {
		return false
	}
	body, m := protowire.ConsumeBytes(b[n:])
	return m == len(b)-n && scan(body, func(field protowire.Number, _ []byte, integer uint64, isBytes bool) bool {
		switch {
		case isBytes:
			return false
		case field == 1:
			h.ClusterId = integer
		case field == 2:
			h.MemberId = integer
		case field == 3:
			h.Revision = int64(integer)
		case field == 4:
			h.RaftTerm = integer
		default:
			return false
		}
		return true
	})
}

// putPrefix is the most that comes before a put of less than maxWrapped bytes in an InternalRaftRequest.
const (
	putPrefix  = 1 + 4
	maxWrapped = 1 << 28
)

// putTag is InternalRaftRequest's of a put.
const putTag = 4<<3 | byte(protowire.BytesType)

// wrapPut makes an encoded PutRequest an InternalRaftRequest, where it is: frame has putPrefix bytes before it.
func wrapPut(frame []byte) []byte {
	size := uint64(len(frame) - putPrefix)
	data := frame[putPrefix-1-protowire.SizeVarint(size):]
	protowire.AppendVarint(append(data[:0], putTag), size)
	return data
}

func sizeInteger(v uint64) int {
	if v == 0 {
		return 0
	}
	return 1 + protowire.SizeVarint(v)
}

func sizeBytes(v []byte) int {
	if len(v) == 0 {
		return 0
	}
	return 1 + protowire.SizeBytes(len(v))
}

func appendInteger(b []byte, field byte, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(append(b, field<<3|byte(protowire.VarintType)), v)
}

func appendBytes(b []byte, field byte, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return append(appendSize(b, field, len(v)), v...)
}

// appendSize begins a field with a size.
func appendSize(b []byte, field byte, size int) []byte {
	return protowire.AppendVarint(append(b, field<<3|byte(protowire.BytesType)), uint64(size))
}

func sizeHeader(h *pb.ResponseHeader) int {
	return sizeInteger(h.ClusterId) + sizeInteger(h.MemberId) + sizeInteger(uint64(h.Revision)) + sizeInteger(h.RaftTerm)
}

// appendHeader appends the header of a response, which is the first field of all of them.
func appendHeader(b []byte, h *pb.ResponseHeader) []byte {
	if h == nil {
		return b
	}
	b = appendSize(b, 1, sizeHeader(h))
	b = appendInteger(b, 1, h.ClusterId)
	b = appendInteger(b, 2, h.MemberId)
	b = appendInteger(b, 3, uint64(h.Revision))
	return appendInteger(b, 4, h.RaftTerm)
}

func sizeKeyValue(kv *mvccpb.KeyValue) int {
	return sizeBytes(kv.Key) + sizeInteger(uint64(kv.CreateRevision)) + sizeInteger(uint64(kv.ModRevision)) +
		sizeInteger(uint64(kv.Version)) + sizeBytes(kv.Value) + sizeInteger(uint64(kv.Lease))
}

func appendKeyValue(b []byte, field byte, kv *mvccpb.KeyValue) []byte {
	b = appendSize(b, field, sizeKeyValue(kv))
	b = appendBytes(b, 1, kv.Key)
	b = appendInteger(b, 2, uint64(kv.CreateRevision))
	b = appendInteger(b, 3, uint64(kv.ModRevision))
	b = appendInteger(b, 4, uint64(kv.Version))
	b = appendBytes(b, 5, kv.Value)
	return appendInteger(b, 6, uint64(kv.Lease))
}

// appendPutResponse appends a response without unknown fields.
func appendPutResponse(b []byte, r *pb.PutResponse) []byte {
	b = appendHeader(b, r.Header)
	if r.PrevKv != nil {
		b = appendKeyValue(b, 2, r.PrevKv)
	}
	return b
}

// appendRangeResponse appends a response without unknown fields.
func appendRangeResponse(b []byte, r *pb.RangeResponse) []byte {
	size := 64
	for _, kv := range r.Kvs {
		size += 8 + sizeKeyValue(kv)
	}
	b = appendHeader(slices.Grow(b, size), r.Header)
	for _, kv := range r.Kvs {
		b = appendKeyValue(b, 2, kv)
	}
	b = appendInteger(b, 3, boolInteger(r.More))
	return appendInteger(b, 4, uint64(r.Count))
}

// watchResponseIsKnown reports whether a response can be encoded here. Events that another node has sent may have more.
func watchResponseIsKnown(r *pb.WatchResponse) bool {
	for _, e := range r.Events {
		if hasUnknown(e) || e.Kv != nil && hasUnknown(e.Kv) || e.PrevKv != nil && hasUnknown(e.PrevKv) {
			return false
		}
	}
	return !hasUnknown(r)
}

func sizeWatchResponse(r *pb.WatchResponse) int {
	size := sizeInteger(uint64(r.WatchId)) + sizeInteger(boolInteger(r.Created)) + sizeInteger(boolInteger(r.Canceled)) +
		sizeInteger(uint64(r.CompactRevision)) + sizeInteger(boolInteger(r.Fragment))
	if r.Header != nil {
		size += 1 + protowire.SizeBytes(sizeHeader(r.Header))
	}
	if len(r.CancelReason) > 0 {
		size += 1 + protowire.SizeBytes(len(r.CancelReason))
	}
	for _, e := range r.Events {
		size += 1 + protowire.SizeBytes(sizeWireEvent(e))
	}
	return size
}

// sizeWireEvent is what an event takes as a message, without its own size.
func sizeWireEvent(e *mvccpb.Event) int {
	size := sizeInteger(uint64(e.Type))
	if e.Kv != nil {
		size += 1 + protowire.SizeBytes(sizeKeyValue(e.Kv))
	}
	if e.PrevKv != nil {
		size += 1 + protowire.SizeBytes(sizeKeyValue(e.PrevKv))
	}
	return size
}

// appendWatchResponse appends a response without unknown fields.
func appendWatchResponse(b []byte, r *pb.WatchResponse) []byte {
	b = appendHeader(b, r.Header)
	b = appendInteger(b, 2, uint64(r.WatchId))
	b = appendInteger(b, 3, boolInteger(r.Created))
	b = appendInteger(b, 4, boolInteger(r.Canceled))
	b = appendInteger(b, 5, uint64(r.CompactRevision))
	if len(r.CancelReason) > 0 {
		b = append(appendSize(b, 6, len(r.CancelReason)), r.CancelReason...)
	}
	b = appendInteger(b, 7, boolInteger(r.Fragment))
	for _, e := range r.Events {
		b = appendSize(b, 11, sizeWireEvent(e))
		b = appendInteger(b, 1, uint64(e.Type))
		if e.Kv != nil {
			b = appendKeyValue(b, 2, e.Kv)
		}
		if e.PrevKv != nil {
			b = appendKeyValue(b, 3, e.PrevKv)
		}
	}
	return b
}

func boolInteger(v bool) uint64 {
	if v {
		return 1
	}
	return 0
}

// hasUnknown reports whether a message, not those inside, has fields that this version does not know.
func hasUnknown(m proto.Message) bool { return len(m.ProtoReflect().GetUnknown()) > 0 }
