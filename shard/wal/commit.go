package wal

import (
	"fmt"
	"math"
	"time"

	"github.com/hashicorp/raft"
)

const (
	// maxBatchBytes is how much a batch takes up of what waits, unless the first that waits is larger.
	maxBatchBytes = 8 << 20

	// keepBufferBytes is what is kept of the write buffer.
	keepBufferBytes = 4 << 20

	// maxRequestBytes bounds what has to be durable at once, or not at all.
	maxRequestBytes = maxSegmentBytes
)

// request is what one replica wants to be written. Its owner has the replica's turn.
type request struct {
	kind    kind
	rep     *replica
	entries []*raft.Log // kindEntry
	copies  []byte      // kindCopied: records
	copied  int         // how many
	index   uint64      // kindFirst, kindLast
	key     []byte      // kindKey
	value   []byte

	sizeBytes int64
	records   int
	next      *request
	wake      chan bool // capacity 1. true: it is done; false: lead
	err       error
}

// measure fills in the size and number of the records.
func (r *request) measure() {
	r.records = 1
	switch r.kind {
	case kindEntry:
		r.records, r.sizeBytes = len(r.entries), 0
		for _, e := range r.entries {
			r.sizeBytes += int64(entryRecordBytes(e))
		}
	case kindCopied:
		r.records, r.sizeBytes = r.copied, int64(len(r.copies))
	case kindFirst, kindLast:
		r.sizeBytes = recordHeaderBytes + 8
	case kindKey:
		r.sizeBytes = recordHeaderBytes + 4 + int64(len(r.key)+len(r.value))
	default:
		r.sizeBytes = recordHeaderBytes
	}
}

func (r *request) encode(b []byte) []byte {
	switch r.kind {
	case kindEntry:
		for _, e := range r.entries {
			b = appendEntry(b, r.rep.id, e)
		}
		return b
	case kindCopied:
		return append(b, r.copies...)
	case kindFirst, kindLast:
		return appendIndex(b, r.kind, r.rep.id, r.index)
	case kindKey:
		return appendKey(b, r.rep.id, r.key, r.value)
	}
	return appendPlain(b, r.kind, r.rep.id)
}

// submit returns when what r wants is durable, and known to all, or has failed. Whoever finds nobody writing
// does it itself, for all that wait. When it is done it passes that on to the first that has come meanwhile.
func (l *Log) submit(r *request) error {
	r.measure()
	if r.sizeBytes > maxRequestBytes {
		return fmt.Errorf("%w: %d bytes at once, %d are possible", ErrTooLarge, r.sizeBytes, maxRequestBytes)
	}
	r.next, r.err = nil, nil
	l.mu.Lock()
	if err := l.unusable(); err != nil {
		l.mu.Unlock()
		return err
	}
	if l.tail == nil {
		l.head = r
	} else {
		l.tail.next = r
	}
	l.tail = r
	alone := !l.leading
	l.leading = true
	l.mu.Unlock()
	if !alone && <-r.wake {
		return r.err
	}
	l.lead(r)
	return r.err
}

// lead writes the batch that begins with own, which is the first that waits.
func (l *Log) lead(own *request) {
	group := l.take()
	err := l.commit(group)
	l.pass()
	for r := group; r != nil; {
		next := r.next
		r.err = err
		if r != own {
			r.wake <- true // r is its owner's from here on
		}
		r = next
	}
}

// take takes what fits into a batch from those that wait.
func (l *Log) take() *request {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := l.head
	last, size := first, first.sizeBytes
	for last.next != nil && size+last.next.sizeBytes <= maxBatchBytes {
		last = last.next
		size += last.sizeBytes
	}
	l.head, last.next = last.next, nil
	if l.head == nil {
		l.tail = nil
	}
	return first
}

// pass lets the first that waits write next. If the log has failed, it lets it fail.
func (l *Log) pass() {
	l.mu.Lock()
	next := l.head
	if next == nil {
		l.leading = false
		if l.closing {
			close(l.idle)
		}
	}
	l.mu.Unlock()
	if next != nil {
		next.wake <- false
	}
}

