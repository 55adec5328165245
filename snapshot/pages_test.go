package snapshot

import (
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
		rnd := newRand(rapid.Uint64().Draw(rt, "seed"))
		db := newDB(t, rnd, rapid.SampledFrom([]int{0, 5, 100, 2000}).Draw(rt, "keys"))
		path := filepath.Join(t.TempDir(), "copy.db")
		if err := db.View(func(tx *bbolt.Tx) error { return tx.CopyFile(path, 0o600) }); err != nil {
			rt.Fatal(err)
		}
		if err := checkFile(ctx, path); err != nil {
			rt.Fatalf("refuses a sound file: %v", err)
		}
		for range 10 {
			undo := damage(t, rnd, path, db.Info().PageSize)
			err := checkFile(ctx, path)
			switch {
			case err == nil:
				harmless++
				if _, err := dumpFile(path); err != nil {
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
	if rnd.IntN(2) == 0 {
		b[at] ^= 1 << rnd.IntN(8)
	} else {
		b[at] = byte(rnd.Uint32())
	}
	for i := range 2 {
		m := b[i*pageSize+pageHeadBytes:]
		sum := fnv.New64a()
		sum.Write(m[:metaPageBytes-8])
		order.PutUint64(m[metaPageBytes-8:], sum.Sum64())
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
	if err := checkFile(ctx, path); err != nil {
		t.Error(err)
	}
}
