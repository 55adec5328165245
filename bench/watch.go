package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// Operations of a Watch workload.
const (
	putOperation = iota
	eventOperation
)

const (
	stampBytes         = 16 // a number of the run, and when the put began
	minWatchValueBytes = stampBytes
)

// watching is a Watch workload: puts whose values say when they began, and streams of watchers who see them.
type watching struct {
	basic
	stamp   []byte
	phase   *phase
	readers sync.WaitGroup

	created chan error // from each stream, once: all its watchers are there, or why not
	events  atomic.Int64
	last    atomic.Int64  // when the last event came
	arrived chan struct{} // signalled by events while somebody waits
}

// watchStream is one stream of watchers. All but the request belongs to its reader.
type watchStream struct {
	*watching
	shard    *shard
	stream   grpc.ClientStream
	watchers int
	request  mem.BufferSlice // the same for every watcher

	there  int   // watchers created
	now    int64 // when the message came
	reason string
}

func (r *run) watch(ctx context.Context) (*Result, error) {
	streamsCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &watching{
		basic: basic{r, new(atomic.Int64)}, arrived: make(chan struct{}, 1),
		stamp: binary.LittleEndian.AppendUint64(nil, rand.Uint64()),
	}
	p := r.phase("run", w, r.o.Total, r.o.Duration)
	p.rec.first, p.observe, p.drain, w.phase = eventOperation, r.o.Observe, func() { w.drain(ctx) }, p
	err := w.openStreams(ctx, streamsCtx)
	if err == nil {
		p.execute(ctx)
	}
	cancel()
	w.readers.Wait()
	if err != nil {
		return nil, err
	}
	result := p.result()
	result.Missing = max(0, w.expected(result.Operations[putOperation].Count)-w.events.Load())
	return result, ctx.Err()
}

// openStreams returns when all watchers are there.
func (w *watching) openStreams(ctx, streamsCtx context.Context) error {
	n, watchers := min(len(w.conns), w.o.Workload.Watchers), w.o.Workload.Watchers
	w.created = make(chan error, n)
	for i := range n {
		stream, err := w.conns[i].NewStream(streamsCtx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, methodWatch)
		if err != nil {
			return watchError(err)
		}
		s := &watchStream{
			watching: w, shard: w.phase.rec.shards[i%len(w.phase.rec.shards)], stream: stream,
			watchers: watchers/n + min(1, max(0, watchers%n-i)),
			request:  mem.BufferSlice{mem.SliceBuffer(appendWatch(nil, w.keys.append(nil, 0), w.keys.after(nil)))},
		}
		w.readers.Go(s.read)
		w.readers.Go(s.create)
	}
	timeout := time.NewTimer(w.o.Timeout)
	defer timeout.Stop()
	for range n {
		select {
		case err := <-w.created:
			if err != nil {
				return watchError(err)
			}
		case <-timeout.C:
			return fmt.Errorf("bench: %d watchers are not there after %v", watchers, w.o.Timeout)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func watchError(err error) error {
	if status.Code(err) == codes.Unimplemented {
		return fmt.Errorf("%w: %w", ErrNoWatch, err)
	}
	return fmt.Errorf("bench: watch: %w", err)
}

// appendWatch asks for a watcher of a range.
func appendWatch(b, key, end []byte) []byte {
	b = appendMessage(b, watchCreate, protowire.SizeTag(createKey)+protowire.SizeBytes(len(key))+
		protowire.SizeTag(createEnd)+protowire.SizeBytes(len(end)))
	return appendBytes(appendBytes(b, createKey, key), createEnd, end)
}

// create asks for the stream's watchers. An error shows in read, too.
func (s *watchStream) create() {
	for range s.watchers {
		if s.stream.SendMsg(s) != nil {
			return
		}
	}
}

// read takes what comes until the stream ends.
func (s *watchStream) read() {
	for {
		before := s.there
		err := s.stream.RecvMsg(s)
		if err == nil && s.reason != "" {
			err = errors.New(s.reason)
		}
		if err != nil && s.there < s.watchers {
			s.created <- err
			return
		}
		if err != nil {
			s.lost(err)
			return
		}
		if before < s.watchers && s.there == s.watchers {
			s.created <- nil
		}
	}
}

// lost counts the watchers of a stream that has ended before the run.
func (s *watchStream) lost(err error) {
	if s.stream.Context().Err() != nil {
		return
	}
	for range s.watchers {
		s.shard.record(eventOperation, s.run.now()-s.phase.start, 0, outcome{err: err})
	}
}

func (s *watchStream) encoded() mem.BufferSlice { return s.request }

func (s *watchStream) decode(b []byte) error {
	s.now = s.run.now()
	return fields(b, func(field protowire.Number, v uint64, b []byte) error {
		switch {
		case field == watchCreated && v != 0:
			s.there++
		case field == watchCanceled && v != 0 && s.reason == "":
			s.reason = "the server ended a watcher"
		case field == watchReason && len(b) > 0:
			s.reason = string(b)
		case field == watchEvent:
			return fields(b, s.event)
		}
		return nil
	})
}

// event looks at a field of an event for the key's value, and at that for the stamp of this run.
func (s *watchStream) event(field protowire.Number, _ uint64, b []byte) error {
	if field != eventKV {
		return nil
	}
	return fields(b, func(field protowire.Number, _ uint64, b []byte) error {
		if field != kvValue || len(b) < stampBytes || !bytes.HasPrefix(b, s.stamp) {
			return nil
		}
		begun := int64(binary.LittleEndian.Uint64(b[len(s.stamp):]))
		s.shard.record(eventOperation, s.now-s.phase.start, s.now-begun, outcome{keys: 1})
		s.events.Add(1)
		s.last.Store(s.now)
		select {
		case s.arrived <- struct{}{}:
		default:
		}
		return nil
	})
}

func (*watching) operations() []string { return []string{"put", "event"} }

func (w *watching) do(c *client) (int, outcome) {
	n := c.keys.next(c.rng)
	c.value = append(c.value[:0], w.stamp...)
	c.value = binary.LittleEndian.AppendUint64(c.value, uint64(c.begun))
	c.value = append(c.value, w.values.pick(c.rng)[stampBytes:]...)
	c.key = w.keys.append(c.key[:0], n)
	c.call.request = appendPut(c.call.request[:0], c.key, c.value)
	return putOperation, outcome{err: c.invoke(methodPut, readPut), keys: 1}
}

func (w *watching) expected(puts int64) int64 { return puts * int64(w.o.Workload.Watchers) }

// drain waits for the events of all puts.
func (w *watching) drain(ctx context.Context) {
	timeout := time.NewTimer(w.o.Timeout)
	defer timeout.Stop()
	for puts := w.phase.rec.count(putOperation); w.events.Load() < w.expected(puts); {
		select {
		case <-w.arrived:
		case <-timeout.C:
			return
		case <-ctx.Done():
			return
		}
	}
	w.phase.end = max(w.phase.end, w.last.Load())
}
