package server

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	protobuf "google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// answers bounds the memory of all answers under way on this node: while they
// are read from the state, and from when they are encoded until the client has
// taken them. It refuses reads; what is read already is sent.
type answers struct {
	max   int64
	bytes atomic.Int64
}

// freeAnswerBytes of each answer do not count, so that many large ones do not
// keep the small ones from being read.
const freeAnswerBytes = 4 << 10

// metered makes the reads with ctx count until release is called.
func (a *answers) metered(ctx context.Context) (_ context.Context, release func()) {
	m := a.meter()
	return fsm.WithMeter(ctx, m), m.release
}

func (a *answers) meter() *answerMeter { return &answerMeter{answers: a, free: freeAnswerBytes} }

// answerMeter is one request's.
type answerMeter struct {
	answers *answers
	free    int
	taken   int64
}

func (m *answerMeter) Take(n int) error {
	free := min(n, m.free)
	m.free -= free
	more := int64(n - free)
	if more > 0 && m.answers.bytes.Add(more) > m.answers.max {
		m.answers.bytes.Add(-more)
		return errBusy
	}
	m.taken += more
	return nil
}

// release gives back all that was taken.
func (m *answerMeter) release() { m.answers.bytes.Add(-m.taken) }

// give back what is no longer kept. The free bytes are not given back, so that
// what is taken is never less than what is kept.
func (m *answerMeter) give(n int) {
	n = int(min(int64(n), m.taken))
	m.taken -= int64(n)
	m.answers.bytes.Add(-int64(n))
}

// codec is gRPC's own, except that large answers count until they are gone.
type codec struct {
	encoding.CodecV2
	answers *answers
}

func newCodec(a *answers) codec { return codec{encoding.GetCodecV2(proto.Name), a} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if answer, ok := v.(*pb.WatchResponse); ok {
		if size := sizeWatchResponse(answer); size <= freeAnswerBytes && watchResponseIsKnown(answer) {
			return mem.BufferSlice{mem.SliceBuffer(appendWatchResponse(make([]byte, 0, size), answer))}, nil
		}
	}
	if e, ok := v.(*encodedAnswer); ok {
		return e.buffers(), nil
	}
	message, ok := v.(protobuf.Message)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	size := protobuf.Size(message)
	if size <= freeAnswerBytes {
		return c.CodecV2.Marshal(v)
	}
	encoded, err := protobuf.MarshalOptions{UseCachedSize: true}.MarshalAppend(make([]byte, 0, size), message)
	if err != nil {
		return nil, err
	}
	l := &loan{answers: c.answers, bytes: int64(size)}
	c.answers.bytes.Add(l.bytes)
	buffer := &encoded
	runtime.AddCleanup(buffer, (*loan).end, l) // should gRPC ever drop one
	return mem.BufferSlice{mem.NewBuffer(buffer, l)}, nil
}

// loan is one encoded answer. It stands in for the pool that the buffer would
// be given back to.
type loan struct {
	answers *answers
	bytes   int64
	once    sync.Once
}

func (l *loan) end() { l.once.Do(func() { l.answers.bytes.Add(-l.bytes) }) }

func (l *loan) Put(*[]byte) { l.end() }

func (l *loan) Get(n int) *[]byte {
	b := make([]byte, n)
	return &b
}
