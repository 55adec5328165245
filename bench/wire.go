package bench

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Methods of etcd's API, and the numbers of the fields that are used here (rpc.proto and kv.proto of etcd's api module).
const (
	methodPut   = "/etcdserverpb.KV/Put"
	methodRange = "/etcdserverpb.KV/Range"
	methodTxn   = "/etcdserverpb.KV/Txn"
	methodWatch = "/etcdserverpb.Watch/Watch"

	putKey, putValue = 1, 2

	rangeKey, rangeEnd, rangeLimit, rangeSerializable = 1, 2, 3, 7

	txnCompare, txnSuccess, txnFailure = 1, 2, 3
	compareTarget, compareKey          = 2, 3
	compareModRevision                 = 6
	targetMod                          = 2
	opRange, opPut                     = 1, 2

	headerRevision = 3
	answerHeader   = 1 // of every response
	answerKVs      = 2 // of a RangeResponse
	txnSucceeded   = 2
	txnResponses   = 3
	kvModRevision  = 3
	kvValue        = 5

	watchCreate, createKey, createEnd = 1, 1, 2
	watchCreated, watchCanceled       = 3, 4
	watchReason, watchEvent           = 6, 11
	eventKV                           = 2
)

var errWire = errors.New("bench: the answer is no message of etcd's API")

func appendBytes(b []byte, field protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), v)
}

func appendInt(b []byte, field protowire.Number, v int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(v))
}

func appendPut(b, key, value []byte) []byte {
	return appendBytes(appendBytes(b, putKey, key), putValue, value)
}

// appendRange reads one key if end is empty; limit 0: none.
func appendRange(b, key, end []byte, limit int, serializable bool) []byte {
	b = appendBytes(b, rangeKey, key)
	if len(end) > 0 {
		b = appendBytes(b, rangeEnd, end)
	}
	if limit > 0 {
		b = appendInt(b, rangeLimit, int64(limit))
	}
	if serializable {
		b = appendInt(b, rangeSerializable, 1)
	}
	return b
}

// appendCompareAndPut writes the key if it is still at revision, and else reads it.
func appendCompareAndPut(b, key, value []byte, revision int64) []byte {
	compare := protowire.SizeTag(compareTarget) + protowire.SizeVarint(targetMod) +
		protowire.SizeTag(compareKey) + protowire.SizeBytes(len(key)) +
		protowire.SizeTag(compareModRevision) + protowire.SizeVarint(uint64(revision))
	b = appendMessage(b, txnCompare, compare)
	b = appendInt(b, compareTarget, targetMod)
	b = appendBytes(b, compareKey, key)
	b = appendInt(b, compareModRevision, revision)

	put := protowire.SizeTag(putKey) + protowire.SizeBytes(len(key)) + protowire.SizeTag(putValue) + protowire.SizeBytes(len(value))
	b = appendMessage(b, txnSuccess, protowire.SizeTag(opPut)+protowire.SizeBytes(put))
	b = appendMessage(b, opPut, put)
	b = appendPut(b, key, value)

	get := protowire.SizeTag(rangeKey) + protowire.SizeBytes(len(key))
	b = appendMessage(b, txnFailure, protowire.SizeTag(opRange)+protowire.SizeBytes(get))
	b = appendMessage(b, opRange, get)
	return appendBytes(b, rangeKey, key)
}

// appendMessage begins a message of so many bytes, which the caller appends.
func appendMessage(b []byte, field protowire.Number, sizeBytes int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.BytesType), uint64(sizeBytes))
}

// call is a request and what matters of its answer. A client uses one for all its requests.
type call struct {
	request []byte
	pieces  mem.BufferSlice

	revision    int64 // of the header
	keys        int
	modRevision int64 // of the last key
	succeeded   bool  // of a transaction
	read        func(c *call, b []byte) error
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

func (c *call) header(b []byte) error {
	return fields(b, func(field protowire.Number, v uint64, _ []byte) error {
		if field == headerRevision {
			c.revision = int64(v)
		}
		return nil
	})
}

func readPut(c *call, m []byte) error {
	c.keys = 1
	return fields(m, func(field protowire.Number, _ uint64, b []byte) error {
		if field == answerHeader {
			return c.header(b)
		}
		return nil
	})
}

func readRange(c *call, m []byte) error {
	return fields(m, func(field protowire.Number, _ uint64, b []byte) error {
		switch field {
		case answerHeader:
			return c.header(b)
		case answerKVs:
			c.keys++
			return c.keyValue(b)
		}
		return nil
	})
}

func (c *call) keyValue(b []byte) error {
	return fields(b, func(field protowire.Number, v uint64, _ []byte) error {
		if field == kvModRevision {
			c.modRevision = int64(v)
		}
		return nil
	})
}

// readTxn reads the answer of a compare-and-put.
func readTxn(c *call, m []byte) error {
	err := fields(m, func(field protowire.Number, v uint64, b []byte) error {
		switch field {
		case answerHeader:
			return c.header(b)
		case txnSucceeded:
			c.succeeded = v != 0
		case txnResponses:
			return fields(b, func(field protowire.Number, _ uint64, b []byte) error {
				if field != opRange {
					return nil
				}
				return fields(b, func(field protowire.Number, _ uint64, b []byte) error {
					if field == answerKVs {
						return c.keyValue(b)
					}
					return nil
				})
			})
		}
		return nil
	})
	if c.keys = 1; c.succeeded {
		c.modRevision = c.revision
	}
	return err
}

// message is what gRPC sends and fills in.
type message interface {
	// encoded is what to send. It must not be touched before an answer has come, and not at all if none comes: so gRPC
	// needs no copy.
	encoded() mem.BufferSlice
	// decode reads what came. It keeps no part of b.
	decode(b []byte) error
}

func (c *call) encoded() mem.BufferSlice {
	c.pieces = append(c.pieces[:0], mem.SliceBuffer(c.request))
	return c.pieces
}

// forget leaves the buffers of a request without an answer to gRPC.
func (c *call) forget() { c.request, c.pieces = nil, nil }

func (c *call) decode(b []byte) error {
	c.revision, c.keys, c.modRevision, c.succeeded = 0, 0, 0, false
	return c.read(c, b)
}

// codec hands messages to gRPC and back.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(message)
	if !ok {
		return nil, fmt.Errorf("bench: %T is no message", v)
	}
	return m.encoded(), nil
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(message)
	if !ok {
		return fmt.Errorf("bench: %T is no message", v)
	}
	whole := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer whole.Free()
	return m.decode(whole.ReadOnlyData())
}
