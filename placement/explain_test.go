package placement

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// state counts the shards in a state.
func state(o Overview, state string) int {
	count := 0
	for _, s := range o.Shards {
		if s.State == state {
			count++
		}
	}
	return count
}

func TestTheOverviewSaysWhatIsWrong(t *testing.T) {
	bubble(t, 5, consistent(10, 3, WitnessesNone), func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", home)
		c.await(10*time.Second, "rest", func(m *Map, o Overview) bool {
			leaders := 0
			for _, n := range o.Nodes {
				leaders += n.Leaders
				if n.State != nodeAlive || n.Shards == 0 || n.Weight != 1 || n.DiskFree == 0 || n.Waits != "" {
					return false
				}
			}
			for _, s := range o.Shards {
				if s.Tolerates != 1 || len(s.Why) == 0 || s.Leader == "" {
					return false
				}
			}
			return leaders == 10 && state(o, shardOK) == 10
		})
		registry := prometheus.NewRegistry()
		c.restart(func(cfg *Config) {
			cfg.Registerer = prometheus.WrapRegistererWith(prometheus.Labels{"node": cfg.Node}, registry)
		})
		c.await(30*time.Second, "rest", home)
		dead := []string{"n4", "n5"}
		if slices.Contains(dead, c.leader().name) {
			dead = []string{"n1", "n2"}
		}
		for _, name := range dead {
			c.stop(name)
		}
		c.await(20*time.Second, "suspicion", func(m *Map, o Overview) bool {
			suspects := 0
			for _, n := range o.Nodes {
				if n.State == nodeSuspect && slices.Contains(dead, n.Name) {
					suspects++
				}
			}
			return suspects == 2 && state(o, shardNoQuorum) > 0 && state(o, shardDegraded) > 0
		})
		time.Sleep(time.Second)
		counted := make(map[string]float64)
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "kvd_placement_nodes" {
					counted[m.GetLabel()[1].GetValue()] += m.GetGauge().GetValue()
				}
			}
		}
		if want := map[string]float64{nodeAlive: 3, nodeSuspect: 2, nodeDown: 0, nodeLeaving: 0}; !maps.Equal(counted, want) {
			t.Errorf("the leader counts %v, and nobody else does", counted)
		}
		// Where a majority died nothing can be done; the rest is rebuilt.
		c.await(60*time.Second, "rebuilding", func(m *Map, o Overview) bool {
			for _, s := range o.Shards {
				if s.State == shardOK {
					continue
				}
				if s.State != shardNoQuorum || s.Tolerates != 0 || s.Leader != "" || !strings.Contains(strings.Join(s.Why, "\n"), "1 of 3 replicas answer") {
					return false
				}
			}
			return state(o, shardNoQuorum) > 0 && o.Nodes[slices.IndexFunc(o.Nodes, func(n NodeOverview) bool { return n.Name == dead[0] })].State == nodeDown
		})
	})
}

func TestTheOverviewOfAClusterWithoutShards(t *testing.T) {
	bubble(t, 3, nil, func(t *testing.T, c *testCluster) {
		c.await(30*time.Second, "founding", func(m *Map, o Overview) bool {
			return o.Config == nil && len(o.Shards) == 0 && len(o.Nodes) == 3 && o.Nodes[0].State == nodeAlive
		})
		n4 := c.join("n4", 1, 0)
		c.await(10*time.Second, "joining", func(m *Map, o Overview) bool {
			for _, g := range c.leader().group0.Status().Members {
				if g.ID == n4.replica && g.Voter {
					return true
				}
			}
			return false
		})
	})
}
