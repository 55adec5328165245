package boltcheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

// Every file that bbolt writes passes, and no damaged file passes that bbolt's own check would refuse: so
// nothing that was staged can make bbolt panic later.
func TestPageCheckAgreesWithBbolt(t *testing.T) {
	caught, harmless := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		rnd := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
		path, pageBytes := newFile(t, rnd, rapid.SampledFrom([]int{0, 5, 100, 1000}).Draw(rt, "keys"))
		if err := File(context.Background(), path); err != nil {
			rt.Fatalf("refuses a sound file: %v", err)
		}
		for range 4 {
			undo := damage(t, rnd, path, pageBytes)
			err := File(context.Background(), path)
			switch {
			case err == nil:
				harmless++
				if err := bboltCheck(path); err != nil {
					rt.Fatalf("accepts what bbolt refuses: %v", err)
				}
			case errors.Is(err, ErrCorrupt):
				caught++
			default:
				rt.Fatal(err)
			}
			undo()
		}
	})
	if caught == 0 || harmless == 0 {
		t.Errorf("%d damages caught, %d harmless: the test shows nothing", caught, harmless)
	}
}

// newFile makes a bbolt file over a few transactions, with free pages, overflow pages, branches, inline and
// nested buckets.
func newFile(t *testing.T, rnd *rand.Rand, keys int) (path string, pageBytes int) {
	t.Helper()
	path, pageBytes = filepath.Join(t.TempDir(), "test.db"), 1024<<rnd.IntN(4)
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, NoFreelistSync: rnd.IntN(2) == 0, PageSize: pageBytes})
	if err != nil {
		t.Fatal(err)
	}
	for range 1 + rnd.IntN(4) {
		if err := db.Update(func(tx *bbolt.Tx) error { return fill(tx, rnd, keys) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return path, pageBytes
}

func fill(tx *bbolt.Tx, rnd *rand.Rand, keys int) error {
	for _, name := range []string{"a", "b", "c"} {
		b, err := tx.CreateBucketIfNotExists([]byte(name))
		if err != nil {
			return err
		}
		inner, err := b.CreateBucketIfNotExists([]byte("inner"))
		if err != nil {
			return err
		}
		if err := errors.Join(fillBucket(b, rnd, rnd.IntN(keys+1)), fillBucket(inner, rnd, rnd.IntN(8))); err != nil {
			return err
		}
	}
	return nil
}

func fillBucket(b *bbolt.Bucket, rnd *rand.Rand, keys int) error {
	for range keys {
		key := fmt.Appendf(nil, "k%04d", rnd.IntN(4096))
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
		if err := b.Put(key, make([]byte, size)); err != nil {
			return err
		}
	}
	return nil
}

// bboltCheck has bbolt open and check the file, and reads everything in it.
func bboltCheck(path string) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, NoFreelistSync: true})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) (err error) {
		for cerr := range tx.Check() {
			err = cerr
		}
		_ = tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			if b != nil { // nil: damage made a plain key of it
				return b.ForEach(func(_, v []byte) error { _ = bytes.Count(v, []byte("x")); return nil })
			}
			return nil
		})
		return err
	})
}

