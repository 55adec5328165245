package fsm

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// leaseStep is a LeaseCommand among messages.
type leaseStep struct {
	proto.Message
	LeaseCommand
}

func (s leaseStep) String() string { return fmt.Sprintf("%+v", s.LeaseCommand) }

// decidedIn is a message about leases with the grounds on which it was decided.
type decidedIn struct {
	proto.Message
	decision
}

// leaseCommand makes a command with leases: mostly one that makes sense at this point, so that leases live long
// enough to get keys. 7 and 8 are of this group, the others of others.
func (c *cluster) leaseCommand() proto.Message {
	id := 7 + c.Int64N(6)
	if c.oneIn(10) {
		id = c.leases[c.IntN(len(c.leases))]
	}
	guest := (id > 8) != c.oneIn(10)
	l := c.model.leases[id]
	var incarnation int64
	if l != nil {
		incarnation = l.Incarnation
	}
	if c.oneIn(4) {
		incarnation += c.Int64N(3) - 1
	}
	switch {
	case guest && (l == nil || c.oneIn(4)):
		if l == nil {
			incarnation = c.newest(id) + c.Int64N(4) - 1
		}
		return leaseStep{LeaseCommand: LeaseCommand{Kind: LeaseAttach, ID: id, Incarnation: incarnation, Revision: c.revision - c.Int64N(20)}}
	case guest:
		return leaseStep{LeaseCommand: LeaseCommand{Kind: LeaseDrop, ID: id, Incarnation: incarnation}}
	case l == nil || c.oneIn(6):
		return &pb.LeaseGrantRequest{ID: id, TTL: 1 + c.Int64N(100)}
	case l.Ending:
		return leaseStep{LeaseCommand: LeaseCommand{Kind: LeaseForget, ID: id, Incarnation: incarnation}}
	}
	switch c.IntN(6) {
	case 0:
		return leaseStep{LeaseCommand: LeaseCommand{Kind: LeaseRegister, ID: id, Group: c.Uint64N(6)}}
	case 1:
		return leaseStep{LeaseCommand: LeaseCommand{Kind: LeaseEnd, ID: id, Term: c.Uint64N(3), Incarnation: incarnation * c.Int64N(2)}}
	case 2:
		return decidedIn{&pb.LeaseRevokeRequest{ID: id}, decision{c.Uint64N(3), incarnation * c.Int64N(2)}}
	case 3:
		return &pb.LeaseRevokeRequest{ID: id}
	case 4:
		return leaseStep{LeaseCommand: LeaseCommand{Kind: LeaseForget, ID: id, Incarnation: incarnation}}
	default:
		m := &pb.LeaseCheckpointRequest{Checkpoints: []*pb.LeaseCheckpoint{{ID: id, Remaining_TTL: c.Int64N(3)}, {ID: 7, Remaining_TTL: c.Int64N(3)}}}
		if c.oneIn(2) {
			return m
		}
		return decidedIn{m, decision{c.Uint64N(3), incarnation * c.Int64N(2)}}
	}
}

// newest is the last incarnation of a lease that was dropped.
func (c *cluster) newest(id int64) int64 {
	newest := int64(1)
	for _, d := range c.model.drops {
		if d.id == id {
			newest = max(newest, d.incarnation)
		}
	}
	return newest
}

// remembered are the latest drops, and the newest revision of the others.
func (m *model) remembered() (latest []drop, forgotten int64) {
	n := max(0, len(m.drops)-m.maxDrops)
	for _, d := range m.drops[:n] {
		forgotten = max(forgotten, d.revision)
	}
	return m.drops[n:], forgotten
}

func (m *model) isDropped(id, incarnation int64) bool {
	latest, _ := m.remembered()
	return slices.ContainsFunc(latest, func(d drop) bool { return d.id == id && d.incarnation >= incarnation })
}

func (m *model) drop(id, incarnation int64) {
	if !m.isDropped(id, incarnation) {
		m.drops = append(m.drops, drop{id, incarnation, m.revision() + 1})
	}
}

// end deletes the keys of a lease, and the lease.
func (a *attempt) end(id int64) {
	for _, key := range a.keysOf(id) {
		a.deleteRange(&pb.DeleteRangeRequest{Key: []byte(key)})
	}
	delete(a.leases, id)
}

func (a *attempt) keysOf(id int64) (keys []string) {
	for _, key := range slices.Sorted(maps.Keys(a.state)) {
		if a.state[key].Lease == id {
			keys = append(keys, key)
		}
	}
	return keys
}

func (a *attempt) header() *pb.ResponseHeader { return &pb.ResponseHeader{Revision: a.now()} }

