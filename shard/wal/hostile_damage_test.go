package wal

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"kvd/shard/wal/vfs"
)

// specimen is a directory that is about to be damaged, and what is in it.
type specimen struct {
	fs      *vfs.Memory
	options Options
	allowed map[ID][]*state // in the order of preference
	tail    string          // the file that was written last, before Close
	names   []string        // the log's files
	vague   bool            // it does not matter whether errors say where
}

// newSpecimen runs a script. If it ends without Close, the last batch is one that may be missing after damage:
// it is the last StoreLogs of the first replica, and whatever the log itself wrote since.
func newSpecimen(o Options, script func(*trial) error, seed uint64, clean bool) (*specimen, error) {
	w := newTrial(seeded(seed), 2, o)
	s := &specimen{options: w.options}
	var mu sync.Mutex
	var tail string
	w.fs.Inject(func(op vfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		if op.Kind == vfs.OpWrite && strings.HasSuffix(op.Name, segmentSuffix) {
			tail = op.Name
		}
		return nil
	})
	if err := errors.Join(w.open(), script(w)); err != nil {
		return nil, w.failure("script", err)
	}
	before := w.replicas[0].durable
	if err := errors.Join(w.append(w.replicas[0]), w.check()); err != nil {
		return nil, w.failure("script", err)
	}
	s.allowed = w.allowed()
	if clean {
		if err := w.log.Close(); err != nil {
			return nil, err
		}
	} else {
		s.allowed[w.replicas[0].id] = append(s.allowed[w.replicas[0].id], before)
	}
	mu.Lock()
	s.fs, s.tail = w.fs.Kill(), tail
	mu.Unlock()
	if err := w.log.Close(); err != nil {
		return nil, err
	}
	names, err := s.fs.List(trialDir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if b, err := contentsOf(s.fs, name); err != nil {
			return nil, err
		} else if len(b) > 0 {
			s.names = append(s.names, name)
		}
	}
	return s, nil
}

func contentsOf(fs vfs.FS, name string) ([]byte, error) {
	f, err := fs.Open(filepath.Join(trialDir, name), false)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}

// setContents makes a file of exactly b, durably.
func setContents(fs vfs.FS, name string, b []byte) error {
	f, err := fs.Open(filepath.Join(trialDir, name), true)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(len(b))); err != nil {
		return err
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return errors.Join(f.Sync(), fs.SyncDir(trialDir))
}

var hasOffset = regexp.MustCompile(`offset \d+|at \d+`)

// judge opens a damaged copy: it has exactly what is allowed, or is ErrCorrupt, which names the file and where.
// named is the file that was damaged, "" if it may be any.
func (s *specimen) judge(damaged *vfs.Memory, named string) (corrupt bool, err error) {
	log, _, err := inspect(damaged, s.options, s.allowed)
	closeLog(log)
	switch {
	case err == nil:
		return false, nil
	case !errors.Is(err, ErrCorrupt):
		return false, fmt.Errorf("neither whole nor ErrCorrupt: %w", err)
	case s.vague:
	case !strings.Contains(err.Error(), named) || !hasOffset.MatchString(err.Error()):
		return true, fmt.Errorf("the error does not say where in %s: %w", named, err)
	}
	return true, nil
}

// A flipped bit anywhere is found, or does not matter. Only in the last batch, and only if the log was not closed,
// it makes that batch one that has not been written.
func TestBitFlips(t *testing.T) {
	for name, script := range map[string]func(*trial) error{"all": shortScript, "votes": votes} {
		for _, clean := range []bool{true, false} {
			s, err := newSpecimen(Options{SegmentBytes: hostileSegmentBytes}, script, 3, clean)
			if err != nil {
				t.Fatal(err)
			}
			flips, found, err := s.flip()
			if t.Logf("%s, clean %v: %d of %d flips found", name, clean, found, flips); err != nil {
				t.Errorf("%s, clean %v: %v", name, clean, err)
			}
			if found < flips/10 {
				t.Errorf("%s, clean %v: only %d of %d flips were found", name, clean, found, flips)
			}
		}
	}
}

