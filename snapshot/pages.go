package snapshot

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// checkFile reads every page of the bbolt file at path that a transaction can reach, and refuses with
// ErrCorrupt a file whose pages are out of bounds, of the wrong kind, used twice, both used and free, out of
// order, or malformed. ctx is looked at between pages.
//
// It does what bbolt's own Tx.Check does, but on bytes that nobody vouches for: bbolt maps the file and trusts
// every offset in it, so a crafted page can kill the process, and it keeps a map entry for each page. This
// reads page by page, with a bit of memory for each.
func checkFile(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return checkPages(ctx, f, info.Size())
}

// The layout of a bbolt file (version 2). Integers have the byte order of the machine that wrote it; a file
// of another order fails at its magic number.
const (
	pageHeadBytes    = 16 // id u64, flags u16, count u16, overflow u32
	pageElementBytes = 16 // leaf: flags, pos, ksize, vsize u32; branch: pos, ksize u32, pgid u64
	bucketBytes      = 16 // root page u64, sequence u64; an inline bucket's only page follows
	metaPageBytes    = 64 // magic, version, page size, flags u32; root bucket; freelist, pages, txid, sum u64

	branchPage, leafPage, metaPage, freelistPage = 0x01, 0x02, 0x04, 0x10

	bucketElement = 0x01

	boltMagic   = 0xED0CDAED
	boltVersion = 2
	noFreelist  = ^uint64(0)

	// maxDepth bounds branches and nested buckets together: with two keys to a page, 2^60 is enough.
	maxDepth = 64
	// maxNodeBytes bounds one node with its overflow pages. A value is at most a few MiB, and bbolt splits
	// nodes as soon as they hold two keys to a page.
	maxNodeBytes = 64 << 20
)

var order = binary.NativeEndian

type pageChecker struct {
	ctx      context.Context // of one check, which this lives no longer than
	r        io.ReaderAt
	pageSize uint64
	pages    uint64 // high water mark: pages from here on are unused
	used     []uint64
	buffers  [][]byte // idle page buffers
}

func checkPages(ctx context.Context, r io.ReaderAt, size int64) error {
	c := &pageChecker{ctx: ctx, r: r}
	root, freelist, err := c.newestMeta(uint64(size))
	if err != nil {
		return err
	}
	c.used = make([]uint64, (c.pages+63)/64)
	if err := c.node(root, nil, nil, 0); err != nil {
		return err
	}
	if freelist == noFreelist {
		return nil
	}
	return c.freelist(freelist)
}

func corruptPage(id uint64, format string, args ...any) error {
	return fmt.Errorf("%w: page %d %s", ErrCorrupt, id, fmt.Sprintf(format, args...))
}

// newestMeta demands both meta pages to be valid, as they are in every stream, and takes the newer one.
func (c *pageChecker) newestMeta(size uint64) (root, freelist uint64, err error) {
	first := make([]byte, pageHeadBytes+metaPageBytes)
	if _, err := c.r.ReadAt(first, 0); err != nil {
		return 0, 0, corruptPage(0, "is not readable: %v", err)
	}
	pageSize := uint64(order.Uint32(first[pageHeadBytes+8:]))
	if pageSize < 1<<9 || pageSize > 1<<24 || pageSize&(pageSize-1) != 0 {
		return 0, 0, corruptPage(0, "claims pages of %d bytes", pageSize)
	}
	second := make([]byte, len(first))
	if _, err := c.r.ReadAt(second, int64(pageSize)); err != nil {
		return 0, 0, corruptPage(1, "is not readable: %v", err)
	}
	newest := first[pageHeadBytes:]
	for i, p := range [][]byte{first, second} {
		m := p[pageHeadBytes:]
		sum := fnv.New64a()
		sum.Write(m[:metaPageBytes-8])
		switch {
		case order.Uint32(m) != boltMagic || order.Uint32(m[4:]) != boltVersion:
			return 0, 0, corruptPage(uint64(i), "is not a bbolt meta page")
		case order.Uint64(m[metaPageBytes-8:]) != sum.Sum64():
			return 0, 0, corruptPage(uint64(i), "has a wrong checksum")
		case order.Uint64(p) != uint64(i) || order.Uint16(p[8:]) != metaPage:
			return 0, 0, corruptPage(uint64(i), "has a wrong head")
		case uint64(order.Uint32(m[8:])) != pageSize:
			return 0, 0, corruptPage(uint64(i), "claims another page size")
		}
		if order.Uint64(m[48:]) > order.Uint64(newest[48:]) {
			newest = m
		}
	}
	root, freelist = order.Uint64(newest[16:]), order.Uint64(newest[32:])
	c.pageSize, c.pages = pageSize, order.Uint64(newest[40:])
	if c.pages < 3 || c.pages > size/pageSize {
		return 0, 0, fmt.Errorf("%w: %d pages of %d bytes in a file of %d", ErrCorrupt, c.pages, pageSize, size)
	}
	return root, freelist, nil
}

