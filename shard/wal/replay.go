package wal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// replay reads the log into l.population and l.segments.
type replay struct {
	l        *Log
	files    []*segment // with a segment's name, by number
	sequence uint64     // of the last batch; 0 = none yet
	last     batch      // the last one
	end      int        // how many of the files have batches
	torn     bool       // something stands where the log ends
}

// batch is one that has been read. Its body is valid until the next.
type batch struct {
	offset, sizeBytes int64 // with header and filling
	header            batchHeader
	body              []byte
}

func corrupt(path string, offset int64, format string, args ...any) error {
	return fmt.Errorf("%w: %s at %d: %w", ErrCorrupt, path, offset, fmt.Errorf(format, args...))
}

// run reads all segments. What is behind the end of the log has no sound batch in it then, except if the log
// was closed: in that case it is enough that it ends where it did.
func (p *replay) run(closed *place) error {
	for i, seg := range p.files {
		if i > 0 && seg.number != p.files[i-1].number+1 {
			return corrupt(seg.path, 0, "it follows segment %d: one is missing", p.files[i-1].number)
		}
	}
	for p.end < len(p.files) {
		more, err := p.segment(p.files[p.end])
		if err != nil {
			return err
		}
		if !more {
			break
		}
		p.end++
	}
	if err := p.checkEnd(closed); err != nil {
		return err
	}
	for _, rep := range p.l.population.replicas {
		if err := rep.complete(); err != nil { // the last batch, which is broken, had copies of them
			path, offset := p.whereItEnds()
			return corrupt(path, offset, "the log ends here, and %w", err)
		}
	}
	return nil
}

// place is where the log ends.
func (p *replay) place() place {
	if p.end == 0 {
		return place{}
	}
	seg := p.files[p.end-1]
	return place{segment: seg.number, offset: seg.end, sequence: p.sequence}
}

// whereItEnds is where the next batch would be.
func (p *replay) whereItEnds() (path string, offset int64) {
	if p.end < len(p.files) && (p.end == 0 || p.files[p.end-1].sealed) {
		return p.files[p.end].path, blockBytes
	}
	if p.end == 0 {
		return p.l.options.Dir, 0
	}
	return p.files[p.end-1].path, p.files[p.end-1].end
}

func (p *replay) checkEnd(closed *place) error {
	now := p.place()
	if closed != nil && *closed != now {
		path, offset := p.whereItEnds()
		return corrupt(path, offset, "the log was closed at %d of segment %d with batch %d, and ends in segment %d with batch %d",
			closed.offset, closed.segment, closed.sequence, now.segment, now.sequence)
	}
	if p.end == 0 && len(p.files) > 0 && p.files[0].number != 1 {
		return corrupt(p.files[0].path, blockBytes, "the log's first batch is broken")
	}
	if p.end > 0 && p.end == len(p.files) && p.files[p.end-1].sealed {
		return corrupt(p.files[p.end-1].path, now.offset, "it is sealed, and segment %d is missing", now.segment+1)
	}
	if closed != nil {
		return nil
	}
	for _, seg := range p.files[max(0, p.end-1):] {
		if err := p.nothingSound(seg); err != nil {
			return err
		}
	}
	return nil
}

// segment reads the batches of one, if there are any.
func (p *replay) segment(seg *segment) (any bool, err error) {
	w := window{file: seg.file, sizeBytes: seg.sizeBytes, ahead: windowBytes}
	for seg.end = blockBytes; ; {
		b, err := p.batch(seg, &w)
		switch {
		case err != nil:
			return any, err
		case b.sizeBytes == 0:
			return any, nil
		case !any:
			p.l.segments.push(seg)
		}
		if err := p.records(seg, &b, !any); err != nil {
			return any, err
		}
		any = true
		seg.end += b.sizeBytes
		p.sequence = b.header.sequence
		p.last = batch{offset: b.offset, sizeBytes: b.sizeBytes}
		if seg.sealed {
			return true, nil
		}
	}
}

// batch returns the batch at seg.end; its size is 0 if the log, or this segment's part of it, ends there.
func (p *replay) batch(seg *segment, w *window) (batch, error) {
	b, sound, err := readBatch(seg, w, seg.end, p.l.options.faults.ignoreSalt)
	switch {
	case err != nil:
		return batch{}, err
	case !sound && p.l.options.faults.acceptBroken:
		return p.skip(seg, w)
	case !sound:
		return batch{}, nil
	case p.sequence != 0 && !p.l.options.faults.ignoreSalt && !p.l.options.faults.acceptBroken:
		return b, p.follows(seg, &b)
	}
	return b, nil
}

// follows fails if a batch is not the next one. Where segments meet, the end of the former is what is damaged.
func (p *replay) follows(seg *segment, b *batch) error {
	path, offset, sealed := seg.path, seg.end, true
	if seg.end == blockBytes && p.end > 0 {
		before := p.files[p.end-1]
		path, offset, sealed = before.path, before.end, before.sealed
	}
	if b.header.sequence == p.sequence+1 && sealed {
		return nil
	}
	return corrupt(path, offset, "behind batch %d nothing sound is here, but batch %d is at %d of segment %d",
		p.sequence, b.header.sequence, b.offset, seg.number)
}