// votes writes what nothing later depends on: a vote that is left out is one that is taken back.
func votes(w *trial) error {
	for _, r := range w.replicas {
		if err := each(r, w.create, w.append); err != nil {
			return err
		}
	}
	for range 12 {
		for _, r := range w.replicas {
			if err := each(r, w.vote, w.key); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *specimen) flip() (flips, found int, err error) {
	for _, name := range s.names {
		b, err := contentsOf(s.fs, name)
		if err != nil {
			return flips, found, err
		}
		for _, bit := range bitsToFlip(b, 1+flipsPerSpecimen**deepFlag/len(s.names)) {
			damaged := s.fs.Kill()
			if err := damaged.Flip(filepath.Join(trialDir, name), bit); err != nil {
				return flips, found, err
			}
			corrupt, err := s.judge(damaged, name)
			if err != nil {
				return flips, found, fmt.Errorf("bit %d of %s (byte %d): %w", bit, name, bit/8, err)
			}
			if flips++; corrupt {
				found++
			}
		}
	}
	return flips, found, nil
}

// flipsPerSpecimen is how many bits are tried, in all files together.
const flipsPerSpecimen = 800

// bitsToFlip are in the file's header, in the first batch's, and in many other bytes, most of them not zero.
func bitsToFlip(b []byte, count int) (bits []int64) {
	rnd := rand.New(rand.NewPCG(uint64(len(b)), uint64(count)))
	for len(bits) < count {
		i := rnd.IntN(len(b))
		switch rnd.IntN(4) {
		case 0:
			i = rnd.IntN(min(len(b), segmentHeaderBytes))
		case 1:
			i = min(len(b)-1, blockBytes+rnd.IntN(batchHeaderBytes))
		default:
			if b[i] == 0 && rnd.IntN(8) > 0 {
				continue
			}
		}
		bits = append(bits, int64(8*i+rnd.IntN(8)))
	}
	return bits
}

// Files that are missing, cut off, exchanged, empty or copied are found, or nothing of them was needed.
func TestDamagedFiles(t *testing.T) {
	damages := map[string]func(fs vfs.FS, name, other string) error{
		"missing": func(fs vfs.FS, name, _ string) error { return fs.Remove(filepath.Join(trialDir, name)) },
		"cut off": func(fs vfs.FS, name, _ string) error { return cutOff(fs, name, 2) },
		"empty":   func(fs vfs.FS, name, _ string) error { return cutOff(fs, name, 1<<40) },
		"zeros": func(fs vfs.FS, name, _ string) error {
			b, err := contentsOf(fs, name)
			return errors.Join(err, setContents(fs, name, make([]byte, len(b))))
		},
		"copied": func(fs vfs.FS, name, other string) error {
			b, err := contentsOf(fs, other)
			return errors.Join(err, setContents(fs, name, b))
		},
		"exchanged": func(fs vfs.FS, name, other string) error {
			b1, err1 := contentsOf(fs, name)
			b2, err2 := contentsOf(fs, other)
			return errors.Join(err1, err2, setContents(fs, name, b2), setContents(fs, other, b1))
		},
	}
	for _, clean := range []bool{true, false} {
		s, err := newSpecimen(Options{SegmentBytes: hostileSegmentBytes}, shortScript, 4, clean)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for i, name := range s.names {
			other := s.names[(i+1)%len(s.names)]
			for what, damage := range damages {
				damaged := s.fs.Kill()
				if err := damage(damaged, name, other); err != nil {
					t.Fatal(err)
				}
				corrupt, err := s.judge(damaged, "")
				if err != nil {
					t.Errorf("clean %v: %s %s (%s): %v", clean, name, what, other, err)
				}
				if corrupt {
					found++
				}
			}
		}
		if found < len(s.names) {
			t.Errorf("clean %v: only %d damages found", clean, found)
		}
	}
}

func cutOff(fs vfs.FS, name string, divisor int) error {
	b, err := contentsOf(fs, name)
	if err != nil {
		return err
	}
	return setContents(fs, name, b[:len(b)/divisor])
}

// After a clean Close not even the end may be missing: every batch of the last file that is cut away is missed.
func TestCleanCloseIsRemembered(t *testing.T) {
	s, err := newSpecimen(Options{SegmentBytes: hostileSegmentBytes}, shortScript, 5, true)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(s.tail)
	whole, err := contentsOf(s.fs, name)
	if err != nil {
		t.Fatal(err)
	}
	end := len(strings.TrimRight(string(whole), "\x00"))
	for at := end - 1; at > 0; at -= 1 + at/200 {
		damaged := s.fs.Kill()
		b := append(append([]byte(nil), whole[:at]...), make([]byte, len(whole)-at)...)
		if err := setContents(damaged, name, b); err != nil {
			t.Fatal(err)
		}
		if _, err := s.judge(damaged, name); err != nil {
			t.Errorf("%s zeroed from %d on: %v", name, at, err)
		}
	}
}
