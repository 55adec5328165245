package placement

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"kvd/shard"
)

func listening(term uint64) *observations {
	o := &observations{suspectAfter: 3 * time.Second, downAfter: 30 * time.Second}
	o.begin(term)
	return o
}

// listen looks every half second until d has passed, as the loop does.
func (o *observations) listenFor(d time.Duration, members ...Member) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		o.look(members, time.Now())
	}
	o.look(members, time.Now())
}

func TestSilenceIsCountedFromWhenTheLeaderListens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n1 := Member{Name: "n1", Incarnation: 1}
		time.Sleep(time.Hour)
		o := listening(5)
		o.listenFor(29*time.Second, n1)
		if v := o.node(n1, time.Now()); v != (NodeView{}) {
			t.Errorf("after 29 s without a word: %+v", v)
		}
		o.listenFor(time.Second, n1)
		if v := o.node(n1, time.Now()); v != (NodeView{Down: true}) {
			t.Errorf("after 30 s without a word: %+v", v)
		}
		o.accept(Report{Node: "n1", Incarnation: 1}, true, time.Now())
		if v := o.node(n1, time.Now()); v != (NodeView{Alive: true}) {
			t.Errorf("after a word: %+v", v)
		}
		o.listenFor(3*time.Second, n1)
		if v := o.node(n1, time.Now()); v != (NodeView{}) {
			t.Errorf("3 s later: %+v", v)
		}
		o.begin(5) // the same term
		o.listenFor(27*time.Second, n1)
		if v := o.node(n1, time.Now()); v != (NodeView{Down: true}) {
			t.Errorf("30 s later: %+v", v)
		}
		o.begin(7)
		o.look([]Member{n1}, time.Now())
		if v := o.node(n1, time.Now()); v != (NodeView{}) {
			t.Errorf("in another term: %+v", v)
		}
	})
}

// A member that has just joined, or come back without its data, has had no time
// to speak, however long this leader has been listening to others.
func TestAnotherIncarnationIsListenedToAfresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := listening(5)
		o.listenFor(time.Hour, Member{Name: "n1", Incarnation: 1})
		next := Member{Name: "n1", Incarnation: 2}
		o.look([]Member{next}, time.Now())
		if v := o.node(next, time.Now()); v != (NodeView{}) {
			t.Errorf("the new incarnation: %+v", v)
		}
		o.accept(Report{Node: "n1", Incarnation: 1}, true, time.Now()) // it does not know yet
		if v := o.node(next, time.Now()); v.Alive {
			t.Error("the former incarnation speaks for the new one")
		}
	})
}

// A process that stood still has heard nothing because it did not listen.
func TestAPauseOfTheLeaderIsNobodysSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n1 := Member{Name: "n1", Incarnation: 1}
		o := listening(5)
		o.accept(Report{Node: "n1", Incarnation: 1}, true, time.Now())
		o.listenFor(time.Second, n1)
		time.Sleep(time.Minute)
		o.look([]Member{n1}, time.Now())
		if v := o.node(n1, time.Now()); v != (NodeView{}) {
			t.Errorf("after a pause of a minute: %+v", v)
		}
		o.listenFor(30*time.Second, n1)
		if v := o.node(n1, time.Now()); v != (NodeView{Down: true}) {
			t.Errorf("30 s later: %+v", v)
		}
	})
}

func TestOfTwoThatLeadTheLaterTermCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		members := []Member{{Name: "n1", Incarnation: 1}, {Name: "n2", Incarnation: 1}, {Name: "n3", Incarnation: 1}}
		leads := func(id raft.ServerID, term uint64) GroupReport {
			return GroupReport{Group: 4, Replica: id, Term: term, Leading: &Leading{
				Members:   []shard.Member{{ID: id, Node: shard.NodeOf(id), Voter: true}},
				Followers: map[raft.ServerID]Following{"n3/9": {Match: 1, Acked: time.Second}, "n3/8": {Acked: -1}},
			}}
		}
		o := listening(5)
		o.accept(Report{Node: "n1", Incarnation: 1, Groups: []GroupReport{leads("n1/7", 3)}}, true, time.Now())
		o.accept(Report{Node: "n2", Incarnation: 1, Groups: []GroupReport{leads("n2/8", 2)}}, true, time.Now())
		o.accept(Report{Node: "n3", Incarnation: 1, Groups: []GroupReport{{Group: 4, Replica: "n3/9"}}}, true, time.Now())
		time.Sleep(time.Second)
		g := o.groups(members, time.Now())[4]
		if g.Leader == nil || g.Leader.Replica != "n1/7" || len(g.Reports) != 3 {
			t.Fatalf("%+v", g)
		}
		// What was so when it was reported is older now.
		if f := g.Leader.Leading.Followers; f["n3/9"].Acked != 2*time.Second || f["n3/8"].Acked != -1 {
			t.Errorf("followers %+v", f)
		}
		time.Sleep(2 * time.Second)
		o.accept(Report{Node: "n2", Incarnation: 1, Groups: []GroupReport{leads("n2/8", 4)}}, false, time.Now())
		g = o.groups(members, time.Now())[4]
		if g.Leader == nil || g.Leader.Replica != "n2/8" || len(g.Reports) != 1 {
			t.Errorf("what is 3 s old counts: %+v", g)
		}
		// A whole report that does not name a replica says that it is gone.
		o.accept(Report{Node: "n2", Incarnation: 1}, true, time.Now())
		if g = o.groups(members, time.Now())[4]; g.Leader != nil {
			t.Errorf("%+v", g)
		}
	})
}

func TestAWitnessKeepsWhatAnyDataReplicaMayNeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := Shard{Number: 3, Replicas: []Replica{{"n1/7", 1}, {"n2/8", 1}, {"n3/9w", 1}}}
		o := listening(5)
		durable := func(id raft.ServerID, index uint64) {
			o.accept(Report{Node: shard.NodeOf(id), Incarnation: 1, Groups: []GroupReport{{Group: 4, Replica: id, Durable: index}}}, true, time.Now())
		}
		durable("n1/7", 100)
		durable("n3/9w", 10)
		if f, ok := o.floor(s); ok {
			t.Errorf("%d though n2/8 has not spoken", f)
		}
		durable("n2/8", 40)
		if f, ok := o.floor(s); !ok || f != 40 {
			t.Errorf("%d, %v", f, ok)
		}
		durable("n1/7", 200)
		time.Sleep(time.Hour) // n2 is dead; what it had remains known
		if f, ok := o.floor(s); !ok || f != 40 {
			t.Errorf("%d, %v", f, ok)
		}
		s.Replicas = append(s.Replicas, Replica{"n4/10", 1})
		if f, ok := o.floor(s); ok {
			t.Errorf("%d though n4/10 is coming", f)
		}
		s.Replicas = []Replica{{"n1/7", 1}, {"n3/9w", 1}}
		if f, ok := o.floor(s); !ok || f != 200 {
			t.Errorf("%d, %v once n2/8 is gone", f, ok)
		}
		o.begin(7)
		if f, ok := o.floor(s); ok {
			t.Errorf("%d at a new leader", f)
		}
	})
}

func TestWhichVotersMustTakeEntriesBeforeAStep(t *testing.T) {
	voters := []shard.Member{{ID: "n1/1", Voter: true}, {ID: "n2/2", Voter: true}, {ID: "n3/3", Voter: true}, {ID: "n4/4"}}
	for _, c := range []struct {
		action Action
		id     raft.ServerID
		have   []raft.ServerID
		lack   int
	}{
		{Remove, "n3/3", []raft.ServerID{"n1/1", "n2/2"}, 0},
		{Remove, "n3/3", []raft.ServerID{"n1/1", "n3/3", "n4/4"}, 1}, // n2/2 would be needed
		{Remove, "n4/4", []raft.ServerID{"n1/1", "n3/3"}, 0},
		{Promote, "n4/4", []raft.ServerID{"n1/1", "n2/2"}, 2}, // two of four are no majority
		{Promote, "n4/4", []raft.ServerID{"n1/1", "n2/2", "n4/4"}, 0},
		{Transfer, "n2/2", []raft.ServerID{"n1/1", "n3/3"}, 1},
		{Transfer, "n2/2", []raft.ServerID{"n1/1", "n2/2"}, 0},
	} {
		has := make(map[raft.ServerID]bool)
		for _, id := range c.have {
			has[id] = true
		}
		if got := lacking(voters, has, c.action, c.id); len(got) != c.lack {
			t.Errorf("%s %s: %v", c.action, c.id, got)
		}
	}
}
