package server

import (
	"context"
	"errors"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"kvd/fsm"
)

// rangeSharded answers a range from a sharded key space.
func (s *kv) rangeSharded(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	group, one, err := s.router.groupOfRange(r.Key, r.RangeEnd)
	if err != nil {
		return nil, err
	}
	for {
		var resp *pb.RangeResponse
		if one {
			resp, err = s.rangeOne(ctx, group, r)
		} else {
			resp, err = s.rangeAcross(ctx, r)
		}
		if err == nil {
			return resp, nil
		}
		// A read of the newest revision cannot be too late: it has only been
		// overtaken by a compaction, and is read at the next one.
		if !errors.Is(err, fsm.ErrCompacted) || r.Revision > 0 || ctx.Err() != nil {
			return nil, refusal(err)
		}
		s.router.metrics.retries.Inc()
	}
}

// rangeOne reads a range of one group.
func (s *kv) rangeOne(ctx context.Context, group uint64, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if r.Revision > 0 {
		return s.rangeOneAt(ctx, group, r)
	}
	if state, release, err := s.router.pinHere(ctx, group, r.Serializable); err == nil {
		defer release()
		ctx, answered := s.router.answers.metered(ctx)
		defer answered()
		return state.Range(ctx, fsm.User, r)
	}
	return s.merged(ctx, r, []*source{s.router.newSource(group, r, !r.Serializable)})
}

// rangeOneAt reads at a client's revision. A state that has gone beyond it has
// all of it; else the leader must see to it that nothing more can come.
func (s *kv) rangeOneAt(ctx context.Context, group uint64, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if r.Serializable {
		if state, release, err := s.router.pinHere(ctx, group, true); err == nil {
			defer release()
			if state.Revision(fsm.User) >= r.Revision {
				ctx, answered := s.router.answers.metered(ctx)
				defer answered()
				return state.Range(ctx, fsm.User, r)
			}
		}
	}
	sources, _, err := s.router.sourceAt(ctx, group, r)
	if err != nil {
		return nil, err
	}
	return s.merged(ctx, r, sources)
}

// rangeAcross reads a range of all groups, at one revision.
func (s *kv) rangeAcross(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	sources, newest, err := s.router.sourcesAcross(ctx, r)
	if err != nil {
		return nil, err
	}
	resp, err := s.merged(ctx, r, sources)
	if err == nil && newest > 0 && !s.router.cfg.faults.shardHeader {
		resp.Header.Revision = newest // some group may be ahead of it
	}
	return resp, err
}

// merged answers a range from all sources that have keys of it.
func (s *kv) merged(ctx context.Context, r *pb.RangeRequest, sources []*source) (*pb.RangeResponse, error) {
	meter := &sharedMeter{meter: s.router.answers.meter()}
	defer meter.meter.release()
	return rangeOf(ctx, r, sources, meter)
}

// newSource reads a range of one group: what its leader has, or what any state
// has.
func (r *router) newSource(group uint64, request *pb.RangeRequest, lead bool) *source {
	return &source{router: r, ask: pageRequest{group: group, lead: lead, r: sameKeys(request)}}
}

// sameKeys copies a request for one of many groups, but for its keys, which may
// be large.
func sameKeys(r *pb.RangeRequest) *pb.RangeRequest {
	return &pb.RangeRequest{
		Key: r.Key, RangeEnd: r.RangeEnd, Limit: r.Limit, Revision: r.Revision,
		SortOrder: r.SortOrder, SortTarget: r.SortTarget,
		Serializable: r.Serializable, KeysOnly: r.KeysOnly, CountOnly: r.CountOnly,
		MinModRevision: r.MinModRevision, MaxModRevision: r.MaxModRevision,
		MinCreateRevision: r.MinCreateRevision, MaxCreateRevision: r.MaxCreateRevision,
	}
}

// sourcesAcross are all groups, at the newest revision or at the request's.
// newest is 0 if the request does not want to know: each group then answers
// what it has.
func (r *router) sourcesAcross(ctx context.Context, request *pb.RangeRequest) (sources []*source, newest int64, err error) {
	if request.Serializable && request.Revision <= 0 {
		for _, group := range r.cfg.Groups.All() {
			sources = append(sources, r.newSource(group, request, false))
		}
		return sources, 0, nil
	}
	c, err := r.cuts.take(ctx)
	if err != nil {
		return nil, 0, err
	}
	sources, err = r.sourcesIn(c, request)
	return sources, c.revision, err
}

