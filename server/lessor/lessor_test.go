package lessor

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

const (
	grace    = 200 * time.Millisecond
	interval = 5 * time.Minute
	retry    = time.Second
)

// clock is a time that tests move.
type clock struct{ now time.Duration }

func (c *clock) lessor() *Lessor {
	return New(Config{Now: func() time.Duration { return c.now }, Grace: grace, CheckpointInterval: interval, RetryInterval: retry})
}

func ids(leases []Lease) []int64 {
	var out []int64
	for _, l := range leases {
		out = append(out, l.ID)
	}
	slices.Sort(out)
	return out
}

func wantDue(t *testing.T, l *Lessor, want ...int64) {
	t.Helper()
	if got := ids(l.Due(math.MaxInt)); !slices.Equal(got, want) {
		t.Fatalf("given out: %d instead of %d", got, want)
	}
}

func wantState(t *testing.T, l *Lessor, id int64, want State) uint64 {
	t.Helper()
	got, mark := l.Renew(id)
	if got != want {
		t.Fatalf("lease %d: state %d instead of %d", id, got, want)
	}
	return mark
}

func TestALeaseEndsWhenItsTimeIsOverAndOnce(t *testing.T) {
	c := &clock{now: time.Hour}
	l := c.lessor()
	l.Set(Lease{ID: 1, TTL: 10})
	l.Set(Lease{ID: 2, TTL: 20})
	c.now += 10*time.Second + grace - 1
	wantDue(t, l)
	if left, ok := l.Left(1); !ok || left != 0 {
		t.Fatal(left, ok)
	}
	c.now++
	wantDue(t, l, 1)
	wantDue(t, l)
	wantState(t, l, 1, Dying)
	wantState(t, l, 2, Alive)
	l.Failed(1, 0)
	c.now += retry - 1
	wantDue(t, l)
	c.now++
	wantDue(t, l, 1)
	l.Remove(1)
	wantState(t, l, 1, Unknown)
	l.Failed(1, 0)
	if _, ok := l.Left(1); ok || l.Len() != 1 {
		t.Fatal("a lease that was removed is there")
	}
	c.now += 19 * time.Second // since the renewal some 20
	wantDue(t, l)
	c.now += time.Second
	wantDue(t, l, 2)
}

func TestAnotherIncarnationIsAnotherLease(t *testing.T) {
	c := &clock{}
	l := c.lessor()
	l.Set(Lease{ID: 1, Incarnation: 5, TTL: 10})
	c.now += 9 * time.Second
	l.Set(Lease{ID: 1, Incarnation: 5, TTL: 10}) // the same: its time runs on
	if left, _ := l.Left(1); left != time.Second {
		t.Fatal(left)
	}
	l.Set(Lease{ID: 1, Incarnation: 6, TTL: 10})
	if left, _ := l.Left(1); left != 10*time.Second {
		t.Fatal(left)
	}
	c.now += 20 * time.Second
	wantDue(t, l, 1)
	l.Failed(1, 5) // of the one before
	c.now += retry
	wantDue(t, l)
}

func TestAnEndingLeaseIsGivenOutAtOnce(t *testing.T) {
	c := &clock{}
	l := c.lessor()
	l.Set(Lease{ID: 1, TTL: 1000})
	l.Set(Lease{ID: 2, TTL: 1000, Ending: true})
	wantState(t, l, 2, Unknown)
	if _, ok := l.Left(2); ok {
		t.Fatal("an ending lease has time")
	}
	if at, ok := l.Next(); !ok || at > c.now {
		t.Fatal(at, ok)
	}
	wantDue(t, l, 2)
	l.Set(Lease{ID: 1, TTL: 1000, Ending: true})
	wantDue(t, l, 1)
	l.Set(Lease{ID: 1, TTL: 1000, Ending: true})
	wantDue(t, l)
}