// damage changes one small field near the head of a random page and makes the checksums of meta pages right
// again. It returns a function that takes the damage back.
func damage(t *testing.T, rnd *rand.Rand, path string, pageSize int) (undo func()) {
	t.Helper()
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b := append([]byte(nil), before...)
	page := rnd.IntN(len(b) / pageSize)
	at := page*pageSize + rnd.IntN(min(pageSize, 200))
	if page < 2 { // bbolt's check looks at the heads of meta pages, bbolt itself does not
		at = page*pageSize + pageHeadBytes + rnd.IntN(metaBytes)
	}
	if rnd.IntN(2) == 0 {
		b[at] ^= 1 << rnd.IntN(8)
	} else {
		b[at] = byte(rnd.Uint32())
	}
	for i := range 2 {
		m := b[i*pageSize+pageHeadBytes:]
		sum := fnv.New64a()
		sum.Write(m[:metaBytes-8])
		order.PutUint64(m[metaBytes-8:], sum.Sum64())
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.WriteFile(path, before, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// leafOf returns a leaf whose elements are buckets, all of which have the one value; the key of each but the first
// begins before the one before it, so that all of them end where the value begins. It is followed by nothing.
func leafOf(keys int, value []byte) []byte {
	const all = "dcba" // "a", "ba", "cba", "dcba" are in order
	name := all[len(all)-keys:]
	b := make([]byte, pageHeadBytes+keys*elementBytes)
	order.PutUint16(b[8:], leafPage)
	order.PutUint16(b[10:], uint16(keys))
	for i := range keys {
		at := pageHeadBytes + i*elementBytes
		order.PutUint32(b[at:], bucketFlag)
		order.PutUint32(b[at+4:], uint32(len(b)+keys-1-i-at))
		order.PutUint32(b[at+8:], uint32(i+1))
		order.PutUint32(b[at+12:], uint32(len(value)))
	}
	return append(append(b, name...), value...)
}

// fileOf returns a file whose root is the leaf.
func fileOf(leaf []byte) []byte {
	const pageBytes = 4096
	b := make([]byte, 3*pageBytes)
	for i := range 2 {
		m := b[i*pageBytes+pageHeadBytes:]
		order.PutUint32(m, magic)
		order.PutUint32(m[4:], version)
		order.PutUint32(m[8:], pageBytes)
		order.PutUint64(m[16:], 2)
		order.PutUint64(m[32:], noFreelist)
		order.PutUint64(m[40:], 3)
		sum := fnv.New64a()
		sum.Write(m[:metaBytes-8])
		order.PutUint64(m[metaBytes-8:], sum.Sum64())
	}
	copy(b[2*pageBytes:], leaf)
	order.PutUint64(b[2*pageBytes:], 2)
	return b
}

// What a page says is looked at once. Elements that share bytes, and inline buckets inside of each other, would
// let one page ask for 2^60 steps.
func TestSharedAndNestedElementsAreRefused(t *testing.T) {
	bucket := func(leaf []byte) []byte { return append(make([]byte, bucketBytes), leaf...) }
	empty := bucket(leafOf(0, nil))
	nested := empty
	for range 20 {
		nested = bucket(leafOf(2, nested))
	}
	for _, c := range []struct {
		name string
		leaf []byte
		want error
	}{
		{"one inline bucket", leafOf(1, empty), nil},
		{"one value for two", leafOf(2, empty), ErrCorrupt},
		{"an inline bucket in another", leafOf(1, bucket(leafOf(1, empty))), ErrCorrupt},
		{"a million", leafOf(2, nested), ErrCorrupt},
	} {
		b := fileOf(c.leaf)
		if err := Check(context.Background(), bytes.NewReader(b), int64(len(b))); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// The freelist does not fit into one page, nor its length into the page's head.
func TestPageCheckReadsALongFreelist(t *testing.T) {
	path := filepath.Join(t.TempDir(), "free.db")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true, PageSize: 1024})
	if err != nil {
		t.Fatal(err)
	}
	bucket := []byte("b")
	if err := db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket(bucket)
		for i := 0; i < 70_000 && err == nil; i++ {
			err = b.Put(fmt.Appendf(nil, "%08d", i), make([]byte, 900))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := db.Update(func(tx *bbolt.Tx) error {
			if tx.Bucket(bucket) == nil {
				return nil
			}
			return tx.DeleteBucket(bucket)
		}); err != nil {
			t.Fatal(err)
		}
	}
	if free := db.Stats().FreePageN; free < 0xFFFF {
		t.Fatalf("only %d free pages", free)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := File(context.Background(), path); err != nil {
		t.Error(err)
	}
}

// A crash may tear the meta page that was being written; the other one counts then.
func TestOneTornMetaPage(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		path, pageBytes := newFile(t, rnd, 100)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for torn, sound := range map[string]bool{"first": true, "second": true, "both": false} {
			b := bytes.Clone(whole)
			if torn != "second" {
				b[pageHeadBytes+45]++
			}
			if torn != "first" {
				b[pageBytes+pageHeadBytes+45]++
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			err := File(context.Background(), path)
			if sound {
				if bolt := bboltCheck(path); err != nil || bolt != nil {
					t.Errorf("seed %d, %s torn: %v, bbolt: %v", seed, torn, err, bolt)
				}
			} else if !errors.Is(err, ErrCorrupt) {
				t.Errorf("seed %d, %s torn: %v", seed, torn, err)
			}
		}
	}
}

func TestContextEndsTheCheck(t *testing.T) {
	path, _ := newFile(t, rand.New(rand.NewPCG(1, 0)), 100)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := File(ctx, path); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Cut anywhere, a file is refused or has everything: bbolt would die of it.
func TestTruncatedFile(t *testing.T) {
	path, pageBytes := newFile(t, rand.New(rand.NewPCG(2, 0)), 300)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for size := 0; size < len(whole); size += pageBytes / 2 {
		err := Check(context.Background(), bytes.NewReader(whole[:size]), int64(size))
		switch {
		case errors.Is(err, ErrCorrupt):
			refused++
		case err != nil:
			t.Fatal(err)
		default:
			if err := os.WriteFile(path, whole[:size], 0o600); err != nil {
				t.Fatal(err)
			}
			if err := bboltCheck(path); err != nil {
				t.Errorf("cut at %d: %v", size, err)
			}
		}
	}
	if refused == 0 {
		t.Error("no cut was refused")
	}
}
