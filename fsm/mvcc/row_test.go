package mvcc

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

func FuzzRowIsProtobuf(f *testing.F) {
	f.Add([]byte("key"), []byte("value"), int64(3), int64(5), int64(2), int64(0))
	f.Add([]byte{}, []byte{}, int64(1), int64(math.MaxInt64), int64(1), int64(-1))
	f.Add(bytes.Repeat([]byte("k"), 300), make([]byte, 1000), int64(1<<40), int64(1<<50), int64(1<<30), int64(1)<<62)
	f.Fuzz(func(t *testing.T, key, value []byte, created, main, version, lease int64) {
		s := Stamp{Main: main, Created: created, Version: version}
		row := AppendRow(nil, key, value, s, lease)
		if n := RowBytes(key, value, s, lease); n != len(row) {
			t.Errorf("%d bytes announced, %d written", n, len(row))
		}
		want := &mvccpb.KeyValue{Key: key, Value: value, CreateRevision: created, ModRevision: main, Version: version, Lease: lease}
		marshalled, err := proto.MarshalOptions{Deterministic: true}.Marshal(want)
		if err != nil || !bytes.Equal(row, marshalled) {
			t.Errorf("%x, want %x (%v)", row, marshalled, err)
		}
		var kv mvccpb.KeyValue
		if err := DecodeRow(row, &kv); err != nil || !proto.Equal(&kv, want) {
			t.Errorf("%v, %v, want %v", &kv, err, want)
		}
		name, stamp, err := DecodeStamp(row, Revision{Main: main}, false)
		if valid := created > 0 && created <= main && version > 0; valid != (err == nil) {
			t.Errorf("%v: %v", s, err)
		}
		if err == nil && (!bytes.Equal(name, key) || stamp != s) {
			t.Errorf("%q %v, want %q %v", name, stamp, key, s)
		}
	})
}

func FuzzDecodeRow(f *testing.F) {
	f.Add(AppendRow(nil, []byte("k"), []byte("v"), Stamp{Main: 5, Created: 3, Version: 2}, 0))
	f.Add(AppendTombstone(nil, "k"))
	f.Add([]byte{0x0b})
	f.Fuzz(func(t *testing.T, data []byte) {
		var kv mvccpb.KeyValue
		if err := DecodeRow(data, &kv); err != nil && !errors.Is(err, ErrMalformed) {
			t.Error(err)
		}
	})
}

func TestTombstone(t *testing.T) {
	row := AppendTombstone(nil, "key")
	want, err := proto.Marshal(&mvccpb.KeyValue{Key: []byte("key")})
	if err != nil || !bytes.Equal(row, want) || TombstoneBytes("key") != len(row) {
		t.Errorf("%x, want %x (%v)", row, want, err)
	}
	name, stamp, err := DecodeStamp(row, Revision{7, 1}, true)
	if string(name) != "key" || stamp != (Stamp{Main: 7, Sub: 1}) || !stamp.Tombstone() || err != nil {
		t.Errorf("%q %v %v", name, stamp, err)
	}
}

func TestKeysSortByRevision(t *testing.T) {
	revisions := []Revision{{1, 0}, {1, 1}, {1, 256}, {2, 0}, {255, math.MaxUint32}, {256, 0}, {math.MaxInt64, 0}}
	var last []byte
	for i, r := range revisions {
		for _, tombstone := range []bool{false, true} {
			k := r.AppendKey(nil, tombstone)
			got, mark, err := ParseKey(k)
			if got != r || mark != tombstone || err != nil {
				t.Errorf("%v became %v, %v, %v", r, got, mark, err)
			}
			if bytes.Compare(last, k) >= 0 {
				t.Errorf("%x is not above %x", k, last)
			}
			last = k
		}
		if i > 0 && r.Compare(revisions[i-1]) <= 0 {
			t.Errorf("%v is not above %v", r, revisions[i-1])
		}
	}
	for _, k := range [][]byte{nil, last[:16], append(slices.Clone(last), 't'), bytes.Repeat([]byte{0xff}, 17), make([]byte, 17)} {
		if _, _, err := ParseKey(k); !errors.Is(err, ErrMalformed) {
			t.Errorf("%x: %v", k, err)
		}
	}
}

func TestRowsFind(t *testing.T) {
	var rows Rows
	for main := int64(3); main < 40; main += 3 {
		for sub := range uint32(main % 4) {
			rows = append(rows, Row{Revision: Revision{main, sub}, Data: []byte{byte(main), byte(sub)}})
		}
	}
	for main := int64(0); main < 45; main++ {
		for sub := range uint32(5) {
			r := Revision{main, sub}
			i := slices.IndexFunc(rows, func(row Row) bool { return row.Revision == r })
			data, ok := rows.Find(r)
			if ok != (i >= 0) || ok && !bytes.Equal(data, rows[i].Data) {
				t.Errorf("%v: %v %v", r, data, ok)
			}
		}
	}
}

func TestArenaSlicesAreApart(t *testing.T) {
	var a Arena
	var all [][]byte
	for i := range 2000 {
		n := (i * 37) % 900
		if i%500 == 499 {
			n = arenaBlockBytes
		}
		b := a.Take(n)
		if len(b) != 0 || cap(b) != n {
			t.Fatalf("len %d, cap %d, want capacity %d", len(b), cap(b), n)
		}
		all = append(all, append(b, bytes.Repeat([]byte{byte(i)}, n)...))
	}
	for i, b := range all {
		if bytes.Count(b, []byte{byte(i)}) != len(b) {
			t.Fatalf("slice %d was written over", i)
		}
	}
}