// claim marks the page and its overflow pages as used, each for the first time.
func (c *pageChecker) claim(id, overflow uint64) error {
	if id < 2 || id >= c.pages || overflow >= c.pages-id {
		return corruptPage(id, "with %d overflow pages is outside of the file's %d", overflow, c.pages)
	}
	for i := id; i <= id+overflow; i++ {
		if c.used[i/64]&(1<<(i%64)) != 0 {
			return corruptPage(i, "is used twice")
		}
		c.used[i/64] |= 1 << (i % 64)
	}
	return nil
}

// open reads and claims the node at page id with its overflow pages. close gives the buffer back.
func (c *pageChecker) open(id uint64) (page []byte, err error) {
	if err := c.ctx.Err(); err != nil {
		return nil, err
	}
	if id < 2 || id >= c.pages {
		return nil, corruptPage(id, "is outside of the file's %d", c.pages)
	}
	if n := len(c.buffers); n > 0 {
		page, c.buffers = c.buffers[n-1][:c.pageSize], c.buffers[:n-1]
	} else {
		page = make([]byte, c.pageSize)
	}
	if _, err := c.r.ReadAt(page, int64(id*c.pageSize)); err != nil {
		return nil, corruptPage(id, "is not readable: %v", err)
	}
	if order.Uint64(page) != id {
		return nil, corruptPage(id, "calls itself %d", order.Uint64(page))
	}
	overflow := uint64(order.Uint32(page[12:]))
	if err := c.claim(id, overflow); err != nil || overflow == 0 {
		return page, err
	}
	if (overflow+1)*c.pageSize > maxNodeBytes {
		return nil, corruptPage(id, "has %d overflow pages", overflow)
	}
	c.close(page)
	page = make([]byte, (overflow+1)*c.pageSize)
	if _, err := c.r.ReadAt(page, int64(id*c.pageSize)); err != nil {
		return nil, corruptPage(id, "is not readable: %v", err)
	}
	return page, nil
}

func (c *pageChecker) close(page []byte) {
	if uint64(len(page)) == c.pageSize {
		c.buffers = append(c.buffers, page)
	}
}

// node checks the subtree at page id, all of whose keys must be in [low, high); nil is no bound.
func (c *pageChecker) node(id uint64, low, high []byte, depth int) error {
	if depth > maxDepth {
		return corruptPage(id, "is nested too deep")
	}
	page, err := c.open(id)
	if err != nil {
		return err
	}
	defer c.close(page)
	switch order.Uint16(page[8:]) {
	case branchPage:
		return c.branch(id, page, low, high, depth)
	case leafPage:
		return c.leaf(id, page, low, high, depth)
	}
	return corruptPage(id, "is of the unknown kind %#x", order.Uint16(page[8:]))
}

// elements returns how many elements page has, if their array fits in.
func elements(id uint64, page []byte) (int, error) {
	n := int(order.Uint16(page[10:]))
	if pageHeadBytes+n*pageElementBytes > len(page) {
		return 0, corruptPage(id, "has %d elements", n)
	}
	return n, nil
}

// slice returns n bytes of page at pos from the element at offset at.
func slice(id uint64, page []byte, at int, pos, n uint64) ([]byte, error) {
	from := uint64(at) + pos
	if from > uint64(len(page)) || n > uint64(len(page))-from {
		return nil, corruptPage(id, "has an element outside of it")
	}
	return page[from : from+n], nil
}

// checkKey says whether key may follow low (exclusively if strict) and is below high.
func checkKey(id uint64, key, low, high []byte, strict bool) error {
	if len(key) == 0 {
		return corruptPage(id, "has an empty key")
	}
	cmp := bytes.Compare(low, key)
	if low != nil && (cmp > 0 || cmp == 0 && strict) || high != nil && bytes.Compare(key, high) >= 0 {
		return corruptPage(id, "has a key out of order")
	}
	return nil
}

