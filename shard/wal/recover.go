package wal

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"kvd/shard/wal/vfs"
)

// recover locks the directory, reads the log, and makes it ready to be written.
func (l *Log) recover() (err error) {
	o := l.options
	if err := o.FS.MkdirAll(o.Dir); err != nil {
		return err
	}
	if !o.NoSync {
		if err := o.FS.SyncDir(filepath.Dir(o.Dir)); err != nil {
			return fmt.Errorf("sync %s: %w", filepath.Dir(o.Dir), err)
		}
	}
	if l.lock, err = o.FS.Lock(l.path(lockName)); err != nil {
		if errors.Is(err, vfs.ErrLocked) {
			return fmt.Errorf("%w: %s", ErrLocked, o.Dir)
		}
		return err
	}
	p := &replay{l: l}
	if err := l.recoverLocked(p); err != nil {
		for _, seg := range p.files {
			seg.file.Close()
		}
		for _, s := range l.spares {
			s.file.Close()
		}
		return errors.Join(err, l.lock.Close())
	}
	return nil
}

func (l *Log) recoverLocked(p *replay) error {
	names, err := l.options.FS.List(l.options.Dir)
	if err != nil {
		return err
	}
	if p.files, err = l.openSegments(names); err != nil {
		return err
	}
	closed, err := l.readMark(names)
	if err != nil {
		return err
	}
	if err := p.run(closed); err != nil {
		return err
	}
	if p.torn {
		l.log.Info("the last write to the raft log was interrupted, and is left out", "dir", l.options.Dir)
	}
	if err := l.rewrite(p); err != nil {
		return err
	}
	if err := l.openSpares(names); err != nil {
		return err
	}
	return l.beginWriting(p, names)
}

// openSegments opens all files with a segment's name, and reads their headers.
func (l *Log) openSegments(names []string) (files []*segment, err error) {
	for _, name := range names {
		number, ok := parseName(name, segmentSuffix)
		if !ok {
			continue
		}
		seg := &segment{path: l.path(name), number: number, end: blockBytes}
		if seg.file, err = l.options.FS.Open(seg.path, false); err == nil {
			files = append(files, seg)
			err = seg.readHeader()
		}
		if err != nil {
			for _, seg := range files {
				seg.file.Close()
			}
			return nil, err
		}
	}
	slices.SortFunc(files, func(a, b *segment) int { return int(int64(a.number - b.number)) })
	return files, nil
}

func (s *segment) readHeader() (err error) {
	if s.sizeBytes, err = s.file.Size(); err != nil {
		return err
	}
	w := window{file: s.file, sizeBytes: s.sizeBytes}
	b, err := w.read(0, min(blockBytes, s.sizeBytes))
	if err != nil {
		return fmt.Errorf("%s: %w", s.path, err)
	}
	h, err := decodeSegmentHeader(b)
	switch {
	case errors.Is(err, ErrVersion):
		return fmt.Errorf("%s: %w", s.path, err)
	case err != nil:
		return corrupt(s.path, 0, "%w", err)
	case h.number != s.number:
		return corrupt(s.path, 0, "it is segment %d", h.number)
	case s.sizeBytes < h.sizeBytes:
		return corrupt(s.path, s.sizeBytes, "the file ends here, and had %d bytes when it was made", h.sizeBytes)
	}
	s.salt = h.salt
	return nil
}

// readMark returns where the log ended when it was closed, nil if it was not.
func (l *Log) readMark(names []string) (*place, error) {
	if !slices.Contains(names, closedName) {
		return nil, nil
	}
	file, err := l.options.FS.Open(l.path(closedName), false)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	size, err := file.Size()
	if err != nil {
		return nil, err
	}
	w := window{file: file, sizeBytes: size}
	b, err := w.read(0, min(size, blockBytes))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.path(closedName), err)
	}
	p, ok := decodePlace(b)
	if !ok {
		return nil, corrupt(l.path(closedName), 0, "the mark of a clean close cannot be read")
	}
	return &p, nil
}

// rewrite makes the last batch durable: it may be in the operating system's memory only.
func (l *Log) rewrite(p *replay) error {
	if p.end == 0 || l.options.NoSync {
		return nil
	}
	seg := p.files[p.end-1]
	w := window{file: seg.file, sizeBytes: seg.sizeBytes}
	b, err := w.read(p.last.offset, min(p.last.sizeBytes, seg.sizeBytes-p.last.offset)) // its filling may be cut off
	if err == nil {
		_, err = seg.file.WriteAt(b, p.last.offset)
	}
	if err == nil {
		err = seg.file.Sync()
	}
	if err != nil {
		return fmt.Errorf("write the last batch of %s again: %w", seg.path, err)
	}
	return nil
}

func (l *Log) openSpares(names []string) error {
	for _, name := range names {
		number, ok := parseName(name, spareSuffix)
		if !ok {
			continue
		}
		l.lastSpare = max(l.lastSpare, number)
		file, err := l.options.FS.Open(l.path(name), false)
		if err != nil {
			return err
		}
		size, err := file.Size()
		if err == nil {
			err = l.keepSpare(spare{file: file, number: number}, size)
		}
		if err != nil {
			file.Close()
			return err
		}
	}
	return nil
}

// beginWriting takes what is there of segments without a batch: the first is the next one to write to, and the
// others are spares, the last one first, so that no gap is ever seen. Then it takes the marks of the last close.
func (l *Log) beginWriting(p *replay, names []string) error {
	for len(p.files) > p.end+1 {
		last := p.files[len(p.files)-1]
		if err := l.retire(last); err != nil {
			return err
		}
		p.files = p.files[:len(p.files)-1]
	}
	if len(p.files) > p.end {
		l.asked = true
		l.ready <- prepared{segment: p.files[p.end]}
	}
	for _, name := range []string{closedTemp, closedName} {
		if !slices.Contains(names, name) {
			continue
		}
		if err := l.options.FS.Remove(l.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if p.end > 0 {
		l.active = p.files[p.end-1]
		l.lastNumber = l.active.number
	}
	l.sequence = p.sequence
	return l.syncDir()
}

// markClosed says, durably, that the log ends here.
func (l *Log) markClosed() error {
	now := place{sequence: l.sequence}
	if l.active != nil {
		now.segment, now.offset = l.active.number, l.active.end
	}
	file, err := l.options.FS.Open(l.path(closedTemp), true)
	if err != nil {
		return err
	}
	_, err = file.WriteAt(now.encode(), 0)
	if err == nil {
		err = l.sync(file)
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("mark the raft log as closed: %w", err)
	}
	return l.rename(closedTemp, closedName)
}
