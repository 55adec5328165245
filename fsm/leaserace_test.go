package fsm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// races are groups with one counter of revisions, clients that put keys with leases in any of them, and whoever ends
// the leases. What they propose is applied in the order of a group's log, but as much later than in other groups as
// chance has it; and between any two steps of theirs, anything may happen.
type races struct {
	*rand.Rand
	groups []*racingGroup // the home of a lease is that of its id
	next   int64          // revision
	actors []func() bool  // take one step; false when done
	grants int
}

type racingGroup struct {
	store *Store
	queue []proposed // have revisions, and are not applied
}

type proposed struct {
	floor  int64
	m      proto.Message
	answer *Result
}

const racingGroups, racingLeases = 3, 2

func newRaces(t testing.TB, seed uint64, change func(*Config)) *races {
	x := &races{Rand: rand.New(rand.NewPCG(seed, 9)), next: 1}
	for i := range racingGroups {
		config := testConfig(tempPath(t))
		config.Group, config.maxDrops = uint64(i+1), 1
		change(&config)
		x.groups = append(x.groups, &racingGroup{store: open(t, config)})
	}
	return x
}

func (x *races) home(id int64) int { return int(id) % racingGroups }

// propose puts a command into a group's log.
func (x *races) propose(group int, m proto.Message) *Result {
	x.next++
	p := proposed{x.next, m, &Result{}}
	x.groups[group].queue = append(x.groups[group].queue, p)
	return p.answer
}

func (r *Result) isThere() bool { return r.Response != nil || r.Err != nil }

func (g *racingGroup) applyOne(t testing.TB) {
	p := g.queue[0]
	g.queue = g.queue[1:]
	*p.answer = applyAt(t, g.store, p.floor, p.m)[0]
}

// putter puts a key, as a node does: it makes the lease known to the group if it is not.
func (x *races) putter(id int64, group int) func() bool {
	key := fmt.Sprint("k", x.IntN(3))
	put := func() *Result { return x.propose(group, leased(key, id)) }
	register := func() *Result {
		return x.propose(x.home(id), step(LeaseCommand{Kind: LeaseRegister, ID: id, Group: uint64(group + 1)}))
	}
	waiting, registered := put(), false
	return func() bool {
		if !waiting.isThere() {
			return true
		}
		switch response := waiting.Response.(type) {
		case *pb.LeaseTimeToLiveResponse:
			waiting = x.propose(group, step(LeaseCommand{Kind: LeaseAttach, ID: id, Incarnation: response.TTL, Revision: response.Header.Revision}))
			return true
		case *pb.LeaseRevokeResponse: // attached
			waiting = put()
			return true
		}
		if errors.Is(waiting.Err, ErrLeaseNotFound) && !registered || errors.Is(waiting.Err, ErrLeaseStale) {
			waiting, registered = register(), true
			return true
		}
		return false
	}
}

// ender ends a lease. Several may do it at once.
func (x *races) ender(id int64) func() bool {
	home := x.groups[x.home(id)].store
	waiting := []*Result{x.propose(x.home(id), step(LeaseCommand{Kind: LeaseEnd, ID: id}))}
	var incarnation int64
	return func() bool {
		for _, r := range waiting {
			switch {
			case !r.isThere():
				return true
			case r.Err != nil: // somebody else has done it
				return false
			}
		}
		if response, ok := waiting[0].Response.(*pb.LeaseTimeToLiveResponse); ok {
			incarnation = response.TTL
			info, ok := home.Lease(id)
			if !ok || info.Incarnation != incarnation {
				return false
			}
			waiting = nil
			for _, g := range info.Groups {
				waiting = append(waiting, x.propose(int(g-1), step(LeaseCommand{Kind: LeaseDrop, ID: id, Incarnation: incarnation})))
			}
			if len(waiting) > 0 {
				return true
			}
		} else if incarnation == 0 {
			return false
		}
		waiting = []*Result{x.propose(x.home(id), step(LeaseCommand{Kind: LeaseForget, ID: id, Incarnation: incarnation}))}
		incarnation = 0
		return true
	}
}

func (x *races) granter(id int64) func() bool {
	waiting := x.propose(x.home(id), grant(id, 9))
	return func() bool {
		if waiting.Err == nil && waiting.isThere() {
			x.grants++
		}
		return !waiting.isThere()
	}
}

// run lets everybody act, and returns what is wrong in between or in the end.
func (x *races) run(t testing.TB, steps int) error {
	for n := 0; n < steps || len(x.actors) > 0; n++ {
		if g := x.groups[x.IntN(racingGroups)]; len(g.queue) > 0 && x.IntN(3) > 0 {
			g.applyOne(t)
			if err := x.check(); err != nil {
				return err
			}
		}
		id := 1 + x.Int64N(racingLeases)
		switch k := x.IntN(30); {
		case n >= steps:
		case k < 3:
			x.actors = append(x.actors, x.granter(id))
		case k < 6:
			x.actors = append(x.actors, x.ender(id))
		case k < 12:
			x.actors = append(x.actors, x.putter(id, x.IntN(racingGroups)))
		}
		if len(x.actors) > 0 {
			if i := x.IntN(len(x.actors)); !x.actors[i]() {
				x.actors = slices.Delete(x.actors, i, i+1)
			}
		}
	}
	return nil
}

// check finds keys that nobody will delete: whose lease is not known to its home in the incarnation of the key's
// group, or with that group.
func (x *races) check() error {
	for i, g := range x.groups {
		for _, l := range g.store.Leases() {
			at, ok := x.groups[x.home(l.ID)].store.Lease(l.ID)
			switch {
			case l.Home:
			case !ok || at.Incarnation != l.Incarnation || !slices.Contains(at.Groups, uint64(i+1)):
				return fmt.Errorf("group %d has %+v; its home knows %+v", i+1, l, at)
			}
		}
	}
	return nil
}

// No key outlives its lease, whatever puts race with its end, and however much a group remembers of other ends.
func TestNoKeyOutlivesItsLease(t *testing.T) {
	grants := 0
	seeds(t, 15, func(t *testing.T, seed uint64) {
		x := newRaces(t, seed, func(*Config) {})
		if err := x.run(t, 2000); err != nil {
			t.Fatal(err)
		}
		grants += x.grants
		for id := range int64(racingLeases) {
			x.actors = append(x.actors, x.ender(id+1))
		}
		if err := x.run(t, 0); err != nil {
			t.Fatal(err)
		}
		for len(x.groups[0].queue)+len(x.groups[1].queue)+len(x.groups[2].queue) > 0 {
			if err := x.run(t, 10); err != nil {
				t.Fatal(err)
			}
		}
	})
	if grants == 0 {
		t.Error("no lease was granted")
	}
}

func TestRacesCatchKeysThatOutliveTheirLeases(t *testing.T) {
	caught := false
	seeds(t, 10, func(t *testing.T, seed uint64) {
		x := newRaces(t, seed, func(c *Config) { c.faults.lateAttachments = true })
		caught = x.run(t, 2000) != nil || caught
	})
	if !caught {
		t.Error("nothing was noticed")
	}
}