func (c *pageChecker) branch(id uint64, page, low, high []byte, depth int) error {
	n, err := elements(id, page)
	if err != nil {
		return err
	}
	if n == 0 {
		return corruptPage(id, "is a branch to nowhere")
	}
	key := func(i int) ([]byte, error) {
		at := pageHeadBytes + i*pageElementBytes
		return slice(id, page, at, uint64(order.Uint32(page[at:])), uint64(order.Uint32(page[at+4:])))
	}
	current, err := key(0)
	if err != nil {
		return err
	}
	if err := checkKey(id, current, low, high, false); err != nil {
		return err
	}
	for i := range n {
		next := high
		if i+1 < n {
			if next, err = key(i + 1); err != nil {
				return err
			}
			if err := checkKey(id, next, current, high, true); err != nil {
				return err
			}
		}
		child := order.Uint64(page[pageHeadBytes+i*pageElementBytes+8:])
		if err := c.node(child, current, next, depth+1); err != nil {
			return err
		}
		current = next
	}
	return nil
}

func (c *pageChecker) leaf(id uint64, page, low, high []byte, depth int) error {
	n, err := elements(id, page)
	if err != nil {
		return err
	}
	previous := low
	for i := range n {
		at := pageHeadBytes + i*pageElementBytes
		flags := order.Uint32(page[at:])
		pos, ksize, vsize := uint64(order.Uint32(page[at+4:])), uint64(order.Uint32(page[at+8:])), uint64(order.Uint32(page[at+12:]))
		both, err := slice(id, page, at, pos, ksize+vsize)
		if err != nil {
			return err
		}
		key, value := both[:ksize], both[ksize:]
		if err := checkKey(id, key, previous, high, i > 0); err != nil {
			return err
		}
		switch flags {
		case 0:
		case bucketElement:
			if err := c.bucket(id, value, depth); err != nil {
				return err
			}
		default:
			return corruptPage(id, "has an element with the unknown flags %#x", flags)
		}
		previous = key
	}
	return nil
}

// bucket checks a nested bucket, whose head (and only page, if it is inline) is value, an element of page id.
func (c *pageChecker) bucket(id uint64, value []byte, depth int) error {
	if len(value) < bucketBytes {
		return corruptPage(id, "has a bucket of %d bytes", len(value))
	}
	if root := order.Uint64(value); root != 0 {
		return c.node(root, nil, nil, depth+1)
	}
	inline := value[bucketBytes:]
	if depth >= maxDepth || len(inline) < pageHeadBytes || order.Uint16(inline[8:]) != leafPage {
		return corruptPage(id, "has a malformed inline bucket")
	}
	return c.leaf(id, inline, nil, nil, depth+1)
}

// freelist checks that the free pages are inside of the file, ascending, and that nothing else uses them.
// There may be millions, so they are read piece by piece.
func (c *pageChecker) freelist(id uint64) error {
	head := make([]byte, pageHeadBytes+8)
	if id < 2 || id >= c.pages {
		return corruptPage(id, "is outside of the file's %d", c.pages)
	}
	if _, err := c.r.ReadAt(head, int64(id*c.pageSize)); err != nil {
		return corruptPage(id, "is not readable: %v", err)
	}
	count, overflow := uint64(order.Uint16(head[10:])), uint64(order.Uint32(head[12:]))
	if order.Uint64(head) != id || order.Uint16(head[8:]) != freelistPage {
		return corruptPage(id, "is not a freelist")
	}
	if err := c.claim(id, overflow); err != nil {
		return err
	}
	ids := id*c.pageSize + pageHeadBytes
	if count == 0xFFFF { // the count did not fit: it is the first element
		count, ids = order.Uint64(head[pageHeadBytes:]), ids+8
	}
	if room := (id + overflow + 1) * c.pageSize; ids > room || count > (room-ids)/8 {
		return corruptPage(id, "has %d free pages", count)
	}
	list := bufio.NewReaderSize(io.NewSectionReader(c.r, int64(ids), int64(count*8)), 64<<10)
	return c.freePages(list, id, count)
}

func (c *pageChecker) freePages(r io.Reader, id, count uint64) error {
	var b [8]byte
	previous := uint64(0)
	for i := range count {
		if i%1024 == 0 && c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return corruptPage(id, "is not readable: %v", err)
		}
		free := order.Uint64(b[:])
		if free <= previous {
			return corruptPage(id, "is out of order")
		}
		if err := c.claim(free, 0); err != nil {
			return err
		}
		previous = free
	}
	return nil
}
