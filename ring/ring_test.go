package ring

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func genNodes(most int) *rapid.Generator[[]Node] {
	return rapid.Custom(func(t *rapid.T) []Node {
		names := rapid.SliceOfNDistinct(rapid.StringMatching(`[A-Za-z0-9._-]{1,8}`), 0, most, rapid.ID[string]).Draw(t, "names")
		weight := rapid.Just(1.0)
		if rapid.Bool().Draw(t, "weighted") {
			weight = rapid.SampledFrom([]float64{0.001, 0.3, 1, 1, 2, 7.5, 100})
		}
		nodes := make([]Node, len(names))
		for i, name := range names {
			nodes[i] = Node{name, weight.Draw(t, "weight")}
		}
		return nodes
	})
}

func genConfig() *rapid.Generator[Config] {
	return rapid.Custom(func(t *rapid.T) Config {
		return Config{
			Shards:       rapid.IntRange(1, 100).Draw(t, "shards"),
			Replicas:     rapid.IntRange(1, MaxReplicas).Draw(t, "replicas"),
			VirtualNodes: rapid.SampledFrom([]int{1, 2, 16, 64}).Draw(t, "virtual nodes"),
		}
	})
}

type fataler interface {
	Helper()
	Fatal(...any)
}

func mustNew(t fataler, config Config, nodes ...Node) *Ring {
	t.Helper()
	r, err := New(config, nodes...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func mustRemove(t fataler, r *Ring, names ...string) *Ring {
	t.Helper()
	less, err := r.Remove(names...)
	if err != nil {
		t.Fatal(err)
	}
	return less
}

func mustMoves(t fataler, from, to *Ring) []Move {
	t.Helper()
	moves, err := Moves(from, to)
	if err != nil {
		t.Fatal(err)
	}
	return moves
}

func loads(r *Ring) map[string]int {
	load := map[string]int{}
	for shard := range r.config.Shards {
		for _, name := range r.Owners(shard) {
			load[name]++
		}
	}
	return load
}

// shares computes what bounds should follow in another way: by looking for the
// replicas per weight at which all nodes together take exactly all replicas.
func shares(r *Ring) []float64 {
	shards := float64(r.config.Shards)
	all := shards * float64(min(r.config.Replicas, len(r.nodes)))
	low, high := 0.0, shards/MinWeight
	for range 200 {
		middle, sum := (low+high)/2, 0.0
		for _, n := range r.nodes {
			sum += min(shards, middle*n.Weight)
		}
		if sum < all {
			low = middle
		} else {
			high = middle
		}
	}
	result := make([]float64, len(r.nodes))
	for i, n := range r.nodes {
		result[i] = min(shards, high*n.Weight)
	}
	return result
}

// broken says which promise to a single placement the ring breaks.
func broken(r *Ring) error {
	want := min(r.config.Replicas, len(r.nodes))
	for shard := range r.config.Shards {
		owners := r.Owners(shard)
		distinct := slices.Compact(slices.Sorted(slices.Values(owners)))
		if len(owners) != want || len(distinct) != want {
			return fmt.Errorf("shard %d is on %v, want %d distinct nodes", shard, owners, want)
		}
		for _, name := range owners {
			if _, ok := r.index(name); !ok {
				return fmt.Errorf("shard %d is on %q, which is not live", shard, name)
			}
		}
	}
	load, share := loads(r), shares(r)
	for i, n := range r.nodes {
		if most := int(math.Ceil(1.1*share[i] - 1e-6)); load[n.Name] > most {
			return fmt.Errorf("%s holds %d replicas, more than %d", n.Name, load[n.Name], most)
		}
		if bound, ok := r.Bound(n.Name); !ok || load[n.Name] > bound {
			return fmt.Errorf("%s holds %d replicas, more than its bound %d", n.Name, load[n.Name], bound)
		}
	}
	return nil
}

func TestPlacementKeepsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := mustNew(t, genConfig().Draw(t, "config"), genNodes(20).Draw(t, "nodes")...)
		if err := broken(r); err != nil {
			t.Fatal(err)
		}
	})
}

func TestPlacementIsAFunctionOfTheNodeSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		config, nodes := genConfig().Draw(t, "config"), genNodes(12).Draw(t, "nodes")
		r := mustNew(t, config, nodes...)
		walked := mustNew(t, config)
		for _, n := range rapid.Permutation(nodes).Draw(t, "order") {
			var err error
			if walked, err = walked.Add(n); err != nil {
				t.Fatal(err)
			}
			if rapid.Bool().Draw(t, "leaves and returns") {
				if walked, err = mustRemove(t, walked, n.Name).Add(n); err != nil {
					t.Fatal(err)
				}
			}
		}
		requireSame(t, r, walked)
	})
}

