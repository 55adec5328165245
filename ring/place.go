package ring

import (
	"cmp"
	"container/heap"
	"slices"
	"sort"
)

// point is one virtual node: a place on the circle of 64-bit positions.
type point struct {
	position uint64
	node     int32 // index into nodes sorted by name, so that equal positions are ordered by name
}

func circle(nodes []Node, virtualNodes int, hash hashFunc) []point {
	var points []point
	for i, n := range nodes {
		for v := range n.points(virtualNodes) {
			points = append(points, point{hash(nodePoint, n.Name, uint32(v)), int32(i)})
		}
	}
	slices.SortFunc(points, func(a, b point) int {
		return cmp.Or(cmp.Compare(a.position, b.position), cmp.Compare(a.node, b.node))
	})
	return points
}

// bounds returns how many replicas each node may hold: 1.1 times its share,
// rounded to one of the two integers beside that. A share is proportional to
// the weight, but never above one replica of every shard: what a heavy node
// cannot take is shared by the others.
//
// Rounding everybody up would move the bound of all nodes at once when the
// average passes certain values: from 1010 nodes down to 930 with 4096 shards of
// 3, a removal then moves 1.9/N on average but 37/N at worst. Each node rounds
// by its own hash instead, so that a removal moves a few nodes' bounds: 2.3/N
// and 3.1/N. Up to 50 nodes the two hardly differ. No node rounds below its
// share rounded up, so that all replicas find room.
func bounds(nodes []Node, shards, copies int, hash hashFunc) []int {
	heaviest := make([]int, len(nodes))
	var weights uint64
	for i, n := range nodes {
		heaviest[i] = i
		weights += n.thousandths()
	}
	slices.SortStableFunc(heaviest, func(a, b int) int {
		return cmp.Compare(nodes[b].thousandths(), nodes[a].thousandths())
	})
	result := make([]int, len(nodes))
	replicas := uint64(shards) * uint64(copies) // below 2^19, weights below 2^30: nothing here overflows
	for _, i := range heaviest {
		weight := nodes[i].thousandths()
		if replicas*weight >= uint64(shards)*weights {
			result[i] = shards
			replicas -= uint64(shards)
			weights -= weight
			continue
		}
		share := (replicas*weight + weights - 1) / weights
		const one = 1 << 16
		rounded := (replicas*weight*11*one/(weights*10) + hash(nodeRounding, nodes[i].Name, 0)>>48) / one
		result[i] = min(shards, int(max(share, rounded)))
	}
	return result
}

// placing is the state of one run of place.
type placing struct {
	points []point
	bounds []int
	copies int
	owners [][]int32 // by shard
	load   []int     // by node
	queue  []walk    // a heap: the shard whose next point is closest comes first
}

// walk is a shard on its way around the circle.
type walk struct {
	shard    int32
	next     int32  // index of the next point
	left     int32  // points not yet visited
	start    uint64 // where the shard sits
	distance uint64 // from start to the next point, clockwise
}

// place gives each shard copies distinct nodes. All shards walk clockwise at
// the same speed and take each node they meet that has room, until they have
// enough: so a node is filled by the shards closest to it, and a shard that
// arrives from further away, as those of a removed node do, seldom displaces one.
func place(points []point, bounds []int, shards, copies int, hash hashFunc) [][]int32 {
	p := &placing{points: points, bounds: bounds, copies: copies, owners: make([][]int32, shards), load: make([]int, len(bounds))}
	if copies == 0 {
		return p.owners
	}
	for s := range shards {
		w := walk{shard: int32(s), start: hash(shardPoint, "", uint32(s)), left: int32(len(points))}
		w.next = int32(firstPoint(points, w.start))
		w.distance = points[w.next].position - w.start
		p.queue = append(p.queue, w)
	}
	heap.Init(p)
	for len(p.queue) > 0 {
		p.step()
	}
	for s := range p.owners {
		for len(p.owners[s]) < copies {
			p.swap(s)
		}
	}
	return p.owners
}

// step lets the walk at the head of the queue visit its next point.
func (p *placing) step() {
	w := &p.queue[0]
	node := p.points[w.next].node
	if p.load[node] < p.bounds[node] && !slices.Contains(p.owners[w.shard], node) {
		p.owners[w.shard] = append(p.owners[w.shard], node)
		p.load[node]++
	}
	w.left--
	if w.left == 0 || len(p.owners[w.shard]) == p.copies {
		heap.Pop(p)
		return
	}
	w.next = (w.next + 1) % int32(len(p.points))
	w.distance = p.points[w.next].position - w.start
	heap.Fix(p, 0)
}

// swap finds one more node for a shard that met none with room but those it
// has: another shard moves to such a node and leaves it another one.
//
// There always is one. The bounds add up to all replicas, so some node has room;
// short owns it (it would have taken it), and not all shards do (its bound is at
// most their number). A shard without it has all its copies, for the same
// reason: more than short has, and so one on a node that short lacks.
func (p *placing) swap(short int) {
	roomy := 0
	for p.load[roomy] >= p.bounds[roomy] {
		roomy++
	}
	for other := range p.owners {
		if slices.Contains(p.owners[other], int32(roomy)) {
			continue
		}
		for i, node := range p.owners[other] {
			if !slices.Contains(p.owners[short], node) {
				p.owners[other][i] = int32(roomy)
				p.owners[short] = append(p.owners[short], node)
				p.load[roomy]++
				return
			}
		}
	}
	panic("ring: no room for a replica though the bounds leave some")
}

func firstPoint(points []point, position uint64) int {
	i := sort.Search(len(points), func(i int) bool { return points[i].position >= position })
	return i % len(points)
}

func (p *placing) Len() int { return len(p.queue) }
func (p *placing) Less(i, j int) bool {
	a, b := &p.queue[i], &p.queue[j]
	return a.distance < b.distance || a.distance == b.distance && a.shard < b.shard
}
func (p *placing) Swap(i, j int) { p.queue[i], p.queue[j] = p.queue[j], p.queue[i] }
func (p *placing) Push(w any)    { p.queue = append(p.queue, w.(walk)) }
func (p *placing) Pop() any {
	last := p.queue[len(p.queue)-1]
	p.queue = p.queue[:len(p.queue)-1]
	return last
}
