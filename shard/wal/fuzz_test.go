package wal

import (
	"bytes"
	"errors"
	"runtime"
	"sync"
	"testing"

	"github.com/hashicorp/raft"

	"kvd/shard/wal/vfs"
)

// How a fuzzed file comes to be.
const (
	fuzzWhole   = iota // it is what the fuzzer says, and alone
	fuzzOverlay        // what the fuzzer says replaces a part of one of many
	fuzzSealed         // it is a segment with one batch, whose records the fuzzer says, and the checksums are right
	fuzzModes
)

// fuzzTotalBytes bounds what is allocated in all while a directory of a few small files is opened.
const fuzzTotalBytes = 64 << 20

var fuzzSpecimens = sync.OnceValues(func() (out []*specimen, err error) {
	for i, clean := range []bool{true, false} {
		s, err := newSpecimen(Options{SegmentBytes: hostileSegmentBytes}, shortScript, uint64(10+i), clean)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
})

// Whatever bytes are in the directory, Open neither panics nor allocates much; what it opens can be read, goes on,
// and is there the next time.
func FuzzOpen(f *testing.F) {
	specimens, err := fuzzSpecimens()
	if err != nil {
		f.Fatal(err)
	}
	for i, s := range specimens {
		for j, name := range s.names {
			b, err := contentsOf(s.fs, name)
			if err != nil {
				f.Fatal(err)
			}
			b = bytes.TrimRight(b, "\x00")
			f.Add(uint8(i), uint8(j), uint8(fuzzWhole), uint16(0), b)
			f.Add(uint8(i), uint8(j), uint8(fuzzOverlay), uint16(len(b)), b[:min(len(b), 600)])
			f.Add(uint8(i), uint8(j), uint8(fuzzOverlay), uint16(len(b)/2), bytes.Repeat([]byte{0xff}, 16))
			f.Add(uint8(i), uint8(j), uint8(fuzzSealed), uint16(0), bodies(s.fs, name))
		}
	}
	f.Add(uint8(0), uint8(0), uint8(fuzzWhole), uint16(0), []byte{})
	f.Add(uint8(0), uint8(1), uint8(fuzzWhole), uint16(0), bytes.Repeat([]byte{0xff}, 4096))
	f.Fuzz(func(t *testing.T, which, file, mode uint8, offset uint16, data []byte) {
		s := specimens[int(which)%len(specimens)]
		fs := s.fs.Kill()
		name := s.names[int(file)%len(s.names)]
		switch mode % fuzzModes {
		case fuzzWhole:
			name = segmentName(1)
			if h, err := decodeSegmentHeader(data); err == nil {
				name = segmentName(h.number)
			}
			fs = emptyDir()
		case fuzzOverlay:
			whole, err := contentsOf(fs, name)
			if err != nil {
				t.Fatal(err)
			}
			at := min(int(offset), len(whole))
			data = append(whole[:at:at], append(data, whole[min(len(whole), at+len(data)):]...)...)
		case fuzzSealed:
			name, data = segmentName(1), sealed(data)
			fs = emptyDir()
		}
		if err := setContents(fs, name, data); err != nil {
			t.Fatal(err)
		}
		fuzzed(t, fs, s.options)
	})
}

func emptyDir() *vfs.Memory {
	fs := new(vfs.Memory)
	if err := fs.MkdirAll(trialDir); err != nil {
		panic(err)
	}
	return fs
}

// bodies joins the records of all batches of a segment.
func bodies(fs vfs.FS, name string) (all []byte) {
	b, err := contentsOf(fs, name)
	if err != nil {
		panic(err)
	}
	for at := blockBytes; at < len(b); {
		h, ok := decodeBatchHeader(b[at:])
		if !ok {
			break
		}
		all = append(all, b[at+batchHeaderBytes:][:h.bodyBytes]...)
		at += int(blocks(batchHeaderBytes + int64(h.bodyBytes)))
	}
	return all
}

// sealed is a segment with one batch of these records.
func sealed(body []byte) []byte {
	records := 0
	for rest := body; len(rest) > 0; records++ {
		r, err := splitRecord(rest)
		if err != nil {
			break
		}
		rest = rest[len(r.bytes):]
	}
	batch := append(make([]byte, batchHeaderBytes), body...)
	encodeBatchHeader(batch, 9, 77, records)
	batch = append(batch, make([]byte, blocks(int64(len(batch)))-int64(len(batch)))...)
	header := segmentHeader{number: 1, salt: 77, sizeBytes: blockBytes + int64(len(batch))}
	return append(header.encode(), batch...)
}

func fuzzed(t *testing.T, fs *vfs.Memory, o Options) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	log, err := openOn(fs, o)
	if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > fuzzTotalBytes {
		t.Errorf("%d bytes allocated", after.TotalAlloc-before.TotalAlloc)
	}
	if err != nil {
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("neither opened nor ErrCorrupt: %v", err)
		}
		return
	}
	found := map[ID][]*state{}
	for _, id := range log.Replicas() {
		store, err := log.Replica(id, ReplicaOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := observe(store)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("%s: %v", id, err)
		}
		if err != nil {
			_ = log.Close()
			return
		}
		found[id] = []*state{got}
	}
	if err := fuzzedGoesOn(log, found); err != nil {
		t.Fatal(err)
	}
	log, _, err = inspect(fs, o, found)
	if err := errors.Join(err, closeLog(log)); err != nil {
		t.Errorf("opened again: %v", err)
	}
}

// fuzzedGoesOn adds a replica, with what that adds to found, and closes the log.
func fuzzedGoesOn(log *Log, found map[ID][]*state) error {
	id := ID{Group: 1 << 50, Replica: 1 << 50}
	if err := log.Create(id); err != nil {
		return err
	}
	store, err := log.Replica(id, ReplicaOptions{})
	if err != nil {
		return err
	}
	entry := makeEntry(1, 2, 3, 100)
	if err := store.StoreLog(entry); err != nil {
		return err
	}
	found[id] = []*state{{life: alive, entries: []*raft.Log{entry}}}
	return log.Close()
}
