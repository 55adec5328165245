package placement

import (
	"testing"
	"time"
)

func consistent(shards, rf int, witnesses string) *ClusterConfig {
	return &ClusterConfig{Strategy: "consistent", Shards: shards, ReplicationFactor: rf, Witnesses: witnesses}
}

func TestAStoppedNodesShardsAreRebuiltAndGoHome(t *testing.T) {
	bubble(t, 4, consistent(6, 3, WitnessesNone), func(c *testCluster) {
		t.Log("founded after", c.await(30*time.Second, "founding", home))
		c.put(1, "k", "v")
		n := c.nodes["n3"]
		c.stop("n3")
		t.Log("rebuilt after", c.await(60*time.Second, "rebuilding", func(m *Map, o Overview) bool {
			return home(m, o) && on(o, "n3") == 0
		}))
		c.start(n.member())
		t.Log("home after", c.await(20*time.Second, "going home", func(m *Map, o Overview) bool {
			return home(m, o) && on(o, "n3") > 0
		}))
		if v := c.get(1, "k"); v != "v" {
			t.Errorf("k is %q", v)
		}
	})
}