// commit makes a group durable and known.
func (l *Log) commit(group *request) error {
	if err := l.Err(); err != nil {
		return err
	}
	began := time.Since(l.born)
	l.writing.Store(int64(began) + 1)
	defer l.writing.Store(0)
	at, err := l.write(group)
	if err != nil {
		return l.fail(err)
	}
	if err := l.publish(group, at); err != nil {
		return l.fail(err)
	}
	if !l.asked && l.active.end > l.active.sizeBytes/4 {
		l.prepareNext()
	}
	return nil
}

// write writes a batch and returns where the records of the group begin.
func (l *Log) write(group *request) (at int64, err error) {
	size, records, replicas := int64(batchHeaderBytes), 0, 0
	for r := group; r != nil; r = r.next {
		size, records, replicas = size+r.sizeBytes, records+r.records, replicas+1
	}
	if int64(cap(l.buffer)) < blocks(size) {
		l.buffer = make([]byte, 0, blocks(size))
	}
	b := l.buffer[:batchHeaderBytes]
	seg, err := l.room(size, &b)
	if err != nil {
		return 0, err
	}
	if seg != l.active {
		records++
	}
	at = seg.end + int64(len(b))
	for r := group; r != nil; r = r.next {
		b = r.encode(b)
	}
	encodeBatchHeader(b, l.sequence+1, seg.salt, records)
	full := blocks(int64(len(b)))
	b = append(b, zeros[:full-int64(len(b))]...)
	if err := l.durably(seg, b); err != nil {
		return 0, err
	}
	l.metrics.batch(len(b), records, replicas)
	seg.end += full
	l.sequence++
	if seg != l.active {
		l.active = seg
		l.segments.push(seg)
		l.kick()
	}
	if l.buffer = b[:0]; cap(b) > keepBufferBytes {
		l.buffer = nil
	}
	return at, nil
}

var zeros [blockBytes]byte

// durably writes at the end of seg.
func (l *Log) durably(seg *segment, b []byte) error {
	if n, err := seg.file.WriteAt(b, seg.end); err != nil {
		return fmt.Errorf("write %d of %d bytes at %d of %s: %w", n, len(b), seg.end, seg.path, err)
	}
	if l.options.NoSync || l.options.faults.skipSync {
		return nil
	}
	began := time.Since(l.born)
	if err := seg.file.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", seg.path, err)
	}
	l.metrics.synced(time.Since(l.born) - began)
	return nil
}

// room returns the segment that has room for a batch of that size. It may be a new one, and then the batch
// begins with a checkpoint, which is added to b.
func (l *Log) room(sizeBytes int64, b *[]byte) (*segment, error) {
	if a := l.active; a != nil && !a.sealed && a.end+blocks(sizeBytes)+sealBytes <= a.sizeBytes {
		return a, nil
	}
	l.mu.Lock()
	*b = l.population.appendCheckpoint(*b)
	l.mu.Unlock()
	seg, err := l.takeNext()
	if err != nil {
		return nil, err
	}
	if err := l.seal(); err != nil {
		return nil, err
	}
	need := blockBytes + blocks(sizeBytes+int64(len(*b))) + sealBytes
	if need > math.MaxUint32 {
		return nil, fmt.Errorf("%w: a batch of %d bytes", ErrTooLarge, need)
	}
	if need > seg.sizeBytes {
		if err := seg.file.Preallocate(need); err != nil {
			return nil, fmt.Errorf("make %s %d bytes long: %w", seg.path, need, err)
		}
		seg.sizeBytes = need
	}
	return seg, nil
}

// sealBytes is kept free at the end of each segment.
const sealBytes = blockBytes

// seal ends the last segment: the log goes on in the next one, which is there, and would be missed.
func (l *Log) seal() error {
	a := l.active
	if a == nil || a.sealed {
		return nil
	}
	b := appendPlain(make([]byte, batchHeaderBytes, sealBytes), kindSeal, ID{})
	encodeBatchHeader(b, l.sequence+1, a.salt, 1)
	if err := l.durably(a, b[:sealBytes]); err != nil {
		return err
	}
	a.sealed = true
	a.end += sealBytes
	l.sequence++
	return nil
}
