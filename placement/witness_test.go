package placement

import (
	"fmt"
	"testing"
)

func TestShardsWithWitnessesAreRebuiltAndGoHome(t *testing.T) {
	for _, kind := range []struct{ nodes, replicas int }{{3, 2}, {4, 2}, {5, 2}, {5, 3}, {6, 3}} {
		t.Run(fmt.Sprintf("%d copies on %d nodes", kind.replicas, kind.nodes), func(t *testing.T) {
			rebuildAndGoHome(t, kind.nodes, kind.replicas, WitnessesAuto)
		})
	}
}
