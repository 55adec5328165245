package mvcc

import (
	"fmt"
	"slices"
	"sort"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of mvccpb.KeyValue. Rows are written by hand in the order and form that protobuf gives them, so
// that one put costs no message, and a read decodes only what it needs.
const (
	fieldKey            = 1
	fieldCreateRevision = 2
	fieldModRevision    = 3
	fieldVersion        = 4
	fieldValue          = 5
	fieldLease          = 6
)

// RowBytes is the size of the row that AppendRow appends.
func RowBytes(key, value []byte, s Stamp, lease int64) int {
	return sizeBytes(key) + sizeInt(s.Created) + sizeInt(s.Main) + sizeInt(s.Version) + sizeBytes(value) + sizeInt(lease)
}

// AppendRow appends the stored form of a key's value at s.
func AppendRow(b, key, value []byte, s Stamp, lease int64) []byte {
	b = appendBytes(b, fieldKey, key)
	b = appendInt(b, fieldCreateRevision, s.Created)
	b = appendInt(b, fieldModRevision, s.Main)
	b = appendInt(b, fieldVersion, s.Version)
	b = appendBytes(b, fieldValue, value)
	return appendInt(b, fieldLease, lease)
}

// TombstoneBytes is the size of the row that AppendTombstone appends.
func TombstoneBytes(key string) int { return sizeBytes(key) }

// AppendTombstone appends the stored form of a key's deletion.
func AppendTombstone(b []byte, key string) []byte { return appendBytes(b, fieldKey, key) }

func sizeBytes[T ~string | ~[]byte](v T) int {
	if len(v) == 0 {
		return 0
	}
	return 1 + protowire.SizeBytes(len(v))
}

func sizeInt(v int64) int {
	if v == 0 {
		return 0
	}
	return 1 + protowire.SizeVarint(uint64(v))
}

func appendBytes[T ~string | ~[]byte](b []byte, field protowire.Number, v T) []byte {
	if len(v) == 0 {
		return b
	}
	b = append(b, byte(field<<3)|byte(protowire.BytesType))
	b = protowire.AppendVarint(b, uint64(len(v)))
	return append(b, v...)
}

func appendInt(b []byte, field protowire.Number, v int64) []byte {
	if v == 0 {
		return b
	}
	b = append(b, byte(field<<3)|byte(protowire.VarintType))
	return protowire.AppendVarint(b, uint64(v))
}

// DecodeRow fills kv, which must be zero, from a stored row. Key and value alias data.
func DecodeRow(data []byte, kv *mvccpb.KeyValue) error {
	return decodeRow(data, kv, fieldLease)
}

// RowKey reads the key of a stored row, which it aliases.
func RowKey(data []byte) ([]byte, error) {
	var kv mvccpb.KeyValue
	err := decodeRow(data, &kv, fieldKey)
	return kv.Key, err
}

// DecodeStamp reads what the index needs of the stored row of r. The key aliases data.
func DecodeStamp(data []byte, r Revision, tombstone bool) (key []byte, s Stamp, err error) {
	var kv mvccpb.KeyValue
	if err := decodeRow(data, &kv, fieldVersion); err != nil {
		return nil, Stamp{}, err
	}
	s = Stamp{Main: r.Main, Sub: r.Sub}
	if tombstone {
		return kv.Key, s, nil
	}
	if kv.CreateRevision <= 0 || kv.CreateRevision > r.Main || kv.Version <= 0 || kv.ModRevision != r.Main {
		return nil, Stamp{}, fmt.Errorf("%w: revision %d with create revision %d, mod revision %d, version %d",
			ErrMalformed, r.Main, kv.CreateRevision, kv.ModRevision, kv.Version)
	}
	s.Created, s.Version = kv.CreateRevision, kv.Version
	return kv.Key, s, nil
}

// DecodeLease reads the lease of a stored row; 0 is none, as in a tombstone.
func DecodeLease(data []byte) (int64, error) {
	var kv mvccpb.KeyValue
	err := decodeRow(data, &kv, fieldLease)
	return kv.Lease, err
}

// decodeRow decodes the fields up to and including last; rows have them in ascending order.
func decodeRow(data []byte, kv *mvccpb.KeyValue, last protowire.Number) error {
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fmt.Errorf("%w: %w", ErrMalformed, protowire.ParseError(n))
		}
		if number > last {
			return nil
		}
		data = data[n:]
		var bytes []byte
		var integer uint64
		switch kind {
		case protowire.BytesType:
			bytes, n = protowire.ConsumeBytes(data)
		case protowire.VarintType:
			integer, n = protowire.ConsumeVarint(data)
		default:
			return fmt.Errorf("%w: field %d of type %d", ErrMalformed, number, kind)
		}
		if n < 0 {
			return fmt.Errorf("%w: %w", ErrMalformed, protowire.ParseError(n))
		}
		data = data[n:]
		switch number {
		case fieldKey:
			kv.Key = bytes
		case fieldCreateRevision:
			kv.CreateRevision = int64(integer)
		case fieldModRevision:
			kv.ModRevision = int64(integer)
		case fieldVersion:
			kv.Version = int64(integer)
		case fieldValue:
			kv.Value = bytes
		case fieldLease:
			kv.Lease = int64(integer)
		}
	}
	return nil
}

// Row is a change that is not on disk yet.
type Row struct {
	Revision  Revision
	Tombstone bool
	Data      []byte // stored form; never changed
}

// Rows are rows in ascending revision. A copy of the slice header is a stable view while others append.
type Rows []Row

// Find returns the stored form of the row of r.
func (rows Rows) Find(r Revision) ([]byte, bool) {
	if len(rows) == 0 || r.Compare(rows[0].Revision) < 0 {
		return nil, false
	}
	i := sort.Search(len(rows), func(i int) bool { return rows[i].Revision.Compare(r) >= 0 })
	if i == len(rows) || rows[i].Revision != r {
		return nil, false
	}
	return rows[i].Data, true
}

const arenaBlockBytes = 256 << 10

// Arena hands out byte slices cut from larger blocks, which live as long as any slice of theirs does. The zero
// Arena begins with small blocks.
type Arena struct {
	block []byte
	next  int
}

// Take returns an empty slice of capacity n.
func (a *Arena) Take(n int) []byte {
	if n > len(a.block) {
		if n >= arenaBlockBytes/4 {
			return make([]byte, 0, n)
		}
		a.next = min(max(2*a.next, 512, n), arenaBlockBytes)
		a.block = make([]byte, a.next)
	}
	b := a.block[:0:n]
	a.block = a.block[n:]
	return b
}

// SortRevisions sorts by time.
func SortRevisions(r []Revision) { slices.SortFunc(r, Revision.Compare) }
