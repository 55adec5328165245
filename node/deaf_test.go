package node

import (
	"fmt"
	"testing"
	"time"
)

// A leader that nobody reaches, but which reaches the others, keeps its
// followers. It must not go on leading, in any group.
func TestANodeThatNobodyReachesDoesNotGoOnLeading(t *testing.T) {
	for _, shards := range []int{0, 6} {
		t.Run(fmt.Sprint(shards, " shards"), func(t *testing.T) {
			inTown(t, 3, func(w *town) {
				w.shards = shards
				w.start("n1", "n2", "n3")
				w.awaitReady("n1", "n2", "n3")
				if r := w.nodes[w.nodes["n3"].Replica().Leader().Node].Replica(); r != w.nodes["n3"].Replica() {
					if err := r.TransferLeadership(w.t.Context(), "n3"); err != nil {
						w.t.Error(err)
					}
				}
				w.mu.Lock()
				w.deaf = map[string]bool{w.peers["n3"]: true}
				w.mu.Unlock()
				for _, name := range []string{"n1", "n2"} { // n3 always has a quorum
					w.stop(name)
					w.start(name)
					w.awaitFollower(name)
				}
				if w.nodes["n3"].leads() == 0 {
					w.t.Error("n3 leads nothing that it could give away")
				}
				for i := range 20 {
					key := fmt.Sprint("k", i)
					kvPut(w.t, w.nodes["n1"], key, "v")
					if v := kvGet(w.t, w.nodes["n2"], key); v != "v" {
						w.t.Errorf("%s is %q", key, v)
					}
				}
				time.Sleep(time.Minute)
				if leads := w.nodes["n3"].leads(); leads != 0 {
					w.t.Errorf("n3 leads %d groups", leads)
				}
			})
		})
	}
}
