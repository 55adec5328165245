package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"testing/iotest"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

var ctx = context.Background()

var streamErrors = []error{ErrForeign, ErrVersion, ErrTruncated, ErrCorrupt}

// refusal says which one of the stream errors err is.
func refusal(err error) error {
	var found error
	for _, e := range streamErrors {
		if errors.Is(err, e) {
			if found != nil {
				return errors.New("matches two stream errors")
			}
			found = e
		}
	}
	return found
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		rnd := newRand(rapid.Uint64().Draw(rt, "seed"))
		db := newDB(t, rnd, rapid.SampledFrom([]int{0, 10, 300, 1500}).Draw(rt, "keys"))
		stream, want := db.stream(t)
		meta, err := Verify(ctx, bytes.NewReader(stream))
		if err != nil || !reflect.DeepEqual(meta, db.meta) {
			rt.Fatalf("Verify: %+v, %v; want %+v", meta, err, db.meta)
		}
		dir := t.TempDir()
		staged, err := stage(ctx, iotest.HalfReader(bytes.NewReader(stream)), dir, failingOps{noSync: true})
		if err != nil {
			rt.Fatal(err)
		}
		if !reflect.DeepEqual(staged.Meta, db.meta) {
			rt.Fatalf("staged %+v, want %+v", staged.Meta, db.meta)
		}
		target := filepath.Join(dir, "state.db")
		if err := staged.Commit(target); err != nil {
			rt.Fatal(err)
		}
		got, err := dumpFile(target)
		if err != nil || !reflect.DeepEqual(got, want) {
			rt.Fatalf("what came out differs from what went in (%v)", err)
		}
	})
}

