package wal

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvd/shard/wal/vfs"
)

// written returns a log of some segments, as it was left by a kill and by a clean close, and what is in it: at the end,
// and before the last batch.
func written(t *testing.T, seed uint64) (killed, closed *vfs.Memory, now, before string) {
	t.Helper()
	fs := new(vfs.Memory)
	l := open(t, memoryOptions(fs))
	w := newWriter(t, l, rand.New(rand.NewPCG(seed, 1)))
	for i := 0; i < 150 || len(l.segments.all()) < 4; i++ {
		before = w.world.String()
		must(t, w.choose()())
	}
	killed = fs.Kill()
	must(t, l.Close())
	return killed, fs, w.world.String(), before
}

func files(t *testing.T, fs *vfs.Memory, suffix string) (names []string) {
	t.Helper()
	all, err := fs.List("log")
	must(t, err)
	for _, name := range all {
		if strings.HasSuffix(name, suffix) {
			names = append(names, filepath.Join("log", name))
		}
	}
	return names
}

// A bit that flips is reported, or is in what means nothing. What an interrupted write may have left can only be the
// last batch, and only if the log was not closed.
func TestFlippedBits(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	killed, closed, now, before := written(t, seed)
	reported := 0
	for range 400 {
		fs, clean := killed.Kill(), false
		if rnd.IntN(2) == 0 {
			fs, clean = closed.Kill(), true
		}
		names := append(files(t, fs, segmentSuffix), files(t, fs, closedName)...)
		name := names[rnd.IntN(len(names))]
		f, err := fs.Open(name, false)
		must(t, err)
		size, err := f.Size()
		must(t, err)
		bit := rnd.Int64N(8 * size)
		if rnd.IntN(3) == 0 { // where the headers are
			bit = (bit/(8*blockBytes)*blockBytes*8 + rnd.Int64N(8*100)) % (8 * size)
		}
		must(t, fs.Flip(name, bit))
		found, err := reread(fs, faults{})
		switch {
		case errors.Is(err, ErrCorrupt) && strings.Contains(err.Error(), name):
			reported++
		case err != nil:
			t.Fatalf("bit %d of %s: %v", bit, name, err)
		case found != now && (clean || found != before):
			t.Fatalf("bit %d of %s: found\n%s\nwant\n%s", bit, name, found, now)
		}
	}
	if reported < 50 {
		t.Errorf("%d reported", reported)
	}
}

func flipAt(t *testing.T, fs *vfs.Memory, name string, offset int64) {
	t.Helper()
	must(t, fs.Flip(name, offset*8+3))
}

// Damage in the middle of the log is never taken for its end, be it in a segment behind which others come, or in
// the last one.
func TestDamageInTheMiddle(t *testing.T) {
	killed, _, now, _ := written(t, 7)
	l := open(t, memoryOptions(killed.Kill()))
	list := l.segments.all()
	must(t, l.Close())
	for i, seg := range list {
		for name, offset := range map[string]int64{"header": 10, "first batch": blockBytes + 5, "first body": blockBytes + 60, "last batch": seg.end - blockBytes + 5} {
			if i == len(list)-1 && (name == "last batch" || name != "header" && list[i].end <= 3*blockBytes) {
				continue // it may be the end
			}
			fs := killed.Kill()
			flipAt(t, fs, seg.path, offset)
			if _, err := reread(fs, faults{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), seg.path) {
				t.Errorf("%s of segment %d: %v", name, i, err)
			}
		}
	}
	fs := killed.Kill()
	flipAt(t, fs, list[1].path, blockBytes+60)
	if found, err := reread(fs, faults{acceptBroken: true}); err == nil && found == now {
		t.Error("the planted fault makes no difference")
	}
}

func TestMissingFiles(t *testing.T) {
	killed, closed, now, _ := written(t, 8)
	for name, from := range map[string]*vfs.Memory{"killed": killed, "closed": closed} {
		for i, path := range files(t, from, segmentSuffix) {
			fs := from.Kill()
			must(t, fs.Remove(path))
			found, err := reread(fs, faults{})
			if !errors.Is(err, ErrCorrupt) && found != now {
				t.Errorf("%s, without file %d: %v", name, i, err)
			}
		}
	}
}

// The end of the log may be what a crash interrupted, but not after a clean close.
func TestTornEnd(t *testing.T) {
	killed, closed, _, before := written(t, 9)
	l := open(t, memoryOptions(killed.Kill()))
	last := l.segments.all()[len(l.segments.all())-1]
	must(t, l.Close())
	at := int64(-1)
	for offset := int64(blockBytes); offset < last.end; offset += blockBytes {
		w := window{file: mustOpen(t, killed, last.path), sizeBytes: last.sizeBytes}
		if _, sound, err := readBatch(last, &w, offset, false); err == nil && sound {
			at = offset
		}
	}
	for _, offset := range []int64{0, 20, batchHeaderBytes, batchHeaderBytes + 12} {
		fs := killed.Kill()
		flipAt(t, fs, last.path, at+offset)
		if found, err := reread(fs, faults{}); err != nil || found != before {
			t.Errorf("torn at %d: %v", offset, err)
		}
		fs = closed.Kill()
		flipAt(t, fs, last.path, at+offset)
		if _, err := reread(fs, faults{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("damaged at %d after a clean close: %v", offset, err)
		}
	}
}

func mustOpen(t *testing.T, fs *vfs.Memory, name string) vfs.File {
	t.Helper()
	f, err := fs.Open(name, false)
	must(t, err)
	return f
}

// A directory that was put back from an old copy without its last segments does not open after a clean close.
func TestShortenedAfterClose(t *testing.T) {
	_, closed, _, _ := written(t, 10)
	names := files(t, closed, segmentSuffix)
	l := open(t, memoryOptions(closed.Kill()))
	last := l.segments.all()[len(l.segments.all())-1].path
	must(t, l.Close())
	for _, name := range names[slices.Index(names, last):] {
		must(t, closed.Remove(name))
	}
	if _, err := reread(closed, faults{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "was closed") {
		t.Error(err)
	}
}

// A log that a later version has written is not called damaged.
func TestOtherVersion(t *testing.T) {
	killed, _, _, _ := written(t, 11)
	name := files(t, killed, segmentSuffix)[1]
	f := mustOpen(t, killed, name)
	header := make([]byte, blockBytes)
	_, err := f.ReadAt(header, 0)
	must(t, err)
	le.PutUint32(header[8:], version+1)
	le.PutUint32(header[40:], checksum(header[:40]))
	_, err = f.WriteAt(header, 0)
	must(t, err)
	if _, err := reread(killed, faults{}); !errors.Is(err, ErrVersion) || errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}
