// Package boltcheck checks a bbolt file before bbolt opens it. bbolt maps the file and trusts every offset in
// it, so that a damaged or crafted page can end the process, in a way that no caller can recover from.
package boltcheck

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// ErrCorrupt: the file is not a bbolt file, or is damaged.
var ErrCorrupt = errors.New("bbolt file is corrupt")

// File checks all pages of the closed bbolt file at path that a transaction can reach, and refuses with
// ErrCorrupt a file whose pages are out of bounds, of the wrong kind, used twice, used and free or neither, out
// of order, or malformed. It is what bbolt's own Tx.Check does, on bytes that nobody vouches for. Values are not
// read; everything else is, once. It takes a few pages of memory and a bit for each page of the file. ctx is
// looked at between pages.
func File(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return Check(ctx, f, info.Size())
}

// The layout of a bbolt file (version 2). Integers have the byte order of the machine that wrote it; a file
// of another order fails at its magic number.
const (
	pageHeadBytes = 16 // id u64, kind u16, count u16, overflow u32
	elementBytes  = 16 // leaf: flags, pos, ksize, vsize u32; branch: pos, ksize u32, page u64
	bucketBytes   = 16 // root page u64, sequence u64; an inline bucket's only page follows
	metaBytes     = 64 // magic, version, page size, flags u32; root bucket; freelist, pages, txid, sum u64

	branchPage, leafPage, metaPage, freelistPage = 0x01, 0x02, 0x04, 0x10

	bucketFlag = 0x01

	magic      = 0xED0CDAED
	version    = 2
	noFreelist = ^uint64(0)

	minPageBytes, maxPageBytes = 1 << 10, 1 << 16
	maxKeyBytes                = 1 << 15

	// maxDepth bounds branches and nested buckets together: with two keys to a page, 2^60 is enough.
	maxDepth = 64
)

var order = binary.NativeEndian

type checker struct {
	ctx       context.Context // of one Check, which this lives no longer than
	r         io.ReaderAt
	pageBytes uint64
	pages     uint64 // high water mark: pages from here on are unused
	used      []uint64
	buffers   [][]byte // idle page buffers
}

// Check is File for the sizeBytes of r.
func Check(ctx context.Context, r io.ReaderAt, sizeBytes int64) error {
	c := &checker{ctx: ctx, r: r}
	root, freelist, err := c.newestMeta(uint64(sizeBytes))
	if err != nil {
		return err
	}
	c.used = make([]uint64, (c.pages+63)/64)
	if err := c.page(root, nil, nil, 0); err != nil {
		return err
	}
	if freelist == noFreelist {
		return nil
	}
	return c.freelist(freelist)
}

func corrupt(id uint64, format string, args ...any) error {
	return fmt.Errorf("%w: page %d %w", ErrCorrupt, id, fmt.Errorf(format, args...))
}

// newestMeta takes the valid meta page of the newest transaction, as bbolt does. A crash may have torn one.
func (c *checker) newestMeta(sizeBytes uint64) (root, freelist uint64, err error) {
	newest, err := c.meta(0)
	if err == nil {
		c.pageBytes = uint64(order.Uint32(newest[8:]))
	} else { // then the page size is that for which there is another meta page
		for c.pageBytes = minPageBytes; c.pageBytes < maxPageBytes; c.pageBytes *= 2 {
			if _, again := c.meta(1); again == nil {
				break
			}
		}
	}
	second, err2 := c.meta(1)
	id := uint64(0)
	switch {
	case err != nil && err2 != nil:
		return 0, 0, err
	case err != nil, err2 == nil && order.Uint64(second[48:]) > order.Uint64(newest[48:]):
		newest, id = second, 1
	}
	if pageBytes := uint64(order.Uint32(newest[8:])); pageBytes != c.pageBytes || pageBytes&(pageBytes-1) != 0 ||
		pageBytes < minPageBytes || pageBytes > maxPageBytes {
		return 0, 0, corrupt(id, "claims pages of %d bytes", pageBytes)
	}
	root, freelist, c.pages = order.Uint64(newest[16:]), order.Uint64(newest[32:]), order.Uint64(newest[40:])
	if c.pages < 3 || c.pages > sizeBytes/c.pageBytes {
		return 0, 0, fmt.Errorf("%w: %d pages of %d bytes in a file of %d", ErrCorrupt, c.pages, c.pageBytes, sizeBytes)
	}
	return root, freelist, nil
}