func requireSame(t fataler, a, b *Ring) {
	t.Helper()
	for shard := range a.config.Shards {
		if !slices.Equal(a.Order(shard), b.Order(shard)) {
			t.Fatal(fmt.Sprintf("shard %d prefers %v in one and %v in the other", shard, a.Order(shard), b.Order(shard)))
		}
	}
}

func TestOrderNamesAllNodesOwnersFirst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := mustNew(t, genConfig().Draw(t, "config"), genNodes(12).Draw(t, "nodes")...)
		for shard := range r.config.Shards {
			order, owners := r.Order(shard), r.Owners(shard)
			if !slices.Equal(order[:len(owners)], owners) {
				t.Fatal("owners", owners, "are not the first of", order)
			}
			slices.Sort(order)
			if len(slices.Compact(order)) != len(r.nodes) {
				t.Fatal("order does not name each node once:", order)
			}
		}
	})
}

func TestMovesTurnOnePlacementIntoTheOther(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		config := genConfig().Draw(t, "config")
		from := mustNew(t, config, genNodes(10).Draw(t, "from")...)
		config.Replicas = rapid.IntRange(1, MaxReplicas).Draw(t, "other replicas")
		to := mustNew(t, config, slices.Concat(from.nodes[:len(from.nodes)/2], []Node{{"another", 1}, {"one more", 2}})...)
		owners := make([][]string, config.Shards)
		for shard := range owners {
			owners[shard] = from.Owners(shard)
		}
		for _, m := range mustMoves(t, from, to) {
			if m.From == m.To || m.From != "" && !slices.Contains(owners[m.Shard], m.From) || m.To != "" && slices.Contains(owners[m.Shard], m.To) {
				t.Fatal("cannot be done:", m, "on", owners[m.Shard])
			}
			owners[m.Shard] = slices.DeleteFunc(owners[m.Shard], func(n string) bool { return n == m.From })
			if m.To != "" {
				owners[m.Shard] = append(owners[m.Shard], m.To)
			}
		}
		for shard, got := range owners {
			if want := to.Owners(shard); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
				t.Fatal("shard", shard, "ends on", got, "want", want)
			}
		}
		if moves := mustMoves(t, to, to); len(moves) != 0 {
			t.Fatal("moves from a placement to itself:", moves)
		}
	})
}

// TestRemovalMovesLittle keeps the figures of the package comment true. Names
// are fixed, so it gives the same figures at each run.
func TestRemovalMovesLittle(t *testing.T) {
	for _, c := range []struct {
		nodes, shards, replicas, sets int
		mean, worst                   float64 // at most this many Nths of all replicas
	}{
		{3, 64, 2, 10, 1.05, 1.3}, {4, 64, 2, 10, 1.1, 1.3}, {5, 64, 3, 10, 1.1, 1.3}, {10, 64, 3, 10, 1.2, 1.5},
		{5, 256, 3, 5, 1.05, 1.3}, {10, 256, 3, 5, 1.1, 1.3}, {20, 256, 3, 3, 1.2, 1.4}, {20, 1024, 3, 1, 1.1, 1.3},
		{30, 1024, 7, 1, 1.1, 1.3}, {50, 1024, 3, 1, 1.3, 1.5}, {100, 4096, 3, 1, 1.2, 1.3},
		{100, 1024, 3, 1, 1.8, 2.1}, // 30 replicas on each of 100 nodes: the bound binds on many
	} {
		moved, worst, removals := 0.0, 0.0, 0
		for set := range c.sets {
			r := mustNew(t, Config{Shards: c.shards, Replicas: c.replicas}, sameNodes(fmt.Sprintf("set%d-n", set), c.nodes)...)
			for _, n := range r.nodes[:min(c.nodes, 6)] {
				moves := mustMoves(t, r, mustRemove(t, r, n.Name))
				if left := loads(r)[n.Name]; len(moves) < left {
					t.Fatalf("%d moves though the removed node held %d replicas", len(moves), left)
				}
				of := float64(len(moves)) * float64(c.nodes) / float64(c.shards*c.replicas)
				moved, worst, removals = moved+of, max(worst, of), removals+1
			}
		}
		mean := moved / float64(removals)
		t.Logf("%3d nodes, %4d shards of %d replicas: a removal moves %.2f/N, at worst %.2f/N", c.nodes, c.shards, c.replicas, mean, worst)
		if mean > c.mean || worst > c.worst {
			t.Errorf("%d nodes, %d shards of %d: a removal moves %.2f/N and at worst %.2f/N", c.nodes, c.shards, c.replicas, mean, worst)
		}
	}
}

