package snapshot

import (
	"encoding/binary"
	"fmt"

	"github.com/hashicorp/raft"
)

// Bounds of what an encoded Meta may hold. A cluster has at most a few dozen members with ids of some 80
// bytes, so nothing real comes near them.
const (
	maxMetaBytes   = 64 << 10
	maxServers     = 1 << 10
	maxServerBytes = 1 << 10
)

// encodeMeta returns the only encoding of m that decodeMeta accepts, or an error if m is beyond the bounds.
func encodeMeta(m Meta) ([]byte, error) {
	b := make([]byte, 0, 256)
	for _, v := range []uint64{m.ClusterID, m.Group, m.Index, m.Term, m.ConfigurationIndex,
		uint64(m.Revision), uint64(m.CompactRevision), uint64(m.Keys)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	if len(m.Configuration.Servers) > maxServers {
		return nil, fmt.Errorf("snapshot: %d servers, at most %d fit", len(m.Configuration.Servers), maxServers)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(m.Configuration.Servers)))
	for _, s := range m.Configuration.Servers {
		if s.Suffrage < raft.Voter || s.Suffrage > raft.Staging {
			return nil, fmt.Errorf("snapshot: server %s has the unknown suffrage %d", s.ID, s.Suffrage)
		}
		if len(s.ID) > maxServerBytes || len(s.Address) > maxServerBytes {
			return nil, fmt.Errorf("snapshot: a server id or address is longer than %d bytes", maxServerBytes)
		}
		b = append(b, byte(s.Suffrage))
		b = appendString(b, string(s.ID))
		b = appendString(b, string(s.Address))
	}
	if len(b) > maxMetaBytes {
		return nil, fmt.Errorf("snapshot: metadata of %d bytes, at most %d fit", len(b), maxMetaBytes)
	}
	return b, nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

// decodeMeta refuses with ErrCorrupt everything that encodeMeta does not write.
func decodeMeta(b []byte) (Meta, error) {
	d := metaDecoder{b: b}
	m := Meta{
		ClusterID: d.uint64(), Group: d.uint64(), Index: d.uint64(), Term: d.uint64(),
		ConfigurationIndex: d.uint64(),
		Revision:           int64(d.uint64()), CompactRevision: int64(d.uint64()), Keys: int64(d.uint64()),
	}
	servers := int(d.uint16())
	if servers > maxServers {
		return Meta{}, fmt.Errorf("%w: %d servers", ErrCorrupt, servers)
	}
	for i := 0; i < servers && !d.bad; i++ {
		s := raft.Server{Suffrage: raft.ServerSuffrage(d.byte())}
		s.ID, s.Address = raft.ServerID(d.string()), raft.ServerAddress(d.string())
		d.bad = d.bad || s.Suffrage > raft.Staging
		m.Configuration.Servers = append(m.Configuration.Servers, s)
	}
	if d.bad || len(d.b) > 0 {
		return Meta{}, fmt.Errorf("%w: malformed metadata", ErrCorrupt)
	}
	return m, nil
}

// metaDecoder takes values off the front of b. Once something does not fit, bad stays true and all further
// values are zero.
type metaDecoder struct {
	b   []byte
	bad bool
}

func (d *metaDecoder) take(n int) []byte {
	if d.bad || len(d.b) < n {
		d.bad = true
		return make([]byte, min(n, 8))
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *metaDecoder) byte() byte     { return d.take(1)[0] }
func (d *metaDecoder) uint16() uint16 { return binary.BigEndian.Uint16(d.take(2)) }
func (d *metaDecoder) uint64() uint64 { return binary.BigEndian.Uint64(d.take(8)) }

func (d *metaDecoder) string() string {
	n := int(d.uint16())
	if n > maxServerBytes {
		d.bad = true
	}
	if d.bad {
		return ""
	}
	v := d.take(n)
	if d.bad {
		return ""
	}
	return string(v)
}
