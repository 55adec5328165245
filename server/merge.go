package server

import (
	"bytes"
	"container/heap"
	"context"
	"errors"
	"math"
	"slices"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"kvd/fsm"
)

// merge reads one range from several groups, whose keys are disjoint, in the
// order of keys.
type merge struct {
	sources []*source
	meter   *sharedMeter
	target  int // size of a page in bytes; all of them are in memory at once
	keys    int64
	heads   heads // sources with something in their buffers
}

const (
	maxFetches   = 16  // pages of one request asked for at a time
	maxMerges    = 256 // requests that do so; more wait
	minTarget    = 32 << 10
	maxTarget    = 1 << 20
	marginOfPage = 4
)

// newMerge expects that limit keys will be taken; 0 or less is all.
func newMerge(sources []*source, meter *sharedMeter, limit int64) *merge {
	sizes := sources[0].router.sizes
	m := &merge{sources: sources, meter: meter, keys: sizes.firstKeys}
	m.target = max(min(sizes.mergeBytes/len(sources), maxTarget), minTarget)
	if limit > 0 {
		// Keys are spread by a hash: most groups have about the same share.
		share := limit/int64(len(sources)) + 1
		m.keys = min(limit, share+2*int64(math.Sqrt(float64(share)))+marginOfPage, maxPageKeys)
	}
	return m
}

// take returns the next keys in order, at most n of them, fewer only at the
// end.
func (m *merge) take(ctx context.Context, n int64) ([]*mvccpb.KeyValue, error) {
	var out []*mvccpb.KeyValue
	for int64(len(out)) < n {
		if err := m.fill(ctx); err != nil {
			return nil, err
		}
		if len(m.heads) == 0 {
			break
		}
		for int64(len(out)) < n && len(m.heads) > 0 {
			first := m.heads[0]
			out = append(out, first.buffer[0])
			first.buffer[0] = nil
			first.buffer = first.buffer[1:]
			if len(first.buffer) > 0 {
				heap.Fix(&m.heads, 0)
				continue
			}
			heap.Pop(&m.heads)
			if !first.done {
				break // its next key is not known
			}
		}
	}
	return out, nil
}

// more reports whether there are keys left.
func (m *merge) more(ctx context.Context) (bool, error) {
	if err := m.fill(ctx); err != nil {
		return false, err
	}
	return len(m.heads) > 0, nil
}

// fill sees to it that every source has a key to show, or has ended. Sources
// that are about to run out are asked too, as they share the wait.
func (m *merge) fill(ctx context.Context) error {
	low := int64(0)
	for _, s := range m.sources {
		if !s.done && len(s.buffer) == 0 {
			low = m.keys / 2
		}
	}
	var empty []*source
	for _, s := range m.sources {
		if !s.done && (len(s.buffer) == 0 || int64(len(s.buffer)) < low) {
			empty = append(empty, s)
		}
	}
	if len(empty) == 0 {
		return nil
	}
	for _, s := range empty {
		s.ask.r.Limit = m.keys
	}
	before := sizeOfBuffers(empty)
	// A page may be empty but for what the filters keep out.
	for pending := slices.Clone(empty); len(pending) > 0; pending = slices.DeleteFunc(pending, func(s *source) bool { return s.done || len(s.buffer) > 0 }) {
		if err := fetchAll(ctx, pending, m.meter); err != nil {
			return err
		}
	}
	m.steer((sizeOfBuffers(empty) - before) / len(empty))
	m.heads = m.heads[:0]
	for _, s := range m.sources {
		if len(s.buffer) > 0 {
			m.heads = append(m.heads, s)
		}
	}
	heap.Init(&m.heads)
	return nil
}

// steer makes the next pages larger or smaller by the average size of these.
func (m *merge) steer(sizeBytes int) {
	m.keys = min(nextChunkKeys(m.keys, sizeBytes, m.target), maxPageKeys)
}

func sizeOfBuffers(sources []*source) int {
	n := 0
	for _, s := range sources {
		n += sizeOf(s.buffer)
	}
	return n
}