// lease is what the store should answer to a command with leases. Entries are of term 1, the group is 0.
func (a *attempt) lease(command proto.Message) Result {
	var decided decision
	if d, ok := command.(decidedIn); ok {
		command, decided = d.Message, d.decision
	}
	home := func(id int64) *LeaseInfo {
		if l := a.leases[id]; l != nil && l.Home {
			return l
		}
		return nil
	}
	switch c := command.(type) {
	case *pb.LeaseGrantRequest:
		if c.ID == 0 {
			return Result{Err: ErrLeaseNotFound}
		}
		if home(c.ID) != nil {
			return Result{Err: ErrLeaseExists}
		}
		l := &LeaseInfo{ID: c.ID, TTL: c.TTL, Home: true, Incarnation: a.revision() + int64(a.index)<<placeBits + int64(a.place)}
		if a.reserved {
			l.Incarnation = a.revision() + 1
		}
		a.leases[c.ID] = l
		return Result{Response: &pb.LeaseGrantResponse{Header: a.header(), ID: c.ID, TTL: c.TTL}}
	case *pb.LeaseCheckpointRequest:
		if decided.term > 1 {
			return Result{Err: ErrLeaseStale}
		}
		for _, p := range c.Checkpoints {
			if l := home(p.ID); l != nil && (decided.incarnation == 0 || l.Incarnation <= decided.incarnation) {
				l.Remaining = p.Remaining_TTL
			}
		}
		return Result{Response: &pb.LeaseCheckpointResponse{Header: a.header()}}
	case *pb.LeaseRevokeRequest:
		return a.revoke(home(c.ID), decided)
	case leaseStep:
		return a.step(home(c.ID), c.LeaseCommand)
	}
	panic(fmt.Sprintf("no model of %T", command))
}

func (a *attempt) revoke(l *LeaseInfo, decided decision) Result {
	switch {
	case l == nil || decided.incarnation != 0 && l.Incarnation != decided.incarnation:
		return Result{Err: ErrLeaseNotFound}
	case decided.term > 1, len(l.Groups) > 0:
		return Result{Err: ErrLeaseStale}
	}
	if a.reserved {
		a.drop(l.ID, l.Incarnation)
	}
	a.end(l.ID)
	return Result{Response: &pb.LeaseRevokeResponse{Header: a.header()}}
}

func (a *attempt) step(home *LeaseInfo, c LeaseCommand) Result {
	entry := a.leases[c.ID]
	switch c.Kind {
	case LeaseRegister:
		if home == nil || home.Ending {
			return Result{Err: ErrLeaseNotFound}
		}
		if c.Group != 0 && !slices.Contains(home.Groups, c.Group) {
			home.Groups = append(slices.Clone(home.Groups), c.Group)
			slices.SortFunc(home.Groups, cmp.Compare)
		}
	case LeaseEnd:
		switch {
		case home == nil || c.Incarnation != 0 && home.Incarnation != c.Incarnation:
			return Result{Err: ErrLeaseNotFound}
		case c.Term > 1:
			return Result{Err: ErrLeaseStale}
		}
		home.Ending = true
	case LeaseAttach:
		_, forgotten := a.remembered()
		switch {
		case c.ID == 0 || entry != nil && entry.Incarnation > c.Incarnation:
			return Result{Err: ErrLeaseNotFound}
		case home != nil && (home.Ending || home.Incarnation != c.Incarnation):
			return Result{Err: ErrLeaseNotFound}
		case entry != nil && entry.Incarnation == c.Incarnation:
		case a.isDropped(c.ID, c.Incarnation):
			return Result{Err: ErrLeaseNotFound}
		case c.Revision < forgotten:
			return Result{Err: ErrLeaseStale}
		default:
			a.leases[c.ID] = &LeaseInfo{ID: c.ID, Incarnation: c.Incarnation}
		}
	case LeaseDrop:
		if home == nil {
			a.drop(c.ID, c.Incarnation)
			if entry != nil && entry.Incarnation <= c.Incarnation {
				a.end(c.ID)
			}
		}
	case LeaseForget:
		switch {
		case home == nil || home.Incarnation != c.Incarnation:
			return Result{Err: ErrLeaseNotFound}
		case !home.Ending:
			return Result{Err: ErrLeaseStale}
		}
		a.drop(c.ID, c.Incarnation)
		a.end(c.ID)
	}
	if c.Kind == LeaseRegister || c.Kind == LeaseEnd {
		return Result{Response: &pb.LeaseTimeToLiveResponse{
			Header: &pb.ResponseHeader{Revision: a.revision() + 1}, ID: home.ID, GrantedTTL: home.TTL, TTL: home.Incarnation,
		}}
	}
	return Result{Response: &pb.LeaseRevokeResponse{Header: a.header()}}
}

// sameLeases compares all that a replica says about leases with the model.
func (c *cluster) sameLeases(t testing.TB, r *replica) {
	t.Helper()
	if err := c.compareLeases(r.Store); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) compareLeases(s *Store) error {
	a := c.model.begin()
	got := s.Leases()
	if len(got) != len(a.leases) {
		return fmt.Errorf("leases %+v, want %d", got, len(a.leases))
	}
	for i, id := range slices.Sorted(maps.Keys(a.leases)) {
		want, keys := *a.leases[id], a.keysOf(id)
		want.Keys = len(keys)
		if len(want.Groups) == 0 {
			want.Groups = got[i].Groups[:0:0]
		}
		if !reflect.DeepEqual(got[i], want) {
			return fmt.Errorf("lease %+v, want %+v", got[i], want)
		}
		if one, ok := s.Lease(id); !ok || !reflect.DeepEqual(one, want) {
			return fmt.Errorf("lease %d is %+v, %t", id, one, ok)
		}
		if err := sameKeys(s, id, keys); err != nil {
			return err
		}
	}
	return nil
}

func sameKeys(s *Store, id int64, want []string) error {
	for _, most := range []int{0, 1, len(want), len(want) + 1} {
		var got []string
		for _, key := range s.LeaseKeys(id, most) {
			got = append(got, string(key))
		}
		first := want
		if most > 0 {
			first = want[:min(most, len(want))]
		}
		if !slices.Equal(got, first) {
			return fmt.Errorf("the first %d keys of lease %d: %q, want %q", most, id, got, want)
		}
	}
	return nil
}
