package server

import (
	"context"
	"encoding/binary"
	"math"

	"kvd/fsm"
	"kvd/shard"
)

// leasesPerPage are looked at for one answer.
const leasesPerPage = 1000

// homeLeases are some of the leases that a group has granted; if more is true,
// others follow from next on.
type homeLeases struct {
	leases []fsm.LeaseInfo
	next   int64
	more   bool
}

// addLeases adds a group's leases to a backup, as they are when the group has
// applied what the cut needs, or later: every lease that a key names at the cut
// is among those of its home, unless it has ended since then.
func (s *maintenance) addLeases(ctx context.Context, b *fsm.Builder, g gate) error {
	for from, more := int64(math.MinInt64), true; more; {
		page, err := s.leasesOf(ctx, g, from)
		if err != nil {
			return err
		}
		if err := b.AddLeases(page.leases); err != nil {
			return err
		}
		from, more = page.next, page.more
	}
	return nil
}

func (s *maintenance) leasesOf(ctx context.Context, g gate, from int64) (page homeLeases, err error) {
	r := s.router
	here := func(ctx context.Context, replica Replica) error {
		page, err = leasesHere(ctx, replica, g.index, from)
		return err
	}
	there := func(ctx context.Context, node string) error {
		page, err = r.leasesThere(ctx, node, g, from)
		return err
	}
	attempt, cancel := context.WithTimeout(ctx, rowsTimeout)
	defer cancel()
	return page, r.onState(attempt, g.group, g.node, here, there)
}

func leasesHere(ctx context.Context, replica Replica, index uint64, from int64) (page homeLeases, err error) {
	state, unpin, err := pinFor(ctx, replica, index)
	if err != nil {
		return page, err
	}
	defer unpin()
	page.leases, page.next, page.more = state.HomeLeases(from, leasesPerPage)
	return page, nil
}

// The request for leases and its answer, beside what forward.go says:
//
//	leases: version 1, group 8, timeout 4 (ms), index 8, from 8
//	answer: version 1, code 1 | more 1, next 8 | fsm.AppendLeases
const (
	leasesHeader = 29
	leasesAnswer = 9
)

func (r *router) leasesThere(ctx context.Context, node string, g gate, from int64) (page homeLeases, err error) {
	payload := []byte{protocolVersion}
	payload = binary.BigEndian.AppendUint64(payload, g.group)
	payload = binary.BigEndian.AppendUint32(payload, timeoutMillis(ctx))
	payload = binary.BigEndian.AppendUint64(payload, g.index)
	payload = binary.BigEndian.AppendUint64(payload, uint64(from))
	c, body, err := r.call(ctx, node, methodLeases, payload)
	switch {
	case err != nil:
		return page, err
	case c == codeRefused:
		return page, decodeRefusal(body)
	case c != codeOK:
		return page, c.err()
	case len(body) < leasesAnswer || body[0] > 1:
		return page, errBadAnswer
	}
	page.more, page.next = body[0] == 1, int64(binary.BigEndian.Uint64(body[1:]))
	if page.more && page.next <= from { // it would never end
		return page, errBadAnswer
	}
	page.leases, err = fsm.ParseLeases(body[leasesAnswer:])
	return page, err
}

func (r *router) handleLeases(ctx context.Context, _ string, payload []byte) ([]byte, error) {
	if len(payload) != leasesHeader || payload[0] != protocolVersion {
		return answer(codeMalformed), nil
	}
	group := binary.BigEndian.Uint64(payload[1:])
	index, from := binary.BigEndian.Uint64(payload[13:]), int64(binary.BigEndian.Uint64(payload[21:]))
	replica := r.ofKeys(group)
	if replica == nil {
		return r.decline(group, nil, shard.ErrNotLeader), nil
	}
	ctx, cancel := withMost(ctx, binary.BigEndian.Uint32(payload[9:]))
	defer cancel()
	page, err := leasesHere(ctx, replica, index, from)
	if err != nil {
		return r.declineRead(group, replica, err), nil
	}
	reply := append(answer(codeOK), 0)
	if page.more {
		reply[len(reply)-1] = 1
	}
	return fsm.AppendLeases(binary.BigEndian.AppendUint64(reply, uint64(page.next)), page.leases), nil
}
