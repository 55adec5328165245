package fsm

import (
	"encoding/binary"
	"fmt"
)

// LeaseCommands is the Space of a Request whose Data is a LeaseCommand: kvd's own steps with leases whose keys are in
// more than one group. They concern the key space User. It is no key space and cannot be read.
const LeaseCommands Space = 2

// LeaseKind says what a LeaseCommand does. The numbers are in the log: never renumber them.
type LeaseKind uint8

// The kinds of lease commands. A lease has one home, the group that grants it and knows all about it, and may have
// guest entries in other groups, which have keys of it. Each kind is for one of the two.
const (
	// LeaseRegister notes at home that Group may have keys of the lease from now on. ErrLeaseNotFound if the lease is
	// not known or ending. The response, a LeaseTimeToLiveResponse, has the command's own revision in its header and
	// the incarnation as TTL: both are for LeaseAttach.
	LeaseRegister LeaseKind = 1
	// LeaseAttach makes a guest entry, for an Incarnation of the lease that was registered at Revision.
	// ErrLeaseNotFound if that incarnation has been dropped here; ErrLeaseStale if that is not known any more, because
	// the registration is too old: register again.
	LeaseAttach LeaseKind = 2
	// LeaseEnd begins the end of a lease at home: from now on nothing is registered and no put may name it. If Term is
	// not 0 and not the term of the log entry, whoever decided it leads no more: ErrLeaseStale. ErrLeaseNotFound if the
	// lease is not known, or not in this Incarnation, unless that is 0. The response is that of LeaseRegister.
	LeaseEnd LeaseKind = 3
	// LeaseDrop deletes in one revision the guest's keys of this Incarnation and earlier ones, and the guest entry, and
	// remembers it. It must be proposed after LeaseEnd has been applied at home.
	LeaseDrop LeaseKind = 4
	// LeaseForget deletes the keys in the home group and the lease. ErrLeaseStale if the lease is not ending,
	// ErrLeaseNotFound if this Incarnation of it is not known.
	LeaseForget LeaseKind = 5
)

// LeaseCommand is one of kvd's own steps with a lease. Which fields count depends on the kind. The responses of all
// but LeaseRegister and LeaseEnd are LeaseRevokeResponses.
type LeaseCommand struct {
	Kind        LeaseKind
	ID          int64
	Incarnation int64  // all but LeaseRegister: tells a lease from earlier ones with its id
	Revision    int64  // LeaseAttach: of the registration
	Group       uint64 // LeaseRegister
	Term        uint64 // LeaseEnd
}

// Request is the command as the log has it: kind (1 byte), id (8), and the fields that count for the kind, in the
// order of LeaseCommand (8 each), little endian.
func (c LeaseCommand) Request() Request {
	b := append(make([]byte, 0, 25), byte(c.Kind))
	b = binary.LittleEndian.AppendUint64(b, uint64(c.ID))
	for _, field := range c.fields() {
		switch f := field.(type) {
		case *int64:
			b = binary.LittleEndian.AppendUint64(b, uint64(*f))
		case *uint64:
			b = binary.LittleEndian.AppendUint64(b, *f)
		}
	}
	return Request{Space: LeaseCommands, Data: b}
}

// fields are those that count.
func (c *LeaseCommand) fields() []any {
	switch c.Kind {
	case LeaseRegister:
		return []any{&c.Group}
	case LeaseAttach:
		return []any{&c.Incarnation, &c.Revision}
	case LeaseEnd:
		return []any{&c.Incarnation, &c.Term}
	case LeaseDrop, LeaseForget:
		return []any{&c.Incarnation}
	}
	return nil
}

// ParseLeaseCommand is the inverse of Request for its Data. Errors: ErrUnknownCommand, ErrMalformedEntry.
func ParseLeaseCommand(data []byte) (LeaseCommand, error) {
	if len(data) < 9 {
		return LeaseCommand{}, fmt.Errorf("%w: lease command of %d bytes", ErrMalformedEntry, len(data))
	}
	c := LeaseCommand{Kind: LeaseKind(data[0]), ID: int64(binary.LittleEndian.Uint64(data[1:]))}
	fields := c.fields()
	if fields == nil {
		return LeaseCommand{}, fmt.Errorf("%w: lease command of kind %d", ErrUnknownCommand, c.Kind)
	}
	if len(data) != 9+8*len(fields) {
		return LeaseCommand{}, fmt.Errorf("%w: lease command of kind %d in %d bytes", ErrMalformedEntry, c.Kind, len(data))
	}
	for i, field := range fields {
		v := binary.LittleEndian.Uint64(data[9+8*i:])
		switch f := field.(type) {
		case *int64:
			*f = int64(v)
		case *uint64:
			*f = v
		}
	}
	return c, nil
}
