package main

import (
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// rawCodec hands answers over as bytes: what the client takes to read them, servers on the same machine lack.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(message any) (mem.BufferSlice, error) {
	data, err := proto.Marshal(message.(proto.Message))
	return mem.BufferSlice{mem.SliceBuffer(data)}, err
}

func (rawCodec) Unmarshal(data mem.BufferSlice, message any) error {
	to := message.(*[]byte)
	*to = append((*to)[:0], make([]byte, data.Len())...)
	data.CopyTo(*to)
	return nil
}

// Fields of pb.WatchResponse, mvccpb.Event and mvccpb.KeyValue that are read here.
const (
	responseWatch, responseCreated, responseCanceled, responseReason, responseEvent = 2, 3, 4, 6, 11

	eventKind, eventKV           = 1, 2
	kvKey, kvVersion, kvNewValue = 1, 4, 5
)

// notice is a pb.WatchResponse; its bytes live as long as the message's.
type notice struct {
	watch             int64
	created, canceled bool
	reason            []byte
	events            []event
}

type event struct {
	kind       mvccpb.Event_EventType
	key, value []byte
	version    int64
}

var errWire = errors.New("not a " + string((*pb.WatchResponse)(nil).ProtoReflect().Descriptor().FullName()))

// read takes a message apart, into the memory of the one before.
func (n *notice) read(m []byte) error {
	*n = notice{events: n.events[:0]}
	return fields(m, func(field protowire.Number, v uint64, b []byte) error {
		switch field {
		case responseWatch:
			n.watch = int64(v)
		case responseCreated:
			n.created = v != 0
		case responseCanceled:
			n.canceled = v != 0
		case responseReason:
			n.reason = b
		case responseEvent:
			n.events = append(n.events, event{})
			return n.events[len(n.events)-1].read(b)
		}
		return nil
	})
}

func (e *event) read(m []byte) error {
	return fields(m, func(field protowire.Number, v uint64, b []byte) error {
		switch field {
		case eventKind:
			e.kind = mvccpb.Event_EventType(v)
		case eventKV:
			return fields(b, e.readKV)
		}
		return nil
	})
}

func (e *event) readKV(field protowire.Number, v uint64, b []byte) error {
	switch field {
	case kvKey:
		e.key = b
	case kvVersion:
		e.version = int64(v)
	case kvNewValue:
		e.value = b
	}
	return nil
}

// fields calls f for every field of a message; v is the value of a varint, b that of a field of bytes.
func fields(m []byte, f func(field protowire.Number, v uint64, b []byte) error) error {
	for len(m) > 0 {
		field, kind, n := protowire.ConsumeTag(m)
		if n < 0 {
			return errWire
		}
		m = m[n:]
		var v uint64
		var b []byte
		switch kind {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(m)
		case protowire.BytesType:
			b, n = protowire.ConsumeBytes(m)
		default:
			n = protowire.ConsumeFieldValue(field, kind, m)
		}
		if n < 0 {
			return errWire
		}
		m = m[n:]
		if err := f(field, v, b); err != nil {
			return err
		}
	}
	return nil
}
