package transport

import (
	"fmt"
	"testing"
	"time"
)

func onBothNetworks(t *testing.T, f func(t *testing.T, net *testNet)) {
	t.Run("memory", func(t *testing.T) { f(t, newTestNet(t, true)) })
	t.Run("tcp", func(t *testing.T) { f(t, newTestNet(t, false)) })
}

func TestRaftReplicates(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		members := newCluster(net, 3, nil)
		l := leader(t, members)
		before := time.Now()
		for i := range 200 {
			if err := l.raft.Apply(fmt.Appendf(nil, "command %d", i), 10*time.Second).Error(); err != nil {
				t.Fatal(err)
			}
		}
		for _, m := range members {
			eventually(t, m.node+" applies all", func() bool { return m.fsm.count() == 200 })
			if _, _, heartbeats := m.seen.counts(); heartbeats != 0 || !m.seen.handler {
				t.Errorf("%s: the heartbeat fast path ran %d times (handler offered: %v)", m.node, heartbeats, m.seen.handler)
			}
		}
		if _, pipelines, _ := l.seen.counts(); pipelines == 0 {
			t.Error("the leader never pipelined")
		}
		term := l.raft.CurrentTerm()
		for _, m := range others(members, l) {
			eventually(t, "progress of "+m.node, func() bool {
				return l.group.Acked(m.id, term).After(before) && l.group.MatchIndex(m.id, term) == l.raft.LastIndex()
			})
		}
	})
}