// A checkpoint from before a renewal must be gone from the table before the renewal counts.
func TestRenewalsClearCheckpoints(t *testing.T) {
	c := &clock{}
	l := c.lessor()
	l.Set(Lease{ID: 1, Incarnation: 3, TTL: 3600})
	c.now += interval
	wantDue(t, l)
	points := l.Checkpoints(10)
	if len(points) != 1 || points[0].Remaining != 3600-300 || points[0].Lease.Incarnation != 3 {
		t.Fatal(points)
	}
	old := wantState(t, l, 1, Noted)
	c.now += interval
	wantDue(t, l)
	if points := l.Checkpoints(10); len(points) != 1 {
		t.Fatal(points)
	}
	l.Cleared(1, 3, old)
	mark := wantState(t, l, 1, Noted) // of the second
	l.Cleared(1, 2, mark)
	wantState(t, l, 1, Noted) // that was another incarnation
	l.Cleared(1, 3, mark)
	wantState(t, l, 1, Alive)
	l.Set(Lease{ID: 1, Incarnation: 3, TTL: 3600, Remaining: 7}) // the table still has one
	wantState(t, l, 1, Noted)
}

func TestARenewedLeaseNeedsNoCheckpoint(t *testing.T) {
	c := &clock{}
	l := c.lessor()
	l.Set(Lease{ID: 1, TTL: 3600})
	l.Set(Lease{ID: 2, TTL: 300}) // too short for one
	for range 10 {
		c.now += interval - time.Second
		wantState(t, l, 1, Alive)
		wantState(t, l, 2, Alive)
		wantDue(t, l)
		if points := l.Checkpoints(10); len(points) != 0 {
			t.Fatal(points)
		}
	}
}

// A leader that begins goes on where the checkpoint was made, and others have what they had.
func TestANewLeaderGoesOnFromTheCheckpoint(t *testing.T) {
	c := &clock{now: time.Hour}
	l := c.lessor()
	l.Set(Lease{ID: 1, TTL: 3600, Remaining: 10})
	l.Set(Lease{ID: 2, TTL: 5, Remaining: 10})
	l.Set(Lease{ID: 3, TTL: 3600})
	c.now += 5*time.Second + grace
	wantDue(t, l, 2)
	c.now += 5 * time.Second
	wantDue(t, l, 1)
	if left, _ := l.Left(3); left != 3590*time.Second-grace {
		t.Fatal(left)
	}
}

func TestTimesAreBounded(t *testing.T) {
	c := &clock{now: math.MaxInt64 / 2}
	l := c.lessor()
	l.Set(Lease{ID: 1, TTL: math.MaxInt64})
	l.Set(Lease{ID: 2, TTL: -5})
	l.Set(Lease{ID: 3, TTL: 9_000_000_000})
	c.now += time.Second - 1
	wantDue(t, l)
	c.now += time.Second
	wantDue(t, l, 2)
	if at, ok := l.Next(); !ok || at < c.now {
		t.Fatal(at, ok)
	}
}

// model is what a Lessor should know, looked up the slow way.
type model struct {
	lease    Lease
	deadline time.Duration
	given    bool
	retryAt  time.Duration // of one that was given out and has failed; 0 = out
	dirty    bool
}

// Random steps: nothing ends early, and whatever is over is given out when it is asked for.
func TestAgainstAModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	g := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		runModel(t, g)
	}
}

