package fsm

import (
	"fmt"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// decision is on what grounds a lease is to end or to be shortened; 0 stands for any.
type decision struct {
	term        uint64 // in which whoever decided it led
	incarnation int64  // of the lease it was about, or up to which it was about leases
}

// lease returns the lease that a put may name, or nil.
func (w *writer) lease(id int64) *lease {
	if w.space.id != User {
		return nil
	}
	if l := w.store.leases.get(id); l != nil && !l.ending {
		return l
	}
	return nil
}

// header is that of an answer to a command with leases.
func (w *writer) header() *pb.ResponseHeader { return &pb.ResponseHeader{Revision: w.newest} }

// applyGrant makes a lease. It uses no revision, but the one reserved for it, if there is one, is its incarnation. A
// guest entry of another group's lease with the same id, which there never should be, becomes the lease.
func (w *writer) applyGrant(r *pb.LeaseGrantRequest) Result {
	s := w.store
	l := s.leases.get(r.GetID())
	switch {
	case r.GetID() == 0:
		return Result{Err: ErrLeaseNotFound}
	case l != nil && l.home:
		return Result{Err: ErrLeaseExists}
	case l == nil:
		l = &lease{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l.leaseRecord = leaseRecord{id: r.GetID(), ttl: r.GetTTL(), incarnation: w.incarnation(), home: true}
	s.leases.table.Set(l.id, l)
	s.recordLease(l)
	return Result{Response: &pb.LeaseGrantResponse{Header: w.header(), ID: l.id, TTL: l.ttl}}
}

// incarnation grows from grant to grant. Without a reserved revision it is made of the newest one, which a restore
// carries over, the index of the entry, and the place in it.
func (w *writer) incarnation() int64 {
	if w.reserved {
		return w.next
	}
	return w.newest + int64(w.index)<<placeBits + int64(w.place)
}

// placeBits are enough for the requests of an entry.
const placeBits = 20

// applyCheckpoint notes remaining times. Leases that are not known are passed over, as etcd does.
func (w *writer) applyCheckpoint(r *pb.LeaseCheckpointRequest, decided decision) Result {
	if w.isLate(decided.term) {
		return Result{Err: ErrLeaseStale}
	}
	s := w.store
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range r.GetCheckpoints() {
		l := s.leases.home(c.GetID())
		if l == nil || decided.incarnation != 0 && decided.incarnation < l.incarnation {
			continue
		}
		if l.remaining != c.GetRemaining_TTL() {
			l.remaining = c.GetRemaining_TTL()
			s.recordLease(l)
		}
	}
	return Result{Response: &pb.LeaseCheckpointResponse{Header: w.header()}}
}

// applyRevoke ends a lease whose keys are all in this group: they are deleted in one revision, in ascending order,
// and none is used if there are no keys.
func (w *writer) applyRevoke(r *pb.LeaseRevokeRequest, decided decision) Result {
	l := w.store.leases.home(r.GetID())
	switch {
	case l == nil || decided.incarnation != 0 && decided.incarnation != l.incarnation:
		return Result{Err: ErrLeaseNotFound}
	case w.isLate(decided.term), len(l.groups) > 0:
		return Result{Err: ErrLeaseStale}
	}
	if w.reserved {
		w.remember(l.id, l.incarnation)
	}
	return w.drop(l)
}

// isLate says whether a decision that was made in a term came into the log in another one.
func (w *writer) isLate(term uint64) bool {
	return term != 0 && term != w.term && !w.store.config.faults.anyTerm
}

// applyLease applies one of kvd's own steps.
func (w *writer) applyLease(c LeaseCommand) (Result, error) {
	switch c.Kind {
	case LeaseRegister:
		return w.registerLease(c), nil
	case LeaseAttach:
		return w.attachLease(c), nil
	case LeaseEnd:
		return w.endLease(c), nil
	case LeaseDrop:
		return w.dropLease(c), nil
	case LeaseForget:
		return w.forgetLease(c), nil
	}
	return Result{}, fmt.Errorf("%w: lease command of kind %d", ErrUnknownCommand, c.Kind)
}

func (w *writer) registerLease(c LeaseCommand) Result {
	s := w.store
	l := s.leases.home(c.ID)
	if l == nil || l.ending {
		return Result{Err: ErrLeaseNotFound}
	}
	if i, known := slices.BinarySearch(l.groups, c.Group); !known && c.Group != s.config.Group {
		s.mu.Lock()
		l.groups = slices.Insert(slices.Clone(l.groups), i, c.Group)
		s.recordLease(l)
		s.mu.Unlock()
	}
	return w.aboutLease(l)
}

// aboutLease is the answer to LeaseRegister and LeaseEnd.
func (w *writer) aboutLease(l *lease) Result {
	return Result{Response: &pb.LeaseTimeToLiveResponse{Header: &pb.ResponseHeader{Revision: w.next}, ID: l.id, GrantedTTL: l.ttl, TTL: l.incarnation}}
}

// attachLease makes a guest entry, unless the lease has ended or may have. The revision of a LeaseDrop was reserved
// after the lease began to end, so after that of every registration that went before. An attachment that comes after
// the LeaseDrop is therefore refused by what is remembered of it, or else was registered below what is forgotten.
func (w *writer) attachLease(c LeaseCommand) Result {
	s := w.store
	t := &s.leases
	l := t.get(c.ID)
	switch {
	case c.ID == 0, l != nil && l.home && (l.ending || l.incarnation != c.Incarnation), l != nil && l.incarnation > c.Incarnation:
		return Result{Err: ErrLeaseNotFound}
	case l != nil && l.incarnation == c.Incarnation:
	case s.config.faults.lateAttachments:
	case t.drops.has(c.ID, c.Incarnation):
		return Result{Err: ErrLeaseNotFound}
	case c.Revision < t.drops.forgotten:
		return Result{Err: ErrLeaseStale}
	}
	if l == nil || l.incarnation != c.Incarnation {
		if l == nil {
			l = &lease{}
		}
		s.mu.Lock()
		l.leaseRecord = leaseRecord{id: c.ID, incarnation: c.Incarnation}
		t.table.Set(l.id, l)
		s.recordLease(l)
		s.mu.Unlock()
	}
	return Result{Response: &pb.LeaseRevokeResponse{Header: w.header()}}
}

func (w *writer) endLease(c LeaseCommand) Result {
	s := w.store
	l := s.leases.home(c.ID)
	switch {
	case l == nil || c.Incarnation != 0 && c.Incarnation != l.incarnation:
		return Result{Err: ErrLeaseNotFound}
	case w.isLate(c.Term):
		return Result{Err: ErrLeaseStale}
	}
	if !l.ending {
		s.mu.Lock()
		l.ending = true
		s.recordLease(l)
		s.mu.Unlock()
	}
	return w.aboutLease(l)
}

func (w *writer) dropLease(c LeaseCommand) Result {
	l := w.store.leases.get(c.ID)
	if l != nil && l.home { // its keys here go with it
		return Result{Response: &pb.LeaseRevokeResponse{Header: w.header()}}
	}
	w.remember(c.ID, c.Incarnation)
	if l == nil || l.incarnation > c.Incarnation {
		return Result{Response: &pb.LeaseRevokeResponse{Header: w.header()}}
	}
	return w.drop(l)
}

func (w *writer) forgetLease(c LeaseCommand) Result {
	l := w.store.leases.home(c.ID)
	switch {
	case l == nil || l.incarnation != c.Incarnation:
		return Result{Err: ErrLeaseNotFound}
	case !l.ending:
		return Result{Err: ErrLeaseStale}
	}
	w.remember(c.ID, c.Incarnation) // so that this group is no guest's either
	return w.drop(l)
}

// remember makes later attachments of this incarnation fail.
func (w *writer) remember(id, incarnation int64) {
	s := w.store
	if s.leases.drops.has(id, incarnation) {
		return
	}
	d := drop{id, incarnation, w.next}
	s.mu.Lock()
	s.leases.drops.add(d, s.config.maxDrops)
	s.addPending(dropBytes)
	s.mu.Unlock()
	_, _ = s.hasher.Write(d.append(nil))
}

// drop deletes the keys of an entry, and then the entry together with them.
func (w *writer) drop(l *lease) Result {
	hits := make([]hit, 0, l.keys.Len())
	l.keys.Scan(func(key string) bool {
		hits = append(hits, hit{key: key})
		return true
	})
	if f := w.store.config.faults.keyForgotten; f != nil && len(hits) > 0 && f() {
		hits = hits[1:]
	}
	w.deleteAll(hits)
	w.removed = l
	w.publish()
	return Result{Response: &pb.LeaseRevokeResponse{Header: w.header()}}
}