// A transaction always gives the same stream, also while others write.
func TestStreamIsOfItsTransaction(t *testing.T) {
	rnd := newRand(1)
	db := newDB(t, rnd, 1000)
	tx, err := db.Begin(false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	want := dumpTx(tx)
	w := &interferingWriter{interfere: func() {
		if err := db.Update(func(tx *bbolt.Tx) error { return fillBucket(tx.Bucket([]byte("a")), rnd, 5) }); err != nil {
			t.Fatal(err)
		}
	}}
	if _, err := WriteStream(ctx, w, tx, db.meta); err != nil {
		t.Fatal(err)
	}
	staged, err := Stage(ctx, &w.Buffer, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	got, err := dumpFile(staged.Path)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("the stream is not what its transaction saw (%v)", err)
	}
}

type interferingWriter struct {
	bytes.Buffer
	interfere func()
}

func (w *interferingWriter) Write(b []byte) (int, error) {
	w.interfere()
	return w.Buffer.Write(b)
}

// Whatever is done to a stream, it is refused with one typed error, nothing is left of it, and the state that
// was there stays.
func TestDamagedStreamsAreRefused(t *testing.T) {
	db, other := newDB(t, newRand(2), 3000), newDB(t, newRand(3), 3000)
	stream, _ := db.stream(t)
	foreign, _ := other.stream(t)
	if _, chunks, _ := chunksOf(stream); len(chunks) < 3 {
		t.Fatalf("the test stream has %d chunks", len(chunks))
	}
	dir := t.TempDir()
	state := filepath.Join(dir, "state.db")
	if err := os.WriteFile(state, []byte("the old state"), 0o600); err != nil {
		t.Fatal(err)
	}
	refuse := func(rt *rapid.T, damaged []byte, want ...error) {
		_, verr := Verify(ctx, bytes.NewReader(damaged))
		staged, serr := Stage(ctx, bytes.NewReader(damaged), dir)
		if staged != nil || !slices.Contains(want, refusal(serr)) || refusal(verr) != refusal(serr) {
			rt.Fatalf("Stage: %v, Verify: %v, want one of %v", serr, verr, want)
		}
		left, err := os.ReadDir(dir)
		if old, _ := os.ReadFile(state); err != nil || len(left) != 1 || string(old) != "the old state" {
			rt.Fatalf("the directory was touched: %v, %v", left, err)
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		b := slices.Clone(stream)
		header, chunks, trailer := chunksOf(b)
		at := rapid.IntRange(0, len(b)-1).Draw(rt, "at")
		i := rapid.IntRange(0, len(chunks)-1).Draw(rt, "i")
		j := rapid.IntRange(0, len(chunks)-1).Filter(func(j int) bool { return j != i }).Draw(rt, "j")
		_, others, otherTrailer := chunksOf(foreign)
		switch damage := rapid.SampledFrom([]string{"truncate", "flip", "flip header", "reorder", "drop", "repeat",
			"version", "magic", "concatenate", "append", "exchange", "exchange trailer"}).Draw(rt, "damage"); damage {
		case "truncate":
			refuse(rt, b[:at], ErrTruncated)
		case "flip":
			b[at] ^= 1 << rapid.IntRange(0, 7).Draw(rt, "bit")
			refuse(rt, b, streamErrors...)
		case "flip header":
			b[at%len(header)] ^= 1 << rapid.IntRange(0, 7).Draw(rt, "bit")
			refuse(rt, b, ErrForeign, ErrVersion, ErrCorrupt, ErrTruncated)
		case "reorder":
			chunks[i], chunks[j] = chunks[j], chunks[i]
			refuse(rt, slices.Concat(header, slices.Concat(chunks...), trailer), ErrCorrupt)
		case "drop":
			refuse(rt, slices.Concat(header, slices.Concat(slices.Delete(chunks, i, i+1)...), trailer), ErrCorrupt)
		case "repeat":
			refuse(rt, slices.Concat(header, slices.Concat(slices.Insert(chunks, i, chunks[i])...), trailer), ErrCorrupt)
		case "version":
			binary.BigEndian.PutUint32(b[8:], rapid.Uint32().Filter(func(v uint32) bool { return v != streamVersion }).Draw(rt, "version"))
			binary.BigEndian.PutUint32(b[len(header)-4:], crc32.Checksum(b[:len(header)-4], castagnoli))
			refuse(rt, b, ErrVersion)
		case "magic":
			copy(b, "another!")
			refuse(rt, b, ErrForeign)
		case "concatenate":
			refuse(rt, slices.Concat(b, b), ErrCorrupt)
		case "append":
			refuse(rt, append(b, 0), ErrCorrupt)
		case "exchange": // a chunk of another snapshot, itself undamaged
			i = min(i, len(others)-1, len(chunks)-2)
			chunks[i] = others[i]
			refuse(rt, slices.Concat(header, slices.Concat(chunks...), trailer), ErrCorrupt)
		case "exchange trailer":
			refuse(rt, slices.Concat(header, slices.Concat(chunks...), otherTrailer), ErrCorrupt, ErrTruncated)
		}
	})
}

// A stream is refused at the very end too, where little is left to notice.
func TestEveryByteOfHeaderAndTrailerCounts(t *testing.T) {
	db := newDB(t, newRand(4), 10)
	stream, _ := db.stream(t)
	header, _, trailer := chunksOf(stream)
	for at := range stream {
		if at >= len(header) && at < len(stream)-len(trailer) {
			continue
		}
		b := slices.Clone(stream)
		b[at] ^= 1
		if _, err := Verify(ctx, bytes.NewReader(b)); refusal(err) == nil {
			t.Fatalf("byte %d flipped: %v", at, err)
		}
		if _, err := Verify(ctx, bytes.NewReader(stream[:at])); !errors.Is(err, ErrTruncated) {
			t.Fatalf("cut at %d: %v", at, err)
		}
	}
}

func TestForeignFiles(t *testing.T) {
	for name, b := range map[string]string{"text": "this is not a snapshot, but it is long enough", "bbolt": "\x00\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\xed\xda\x0c\xed\x02\x00\x00\x00"} {
		if _, err := Verify(ctx, bytes.NewReader([]byte(b))); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReaderErrorsAreNotTheStreams(t *testing.T) {
	db := newDB(t, newRand(5), 100)
	stream, _ := db.stream(t)
	broken := errors.New("connection broken")
	for _, at := range []int{0, 10, 100, len(stream) / 2, len(stream)} {
		r := io.MultiReader(bytes.NewReader(stream[:at]), iotest.ErrReader(broken))
		if _, err := Verify(ctx, r); !errors.Is(err, broken) || refusal(err) != nil {
			t.Errorf("broken at %d: %v", at, err)
		}
	}
}

func TestContextEndsAStream(t *testing.T) {
	db := newDB(t, newRand(6), 8000)
	stream, _ := db.stream(t)
	done, cancel := context.WithCancel(ctx)
	w := &interferingWriter{interfere: cancel}
	err := db.View(func(tx *bbolt.Tx) error {
		_, err := WriteStream(done, w, tx, db.meta)
		return err
	})
	if !errors.Is(err, context.Canceled) || w.Len() >= len(stream) {
		t.Errorf("WriteStream: %v after %d bytes", err, w.Len())
	}
	dir := t.TempDir()
	if _, err := Stage(done, bytes.NewReader(stream), dir); !errors.Is(err, context.Canceled) {
		t.Errorf("Stage: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestOpenFile(t *testing.T) {
	db := newDB(t, newRand(7), 500)
	stream, _ := db.stream(t)
	sum := sha256.Sum256(stream)
	saved := slices.Concat(stream, sum[:])
	damaged := slices.Clone(saved)
	damaged[len(damaged)-1] ^= 1
	for _, c := range []struct {
		name string
		file []byte
		want error
	}{
		{"saved by kvd", stream, nil},
		{"saved by an etcd client", saved, nil},
		{"wrong digest", damaged, ErrCorrupt},
		{"cut", saved[:len(saved)-1], ErrCorrupt},
		{"cut inside", saved[:len(saved)/2], ErrTruncated},
		{"empty", nil, ErrTruncated},
	} {
		path := filepath.Join(t.TempDir(), "backup")
		if err := os.WriteFile(path, c.file, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := OpenFile(path)
		if err != nil {
			t.Fatal(err)
		}
		meta, err := Verify(ctx, f)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if c.want == nil && !reflect.DeepEqual(meta, db.meta) {
			t.Errorf("%s: %+v", c.name, meta)
		}
		f.Close()
	}
	if _, err := OpenFile(t.TempDir()); !errors.Is(err, ErrForeign) {
		t.Errorf("a directory: %v", err)
	}
}

// The reader never takes more memory than a chunk and the metadata's bound, whatever the header claims.
func TestClaimsAllocateNothing(t *testing.T) {
	b := appendHeader(nil, make([]byte, 66), maxBodyBytes)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := Verify(ctx, bytes.NewReader(b))
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 2*chunkBytes {
		t.Errorf("%d bytes allocated for a claim", n)
	}
	if !errors.Is(err, ErrTruncated) {
		t.Error(err)
	}
	if _, err := Stage(ctx, bytes.NewReader(b), t.TempDir()); !errors.Is(err, ErrNoSpace) {
		t.Error(err)
	}
}

// fixChecksums makes every checksum of a possibly damaged stream right, so that a fuzzer gets past them.
func fixChecksums(s []byte) []byte {
	s = slices.Clone(s)
	if len(s) < headerFixedBytes {
		return s
	}
	n := headerFixedBytes + int(binary.BigEndian.Uint32(s[12:])) + crcBytes
	body := binary.BigEndian.Uint64(s[16:])
	if n > len(s) || body > uint64(len(s)) {
		return s
	}
	binary.BigEndian.PutUint32(s[n-crcBytes:], crc32.Checksum(s[:n-crcBytes], castagnoli))
	if streamSize(int64(n-headerFixedBytes-crcBytes), int64(body)) > int64(len(s)) {
		return s
	}
	_, chunks, trailer := chunksOf(s)
	for _, c := range chunks {
		binary.BigEndian.PutUint32(c[12:], chunkCRC(c, c[chunkHeadBytes:]))
	}
	sum := sha256.Sum256(s[:len(s)-len(trailer)+trailerBytes-sha256.Size])
	copy(trailer[trailerBytes-sha256.Size:], sum[:])
	return s
}

func FuzzStage(f *testing.F) {
	db := newDB(f, newRand(8), 3)
	stream, _ := db.stream(f)
	f.Logf("a stream of %d bytes", len(stream))
	f.Add(stream)
	f.Add(stream[:len(stream)/2])
	f.Add(appendHeader(nil, make([]byte, 66), 4096))
	dir := f.TempDir()
	disk := failingOps{noSync: true}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range [][]byte{b, fixChecksums(b)} {
			_, verr := Verify(ctx, bytes.NewReader(s))
			if verr != nil && refusal(verr) == nil {
				t.Fatalf("untyped: %v", verr)
			}
			staged, err := stage(ctx, bytes.NewReader(s), dir, disk)
			if err != nil {
				if refusal(err) == nil && !errors.Is(err, ErrNoSpace) {
					t.Fatalf("untyped: %v", err)
				}
				continue
			}
			if verr != nil {
				t.Fatalf("staged what Verify refuses: %v", verr)
			}
			if _, err := dumpFile(staged.Path); err != nil {
				t.Fatalf("staged what bbolt refuses: %v", err)
			}
			if err := staged.Discard(); err != nil {
				t.Fatal(err)
			}
		}
	})
}
