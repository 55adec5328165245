package snapshot

import (
	"bytes"
	"context"
	"io"
	"testing"

	"go.etcd.io/bbolt"
)

func benchDB(b *testing.B) *testDB {
	db := newDB(b, newRand(40), 0)
	if err := db.Update(func(tx *bbolt.Tx) error {
		bucket, err := tx.CreateBucketIfNotExists([]byte("big"))
		for i := 0; i < 4000 && err == nil; i++ {
			err = bucket.Put([]byte{byte(i >> 8), byte(i)}, bytes.Repeat([]byte{byte(i)}, 3000))
		}
		return err
	}); err != nil {
		b.Fatal(err)
	}
	return db
}

func BenchmarkWriteStream(b *testing.B) {
	db := benchDB(b)
	for b.Loop() {
		if err := db.View(func(tx *bbolt.Tx) error {
			n, err := WriteStream(context.Background(), io.Discard, tx, db.meta)
			b.SetBytes(n)
			return err
		}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStage(b *testing.B) {
	stream, _ := benchDB(b).stream(b)
	dir := b.TempDir()
	b.SetBytes(int64(len(stream)))
	for b.Loop() {
		staged, err := Stage(context.Background(), bytes.NewReader(stream), dir)
		if err != nil {
			b.Fatal(err)
		}
		if err := staged.Discard(); err != nil {
			b.Fatal(err)
		}
	}
}
