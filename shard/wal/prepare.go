package wal

import (
	"crypto/rand"
	"fmt"
	"path/filepath"

	"kvd/shard/wal/vfs"
)

const (
	// maxSpares is how many files are kept for later segments. More give their space back.
	maxSpares = 2

	fillBytes = 256 << 10
)

// spare is a file that has no part in the log.
type spare struct {
	file   vfs.File
	number uint64 // of its name. No two have the same, nor had
}

// prepared is the result of preparing a segment.
type prepared struct {
	segment *segment
	err     error
}

// prepareNext asks for the segment behind the last. Only who leads calls it, and only if l.asked is false.
func (l *Log) prepareNext() {
	l.asked = true
	l.wanted <- l.lastNumber + 1
}

// takeNext waits for the next segment. It has been prepared long before, unless that failed: then it is tried
// once more, because there may be room by now.
func (l *Log) takeNext() (*segment, error) {
	for try := 0; ; try++ {
		if !l.asked {
			l.prepareNext()
		}
		p := <-l.ready
		l.asked = false
		if p.err == nil {
			l.lastNumber = p.segment.number
			return p.segment, nil
		}
		if try > 0 {
			return nil, p.err
		}
	}
}

// prepare prepares segments, so that those who write rarely wait for that.
func (l *Log) prepare() {
	for {
		select {
		case number := <-l.wanted:
			seg, err := l.prepareSegment(number)
			if err != nil {
				l.log.Warn("the next file of the raft log cannot be prepared yet", "error", err)
			}
			l.ready <- prepared{seg, err}
		case <-l.done:
			return
		}
	}
}

// prepareSegment makes a spare file a segment: its header is durable before its name.
func (l *Log) prepareSegment(number uint64) (*segment, error) {
	s, err := l.takeSpare()
	if err != nil {
		return nil, err
	}
	seg := &segment{file: s.file, path: filepath.Join(l.options.Dir, segmentName(number)), number: number, end: blockBytes}
	if err := l.beginLife(seg); err != nil {
		l.discard(s)
		return nil, fmt.Errorf("prepare %s: %w", seg.path, err)
	}
	if err := l.rename(spareName(s.number), segmentName(number)); err != nil {
		s.file.Close() // whatever its name is now
		return nil, err
	}
	return seg, nil
}

func (l *Log) beginLife(seg *segment) (err error) {
	if seg.sizeBytes, err = seg.file.Size(); err != nil {
		return err
	}
	if want := l.wantedBytes(seg.number); seg.sizeBytes < want {
		if err := seg.file.Preallocate(want); err != nil {
			return err
		}
		if err := l.fill(seg.file, seg.sizeBytes, want); err != nil {
			return err
		}
		seg.sizeBytes = want
	}
	if seg.salt, err = newSalt(); err != nil {
		return err
	}
	header := segmentHeader{number: seg.number, salt: seg.salt, sizeBytes: seg.sizeBytes}
	if _, err := seg.file.WriteAt(header.encode(), 0); err != nil {
		return err
	}
	return l.sync(seg.file)
}

// wantedBytes is the size of a new segment. The first one is small: a node that writes little, or has just been
// made, should not have to write a large file of nothing.
func (l *Log) wantedBytes(number uint64) int64 {
	if number == 1 {
		return max(blocks(l.options.SegmentBytes/4), minSegmentBytes)
	}
	return l.options.SegmentBytes
}

// fill writes zeros to a part of a file that has only been reserved. A file system has to note in its journal
// when such a part is first written, which would make each of the log's syncs more expensive. It syncs now and
// then, because the syncs of the log would wait for all of it.
func (l *Log) fill(file vfs.File, from, to int64) error {
	if !l.options.fill {
		return nil
	}
	nothing := make([]byte, fillBytes)
	for n := int64(0); from < to; n++ {
		size := min(to-from, fillBytes)
		if _, err := file.WriteAt(nothing[:size], from); err != nil {
			return err
		}
		from += size
		if n%8 == 7 {
			if err := l.sync(file); err != nil {
				return err
			}
		}
	}
	return nil
}

// newSalt returns what no former life of a file has had.
func newSalt() (uint64, error) {
	var b [8]byte
	_, err := rand.Read(b[:])
	return le.Uint64(b[:]), err
}

func (l *Log) sync(f vfs.File) error {
	if l.options.NoSync {
		return nil
	}
	return f.Sync()
}

// rename is durable when it returns.
func (l *Log) rename(from, to string) error {
	if err := l.options.FS.Rename(l.path(from), l.path(to)); err != nil {
		return fmt.Errorf("rename %s to %s: %w", l.path(from), to, err)
	}
	return l.syncDir()
}

func (l *Log) path(name string) string { return filepath.Join(l.options.Dir, name) }

func (l *Log) syncDir() error {
	if l.options.NoSync {
		return nil
	}
	if err := l.options.FS.SyncDir(l.options.Dir); err != nil {
		return fmt.Errorf("sync %s: %w", l.options.Dir, err)
	}
	return nil
}

// takeSpare returns a file that has been part of the log, or a new one.
func (l *Log) takeSpare() (spare, error) {
	l.mu.Lock()
	n := len(l.spares)
	if n > 0 {
		s := l.spares[n-1]
		l.spares = l.spares[:n-1]
		l.mu.Unlock()
		return s, nil
	}
	s := spare{number: l.nextSpare()}
	l.mu.Unlock()
	var err error
	if s.file, err = l.options.FS.Open(l.path(spareName(s.number)), true); err != nil {
		return s, fmt.Errorf("make %s: %w", l.path(spareName(s.number)), err)
	}
	return s, nil
}

// nextSpare returns a number that no spare file has. The caller holds l.mu.
func (l *Log) nextSpare() uint64 {
	l.lastSpare++
	return l.lastSpare
}

// discard gives the space of a file back that could not be made a segment. If that fails, the next Open finds it.
func (l *Log) discard(s spare) {
	_ = s.file.Close()
	_ = l.options.FS.Remove(l.path(spareName(s.number)))
}

// retire makes a segment a spare file, or removes it. No entry in it is needed, and a segment that can be read
// without it follows. If a crash brings it back, it is whole.
func (l *Log) retire(seg *segment) error {
	l.mu.Lock()
	s := spare{file: seg.file, number: l.nextSpare()}
	l.mu.Unlock()
	if err := l.rename(segmentName(seg.number), spareName(s.number)); err != nil {
		return err
	}
	return l.keepSpare(s, seg.sizeBytes)
}

// keepSpare keeps a spare file, or removes it if there are enough, or it has an odd size.
func (l *Log) keepSpare(s spare, sizeBytes int64) error {
	l.mu.Lock()
	keep := len(l.spares) < maxSpares && sizeBytes == l.options.SegmentBytes
	if keep {
		l.spares = append(l.spares, s)
	}
	l.mu.Unlock()
	if keep {
		return nil
	}
	if err := l.options.FS.Remove(l.path(spareName(s.number))); err != nil {
		return fmt.Errorf("remove a spare file: %w", err)
	}
	return s.file.Close()
}