// meta reads a meta page. Errors are for what makes bbolt disregard it; its head is not among that.
func (c *checker) meta(id uint64) ([]byte, error) {
	m := make([]byte, metaBytes)
	if _, err := c.r.ReadAt(m, int64(id*c.pageBytes+pageHeadBytes)); err != nil {
		return m, corrupt(id, "is not readable: %w", err)
	}
	sum := fnv.New64a()
	sum.Write(m[:metaBytes-8])
	if order.Uint32(m) != magic || order.Uint32(m[4:]) != version {
		return m, corrupt(id, "is not a bbolt meta page")
	}
	if order.Uint64(m[metaBytes-8:]) != sum.Sum64() {
		return m, corrupt(id, "has a wrong checksum")
	}
	return m, nil
}

// claim marks the page and its overflow pages as used, each for the first time.
func (c *checker) claim(id, overflow uint64) error {
	if id < 2 || id >= c.pages || overflow >= c.pages-id {
		return corrupt(id, "with %d overflow pages is outside of the file's %d", overflow, c.pages)
	}
	for i := id; i <= id+overflow; i++ {
		if c.used[i/64]&(1<<(i%64)) != 0 {
			return corrupt(i, "is used twice")
		}
		c.used[i/64] |= 1 << (i % 64)
	}
	return nil
}

// node is a page with its overflow pages, or an inline bucket's part of one.
type node struct {
	c     *checker
	id    uint64
	start uint64 // offset in the file
	size  uint64
	head  []byte // the first part of it, in memory; all of it for an inline bucket

	inline bool
}

// bytes returns the n bytes at offset from.
func (p *node) bytes(from, n uint64) ([]byte, error) {
	if from > p.size || n > p.size-from {
		return nil, corrupt(p.id, "has an element outside of it")
	}
	if from+n <= uint64(len(p.head)) {
		return p.head[from : from+n], nil
	}
	b := make([]byte, n)
	if _, err := p.c.r.ReadAt(b, int64(p.start+from)); err != nil {
		return nil, corrupt(p.id, "is not readable: %w", err)
	}
	return b, nil
}

// elements returns the page's element headers.
func (p *node) elements() ([]byte, error) {
	return p.bytes(pageHeadBytes, uint64(order.Uint16(p.head[10:]))*elementBytes)
}

// key returns the i-th element's key, which lies pos bytes from the element and not before offset after; and
// the offset of its end. Elements that overlapped could make a small page take very long to check.
func (p *node) key(i int, pos, ksize uint32, after uint64) (key []byte, end uint64, err error) {
	from := pageHeadBytes + uint64(i)*elementBytes + uint64(pos)
	if ksize == 0 || ksize > maxKeyBytes {
		return nil, 0, corrupt(p.id, "has a key of %d bytes", ksize)
	}
	if from < after {
		return nil, 0, corrupt(p.id, "has elements that overlap")
	}
	key, err = p.bytes(from, uint64(ksize))
	return key, from + uint64(ksize), err
}

// open reads and claims the node at page id. close gives its buffer back.
func (c *checker) open(id uint64) (*node, error) {
	if err := c.ctx.Err(); err != nil {
		return nil, err
	}
	if id < 2 || id >= c.pages {
		return nil, corrupt(id, "is outside of the file's %d", c.pages)
	}
	p := &node{c: c, id: id, start: id * c.pageBytes}
	if n := len(c.buffers); n > 0 {
		p.head, c.buffers = c.buffers[n-1], c.buffers[:n-1]
	} else {
		p.head = make([]byte, c.pageBytes)
	}
	if _, err := c.r.ReadAt(p.head, int64(p.start)); err != nil {
		return nil, corrupt(id, "is not readable: %w", err)
	}
	if order.Uint64(p.head) != id {
		return nil, corrupt(id, "calls itself %d", order.Uint64(p.head))
	}
	overflow := uint64(order.Uint32(p.head[12:]))
	p.size = (overflow + 1) * c.pageBytes
	return p, c.claim(id, overflow)
}

func (c *checker) close(p *node) { c.buffers = append(c.buffers, p.head) }

// page checks the subtree at page id, all of whose keys must be in [low, high); nil is no bound.
func (c *checker) page(id uint64, low, high []byte, depth int) error {
	if depth > maxDepth {
		return corrupt(id, "is nested too deep")
	}
	p, err := c.open(id)
	if err != nil {
		return err
	}
	defer c.close(p)
	switch kind := order.Uint16(p.head[8:]); kind {
	case branchPage:
		return c.branch(p, low, high, depth)
	case leafPage:
		return c.leaf(p, low, high, depth)
	default:
		return corrupt(id, "is of the unknown kind %#x", kind)
	}
}