// sourcesIn are the groups that may have keys of a range, complete at a cut.
func (r *router) sourcesIn(c *cut, request *pb.RangeRequest) (sources []*source, err error) {
	group, one, err := r.groupOfRange(request.Key, request.RangeEnd)
	switch {
	case err != nil:
		return nil, err
	case request.Revision > c.revision:
		return nil, fsm.ErrFutureRevision
	}
	for _, g := range c.gates {
		if one && g.group != group {
			continue
		}
		s := r.newSource(g.group, request, false)
		s.ask.index, s.ask.current, s.node = g.index, c.revision, g.node
		if request.Revision <= 0 && !r.cfg.faults.readNewest {
			s.ask.r.Revision = c.revision
		}
		sources = append(sources, s)
	}
	if len(sources) == 0 {
		return nil, notJoined()
	}
	return sources, nil
}

// latest is the newest revision of a sharded key space.
func (r *router) latest(ctx context.Context) (int64, error) {
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	newest, err := r.cfg.Revisions.Latest(ctx)
	if err != nil {
		return 0, r.readStatus(ctx, err)
	}
	return newest, nil
}

// streamSharded is RangeStream over a sharded key space.
func (s *kv) streamSharded(r *pb.RangeRequest, stream grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
	ctx := stream.Context()
	if r.CountOnly {
		resp, err := s.rangeSharded(ctx, r)
		if err != nil {
			return err
		}
		s.router.fill(resp.Header)
		return stream.Send(&pb.RangeStreamResponse{RangeResponse: resp})
	}
	r = sameKeys(r)
	r.SortTarget = pb.RangeRequest_KEY // as in RangeStream
	meter := &sharedMeter{meter: s.router.answers.meter()}
	defer meter.meter.release()
	for {
		out := &streamed{kv: s, r: r, stream: stream, meter: meter}
		err := out.run(ctx)
		if !errors.Is(err, fsm.ErrCompacted) || r.Revision > 0 || out.sent > 0 || ctx.Err() != nil {
			if err != nil {
				return refusal(err)
			}
			return nil
		}
	}
}

// streamed is one try to stream a range.
type streamed struct {
	kv     *kv
	r      *pb.RangeRequest
	stream grpc.ServerStreamingServer[pb.RangeStreamResponse]
	meter  *sharedMeter
	sent   int64 // keys
}

func (o *streamed) run(ctx context.Context) error {
	sources, newest, err := o.kv.router.sourcesOf(ctx, o.r)
	if err != nil {
		return err
	}
	limit := o.r.Limit
	if limit <= 0 {
		limit = math.MaxInt64
	}
	for _, s := range sources {
		s.ask.count = o.r.Limit > 0
	}
	m := newMerge(sources, o.meter, o.r.Limit)
	for keys := min(firstChunkKeys, limit); ; {
		kvs, err := m.take(ctx, keys)
		if err != nil {
			return err
		}
		more, err := m.more(ctx)
		if err != nil {
			return err
		}
		o.sent += int64(len(kvs))
		out := &pb.RangeResponse{Kvs: kvs}
		last := !more || o.sent == limit
		if last {
			out.Header, out.More, out.Count = &pb.ResponseHeader{Revision: newest}, more, o.sent
			for _, s := range sources {
				if newest == 0 {
					out.Header.Revision = max(out.Header.Revision, s.revision)
				}
			}
			if more {
				out.Count = countOf(sources)
			}
			o.kv.router.fill(out.Header)
		}
		size := proto.Size(out)
		if err := o.stream.Send(&pb.RangeStreamResponse{RangeResponse: out}); err != nil || last {
			return err
		}
		o.meter.give(sizeOf(kvs))
		keys = min(nextChunkKeys(keys, size, o.kv.router.cfg.MaxRequestBytes), limit-o.sent)
	}
}

// sourcesOf are what a range is read from, and the newest revision; 0 if that
// is what the answers say.
func (r *router) sourcesOf(ctx context.Context, request *pb.RangeRequest) ([]*source, int64, error) {
	group, one, err := r.groupOfRange(request.Key, request.RangeEnd)
	switch {
	case err != nil:
		return nil, 0, err
	case !one:
		return r.sourcesAcross(ctx, request)
	case request.Revision > 0:
		return r.sourceAt(ctx, group, request)
	}
	return []*source{r.newSource(group, request, !request.Serializable)}, 0, nil
}

// sourceAt reads one group at a client's revision.
func (r *router) sourceAt(ctx context.Context, group uint64, request *pb.RangeRequest) ([]*source, int64, error) {
	newest, err := r.latest(ctx)
	switch {
	case err != nil:
		return nil, 0, err
	case request.Revision > newest:
		return nil, 0, fsm.ErrFutureRevision
	}
	one := r.newSource(group, request, true)
	one.ask.current = newest
	return []*source{one}, newest, nil
}