// skip is the fault acceptBroken.
func (p *replay) skip(seg *segment, w *window) (batch, error) {
	for seg.end+blockBytes < seg.sizeBytes {
		seg.end += blockBytes
		if b, sound, err := readBatch(seg, w, seg.end, false); sound || err != nil {
			return b, err
		}
	}
	return batch{}, nil
}

// readBatch reports whether there is a sound batch of the segment's life at offset.
func readBatch(seg *segment, w *window, offset int64, anyLife bool) (b batch, sound bool, err error) {
	head, err := w.read(offset, batchHeaderBytes)
	if err != nil {
		return b, false, end(err)
	}
	h, ok := decodeBatchHeader(head)
	if !ok || h.salt != seg.salt && !anyLife {
		return b, false, nil
	}
	size := batchHeaderBytes + int64(h.bodyBytes)
	all, err := w.read(offset, size)
	if err != nil {
		return b, false, end(err)
	}
	body := all[batchHeaderBytes:]
	if checksum(body) != h.bodyChecksum {
		return b, false, nil
	}
	return batch{offset: offset, sizeBytes: blocks(size), header: h, body: body}, true, nil
}

// end turns the end of a file into no error: nothing is there.
func end(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// nothingSound fails if a batch that belongs to the log is behind its end. It need not be looked for byte by
// byte: batches begin at blocks.
func (p *replay) nothingSound(seg *segment) error {
	w := window{file: seg.file, sizeBytes: seg.sizeBytes, ahead: windowBytes}
	for offset := seg.end; offset < seg.sizeBytes; offset += blockBytes {
		head, err := w.read(offset, min(blockBytes, seg.sizeBytes-offset))
		if err != nil {
			return end(err)
		}
		if h, ok := decodeBatchHeader(head); !ok || h.salt != seg.salt {
			continue
		}
		b, sound, err := readBatch(seg, &w, offset, false)
		if err != nil {
			return err
		}
		if sound {
			return corrupt(seg.path, seg.end, "nothing sound is here, but batch %d is at %d", b.header.sequence, offset)
		}
		p.torn = true
	}
	return nil
}

// records does what a batch says.
func (p *replay) records(seg *segment, b *batch, firstOfSegment bool) error {
	rest, rep := b.body, (*replica)(nil)
	for n := uint32(0); len(rest) > 0; n++ {
		at := b.offset + b.sizeOf(rest)
		r, err := splitRecord(rest)
		switch {
		case err != nil:
		case (n == 0 && firstOfSegment) != (r.kind == kindCheckpoint):
			err = fmt.Errorf("a record of kind %d where it cannot be", r.kind)
		case r.kind == kindCheckpoint:
			err = p.checkpoint(&r)
		case r.kind == kindSeal:
			seg.sealed = true
		default:
			rep, err = p.record(&r, rep, spot{segment: uint32(seg.number), offset: uint32(at), sizeBytes: uint32(len(r.bytes))})
		}
		if err != nil {
			return corrupt(seg.path, at, "%w", err)
		}
		if rest = rest[len(r.bytes):]; len(rest) == 0 && n+1 != b.header.records {
			return corrupt(seg.path, b.offset, "%d records, not %d", n+1, b.header.records)
		}
	}
	return nil
}

// sizeOf returns where in the batch the rest of its body is.
func (b *batch) sizeOf(rest []byte) int64 { return batchHeaderBytes + int64(len(b.body)-len(rest)) }

// checkpoint takes over what the first segment begins with. In the others it is known already.
func (p *replay) checkpoint(r *record) (err error) {
	if p.sequence == 0 {
		p.l.population, err = readCheckpoint(r, &p.l.segments)
		return err
	}
	if !bytes.Equal(r.bytes, p.l.population.appendCheckpoint(nil)) && p.l.options.faults == (faults{}) {
		return errors.New("the checkpoint is not what was before it")
	}
	return nil
}

// record does what one says. rep is that of the record before.
func (p *replay) record(r *record, rep *replica, at spot) (*replica, error) {
	all := p.l.population
	if rep == nil || rep.id != r.id {
		rep = all.replicas[r.id]
	}
	switch {
	case r.kind == kindCreate:
		if rep != nil || all.removed[r.id] {
			return nil, fmt.Errorf("%s is created again", r.id)
		}
		all.replicas[r.id] = newReplica(r.id, &p.l.segments)
		return all.replicas[r.id], nil
	case rep == nil:
		return nil, fmt.Errorf("%s does not exist", r.id)
	case r.kind == kindRemove:
		rep.reset()
		delete(all.replicas, r.id)
		all.removed[r.id] = true
		return nil, nil
	case p.l.options.faults.forgetBounds && (r.kind == kindFirst || r.kind == kindLast):
		return rep, nil
	}
	return rep, rep.apply(r, at)
}
