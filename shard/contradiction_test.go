package shard

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A replica whose committed entries the others have lost, here with a disk that
// goes back in time, must not go on beside them with another state (I4).
func TestAReplicaHaltsWhenTheOthersLostWhatItApplied(t *testing.T) {
	bubble(t, 3, nil, func(c *cluster) {
		_, leader := c.leader()
		c.mustPut(leader, "k", "old")
		time.Sleep(time.Second)
		c.stop("n3")
		c.stop("n2")
		file, log := filepath.Join(c.dir, "n2", "1", StateFile), c.logs["n2/1"]
		copied, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		end, _ := log.LastIndex()

		c.start("n2", 1, nil)
		_, leader = c.leader()
		c.mustPut(leader, "k", "acknowledged")
		if got := c.get(c.replicas["n1"], "k", leader.Status().CommitIndex); got != "acknowledged" {
			t.Fatalf("k = %q", got)
		}
		c.stop("n1")
		c.stop("n2")
		last, _ := log.LastIndex()
		if err := log.InmemStore.DeleteRange(end+1, last); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, copied, 0o600); err != nil {
			t.Fatal(err)
		}

		c.start("n2", 1, nil)
		c.start("n3", 1, nil)
		_, leader = c.leader()
		c.mustPut(leader, "k", "instead")
		c.start("n1", 1, nil)
		time.Sleep(10 * time.Second)
		if fatal := c.fatal.Swap(nil); fatal == nil || !errors.Is(*fatal, ErrContradicted) {
			t.Errorf("n1 goes on and has %q: %v", c.get(c.replicas["n1"], "k", 0), fatal)
		}
		if kept, _ := c.logs["n1/1"].LastIndex(); kept < last {
			t.Errorf("n1 threw away what it had to %d: its log ends at %d", last, kept)
		}
	})
}
