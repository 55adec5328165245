package vfs

import "slices"

const (
	// SectorBytes is the unit of Memory's disk: after a crash a sector is as it was after one write or another.
	SectorBytes = 512

	pageBytes = 8 * SectorBytes
	// A sector that is written again and again without Sync: the disk has one of so many.
	maxVersions = 6
)

type sector [SectorBytes]byte

// page is written only by the contents that own it, so that copies of a file share what neither changes.
type (
	owner struct{ _ byte }
	page  struct {
		owner *owner
		data  [pageBytes]byte
	}
)

// contents of a file: what is read, and what may be on the disk instead.
type contents struct {
	size  int64
	pages map[int64]*page // absent: zeros

	stale map[int64]*stale // by sector
	sizes []int64          // that the file has had since the last Sync, but for the present one
	owner *owner           // of pages that may be written in place. A copy makes it a new one
}

// stale is what may be on the disk for a sector, besides what is read.
type stale struct {
	versions []*sector // the first is what is there for sure if nothing since was written
	lost     bool      // by a Sync that failed: Sync leaves it as it is until it is written again
}

func newContents() *contents {
	return &contents{pages: map[int64]*page{}, stale: map[int64]*stale{}, owner: new(owner)}
}

// sector returns a copy of what is read.
func (c *contents) sector(i int64) *sector {
	s := new(sector)
	if p := c.pages[i*SectorBytes/pageBytes]; p != nil {
		copy(s[:], p.data[i*SectorBytes%pageBytes:])
	}
	return s
}

// writable returns the page for writing.
func (c *contents) writable(i int64) *page {
	p := c.pages[i]
	if p == nil {
		p = &page{owner: c.owner}
		c.pages[i] = p
	}
	if p.owner != c.owner {
		p = &page{owner: c.owner, data: p.data}
		c.pages[i] = p
	}
	return p
}

// put overwrites without a trace.
func (c *contents) put(off int64, b []byte) {
	for len(b) > 0 {
		n := copy(c.writable(off / pageBytes).data[off%pageBytes:], b)
		off, b = off+int64(n), b[n:]
	}
}

func (c *contents) read(off int64, b []byte) {
	for len(b) > 0 {
		n := min(int64(len(b)), pageBytes-off%pageBytes)
		if p := c.pages[off/pageBytes]; p != nil {
			copy(b[:n], p.data[off%pageBytes:])
		} else {
			clear(b[:n])
		}
		off, b = off+n, b[n:]
	}
}

// dirty remembers what is read of the sectors from off to end, before they change.
func (c *contents) dirty(off, end int64) {
	for i := off / SectorBytes; i*SectorBytes < end; i++ {
		s := c.stale[i]
		if s == nil {
			s = &stale{}
			c.stale[i] = s
		}
		s.lost = false
		if s.versions = append(s.versions, c.sector(i)); len(s.versions) > maxVersions {
			s.versions = slices.Delete(s.versions, 1, 2)
		}
	}
}

func (c *contents) resize(size int64) {
	if size != c.size {
		c.sizes = append(c.sizes, c.size)
		if len(c.sizes) > maxVersions {
			c.sizes = slices.Delete(c.sizes, 1, 2)
		}
		c.size = size
	}
}

func (c *contents) write(off int64, b []byte) {
	if len(b) == 0 {
		return
	}
	end := off + int64(len(b))
	c.dirty(off, end)
	c.put(off, b)
	c.resize(max(c.size, end))
}

// truncate clears what it cuts off, which would be there again when the file grows.
func (c *contents) truncate(size int64) {
	if size < c.size {
		c.zero(size, c.size)
	}
	c.resize(size)
}

func (c *contents) zero(off, end int64) {
	for off < end {
		i := off / pageBytes
		next := min(end, (i+1)*pageBytes)
		if c.pages[i] != nil {
			c.dirty(off, next)
			clear(c.writable(i).data[off%pageBytes:][:next-off])
		}
		off = next
	}
}

func (c *contents) sync() {
	for i, s := range c.stale {
		if !s.lost {
			delete(c.stale, i)
		}
	}
	c.sizes = nil
}

// lose is a Sync that fails: nobody writes what it had to write any more.
func (c *contents) lose() {
	for _, s := range c.stale {
		s.lost = true
	}
}

func (c *contents) flip(bit int64) {
	c.writable(bit / 8 / pageBytes).data[bit/8%pageBytes] ^= 1 << (bit % 8)
	if s := c.stale[bit/8/SectorBytes]; s != nil {
		for i, version := range s.versions {
			flipped := *version
			flipped[bit/8%SectorBytes] ^= 1 << (bit % 8)
			s.versions[i] = &flipped
		}
	}
}

// clone returns contents of its own. Pages stay shared until either writes them.
func (c *contents) clone() *contents {
	out := newContents()
	out.size, out.sizes = c.size, slices.Clone(c.sizes)
	for i, p := range c.pages {
		out.pages[i] = p
	}
	for i, s := range c.stale {
		out.stale[i] = &stale{versions: slices.Clone(s.versions), lost: s.lost}
	}
	c.owner = new(owner)
	return out
}
