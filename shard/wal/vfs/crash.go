package vfs

import (
	"maps"
	"math/rand/v2"
	"slices"
)

// Kill returns what is there when the process ends now and the machine goes on: everything that was written,
// but durable is only what was. No locks, no hook. m itself goes on.
func (m *Memory) Kill() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.copy(&copier{nodes: map[*node]*node{}})
}

// Crash returns what a power cut at this moment may leave; which of the possibilities, depends on seed alone.
// m itself goes on.
func (m *Memory) Crash(seed uint64) *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	rnd := rand.New(rand.NewPCG(seed, 0))
	chances := []float64{0, 0.05, 0.5, 0.5, 0.95, 1}
	return m.copy(&copier{
		nodes: map[*node]*node{}, rnd: rnd,
		name:   chances[rnd.IntN(len(chances))],
		size:   chances[rnd.IntN(len(chances))],
		sector: chances[rnd.IntN(len(chances))],
	})
}

// DropCaches makes readers see what is on the disk where a Sync has failed.
func (m *Memory) DropCaches() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.root != nil {
		m.root.dropCaches()
	}
}

func (n *node) dropCaches() {
	if n.contents != nil {
		for i, s := range n.contents.stale {
			if s.lost {
				n.contents.put(i*SectorBytes, s.versions[0][:])
				delete(n.contents.stale, i)
			}
		}
		return
	}
	for _, child := range n.dir.names {
		child.dropCaches()
	}
}

func (m *Memory) copy(c *copier) *Memory {
	out := &Memory{capacity: m.capacity}
	if m.root != nil {
		out.root = c.node(m.root)
	}
	return out
}

// copier copies a tree. With rnd it decides what a crash keeps, with these chances for each change.
type copier struct {
	nodes              map[*node]*node // a file may have several names, of which some are durable
	rnd                *rand.Rand
	name, size, sector float64
}

func (c *copier) kept(chance float64) bool { return c.rnd.Float64() < chance }

func (c *copier) node(n *node) *node {
	if n == nil {
		return nil
	}
	if out := c.nodes[n]; out != nil {
		return out
	}
	out := &node{path: n.path}
	c.nodes[n] = out
	switch {
	case n.contents != nil:
		out.contents = n.contents.clone()
		if c.rnd != nil {
			c.crash(out.contents)
		}
	case c.rnd != nil:
		out.dir = c.crashDir(n.dir)
	default:
		out.dir = &directory{names: c.names(n.dir.names), durable: c.names(n.dir.durable)}
		for _, change := range n.dir.pending {
			change.node, change.old = c.node(change.node), c.node(change.old)
			out.dir.pending = append(out.dir.pending, change)
		}
	}
	return out
}

func (c *copier) names(names map[string]*node) map[string]*node {
	out := make(map[string]*node, len(names))
	for _, name := range slices.Sorted(maps.Keys(names)) {
		out[name] = c.node(names[name])
	}
	return out
}

// crashDir applies any of the changes since the last SyncDir, in order.
func (c *copier) crashDir(d *directory) *directory {
	left := maps.Clone(d.durable)
	if left == nil {
		left = map[string]*node{}
	}
	for _, change := range d.pending {
		if c.kept(c.name) {
			change.apply(left)
		}
	}
	out := &directory{names: c.names(left)}
	out.sync()
	return out
}

func (c *copier) crash(f *contents) {
	for _, i := range slices.Sorted(maps.Keys(f.stale)) {
		if s := f.stale[i]; !c.kept(c.sector) {
			f.put(i*SectorBytes, s.versions[c.rnd.IntN(len(s.versions))][:])
		}
	}
	if len(f.sizes) > 0 && !c.kept(c.size) {
		f.size = f.sizes[c.rnd.IntN(len(f.sizes))]
	}
	f.cut()
	f.sync()
	clear(f.stale)
}

// cut clears what is beyond the size: it is not there when the file grows.
func (c *contents) cut() {
	for i, p := range c.pages {
		switch from := c.size - i*pageBytes; {
		case from <= 0:
			delete(c.pages, i)
		case from < pageBytes:
			p = c.writable(i)
			clear(p.data[from:])
		}
	}
}