// fetchAll fetches a page of each, a few at a time, and returns the first
// error.
func fetchAll(ctx context.Context, sources []*source, meter *sharedMeter) error {
	if len(sources) > 1 {
		slots := sources[0].router.fetches
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return inParallel(ctx, maxFetches, sources, func(ctx context.Context, s *source) error { return s.fetch(ctx, meter) })
}

// inParallel runs f for all, at most n at a time, until one fails. It returns
// the first error when none runs any more.
func inParallel[T any](ctx context.Context, n int, all []T, f func(context.Context, T) error) error {
	if len(all) == 1 {
		return f(ctx, all[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		tasks sync.WaitGroup
		once  sync.Once
		first error
		next  = make(chan T)
	)
	for range min(n, len(all)) {
		tasks.Go(func() {
			for one := range next {
				if err := f(ctx, one); err != nil {
					once.Do(func() { first = err; cancel() })
				}
			}
		})
	}
feed:
	for _, one := range all {
		select {
		case next <- one:
		case <-ctx.Done():
			break feed
		}
	}
	close(next)
	tasks.Wait()
	if first == nil {
		return context.Cause(ctx)
	}
	return first
}

// heads is a heap of sources by their first keys.
type heads []*source

func (h heads) Len() int           { return len(h) }
func (h heads) Less(i, j int) bool { return bytes.Compare(h[i].buffer[0].Key, h[j].buffer[0].Key) < 0 }
func (h heads) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *heads) Push(x any)        { *h = append(*h, x.(*source)) }
func (h *heads) Pop() any {
	last := len(*h) - 1
	s := (*h)[last]
	*h = (*h)[:last]
	return s
}

// rangeOf answers a range from sources that together have all of its keys. The
// answer is what one state with all of them would give. Only if several sources
// have keys, the order, and the choice by a limit, of those that sort alike may
// be another.
func rangeOf(ctx context.Context, r *pb.RangeRequest, sources []*source, meter *sharedMeter) (*pb.RangeResponse, error) {
	if sources[0].router.cfg.faults.limitPerShard {
		r = sameKeys(r)
		r.Limit *= int64(len(sources))
	}
	fetch := fsm.FetchLimit(r)
	var kvs []*mvccpb.KeyValue
	var sorted bool
	var err error
	switch {
	case r.CountOnly:
		err = wholes(ctx, r, sources, meter)
	case fetch > 0 && fetch < math.MaxInt64:
		kvs, err = inOrder(ctx, sources, meter, fetch)
	case r.Limit > 0 && fetch <= 0 && r.Limit < maxPageKeys:
		kvs, sorted, err = best(ctx, r, sources, meter)
	default:
		kvs, err = inOrder(ctx, sources, meter, 0)
	}
	if err != nil {
		return nil, err
	}
	if !sorted {
		fsm.Order(kvs, r)
	}
	resp := &pb.RangeResponse{Header: &pb.ResponseHeader{}}
	resp.Count = countOf(sources)
	for _, s := range sources {
		resp.Header.Revision = max(resp.Header.Revision, s.revision)
	}
	if r.Limit > 0 && int64(len(kvs)) > r.Limit {
		kvs, resp.More = kvs[:r.Limit], true
	}
	if r.KeysOnly {
		for _, kv := range kvs {
			kv.Value = nil
		}
	}
	resp.Kvs = kvs
	return resp, nil
}

func countOf(sources []*source) int64 {
	n := int64(0)
	for _, s := range sources {
		n += s.count
	}
	return n
}

// inOrder takes the first keys; 0 or less is all.
func inOrder(ctx context.Context, sources []*source, meter *sharedMeter, limit int64) ([]*mvccpb.KeyValue, error) {
	for _, s := range sources {
		s.ask.count = true
	}
	m := newMerge(sources, meter, limit)
	if limit <= 0 {
		limit = math.MaxInt64
	}
	return m.take(ctx, limit)
}

// best takes what every group has to offer for a limited answer that is not in
// the order of keys, or filtered: in the order of keys, or sorted already if
// only one has something. Where that is too much for one message, all of the
// range is read.
func best(ctx context.Context, r *pb.RangeRequest, sources []*source, meter *sharedMeter) (kvs []*mvccpb.KeyValue, sorted bool, err error) {
	whole := make([]*source, len(sources))
	for i, s := range sources {
		copied := *s
		whole[i] = &copied
	}
	err = wholes(ctx, r, whole, meter)
	if errors.Is(err, errPageFull) {
		meter.give(sizeOfBuffers(whole))
		kvs, err = inOrder(ctx, sources, meter, 0)
		return kvs, false, err
	}
	if err != nil {
		return nil, false, err
	}
	offers := 0
	for i, s := range whole {
		if len(s.buffer) > 0 {
			offers++
		}
		kvs = append(kvs, s.buffer...)
		sources[i].count, sources[i].revision = s.count, s.revision
	}
	if offers == 1 {
		return kvs, true, nil
	}
	slices.SortFunc(kvs, func(a, b *mvccpb.KeyValue) int { return bytes.Compare(a.Key, b.Key) })
	return kvs, false, nil
}

// wholes has every group answer the request by itself, with one key more than
// the limit so that it is seen whether there are more.
func wholes(ctx context.Context, r *pb.RangeRequest, sources []*source, meter *sharedMeter) error {
	for _, s := range sources {
		whole := sameKeys(r)
		whole.Revision = s.ask.r.Revision
		whole.KeysOnly = r.KeysOnly && r.SortTarget != pb.RangeRequest_VALUE
		if whole.Limit > 0 && whole.Limit < math.MaxInt64 {
			whole.Limit++
		}
		s.ask.r, s.ask.whole, s.ask.count = whole, true, true
	}
	return fetchAll(ctx, sources, meter)
}