func sameNodes(prefix string, count int) []Node {
	nodes := make([]Node, count)
	for i := range nodes {
		nodes[i] = Node{fmt.Sprint(prefix, i+1), 1}
	}
	return nodes
}

func TestLimits(t *testing.T) {
	good := Config{Shards: 8, Replicas: 2}
	heavy := sameNodes("n", 100)
	for i := range heavy {
		heavy[i].Weight = MaxWeight
	}
	for name, c := range map[string]struct {
		config Config
		nodes  []Node
		want   error
	}{
		"no shards":              {Config{0, 2, 0}, nil, ErrConfig},
		"too many shards":        {Config{MaxShards + 1, 2, 0}, nil, ErrConfig},
		"no replicas":            {Config{8, 0, 0}, nil, ErrConfig},
		"too many replicas":      {Config{8, 8, 0}, nil, ErrConfig},
		"negative virtual nodes": {Config{8, 2, -1}, nil, ErrConfig},
		"too many virtual nodes": {Config{8, 2, MaxVirtualNodes + 1}, nil, ErrConfig},
		"no name":                {good, []Node{{"", 1}}, ErrNode},
		"long name":              {good, []Node{{strings.Repeat("n", 64), 1}}, ErrNode},
		"zero weight":            {good, []Node{{"n", 0}}, ErrNode},
		"negative weight":        {good, []Node{{"n", -1}}, ErrNode},
		"tiny weight":            {good, []Node{{"n", 0.0009}}, ErrNode},
		"huge weight":            {good, []Node{{"n", 101}}, ErrNode},
		"no number":              {good, []Node{{"n", math.NaN()}}, ErrNode},
		"infinite weight":        {good, []Node{{"n", math.Inf(1)}}, ErrNode},
		"twice":                  {good, []Node{{"n", 1}, {"m", 1}, {"n", 2}}, ErrNode},
		"too many nodes":         {good, sameNodes("n", MaxNodes+1), ErrNode},
		"too many points":        {Config{8, 2, MaxVirtualNodes}, heavy, ErrNode},
	} {
		if _, err := New(c.config, c.nodes...); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	r := mustNew(t, good, Node{"n", 1})
	if _, err := r.Add(Node{"n", 1}); !errors.Is(err, ErrNode) {
		t.Errorf("adding a node twice: %v", err)
	}
	if _, err := r.Remove("m"); !errors.Is(err, ErrUnknownNode) {
		t.Errorf("removing an unknown node: %v", err)
	}
	if _, ok := r.Bound("m"); ok {
		t.Error("an unknown node has a bound")
	}
	if _, err := Moves(r, mustNew(t, Config{Shards: 9, Replicas: 2})); !errors.Is(err, ErrConfig) {
		t.Errorf("moves to another number of shards: %v", err)
	}
	if empty := mustRemove(t, r, "n"); len(empty.OwnersOfKey([]byte("k"))) != 0 || len(empty.Order(0)) != 0 {
		t.Error("an empty ring has owners")
	}
	if err := broken(mustNew(t, Config{MaxShards, MaxReplicas, 1}, sameNodes("n", 9)...)); err != nil {
		t.Error("at the upper limits:", err)
	}
}

func TestTag(t *testing.T) {
	for key, want := range map[string]string{
		"": "", "plain": "plain", "{user42}/cart": "user42", "a/{user42}/name": "user42", "{a}{b}": "a", "{}{b}": "{}{b}",
		"{open": "{open", "}{a}": "a", "a}b{": "a}b{", "{{a}}": "{a", "{\x00}": "\x00",
	} {
		if got := string(Tag([]byte(key))); got != want {
			t.Errorf("tag of %q is %q, want %q", key, got, want)
		}
	}
	r := mustNew(t, Config{Shards: 64, Replicas: 2}, sameNodes("n", 5)...)
	a, b := []byte("{user42}/cart"), []byte("{user42}/name")
	if r.Shard(a) != r.Shard(b) || r.Shard(a) != ShardOf([]byte("user42"), 64) || !slices.Equal(r.OwnersOfKey(a), r.OwnersOfKey(b)) {
		t.Error("keys of one tag are in different shards")
	}
}
