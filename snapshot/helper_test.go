package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

// contents is what a test file holds: keys to values, by bucket path ("a" or "a/b").
type contents map[string]map[string]string

// fill writes random contents over several transactions, with deletions between, so that the file has free
// pages, overflow pages, branches, inline and nested buckets.
func fill(t testing.TB, db *bbolt.DB, rnd *rand.Rand, keys int) {
	t.Helper()
	for range 1 + rnd.IntN(4) {
		err := db.Update(func(tx *bbolt.Tx) error {
			for _, name := range []string{"a", "b", "c"} {
				b, err := tx.CreateBucketIfNotExists([]byte(name))
				if err != nil {
					return err
				}
				inner, err := b.CreateBucketIfNotExists([]byte("inner"))
				if err != nil {
					return err
				}
				if err := fillBucket(b, rnd, rnd.IntN(keys+1)); err != nil {
					return err
				}
				if err := fillBucket(inner, rnd, rnd.IntN(8)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func fillBucket(b *bbolt.Bucket, rnd *rand.Rand, keys int) error {
	for range keys {
		key := binary.BigEndian.AppendUint32([]byte("k"), rnd.Uint32N(1<<12))
		if rnd.IntN(4) == 0 {
			if err := b.Delete(key); err != nil {
				return err
			}
			continue
		}
		size := rnd.IntN(100)
		if rnd.IntN(50) == 0 {
			size = rnd.IntN(40_000)
		}
		value := make([]byte, size)
		for i := 0; i < len(value); i += 4 {
			copy(value[i:], binary.BigEndian.AppendUint32(nil, rnd.Uint32()))
		}
		if err := b.Put(key, value); err != nil {
			return err
		}
	}
	return nil
}

func dumpTx(tx *bbolt.Tx) contents {
	c := contents{}
	_ = tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
		if b != nil { // nil: damage made a plain key of it
			dumpBucket(c, string(name), b)
		}
		return nil
	})
	return c
}

func dumpBucket(c contents, path string, b *bbolt.Bucket) {
	c[path] = map[string]string{}
	_ = b.ForEach(func(k, v []byte) error {
		if v == nil {
			dumpBucket(c, path+"/"+string(k), b.Bucket(k))
		} else {
			c[path][string(k)] = string(v)
		}
		return nil
	})
}

// dumpFile opens a bbolt file, has bbolt check it, and returns what is in it.
func dumpFile(path string) (c contents, err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		for cerr := range tx.Check() {
			err = cerr
		}
		c = dumpTx(tx)
		return err
	})
	return c, err
}

type testDB struct {
	*bbolt.DB
	meta Meta
}

func newDB(t testing.TB, rnd *rand.Rand, keys int) *testDB {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	// The map is large enough for all tests: bbolt would wait for read transactions to end before it grows it.
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, NoFreelistSync: rnd.IntN(2) == 0,
		PageSize: 1024 << rnd.IntN(4), InitialMmapSize: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	fill(t, db, rnd, keys)
	return &testDB{DB: db, meta: randomMeta(rnd)}
}

func randomMeta(rnd *rand.Rand) Meta {
	m := Meta{
		ClusterID: rnd.Uint64(), Group: rnd.Uint64N(4), Index: 1 + rnd.Uint64N(1<<40), Term: rnd.Uint64(),
		ConfigurationIndex: rnd.Uint64(), Revision: rnd.Int64(), CompactRevision: rnd.Int64(), Keys: rnd.Int64(),
	}
	for i := range rnd.IntN(8) {
		m.Configuration.Servers = append(m.Configuration.Servers, raft.Server{
			Suffrage: raft.ServerSuffrage(rnd.IntN(3)),
			ID:       raft.ServerID(fmt.Sprintf("node-%d/%d", i, rnd.IntN(1000))),
			Address:  raft.ServerAddress(fmt.Sprintf("n%d/%d", i, rnd.IntN(1000))),
		})
	}
	return m
}

// stream returns the stream of db and what is in it.
func (db *testDB) stream(t testing.TB) ([]byte, contents) {
	t.Helper()
	var out bytes.Buffer
	var c contents
	err := db.View(func(tx *bbolt.Tx) error {
		c = dumpTx(tx)
		want := StreamSize(tx, db.meta)
		n, err := WriteStream(context.Background(), &out, tx, db.meta)
		if err == nil && (n != want || int64(out.Len()) != want || want%512 != 0) {
			t.Errorf("WriteStream wrote %d and says %d, StreamSize says %d", out.Len(), n, want)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), c
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// chunksOf cuts a stream into header, chunks with their heads, and trailer with padding.
func chunksOf(s []byte) (header []byte, chunks [][]byte, trailer []byte) {
	n := headerFixedBytes + int(binary.BigEndian.Uint32(s[12:])) + crcBytes
	rest := int(binary.BigEndian.Uint64(s[16:]))
	header, s = s[:n], s[n:]
	for rest > 0 {
		k := min(rest, chunkBytes)
		chunks, s = append(chunks, s[:chunkHeadBytes+k]), s[chunkHeadBytes+k:]
		rest -= k
	}
	return header, chunks, s
}