// checkKey says whether key may follow low (exclusively if strict) and is below high.
func checkKey(id uint64, key, low, high []byte, strict bool) error {
	cmp := bytes.Compare(low, key)
	if low != nil && (cmp > 0 || cmp == 0 && strict) || high != nil && bytes.Compare(key, high) >= 0 {
		return corrupt(id, "has a key out of order")
	}
	return nil
}

func (c *checker) branch(p *node, low, high []byte, depth int) error {
	elements, err := p.elements()
	if err != nil {
		return err
	}
	n := len(elements) / elementBytes
	if n == 0 {
		return corrupt(p.id, "is a branch to nowhere")
	}
	var key, next []byte
	end := uint64(pageHeadBytes + len(elements))
	for i := range n {
		e := elements[i*elementBytes:]
		next, end, err = p.key(i, order.Uint32(e), order.Uint32(e[4:]), end)
		if err == nil && i == 0 {
			err = checkKey(p.id, next, low, high, false)
		} else if err == nil {
			err = checkKey(p.id, next, key, high, true)
		}
		if err == nil && i > 0 {
			err = c.page(order.Uint64(elements[(i-1)*elementBytes+8:]), key, next, depth+1)
		}
		if err != nil {
			return err
		}
		key = next
	}
	return c.page(order.Uint64(elements[(n-1)*elementBytes+8:]), key, high, depth+1)
}

func (c *checker) leaf(p *node, low, high []byte, depth int) error {
	elements, err := p.elements()
	if err != nil {
		return err
	}
	previous, end := low, uint64(pageHeadBytes+len(elements))
	for i := range len(elements) / elementBytes {
		e := elements[i*elementBytes:]
		flags, pos, ksize, vsize := order.Uint32(e), order.Uint32(e[4:]), order.Uint32(e[8:]), order.Uint32(e[12:])
		key, value, err := p.key(i, pos, ksize, end)
		if err == nil {
			err = checkKey(p.id, key, previous, high, i > 0)
		}
		if err == nil {
			err = c.value(p, flags, value, uint64(vsize), depth)
		}
		if err != nil {
			return err
		}
		previous, end = key, value+uint64(vsize)
	}
	return nil
}

// value checks that the n bytes at from are inside of p, and the bucket that they are the head of, if so.
func (c *checker) value(p *node, flags uint32, from, n uint64, depth int) error {
	switch {
	case from > p.size || n > p.size-from:
		return corrupt(p.id, "has a value outside of it")
	case flags == 0:
		return nil
	case flags != bucketFlag || p.inline || n < bucketBytes || n > c.pageBytes: // inline buckets have no buckets inside
		return corrupt(p.id, "has an element with flags %#x of %d bytes", flags, n)
	}
	b, err := p.bytes(from, n)
	if err != nil {
		return err
	}
	if root := order.Uint64(b); root != 0 {
		return c.page(root, nil, nil, depth+1)
	}
	inline := b[bucketBytes:]
	if len(inline) < pageHeadBytes || order.Uint16(inline[8:]) != leafPage {
		return corrupt(p.id, "has a malformed inline bucket")
	}
	return c.leaf(&node{c: c, id: p.id, size: uint64(len(inline)), head: inline, inline: true}, nil, nil, depth)
}

// freelist checks that the free pages are inside of the file, ascending, that nothing else uses them, and
// that every page is used or free. There may be millions, so they are read piece by piece.
func (c *checker) freelist(id uint64) error {
	p, err := c.open(id)
	if err != nil {
		return err
	}
	if order.Uint16(p.head[8:]) != freelistPage {
		return corrupt(id, "is not a freelist")
	}
	count, at := uint64(order.Uint16(p.head[10:])), uint64(pageHeadBytes)
	if count == 0xFFFF { // the count did not fit: it is the first element
		count, at = order.Uint64(p.head[pageHeadBytes:]), at+8
	}
	if count > (p.size-at)/8 {
		return corrupt(id, "has %d free pages", count)
	}
	list := bufio.NewReaderSize(io.NewSectionReader(c.r, int64(p.start+at), int64(count*8)), 64<<10)
	return c.freePages(list, id, count)
}

func (c *checker) freePages(r io.Reader, id, count uint64) error {
	var b [8]byte
	previous := uint64(0)
	for i := range count {
		if i%1024 == 0 && c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return corrupt(id, "is not readable: %w", err)
		}
		free := order.Uint64(b[:])
		if free <= previous {
			return corrupt(id, "is out of order")
		}
		if err := c.claim(free, 0); err != nil {
			return err
		}
		previous = free
	}
	for i := uint64(2); i < c.pages; i++ {
		if c.used[i/64]&(1<<(i%64)) == 0 {
			return corrupt(i, "is neither used nor free")
		}
	}
	return nil
}
