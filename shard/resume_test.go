package shard

import (
	"fmt"
	"testing"
	"time"
)

// A follower that comes back gets entries as soon as it answers, however long it
// was away.
func TestAFollowerThatComesBackIsFedAtOnce(t *testing.T) {
	for _, away := range []time.Duration{5 * time.Second, 21 * time.Second, 47 * time.Second, 90 * time.Second} {
		t.Run(away.String(), func(t *testing.T) {
			bubble(t, 3, nil, func(c *cluster) {
				leader, r := c.leader()
				c.mustPut(r, "k", "before")
				name, _ := c.follower(leader)
				c.stop(name)
				for i := range int(away / time.Second) {
					c.mustPut(r, "k", fmt.Sprint(i))
					time.Sleep(time.Second)
				}
				index := r.Status().CommitIndex
				back := c.start(name, 1, nil)
				started := time.Now()
				for back.Status().AppliedIndex < index {
					if time.Since(started) > 2*time.Second {
						c.t.Fatalf("%s has applied %d of %d after %v", name, back.Status().AppliedIndex, index, time.Since(started))
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		})
	}
}
