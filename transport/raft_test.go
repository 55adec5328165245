package transport

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

func onBothNetworks(t *testing.T, f func(t *testing.T, net *testNet)) {
	t.Run("memory", func(t *testing.T) { f(t, newTestNet(t, true)) })
	t.Run("tcp", func(t *testing.T) { f(t, newTestNet(t, false)) })
}

func TestRaftReplicates(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		members := newCalmCluster(net, 3)
		l := leader(t, members)
		before := time.Now()
		for i := range 200 {
			if err := l.raft.Apply(fmt.Appendf(nil, "command %d", i), 10*time.Second).Error(); err != nil {
				t.Fatal(err)
			}
		}
		for _, m := range members {
			eventually(t, m.node+" applies all", func() bool { return len(m.fsm.commands()) == 200 })
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

func TestRaftTransfersLeadership(t *testing.T) {
	onBothNetworks(t, func(t *testing.T, net *testNet) {
		members := newCalmCluster(net, 3)
		l := leader(t, members)
		to := others(members, l)[0]
		if err := l.raft.LeadershipTransferToServer(to.id, raft.ServerAddress(to.id)).Error(); err != nil {
			t.Fatal(err)
		}
		eventually(t, to.node+" leads", func() bool { return leader(t, members) == to })
	})
}

// TestPreVoteHappens: a node that was cut off asks before it stands, and so does not raise the term.
func TestPreVoteHappens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		members := newCluster(net, 3, nil)
		l := leader(t, members)
		term := l.raft.CurrentTerm()
		away := others(members, l)[0]
		before, _, _ := away.seen.counts()
		net.memory.Isolate(away.node)
		time.Sleep(time.Minute)
		after, _, _ := away.seen.counts()
		if after-before < 10 {
			t.Errorf("%d pre-votes asked for in a minute alone", after-before)
		}
		net.memory.Rejoin(away.node)
		time.Sleep(time.Minute)
		if got := l.raft.CurrentTerm(); got != term || l.raft.State() != raft.Leader {
			t.Errorf("the return of %s moved the term from %d to %d", away.node, term, got)
		}
		// A real election works by pre-votes that are granted.
		net.memory.Isolate(l.node)
		time.Sleep(time.Minute)
		rest := others(members, l)
		if next := leader(t, rest); next.raft.CurrentTerm() <= term {
			t.Errorf("term %d after an election, %d before", next.raft.CurrentTerm(), term)
		}
	})
}

// TestRaftSurvivesPartitionedLeader: the majority goes on, the old leader comes back with the others' log.
func TestRaftSurvivesPartitionedLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		members := newCluster(net, 3, nil)
		old := leader(t, members)
		if err := old.raft.Apply([]byte("before"), time.Second).Error(); err != nil {
			t.Fatal(err)
		}
		for _, m := range others(members, old) { // it can hear, but not be heard
			net.memory.Partition(old.node, m.node)
		}
		next := leader(t, others(members, old))
		if err := next.raft.Apply([]byte("after"), time.Second).Error(); err != nil {
			t.Fatal(err)
		}
		if got := old.group.Acked(next.id, next.raft.CurrentTerm()); !got.IsZero() {
			t.Errorf("the old leader was acknowledged in the new term")
		}
		net.memory.HealAll()
		for _, m := range members {
			eventually(t, m.node+" has both", func() bool { return len(m.fsm.commands()) == 2 })
		}
	})
}

// TestRaftPipelineRecovers: a follower refuses one pipelined AppendEntries. Replication to it must go on,
// although heartbeats never stopped (hashicorp/raft#612).
func TestRaftPipelineRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		members := newCluster(net, 3, nil)
		l := leader(t, members)
		apply := func(from, to int) {
			var wg sync.WaitGroup
			for i := range to - from {
				wg.Go(func() {
					if err := l.raft.Apply(fmt.Appendf(nil, "%d", from+i), time.Minute).Error(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
		apply(0, 10)
		time.Sleep(time.Second)
		for _, m := range others(members, l) {
			m.seen.refuseNext(5)
		}
		apply(10, 100)
		for _, m := range members {
			eventually(t, m.node+" applies all", func() bool { return len(m.fsm.commands()) == 100 })
		}
		if _, pipelines, _ := l.seen.counts(); pipelines < 3 {
			t.Errorf("%d pipelines: none broke", pipelines)
		}
	})
}

// TestRaftShortensAppends: a follower far behind catches up although a message holds few entries.
func TestRaftShortensAppends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newTestNet(t, true)
		members := newCluster(net, 3, func(c *Config) { c.MaxMessageBytes, c.MaxAppendBytes = 1<<20, 10<<10 })
		l := leader(t, members)
		away := others(members, l)[0]
		net.memory.Isolate(away.node)
		for range 50 {
			if err := l.raft.Apply(make([]byte, 4<<10), time.Second).Error(); err != nil {
				t.Fatal(err)
			}
		}
		net.memory.Rejoin(away.node)
		eventually(t, away.node+" catches up", func() bool { return len(away.fsm.commands()) == 50 })
	})
}

// TestRaftUnderFaults runs three nodes for some virtual minutes over links that break, stall and lag, and
// checks that no acknowledged command is lost, none is applied twice, and all apply the same.
func TestRaftUnderFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := seeded(t)
		net := newTestNet(t, true)
		members := newCluster(net, 3, nil)
		start := time.Now()
		var mu sync.Mutex
		acked := map[string]bool{}
		stop := make(chan struct{})
		var clients sync.WaitGroup
		for _, m := range members {
			clients.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					case <-time.After(20 * time.Millisecond):
					}
					command := fmt.Sprintf("%s-%d", m.node, i)
					if m.raft.Apply([]byte(command), time.Second).Error() == nil {
						mu.Lock()
						acked[command] = true
						mu.Unlock()
					}
				}
			})
		}
		terms := map[uint64]bool{}
		for time.Since(start) < 5*time.Minute {
			a, b := members[r.IntN(3)].node, members[r.IntN(3)].node
			switch r.IntN(6) {
			case 0:
				net.memory.Isolate(a)
			case 1:
				net.memory.Partition(a, b)
			case 2:
				net.memory.DropAll(a)
			case 3:
				net.memory.Delay(a, b, time.Duration(r.IntN(300))*time.Millisecond)
			default:
				net.memory.HealAll()
			}
			time.Sleep(time.Duration(r.IntN(4000)) * time.Millisecond)
			for _, m := range members {
				terms[m.raft.CurrentTerm()] = true
			}
		}
		net.memory.HealAll()
		leader(t, members)
		close(stop)
		clients.Wait()
		last := leader(t, members)
		if err := last.raft.Barrier(time.Minute).Error(); err != nil {
			t.Fatal(err)
		}
		want := last.fsm.commands()
		for _, m := range members {
			eventually(t, m.node+" applies what the leader has", func() bool { return slices.Equal(m.fsm.commands(), want) })
		}
		applied := map[string]int{}
		for _, c := range want {
			applied[c]++
		}
		for c := range acked {
			if applied[c] != 1 {
				t.Errorf("acknowledged command %s was applied %d times", c, applied[c])
			}
		}
		t.Logf("%d acknowledged, %d applied, %d terms in %v", len(acked), len(want), len(terms), time.Since(start))
		if len(acked) < 1000 || len(terms) < 4 {
			t.Errorf("too little happened: %d acknowledged, %d terms", len(acked), len(terms))
		}
	})
}