func runModel(t *testing.T, g *rand.Rand) {
	c := &clock{}
	l := c.lessor()
	known := make(map[int64]*model)
	incarnation := int64(0)
	for range 300 {
		id := 1 + g.Int64N(8)
		m := known[id]
		switch g.IntN(9) {
		case 0:
			incarnation++
			lease := Lease{ID: id, Incarnation: incarnation, TTL: 1 + g.Int64N(1000)}
			if g.IntN(4) == 0 {
				lease.Remaining = 1 + g.Int64N(lease.TTL)
			}
			lease.Ending = g.IntN(10) == 0
			l.Set(lease)
			ttl := lease.TTL
			if lease.Remaining > 0 {
				ttl = lease.Remaining
			}
			known[id] = &model{lease: lease, deadline: c.now + time.Duration(ttl)*time.Second, dirty: lease.Remaining > 0}
		case 1:
			l.Remove(id)
			delete(known, id)
		case 2:
			if m != nil {
				m.lease.Ending = true
				l.Set(m.lease)
			}
		case 3:
			state, mark := l.Renew(id)
			switch {
			case m == nil || m.lease.Ending:
				wantOf(t, state, Unknown)
			case m.given:
				wantOf(t, state, Dying)
			case m.dirty:
				wantOf(t, state, Noted)
				m.deadline = c.now + time.Duration(m.lease.TTL)*time.Second
				if g.IntN(2) == 0 {
					l.Cleared(id, m.lease.Incarnation, mark)
					m.lease.Remaining, m.dirty = 0, false
					l.Set(m.lease)
				}
			default:
				wantOf(t, state, Alive)
				m.deadline = c.now + time.Duration(m.lease.TTL)*time.Second
			}
		case 4:
			if m != nil && m.given {
				l.Failed(id, m.lease.Incarnation)
				m.retryAt = c.now + retry
			}
		case 5:
			for _, p := range l.Checkpoints(g.IntN(5)) {
				m := known[p.Lease.ID]
				if want := int64((m.deadline - c.now + time.Second - 1) / time.Second); m.given || p.Remaining != want || want <= 0 {
					t.Fatalf("checkpoint of %d s where %v are left", p.Remaining, m.deadline-c.now)
				}
				m.dirty = true
			}
		case 6:
			if at, ok := l.Next(); ok && at > c.now && at < c.now+time.Hour {
				c.now = at
			}
		default:
			c.now += time.Duration(g.Int64N(int64(100 * time.Second)))
		}
		give(t, c, l, known, g.IntN(3))
	}
}

func wantOf(t *testing.T, got, want State) {
	t.Helper()
	if got != want {
		t.Fatalf("state %d instead of %d", got, want)
	}
}

// give takes up to most leases that are due, and fails if one should not be or if one is missing.
func give(t *testing.T, c *clock, l *Lessor, known map[int64]*model, most int) {
	t.Helper()
	over := func(m *model) bool {
		if m.given {
			return m.retryAt > 0 && m.retryAt <= c.now
		}
		return m.lease.Ending || m.deadline+grace <= c.now
	}
	n := 0
	for _, m := range known {
		if over(m) {
			n++
		}
	}
	due := l.Due(most)
	for _, lease := range due {
		m := known[lease.ID]
		if m == nil || m.lease.Incarnation != lease.Incarnation || !over(m) {
			t.Fatalf("lease %d was given out at %v: %+v", lease.ID, c.now, m)
		}
		m.given, m.retryAt = true, 0
	}
	if len(due) != min(n, most) {
		t.Fatalf("%d leases are over, and %d of at most %d were given out", n, len(due), most)
	}
	if at, ok := l.Next(); n > len(due) && (!ok || at > c.now) {
		t.Fatalf("leases are over and the next look is at %v (%t)", at, ok)
	}
}

func BenchmarkRenew(b *testing.B) {
	c := &clock{}
	l := c.lessor()
	const leases = 100_000
	for id := range int64(leases) {
		l.Set(Lease{ID: id, TTL: 10})
	}
	b.ReportAllocs()
	i := int64(0)
	for b.Loop() {
		c.now += time.Microsecond
		l.Renew(i % leases)
		l.Due(1)
		i++
	}
}

func BenchmarkMassExpiry(b *testing.B) {
	const leases = 100_000
	b.ReportAllocs()
	for b.Loop() {
		c := &clock{}
		l := c.lessor()
		for id := range int64(leases) {
			l.Set(Lease{ID: id, TTL: 10})
		}
		c.now += time.Minute
		for {
			due := l.Due(64)
			if len(due) == 0 {
				break
			}
			for _, lease := range due {
				l.Remove(lease.ID)
			}
		}
	}
}
