package vfs

import "maps"

// node is a file or a directory.
type node struct {
	dir      *directory
	contents *contents // if it is a file
	path     string    // of a file: the name that it has, or had until it was removed
}

func newDir() *node { return &node{dir: &directory{names: map[string]*node{}}} }

// sizeBytes is of all files below, by the names that they have now.
func (n *node) sizeBytes() (sum int64) {
	if n.contents != nil {
		return n.contents.size
	}
	for _, child := range n.dir.names {
		sum += child.sizeBytes()
	}
	return sum
}

// directory has names, and those that are on the disk with the changes since.
type directory struct {
	names   map[string]*node
	durable map[string]*node
	pending []nameChange
}

// nameChange gives a name to a node, or takes it (nil), and takes the name that the node had.
type nameChange struct {
	name, from string
	node, old  *node
}

func (d *directory) set(name string, n *node) {
	d.change(nameChange{name: name, node: n, old: d.names[name]})
}

func (d *directory) rename(from, to string, n *node) {
	d.change(nameChange{name: to, from: from, node: n})
}

func (d *directory) change(c nameChange) {
	d.pending = append(d.pending, c)
	c.apply(d.names)
}

// apply may find names that a crash has changed: others are left alone.
func (c nameChange) apply(names map[string]*node) {
	switch {
	case c.node != nil:
		if c.from != "" && c.from != c.name && names[c.from] == c.node {
			delete(names, c.from)
		}
		names[c.name] = c.node
	case names[c.name] == c.old:
		delete(names, c.name)
	}
}

func (d *directory) sync() {
	d.durable = maps.Clone(d.names)
	d.pending = nil
}
