package ring

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/golden.txt anew: every existing cluster would move its data")

// TestGolden: a placement is the same in every process, version and machine.
func TestGolden(t *testing.T) {
	var b strings.Builder
	for _, key := range []string{"", "a", "foo", "{user42}/cart", "{user42}/name", "{}", "\x00\xff", "registry/pods/default/web-1"} {
		fmt.Fprintf(&b, "key %q: shard %d of 64, %d of 4096\n", key, ShardOf([]byte(key), 64), ShardOf([]byte(key), 4096))
	}
	weighted := []Node{{"a", 1}, {"b", 0.5}, {"c", 2}, {"d", 1.25}, {"e", 0.3333}}
	for _, c := range []struct {
		config Config
		nodes  []Node
	}{
		{Config{64, 2, 0}, sameNodes("n", 3)}, {Config{64, 3, 0}, sameNodes("n", 5)}, {Config{16, 3, 8}, sameNodes("node-", 20)},
		{Config{32, 2, 0}, weighted}, {Config{5, 7, 1}, sameNodes("n", 8)},
	} {
		r := mustNew(t, c.config, c.nodes...)
		fmt.Fprintf(&b, "%+v of %v, bounds %v\n", r.Config(), r.Nodes(), r.bounds)
		for shard := range c.config.Shards {
			fmt.Fprintf(&b, "  %d: %s\n", shard, strings.Join(r.Order(shard), " "))
		}
	}
	const path = "testdata/golden.txt"
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, lines := strings.Split(b.String(), "\n"), strings.Split(string(want), "\n")
	for i := range min(len(got), len(lines)) {
		if got[i] != lines[i] {
			t.Fatalf("line %d is\n%s\nand was\n%s", i+1, got[i], lines[i])
		}
	}
	if len(got) != len(lines) {
		t.Fatalf("%d lines, were %d", len(got), len(lines))
	}
}
